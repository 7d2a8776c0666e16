#!/usr/bin/env python3
"""A key-value server in one file: HTTP over threads, graceful shutdown, a snapshot on disk.

It needs Python 3.9 or later and nothing else, and listens on http://127.0.0.1:8080 unless told
otherwise (`kv.py --help`). Keys are made of [A-Za-z0-9:_.-], values are UTF-8 text of 1 byte to
10 MiB, and a value comes back byte for byte.

    PUT    /kv/{key}   store the body under key   200, 400, 413, 503
    GET    /kv/{key}   the value                  200, 400, 404   (HEAD: without the body)
    DELETE /kv/{key}   remove the key             200, 400, 503   (also if there was none)
    DELETE /clear      remove every key           200, 503
    GET    /health     "ok"                       200             (HEAD: without the body)

All pairs live in memory. SIGTERM, SIGINT or SIGHUP shuts the server down and writes them to a
snapshot in the working directory, from which the next start reads them back:

    0 s    The signal. Idle connections are closed, the listen queue is served to its end and
           closed, requests in flight go on.
    1 s    If a request is still in flight, what has been acknowledged so far is saved now, and
           again each second.
    12 s   The patience with stalled clients ends, earlier if a save takes long. From here on a
           write is answered 503, because the last snapshot is being written. If that fails, it
           is tried again.
    15 s   The latest exit, because then supervisors, such as the test harness of lsfr.io, send
           SIGKILL. Only a save that takes much longer than any before it can exceed this. Exit
           code 0 means saved.

Normally nobody stalls, and all of it takes a tenth of a second. A second signal ends the waiting,
within a second or when the save that is running ends: one more save, and no second try. A crash,
unlike a shutdown, loses what was written since the last snapshot: there is no write-ahead log here.

The file reads from the inside out, and each part uses those before it: snapshot, store, request
syntax, log, one connection, the server, the process. Only the connection also knows its server.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import mmap
import os
import pickle
import queue
import random
import re
import resource
import select
import signal
import socket
import socketserver
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast
from urllib.parse import unquote

__version__ = "1.0.0"


# ---- Snapshot: all pairs in a file ----
#
# The file is a pickle of the dict, followed by the SHA-256 digest of that pickle. A crash in the
# middle of a save must not leave half a file, so each save writes a new file and gives it the name
# of the old one when it is complete. And a load must not believe a file that something or somebody
# has altered: a pickle is a program for a small stack machine, which can call any function.

SNAPSHOT = "kv.pickle"
TEMPORARY = "kv.pickle.tmp"
DIGEST_SIZE = hashlib.sha256().digest_size


class SnapshotError(Exception):
    """The snapshot cannot be trusted; the text says why."""


class HashingWriter:
    """A file to write to that keeps the digest of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)


