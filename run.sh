#!/bin/sh
# Starts kv.py beside this file. With exec, the process started is the server and gets the signals.
exec "${PYTHON:-python3}" "$(dirname -- "$(readlink -f -- "$0")")/kv.py" "$@"