def create_temporary(directory: int) -> int:
    """Return a descriptor of a new, empty temporary file, readable by its owner alone."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(TEMPORARY, dir_fd=directory)  # left behind by a save that was killed
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    return os.open(TEMPORARY, flags, mode=0o600, dir_fd=directory)


def save_snapshot(directory: int, pairs: dict[str, str]) -> None:
    """Replace the snapshot in `directory` (an open descriptor), whole or not at all.

    Raises OSError (disk full, file too large, directory gone, ...). The old snapshot is then still
    in place, or, if only the last step failed, the whole new one.
    """
    try:
        with open(create_temporary(directory), "wb") as file:
            writer = HashingWriter(file)
            pickler = pickle.Pickler(writer, protocol=4)  # check_opcodes knows this one
            # That is, without a memo of objects seen, which would take a third of the store's size.
            pickler.fast = True
            pickler.dump(pairs)
            file.write(writer.sha256.digest())
            file.flush()
            # The content first: a file system may otherwise put the rename on the disk before it.
            os.fsync(file.fileno())
        os.replace(TEMPORARY, SNAPSHOT, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)  # the rename
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(TEMPORARY, dir_fd=directory)  # half a file would fill a full disk for good
        raise


def load_snapshot(directory: int) -> dict[str, str]:
    """Return the pairs of the snapshot in `directory`, none if there is no snapshot.

    Raises SnapshotError if it is not a dict of strings with its digest, OSError if it cannot be
    read, MemoryError if it does not fit into memory.
    """
    try:
        # The file itself, not what a link leads to: a save would replace the link.
        status = os.stat(SNAPSHOT, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return {}
    # Before it is opened: to open a named pipe is to wait for somebody who writes to it.
    if not stat.S_ISREG(status.st_mode):
        raise SnapshotError("not a regular file")
    if status.st_size <= DIGEST_SIZE:
        raise SnapshotError("too short")
    with open(SNAPSHOT, "rb", opener=functools.partial(os.open, dir_fd=directory)) as file:
        # Mapped, not read: the store need not fit into memory twice.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with data:
        with memoryview(data)[:-DIGEST_SIZE] as pickled:
            if hashlib.sha256(pickled).digest() != data[-DIGEST_SIZE:]:
                raise SnapshotError("truncated or altered: its checksum does not match")
            check_opcodes(pickled)
        try:
            pairs = StringsOnly(data).load()
        except MemoryError:
            raise  # that is no fault of the file
        except Exception as error:  # the pickle module does not promise which
            raise SnapshotError(f"not a valid pickle: {error}") from error
    if not isinstance(pairs, dict):
        raise SnapshotError("not a dict")
    return pairs


class StringsOnly(pickle.Unpickler):
    """An unpickler that gives a pickle no function or class to call.

    `check_opcodes` lets no pickle through that asks for one; this is in case it has a hole.
    """

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"asks for {module}.{name}")


def check_opcodes(pickled: memoryview) -> None:
    """Raise SnapshotError unless a pickle makes do with a dict and strings.

    The checksum proves that the file is whole, not who made it, and without functions a pickle can
    still crash the interpreter (a tuple nested a million deep as a key) or use up all memory (a
    memo entry with a huge number). So only the opcodes pass that `save_snapshot` writes.
    """
    short_string, string = pickle.SHORT_BINUNICODE[0], pickle.BINUNICODE[0]
    frame, stop = pickle.FRAME[0], pickle.STOP[0]
    single_bytes = (pickle.MARK[0], pickle.SETITEM[0], pickle.SETITEMS[0])
    # Protocol 4, the length of the first frame unless it is tiny, and an empty dict.
    start = re.compile(rb"\x80\x04(?:\x95.{8})?\}", re.DOTALL).match(pickled)
    if not start:
        raise SnapshotError("not a dict")
    at = start.end()
    try:
        while True:
            while pickled[at] == short_string:  # a loop of its own for nearly all there is
                at += 2 + pickled[at + 1]
            opcode = pickled[at]
            if opcode in single_bytes:
                at += 1
            elif opcode == string:
                at += 5 + int.from_bytes(pickled[at + 1 : at + 5], "little")
            elif opcode == frame:
                at += 9
            elif opcode == stop and at == len(pickled) - 1:
                return
            else:
                raise SnapshotError(f"unexpected opcode {opcode:#04x} at byte {at}")
    except IndexError:
        raise SnapshotError("has no end") from None


# ---- Store: all pairs in memory ----


class StoreClosed(Exception):
    """The write came too late to be saved."""


class Store:
    """A dict of strings that any number of threads may use at once, until it is closed."""

    def __init__(self, pairs: dict[str, str]) -> None:
        self._pairs = pairs
        self._lock = threading.Lock()
        self._closed = False
        self._changes = 0
        self._saved_changes = 0

    def __len__(self) -> int:
        with self._lock:
            return len(self._pairs)

    def get(self, key: str) -> str | None:
        with self._lock:
            return self._pairs.get(key)

    def put(self, key: str, value: str) -> None:
        """Raises StoreClosed, like `delete` and `clear`."""
        with self._lock:
            self._begin_write()
            self._pairs[key] = value

    def delete(self, key: str) -> None:
        with self._lock:
            self._begin_write()
            self._pairs.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._begin_write()
            self._pairs.clear()

    def _begin_write(self) -> None:
        if self._closed:
            raise StoreClosed
        self._changes += 1

    def close(self) -> None:
        """Refuse every write from now on: the save that follows is the last one.

        A write either has the lock before this, and is part of that save, or has it after this,
        and is refused. There is no third case, and so no acknowledged write that is not saved.
        """
        with self._lock:
            self._closed = True

    def save(self, write: Callable[[dict[str, str]], None]) -> int | None:
        """Hand all pairs to `write`; return how many, or None if no write came since the last time.

        What `write` raises is passed on, and the pairs count as unsaved. For one thread at a time.
        """
        with self._lock:
            changes = self._changes
            if changes == self._saved_changes:
                return None
            # A copy of the dict, not of its strings: some milliseconds, and then requests go on
            # during the seconds that writing it may take.
            pairs = self._pairs.copy()
        write(pairs)
        self._saved_changes = changes
        return len(pairs)


# ---- Request syntax: RFC 9110 (HTTP) and RFC 9112 (HTTP/1.1) ----
#
# A server and the proxy in front of it must agree where each request ends, or one client's bytes
# become the start of another client's request. So what the RFCs do not allow is refused, and
# nothing is guessed or repaired.

# The largest value, in bytes. Receiving one can take three times as much memory, and one that is
# not all ASCII four times as much for good, as str has up to four bytes for each character.
MAX_VALUE = 10 * 1024 * 1024
# The request line, or a chunk's size with extensions, or a trailer field, in bytes. RFC 9112 3 asks
# for room for 8,000 at least.
MAX_LINE = 8192
# The header fields of a request, in bytes and in lines. Browsers with all their cookies stay under
# 16 KiB and 50 lines. More would be memory that each connection can hold.
MAX_HEADER = 32 * 1024
MAX_FIELDS = 100

TOKEN = rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # RFC 9110 5.6.2
PERCENT = rb"%[0-9A-Fa-f]{2}"  # RFC 3986 2.1, like the next four
HOST = rb"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|" + PERCENT + rb")*)(?::[0-9]*)?"
# In a path, which each request has, a run of plain characters is one step of the search, and not
# one for each character as with (?:plain|encoded)*.
PLAIN = rb"[A-Za-z0-9._~!$&'()*+,;=:@/-]*"
PATH = PLAIN + rb"(?:" + PERCENT + PLAIN + rb")*"
QUERY = rb"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|" + PERCENT + rb")*"

# RFC 9112 3: method, origin-form or absolute-form without user information, and version.
REQUEST_LINE = re.compile(
    rb"(" + TOKEN + rb") "
    # The path begins here, or behind a scheme and a host, which is not empty and has an end.
    rb"(?:(?=/)|(?i:https?)://(?=[^/?:])" + HOST + rb"(?=[/? ]))"
    rb"(" + PATH + rb")(?:\?" + QUERY + rb")? "
    rb"(HTTP/1\.[01])"
)
OTHER_VERSION = re.compile(TOKEN + rb" [^ ]+ HTTP/(?!1\.[01]$)[0-9]\.[0-9]")
# RFC 9112 5 and RFC 9110 5.5: no white space before the colon, no folding, no control characters.
FIELD = re.compile(rb"(" + TOKEN + rb"):([^\x00-\x08\x0a-\x1f\x7f]*)")
HOST_VALUE = re.compile(HOST)
# RFC 9112 7.1.1: the size, then extensions, which are checked and ignored.
QUOTED = rb'"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[^\x00-\x08\x0a-\x1f\x7f])*"'  # RFC 9110 5.6.4
EXTENSION = rb"[ \t]*;[ \t]*" + TOKEN + rb"(?:[ \t]*=[ \t]*(?:" + TOKEN + rb"|" + QUOTED + rb"))?"
CHUNK = re.compile(rb"([0-9A-Fa-f]+)(?:" + EXTENSION + rb")*")
KEY = re.compile(r"[A-Za-z0-9:_.-]+")


class Refusal(Exception):
    """A request that is answered with an error: its status, a line of text, one more field."""

    def __init__(self, status: int, reason: str, field: bytes = b"") -> None:
        super().__init__(status, reason, field)
        self.status, self.reason, self.field = status, reason, field


class Fields(NamedTuple):
    """What the header fields of a request mean for this server."""

    length: int  # of the body, in bytes; 0 if it is chunked
    chunked: bool
    keep_alive: bool
    expects_continue: bool


def parse_request_line(line: bytes) -> tuple[str, str, str]:
    """Return the method, the path as it was sent, and the version."""
    if len(line) > MAX_LINE:
        raise Refusal(414, "request line too long")
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        if OTHER_VERSION.fullmatch(line):
            raise Refusal(505, "only HTTP/1.0 and HTTP/1.1")
        raise Refusal(400, "malformed request line")
    method, path, version = match.groups()
    return method.decode(), path.decode(), version.decode()


def has_bare_line_end(data: bytes) -> bool:
    """Whether there is a CR or LF without the other: RFC 9112 2.2."""
    pairs = data.count(b"\r\n")
    # The LF that belongs to a CR at the end may be still to come.
    return data.count(b"\n") > pairs or data[:-1].count(b"\r") > pairs


def parse_field_lines(lines: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Return the names, in lower case, and the values."""
    if len(lines) > MAX_FIELDS:
        raise Refusal(431, "too many header fields")
    fields = []
    for line in lines:
        match = FIELD.fullmatch(line)
        if not match:
            raise Refusal(400, "malformed header field")
        fields.append((match[1].lower(), match[2].strip(b" \t")))
    return fields


def members(values: list[bytes]) -> set[bytes]:
    """Return the members of a list, which may stand in several fields: RFC 9110 5.6.1."""
    return {each.strip(b" \t") for each in b",".join(values).lower().split(b",")} - {b""}


def parse_fields(block: bytes, version: str) -> Fields:
    """Decide from a request's header fields how its body is framed and what happens after it."""
    http11 = version == "HTTP/1.1"
    if len(block) > MAX_HEADER:
        raise Refusal(431, "header too large")
    values: dict[bytes, list[bytes]] = {}
    for name, value in parse_field_lines(block.split(b"\r\n") if block else []):
        values.setdefault(name, []).append(value)

    hosts = values.get(b"host", [])  # RFC 9112 3.2
    if len(hosts) != 1 and (http11 or hosts):
        raise Refusal(400, "a request needs one Host field")
    if hosts and not HOST_VALUE.fullmatch(hosts[0]):
        raise Refusal(400, "invalid Host")

    lengths = set(values.get(b"content-length", []))  # RFC 9112 6.3
    codings = values.get(b"transfer-encoding", [])
    if codings and (lengths or not http11):
        raise Refusal(400, "Transfer-Encoding not allowed here")
    if codings and (len(codings) > 1 or codings[0].lower() != b"chunked"):
        raise Refusal(501, "only the chunked transfer coding")
    digits = lengths.pop() if lengths else b"0"
    # Not int() alone, which also takes "+1", "1_0" and " 1 ".
    if lengths or not digits.isdigit():
        raise Refusal(400, "invalid Content-Length")
    # int() would refuse 5,000 digits in its own way, and 16 are too large already.
    digits = digits.lstrip(b"0")[:16] or b"0"
    if int(digits) > MAX_VALUE:
        raise Refusal(413, "value too large")

    connection = members(values.get(b"connection", []))  # RFC 9112 9.3
    keep_alive = b"close" not in connection and (http11 or b"keep-alive" in connection)

    expectations = members(values.get(b"expect", []))  # RFC 9110 10.1.1
    if expectations - {b"100-continue"}:
        raise Refusal(417, "only Expect: 100-continue")
    return Fields(int(digits), bool(codings), keep_alive, bool(expectations) and http11)


# A client repeats its header fields byte for byte with each request, and parsing them costs more
# than all the rest. 256 blocks of up to 1 KiB are enough for the clients of a busy moment and
# cannot be made to fill the memory.
MAX_REMEMBERED = 1024
remembered_fields = functools.lru_cache(maxsize=256)(parse_fields)


@functools.lru_cache(maxsize=16)  # made once a second for each status
def answer_head(status: int, second: int) -> bytes:
    """Return what all answers of a second with this status begin with: RFC 9112 4, 9110 6.6.1."""
    return (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        f"Date: {formatdate(second, usegmt=True)}\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
    ).encode()


# ---- Log: lines on stderr ----

LOG_LOCK = threading.Lock()


def log(message: str) -> None:
    """Write a line to stderr, in one piece, or drop it.

    If nobody reads our stderr, be it closed or a pipe that is full, we have to save all the same.
    """
    line = f"kv.py: {message}\n".encode(errors="backslashreplace")
    # With the lock, no other thread uses up the room between the look and the write.
    with LOG_LOCK, contextlib.suppress(OSError):
        if sys.stderr is not None and select.select([], [sys.stderr], [], 0)[1]:
            os.write(sys.stderr.fileno(), line)


def make_terminal_non_blocking() -> None:
    """If stderr is a terminal, open it once more, for this process alone and non-blocking.

    With room for a part of a line, a terminal that nobody reads counts as ready, and blocks. And
    O_NONBLOCK on the stderr that we were given would concern the shell, which shares it.
    """
    with contextlib.suppress(OSError):  # it may belong to another user
        if os.isatty(2):
            terminal = os.open(os.ttyname(2), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
            os.dup2(terminal, 2)
            os.close(terminal)


# ---- Handler: one connection ----

# How many seconds a worker waits for the next request. An idle connection costs a thread and 25 KB,
# so it may stay about as long as a person thinks between two requests.
IDLE_SECONDS = 60.0
# The same during a shutdown: a client in the listen queue has normally sent its request already.
DRAIN_IDLE_SECONDS = 0.1
# How many seconds a new connection cannot be closed to make room, unless it has been answered. Its
# request may have been lost in a burst, and then comes again after 0.2 s, 0.4 s, ... or 6.4 s.
FIRST_SECONDS = 10.0
# How many seconds the whole head of a request may take, which is one packet normally; or the next
# piece of a body; or the next piece of an answer to leave. Whoever needs longer is gone, or wants
# to hold the worker.
STALL_SECONDS = 15.0
# What a body must come up to on the whole: a poor line does, and one byte now and then does not.
BODY_BYTES_PER_SECOND = 1024
# How many seconds a client may go on sending when it has been refused.
LINGER_SECONDS = 5.0
# Enough for any request but an upload. Each idle connection has a buffer of this size waiting.
RECEIVE_SIZE = 8192
# For uploads, which take fewer system calls in larger pieces.
RECEIVE_BODY_SIZE = 64 * 1024

HEAD_END = b"\r\n\r\n"
# What the buffer of an idle connection may have: some clients send an empty line behind a body. It
# is left to the head of the next request. RFC 9112 2.2.
NO_REQUEST = (b"", b"\r", b"\r\n")
# Which method of Handler serves what. Behind "/kv/" comes the key. HEAD is served like GET, as
# _answer leaves the body out.
ROUTES = {
    "/kv/": {"GET": "do_GET", "HEAD": "do_GET", "PUT": "do_PUT", "DELETE": "do_DELETE"},
    "/health": {"GET": "do_health", "HEAD": "do_health"},
    "/clear": {"DELETE": "do_clear"},
}


class Route(NamedTuple):
    """Which method of Handler serves a request, and the key; or why none does.

    That is, the arguments of a Refusal: this is kept, and an exception that is raised again and
    again would collect tracebacks.
    """

    served_by: str = ""
    key: str = ""
    refusal: tuple[int, str, bytes] | None = None


def route(method: str, path: str) -> Route:
    is_kv = path.startswith("/kv/")
    methods = ROUTES.get("/kv/" if is_kv else path)
    if not methods:
        return Route(refusal=(404, "not found", b""))
    if method not in methods:
        allow = f"Allow: {', '.join(methods)}\r\n".encode()
        return Route(refusal=(405, "method not allowed", allow))
    key = unquote(path[len("/kv/") :]) if is_kv else ""
    if is_kv and not key:
        return Route(refusal=(400, "key cannot be empty", b""))
    if is_kv and not KEY.fullmatch(key):
        return Route(refusal=(400, "key contains invalid characters", b""))
    return Route(methods[method], key)


class Handler(BaseHTTPRequestHandler):
    """Serves the requests of one connection, one after another.

    The base class has the skeleton: it calls setup, handle, and finish, and handle calls
    handle_one_request until that sets close_connection. But it reads requests more leniently than
    RFC 9112 allows. That part is replaced. `_buffer` has the bytes received and not used yet, among
    which there may already be further requests.
    """

    server: Server
    _body: bytes | bytearray

    def setup(self) -> None:
        self.connection: socket.socket = self.request
        # Each answer is one write. Waiting until it fills a packet would delay it by 40 ms.
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(STALL_SECONDS))
        self._receive_seconds = 0.0  # no limit set yet, see _receive
        self._spared_until = time.monotonic() + FIRST_SECONDS  # see Server.idle
        self._buffer = b""
        self._parsed_head: bytes | None = None  # see _read_head

    def finish(self) -> None:
        """Flush nothing: the base class would, but the files it has for that are not made here."""

    def handle(self) -> None:
        # The client has hung up, or stalled for too long: nobody is left to be told.
        with contextlib.suppress(OSError):
            super().handle()

    def handle_one_request(self) -> None:
        self.close_connection = True  # unless the end of the request is found
        # Forget the last request: while idle, it would only take memory. And a head that cannot be
        # read would be answered and logged as if it were that one.
        self.command, self._head, self._body = "", b"", b""
        while self._buffer in NO_REQUEST:
            received = self._receive_idly(RECEIVE_SIZE, IDLE_SECONDS)
            if not received:
                return
            self._buffer += received
        refused = False
        try:
            self._read_head()
            refusal = self._route.refusal
            if refusal and self._fields.expects_continue:
                raise Refusal(*refusal)  # before the body, which the client then may send or not
            # Even a refused request has a body, behind which the next one starts.
            self._body = self._read_body()
            self.close_connection = not self._fields.keep_alive
            if refusal:
                raise Refusal(*refusal)
            getattr(self, self._route.served_by)()
        except Refusal as error:
            refused = True
            self._answer(error.status, f"{error.reason}\n".encode(), error.field)
        except StoreClosed:
            self._answer(503, b"shutting down\n")
        if self.close_connection and (refused or self._body or self.server.draining):
            self._linger()

    def _read_head(self) -> None:
        """Read a request's head: sets command, request_version, `_fields` and `_route`.

        Raises Refusal for what breaks the rules of HTTP.
        """
        self._deadline = time.monotonic() + STALL_SECONDS
        # Two line ends: the one between request line and fields, and an empty line in front.
        head = self._read_through(HEAD_END, MAX_LINE + MAX_HEADER + 2 * len(b"\r\n"))
        self._head = head.removeprefix(b"\r\n")
        # A client that asks for the same again, as a monitor does, sends the same bytes. Request
        # line and route would take as long as all the rest.
        if self._head != self._parsed_head:
            line, _, block = self._head.partition(b"\r\n")
            method, path, version = parse_request_line(line)
            self.command = method  # now, for the answer to a HEAD of which the fields are refused
            parse = remembered_fields if len(block) <= MAX_REMEMBERED else parse_fields
            self._parsed = method, version, parse(block, version), route(method, path)
            self._parsed_head = self._head if len(self._head) <= MAX_REMEMBERED else None
        self.command, self.request_version, self._fields, self._route = self._parsed

    def do_GET(self) -> None:
        value = self.server.store.get(self._route.key)
        if value is None:
            self._answer(404, b"key not found\n")
        else:
            self._answer(200, value.encode())

    def do_PUT(self) -> None:
        if not self._body:
            raise Refusal(400, "value cannot be empty")
        try:
            value = self._body.decode()
        except UnicodeDecodeError:
            raise Refusal(400, "value must be UTF-8 text") from None
        self.server.store.put(self._route.key, value)
        self._answer(200)

    def do_DELETE(self) -> None:
        self.server.store.delete(self._route.key)
        self._answer(200)

    def do_clear(self) -> None:
        self.server.store.clear()
        self._answer(200)

    def do_health(self) -> None:
        self._answer(200, b"ok\n")

    def _answer(self, status: int, body: bytes = b"", field: bytes = b"") -> None:
        """Send a whole response in one write."""
        if self.server.draining and self._buffer in NO_REQUEST:  # the next one would be in flight
            self.close_connection = True
        if self.close_connection:
            field += b"Connection: close\r\n"
        elif self.request_version == "HTTP/1.0":
            field += b"Connection: keep-alive\r\n"
        head = answer_head(status, int(time.time()))
        sent_body = b"" if self.command == "HEAD" else body
        self.connection.sendall(
            b"%b%bContent-Length: %d\r\n\r\n%b" % (head, field, len(body), sent_body)
        )
        self._spared_until = 0.0
        if self.server.verbose:
            # As a representation, because a client can put anything into it; and not of any length.
            line = self._head.partition(b"\r\n")[0]
            log(f"{self.client_address[0]} {repr(line)[1:]:.1000} {status} {len(body)}")

    # -- Receiving: to wait for a client, but never for good --

    def _receive_idly(self, size: int, seconds: float) -> bytes:
        """Receive without being in flight: the server may hang up meanwhile."""
        server = self.server
        # First registered, then looked whether the server is draining. A drain first says so and
        # then looks who is registered (Server.serve_forever), so one of the two notices the other.
        server.idle[self.connection] = self._spared_until
        try:
            return self._receive(size, DRAIN_IDLE_SECONDS if server.draining else seconds)
        finally:
            del server.idle[self.connection]

    def _read_body(self) -> bytes | bytearray:
        """Read the request's body. This is the one place that says where it ends: RFC 9112 6.3."""
        fields = self._fields
        if not (fields.length or fields.chunked):
            return b""
        if fields.expects_continue and not self._buffer:
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._deadline = time.monotonic() + STALL_SECONDS
        return self._read_chunks() if fields.chunked else self._read(fields.length)

    def _read_chunks(self) -> bytearray:
        """RFC 9112 7.1: chunks, one of size 0, then trailer fields, which are only checked."""
        body = bytearray()
        while True:
            match = CHUNK.fullmatch(self._read_through(b"\r\n", MAX_LINE))
            if not match:
                raise Refusal(400, "malformed chunk")
            size = int(match[1], 16)
            if len(body) + size > MAX_VALUE:
                raise Refusal(413, "value too large")
            if size == 0:
                break
            body += self._read(size)
            if self._read(2) != b"\r\n":
                raise Refusal(400, "malformed chunk")
        trailer: list[bytes] = []
        while line := self._read_through(b"\r\n", MAX_LINE):
            trailer.append(line)
            parse_field_lines(trailer)  # each time, so that there are never too many
        return body

    def _read_through(self, end: bytes, limit: int) -> bytes:
        """Take the input up to and with `end` out of the buffer; return it without `end`."""
        while True:
            text, found, rest = self._buffer.partition(end)
            # As long as it is not found, `text` may have a part of it. So the limit is the same
            # however the bytes arrive.
            if len(text) > (limit if found else limit + len(end)):
                is_request_line = end == HEAD_END and b"\r\n" not in text
                raise Refusal(414 if is_request_line else 431, "line or header too long")
            if found:
                self._buffer = rest
                return text
            if has_bare_line_end(text):  # `end` would never come
                raise Refusal(400, "bare CR or LF")
            self._buffer += self._receive_in_time(RECEIVE_SIZE)

    def _read(self, size: int) -> bytearray:
        """Take `size` bytes of a body out of the input."""
        body, piece = bytearray(), self._buffer[:size]
        self._buffer = self._buffer[size:]
        while True:
            body += piece
            self._deadline += len(piece) / BODY_BYTES_PER_SECOND
            if len(body) == size:
                return body
            piece = self._receive_in_time(min(size - len(body), RECEIVE_BODY_SIZE))

    def _receive_in_time(self, size: int) -> bytes:
        """Return up to `size` bytes of an unfinished request, at least one, before the deadline."""
        seconds = min(self._deadline - time.monotonic(), STALL_SECONDS)
        try:
            data = self._receive(size, seconds)
        except BlockingIOError:
            raise Refusal(408, "request took too long") from None
        if not data:
            raise ConnectionAbortedError("the request breaks off")
        return data

    def _receive(self, size: int, seconds: float) -> bytes:
        """Return up to `size` bytes, none at the end of the input.

        The kernel limits the time, and the call ends with BlockingIOError. settimeout() would poll
        first: one more system call, and one more queueing for the interpreter lock.
        """
        if seconds != self._receive_seconds:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(seconds))
            self._receive_seconds = seconds
        return self.connection.recv(size)

    def _linger(self) -> None:
        """Let a client that may still be sending read its answer before the connection is closed.

        RFC 9112 9.6: closing with unread input sends a reset, which can overtake the answer. So
        only our direction is closed, and what comes is thrown away for a while: the rest of a
        refused request, an empty line behind a body, or during a drain, the next request.
        """
        self.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER_SECONDS
        while (seconds := deadline - time.monotonic()) > 0:
            if not self._receive_idly(RECEIVE_BODY_SIZE, seconds):
                break


def timeval(seconds: float) -> bytes:
    """Seconds as the C structure that socket options take; at least 1 us, as 0 means no limit."""
    return struct.pack("ll", *divmod(max(1, int(seconds * 1_000_000)), 1_000_000))


# ---- Server: the listener and the worker threads ----

# How often the accept loop looks whether it shall end, in seconds: idling costs 10 looks a second,
# and a shutdown starts 0.05 s late on average.
POLL_SECONDS = 0.1
# Workers that wait for a connection. Fewer would mean starting a thread, about 100 us, for more of
# the connections; more would keep the memory of a burst for good.
MAX_SPARE_WORKERS = 64
# Each connection has a thread: 4,000 take 100 MB. When all of them wake at once, they queue for the
# interpreter lock, and the more they are, the longer the kernel may take to wake the next one: a
# shutdown with 10,000 took up to 20 s. Further connections wait in the listen queue.
MAX_CONNECTIONS = 4_000
# Descriptors kept for other things: standard streams, listener, directory, snapshot, and some that
# the parent process may have left open.
RESERVED_DESCRIPTORS = 32


class Server(ThreadingHTTPServer):
    """Accepts connections and gives each to a worker thread, which serves it until it is closed.

    `start` begins, `drain` ends it, `join` waits for what is in flight. In between, a connection
    over the limit waits in the listen queue, and the one that has been idle for longest is closed
    to make room for it.

    The base classes have the loop that accepts. It calls get_request, process_request and
    service_actions, and in a worker, process_request_thread makes a Handler, whose constructor
    serves the connection, and calls shutdown_request, and before that handle_error if need be.
    """

    # With the default of 5, a burst of clients is left to the retries of their kernels: 1 s, 3 s,
    # 7 s. The kernel lowers this to what it allows (somaxconn, 4,096 on Linux).
    request_queue_size = 65_535

    def __init__(self, host: str, port: int, max_connections: int, verbose: bool) -> None:
        """Bind the address, without listening yet. OSError if that fails."""
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family, address = info[0], cast(Any, info[4])
        super().__init__(address, Handler, bind_and_activate=False)
        self.verbose = verbose
        self.draining = False  # each connection is closed as soon as it is idle
        # The connections that wait for a request, or for the client to hang up, in the order in
        # which they began to, and until when (monotonic clock) they are not closed to make room.
        self.idle: dict[socket.socket, float] = {}
        self._max_connections = max_connections
        self._connections = 0
        # One for each connection, and some spare ones that wait for the next.
        self._workers: set[threading.Thread] = set()
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # A lock that guards `_connections` and who leaves `_workers`, and that can be waited for
        # until a connection has ended.
        self._lock = threading.Condition()
        self.server_bind()

    def server_bind(self) -> None:
        # Not the one of HTTPServer: it asks the name service for the name of this host.
        socketserver.TCPServer.server_bind(self)

    @property
    def url(self) -> str:
        host, port = map(str, self.server_address[:2])
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def in_flight(self) -> int:
        """The number of connections that are not idle."""
        return self._connections - len(self.idle)

    def start(self, store: Store) -> None:
        """Listen, and accept connections in a thread of its own."""
        self.store = store
        # Where a client that has given up is taken out of the queue (BSD, macOS), accept() would
        # otherwise wait for the next one, and keep a shutdown waiting, too.
        self.socket.settimeout(POLL_SECONDS)
        self.server_activate()
        self._acceptor = threading.Thread(target=self.serve_forever, daemon=True)
        self._acceptor.start()

    def drain(self) -> None:
        """Tell the accept loop to end, and wait for that; see serve_forever for what it does then.

        What is in flight goes on.
        """
        self.draining = True
        self.shutdown()

    def join(self, until: float) -> bool:
        """Wait for the threads that serve clients, until `until` on the monotonic clock at most.

        Returns whether all of them have ended.
        """
        self._acceptor.join(max(0.0, until - time.monotonic()))
        if self._acceptor.is_alive():
            return False  # it may still start workers, and one that is not started cannot be joined
        for worker in self._workers.copy():
            worker.join(max(0.0, until - time.monotonic()))
        return not self._workers

    # -- The thread that accepts --

    def serve_forever(self, poll_interval: float = POLL_SECONDS) -> None:
        """Accept until `drain`, and then those who are in the listen queue already."""
        while True:
            try:
                super().serve_forever(poll_interval)
            except MemoryError:
                # Only for the moment. Without this thread nobody would get in any more.
                self.handle_error(None, None)
                time.sleep(POLL_SECONDS)
            if self.draining:
                break
        # Not in drain() itself: each hang-up gives up the interpreter lock, and to get it back the
        # main thread, which has a deadline, would queue behind all the workers that it has woken.
        for connection in self.idle.copy():
            self._hang_up(connection)
        # Those who wait stay in the queue, but further clients get in one at a time at most, or a
        # busy server would never see its end.
        self.socket.listen(0)
        while select.select([self.socket], [], [], 0)[0]:
            self.handle_request()
        self.server_close()
        for _ in self._workers.copy():
            self._jobs.put(None)  # the end for one worker

    def get_request(self) -> tuple[socket.socket, Any]:
        with self._lock:
            if self._connections >= self._max_connections:
                # Accept nobody now: have one hang up, wait for a moment until somebody has.
                self._make_room()
                self._lock.wait(POLL_SECONDS)
                raise TimeoutError  # the base class ignores it, and looks whether it shall end
        try:
            request = super().get_request()
        except OSError:
            # Out of descriptors, for instance, with the listener still ready: do not spin.
            time.sleep(POLL_SECONDS)
            raise
        with self._lock:
            self._connections += 1
        return request

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._workers) < self._connections:
            worker = threading.Thread(target=self._work, daemon=True)
            self._workers.add(worker)
            try:
                worker.start()
            except (RuntimeError, MemoryError):
                # The system allows no more threads. So this connection waits for the first worker
                # that is free, if there is any.
                self._workers.remove(worker)
                if not self._workers:
                    raise
        self._jobs.put((request, client_address))

    def service_actions(self) -> None:
        """Called by serve_forever each time it has looked for a connection."""
        if len(self._workers) < self._connections:  # a thread could not be started
            self._make_room()

    def _make_room(self) -> None:
        """Close the connection that has been idle for longest."""
        now = time.monotonic()
        for connection, spared_until in self.idle.copy().items():
            if spared_until <= now:
                self._hang_up(connection)
                break

    def _hang_up(self, connection: socket.socket) -> None:
        """End what an idle connection waits for: its worker receives the end of the input.

        What has arrived before can still be read, so a whole request is answered. One of which the
        first piece arrives in this very moment is cut off, without an answer.
        """
        # The worker may close it meanwhile, hence the OSError. But the number of its descriptor is
        # not that of a new connection by then, as only this thread accepts.
        with contextlib.suppress(OSError):
            if connection in self.idle:
                connection.shutdown(socket.SHUT_RD)

    # -- The worker threads --

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            if job:
                self.process_request_thread(*job)
            # With the lock, or the acceptor would count on a worker that leaves.
            with self._lock:
                if not job or len(self._workers) > self._connections + MAX_SPARE_WORKERS:
                    self._workers.remove(threading.current_thread())
                    return

    def shutdown_request(self, request: Any) -> None:
        request.close()
        with self._lock:
            self._connections -= 1
            self._lock.notify()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report a mistake in this program, or a lack of memory; the other clients are served."""
        error, trace = cast(Any, sys.exc_info()[1:])
        with contextlib.suppress(MemoryError):  # the thread must go on, even without this line
            while trace.tb_next:  # up to the line that raised it
                trace = trace.tb_next
            file = os.path.basename(trace.tb_frame.f_code.co_filename)
            log(f"error: {error!r} in {file}, line {trace.tb_lineno}")


# ---- Process: arguments, working directory, signals, and the order of a shutdown ----

# From the signal to the exit, in seconds: then supervisors, among them the lsfr harness, kill.
SHUTDOWN_SECONDS = 15.0
# Of these, what is kept for the last save besides the time that saves take: the disk may be slower
# then, or full, so that the save has to be tried again. So with quick saves, waiting ends at 12 s.
SAVE_SECONDS = 3.0
# How often to look whether all is answered, for a second signal, or for room on the disk.
STEP_SECONDS = 1.0


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"kv.py: {message} (see kv.py --help)\n")  # one line, without the usage


def port_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError("not a number from 0 to 65535")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    summary = (__doc__ or "").split("\n", 1)[0]
    parser = ArgumentParser(prog="kv.py", description=summary, allow_abbrev=False)
    add = parser.add_argument
    add("--host", metavar="ADDRESS", default="127.0.0.1", help="where to listen (%(default)s)")
    add("--port", metavar="N", type=port_number, default=8080, help="0 is any free (%(default)s)")
    directory = os.environ.get("DATA_DIR") or "."
    add("--working-dir", metavar="DIR", default=directory, help="for the snapshot ($DATA_DIR or .)")
    add("--dump", action="store_true", help="print the snapshot as JSON Lines and exit")
    add("--verbose", action="store_true", help="log every request")
    add("--version", action="version", version=f"kv.py {__version__}")
    return parser.parse_args()


def open_working_directory(path: str) -> int:
    """Return a descriptor of the directory, which holds its lock until the process ends.

    Raises OSError if no file can be created there: found out now rather than at the shutdown.
    """
    with contextlib.suppress(FileExistsError):  # if that is a file, the next line says so
        os.makedirs(path)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    # The kernel gives the lock back however the process ends, so none is ever left behind.
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "in use by another kv.py") from None
    os.close(create_temporary(directory))
    os.unlink(TEMPORARY, dir_fd=directory)
    return directory


def raise_descriptor_limit() -> int:
    """Allow this process as many descriptors as it may use; return how many connections that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + RESERVED_DESCRIPTORS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # macOS allows less than the hard limit says
            wanted = soft
    return max(1, wanted - RESERVED_DESCRIPTORS)


def stay_on_one_core() -> None:
    """Keep all threads on one processor core, where the system can do that.

    Only the thread that has the interpreter lock runs, so a second core adds little, but passing
    the lock to a thread on another core has to wake that core: with 64 busy connections, half as
    many requests per second. A random one, as several servers may run here.
    """
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.sched_setaffinity(0, {random.choice(list(os.sched_getaffinity(0)))})


def dump(working_directory: str) -> None:
    """Print the snapshot's pairs to stdout, as one JSON object a line."""
    # The ways in which command line tools are stopped: `kv.py --dump | head`, Ctrl-C.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    directory = os.open(working_directory, os.O_RDONLY | os.O_DIRECTORY)
    os.stat(SNAPSHOT, dir_fd=directory)  # load_snapshot() takes a missing one for an empty store
    # Not sys.stdout: what it could not write it would try again at the exit, with a traceback.
    with open(1, "wb", closefd=False) as stdout:
        for key, value in load_snapshot(directory).items():
            line = json.dumps({"key": key, "value": value}, ensure_ascii=False)
            stdout.write(line.encode() + b"\n")


def shut_down(
    server: Server, store: Store, directory: int, stop_signals: set[signal.Signals]
) -> int:
    """End what is in flight, save everything that has been acknowledged, return the exit code."""
    begin = time.monotonic()
    longest = 0.0  # of the saves

    def time_is_left(reserve: float) -> bool:
        # A second signal, which stays pending as nobody takes it, means: no more waiting.
        hurry = signal.sigpending() & stop_signals
        return not hurry and time.monotonic() - begin + reserve < SHUTDOWN_SECONDS

    def try_to_save() -> str:
        """Return why it failed, empty if it did not."""
        nonlocal longest
        start = time.monotonic()
        try:
            saved = store.save(lambda pairs: save_snapshot(directory, pairs))
        except (OSError, MemoryError) as error:
            log(f"cannot save: {reason(error)}")
            return reason(error)
        finally:
            longest = max(longest, time.monotonic() - start)
        if saved is not None:
            log(f"saved {saved} pairs in {time.monotonic() - start:.2f} s")
        return ""

    log(f"draining: {server.in_flight} connections in flight, {len(server.idle)} idle")
    server.drain()
    while not server.join(time.monotonic() + STEP_SECONDS):
        # Early, in case that those in flight take longer than we have; if there is time for this
        # save and the last one, each as long as the longest so far.
        if time_is_left(SAVE_SECONDS + 2 * longest):
            try_to_save()
        if not time_is_left(SAVE_SECONDS + 2 * longest):
            break
    log(f"drained in {time.monotonic() - begin:.2f} s, {server.in_flight} given up")
    store.close()
    while failure := try_to_save():
        if not time_is_left(STEP_SECONDS + longest):
            log(f"not saved, {failure}: what was written since the last snapshot is lost")
            return 1
        time.sleep(STEP_SECONDS)
    return 0


def main() -> int:
    arguments = parse_arguments()
    make_terminal_non_blocking()
    doing = f"cannot use the working directory {arguments.working_dir!r}"
    try:
        snapshot = os.path.join(os.path.abspath(arguments.working_dir), SNAPSHOT)
        if arguments.dump:
            doing = f"cannot dump {snapshot}"
            dump(arguments.working_dir)
            return 0
        stop_signals = {signal.SIGTERM, signal.SIGINT}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
            stop_signals.add(signal.SIGHUP)
        # Blocked in this thread and those it starts: a signal waits until it is asked for, and
        # cannot interrupt anything halfway.
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
        stay_on_one_core()
        # How often a thread that waits for the interpreter lock wakes up to ask for it. Thousands
        # that do so each 5 ms, as usual, leave no time for the work. No thread here needs to be
        # asked: each soon waits for the network or the disk, and gives up the lock for that.
        sys.setswitchinterval(1.0)
        directory = open_working_directory(arguments.working_dir)
        # The address now, so that a load that takes long is not in vain; it listens afterwards.
        doing = f"cannot listen on {arguments.host!r} port {arguments.port}"
        max_connections = raise_descriptor_limit()
        server = Server(arguments.host, arguments.port, max_connections, arguments.verbose)
        doing = f"cannot load {snapshot}"
        store = Store(load_snapshot(directory))
        doing = f"cannot listen on {arguments.host!r} port {arguments.port}"
        server.start(store)
    except (OSError, SnapshotError, UnicodeError, MemoryError, RuntimeError) as error:
        log(f"{doing}: {reason(error)}")
        return 1
    log(f"{len(store)} pairs in {snapshot}, listening on {server.url}")
    received = signal.sigwait(stop_signals)
    log(signal.Signals(received).name)
    # Not by way of sys.exit(): the interpreter would first tidy up, and wait for its lock among
    # thousands of threads meanwhile. Everything is on the disk, and nothing is left to flush.
    os._exit(shut_down(server, store, directory, stop_signals))


if __name__ == "__main__":
    sys.exit(main())
