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

Any other request is answered 404 or 405, a malformed, misdirected or excessive one 400 to 501, and
one for which there is no memory 507.

All pairs live in memory. A stop signal, such as SIGTERM or SIGINT, shuts the server down and writes
them to a snapshot in the working directory. The next start reads them back. SIGUSR1 saves while the
server goes on, and --save-every does so by itself. A shutdown has a time limit of 15 s, unless
--graceful-timeout says otherwise:

    0 s    Clients in the backlog are served. After that, answers say `Connection: close`. Idle
           connections are closed after a quarter of a second. Requests in flight go on.
    1 s    If a request is still in flight, acknowledged writes are saved, now and each second.
    12 s   (earlier if saves are slow) What is still in flight is not waited for. A write is
           answered 503 now. The last snapshot is written. If that fails, it is tried again.
    15 s   The process exits, unless the last save takes much longer than those before. Supervisors
           such as the test harness of lsfr.io send SIGKILL then.

Normally nobody stalls, and all of it takes a third of a second. Exit code 0 means saved. The same
signal again ends the waiting. A crash, unlike a shutdown, loses what was written since the last
snapshot. There is no write-ahead log here.

The file reads from the inside out, and each part uses those before it: snapshot, store, request
syntax, log, handler, server, process. Handler and server use each other.
"""

from __future__ import annotations

import signal
import sys

if sys.version_info < (3, 9):  # noqa: UP036
    sys.exit("kv.py: needs Python 3.9 or later")
if __name__ == "__main__":
    # SIGUSR1 would end the process if it came before main waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    # Ctrl-C while the other modules are being imported ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import _thread
import argparse
import collections
import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import mmap
import os
import pickle
import queue
import random
import re
import resource
import selectors
import socket
import socketserver
import stat
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, NoReturn, cast
from urllib.parse import unquote

__version__ = "1.0.0"


# ---- Snapshot: all pairs in a file ----
#
# The file is a pickle of the dict, followed by the SHA-256 digest of that pickle. A crash in the
# middle of a save must not leave half a file. So each save writes a new file, and gives it the name
# of the old one when it is complete. A load must not believe a file that something or somebody has
# altered. A pickle is a program for a small stack machine, so a forged one could run any code.

DIGEST_SIZE = hashlib.sha256().digest_size


class SnapshotError(Exception):
    """The snapshot cannot be trusted; the text says why."""


def write_pairs(path: str, pairs: dict[str, str]) -> None:
    """Write a new file, which is on the disk when this returns. Raises OSError if that fails."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # left behind by a save that was killed
    with open(path, "x+b") as file:
        # check_opcodes knows only this protocol, without the memo. The memo is an index of all
        # strings, a third of the store's size, which `fast` leaves out.
        pickler = pickle.Pickler(file, protocol=4)
        pickler.fast = True
        pickler.dump(pairs)
        file.seek(0)
        sha256 = hashlib.sha256()
        while piece := file.read(1 << 16):
            sha256.update(piece)
        file.write(sha256.digest())
        file.flush()
        os.fsync(file.fileno())


def read_pairs(path: str) -> dict[str, str]:
    """Return the pairs in a file.

    Raises SnapshotError if the file is not a dict of strings with its digest, OSError if it cannot
    be read (FileNotFoundError if there is none), MemoryError if it does not fit into memory.
    """
    # Looked at before it is opened, as opening a named pipe waits for somebody who writes to it. A
    # link is refused, because a save would replace the link and not what it leads to.
    if not stat.S_ISREG(os.stat(path, follow_symlinks=False).st_mode):
        raise SnapshotError("not a regular file")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size <= DIGEST_SIZE:
            raise SnapshotError("too short")
        # Mapped, not read, so the store need not fit into memory twice. Mapped privately, because
        # some file systems in user space refuse a shared map.
        data = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    with data:
        with memoryview(data)[:-DIGEST_SIZE] as pickled:  # released before `data` is closed
            if hashlib.sha256(pickled).digest() != data[-DIGEST_SIZE:]:
                raise SnapshotError("truncated or altered: its checksum does not match")
            check_opcodes(pickled)
        try:
            pairs: dict[str, str] = StringsOnly(data).load()  # reads up to the pickle's end
            texts = itertools.chain(pairs, pairs.values())
            for text in itertools.filterfalse(str.isascii, texts):
                text.encode()  # fails for a lone surrogate, which is no UTF-8
        except MemoryError:
            raise  # that is no fault of the file
        except Exception as error:  # the pickle module does not promise which
            raise SnapshotError(f"not a dict of UTF-8 strings: {error}") from error
    return pairs


class StringsOnly(pickle.Unpickler):
    """An unpickler that gives a pickle no function to call, in case check_opcodes has a hole."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"asks for {module}.{name}")


# A pickle of a dict of strings begins with the number of the protocol, the size of the first frame
# in 8 bytes (none if the pickle is tiny), and an empty dict.
PICKLE_START = re.compile(rb"\x80\x04(?:\x95.{8})?\}", re.DOTALL)
# A string is one of these opcodes, its size in 1 or in 4 bytes, and its text.
SHORT_STRING, STRING = pickle.SHORT_BINUNICODE[0], pickle.BINUNICODE[0]
# Between strings, there are the beginning of a batch of pairs, its end, the end of a single pair,
# and the size of the next frame. These have fixed lengths in bytes, the opcode included.
FIXED_LENGTHS = {pickle.MARK[0]: 1, pickle.SETITEMS[0]: 1, pickle.SETITEM[0]: 1, pickle.FRAME[0]: 9}


def check_opcodes(pickled: memoryview) -> None:
    """Raise SnapshotError unless a pickle has only the opcodes that write_pairs writes.

    The checksum proves that the file is whole, not who made it. Even without functions, a pickle
    can crash the interpreter (a tuple nested a million deep as a key) or use up all memory (a memo
    entry with a huge number).
    """
    start = PICKLE_START.match(pickled)
    if not start:
        raise SnapshotError("not a dict")
    at = start.end()
    try:
        while True:
            while pickled[at] == SHORT_STRING:  # a quick loop, as nearly all strings are short
                at += 2 + pickled[at + 1]
            opcode = pickled[at]
            if opcode == STRING:
                at += 5 + int.from_bytes(pickled[at + 1 : at + 5], "little")
            elif opcode in FIXED_LENGTHS:
                at += FIXED_LENGTHS[opcode]
            elif opcode == pickle.STOP[0] and at == len(pickled) - 1:
                return
            else:
                raise SnapshotError(f"unexpected opcode {opcode:#04x} at byte {at}")
    except IndexError:
        raise SnapshotError("has no end") from None


class Snapshot:
    """The snapshot in a working directory, which it locks against a second kv.py."""

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)
        self.path = os.path.join(self.directory, "kv.pickle")
        self._temporary = self.path + ".tmp"

    def open(self) -> None:
        """Create the directory if need be, lock it, and try out saving and loading.

        Raises OSError or SnapshotError. What would make a save fail is better found out now.
        """
        with contextlib.suppress(FileExistsError):  # if it is a file, `_lock` says so
            os.makedirs(self.directory)
        self._lock()
        write_pairs(self._temporary, {})
        read_pairs(self._temporary)
        self._sync_names()
        os.unlink(self._temporary)

    def load(self) -> dict[str, str]:
        """Return the saved pairs, none if there is no snapshot; raises what read_pairs does."""
        self._ours = self._identity()
        try:
            return read_pairs(self.path)
        except FileNotFoundError:
            return {}

    def is_ours(self) -> bool:
        """Whether the file is the one that was loaded or saved last, or there is still none.

        Else somebody may have removed it, or put another file or directory into its place.
        """
        return self._identity() == self._ours

    def save(self, pairs: dict[str, str]) -> None:
        """Replace the snapshot, whole or not at all.

        Raises OSError (disk full, file too large, directory gone, ...). The old snapshot is then
        still in place, or, if only the sync of its name failed, the whole new one.
        """
        # Somebody may have put another directory into the place of the one that we have locked.
        if not os.path.samestat(os.fstat(self._locked), os.stat(self.directory)):
            locked = self._locked
            self._lock()
            os.close(locked)
        try:
            # The content reaches the disk before the name. Otherwise a power failure in between
            # could leave an empty file of that name.
            write_pairs(self._temporary, pairs)
            os.replace(self._temporary, self.path)
            self._sync_names()
            self._ours = self._identity()
        except Exception:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)  # half a file would keep a full disk full
            raise

    def _lock(self) -> None:
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # The kernel gives this lock back however the process ends, so none is left behind.
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(directory)
            if isinstance(error, BlockingIOError):
                raise BlockingIOError(error.errno, "in use by another kv.py") from None
            raise
        self._locked = directory

    def _identity(self) -> tuple[int, ...] | None:
        with contextlib.suppress(OSError):  # there is none, or a save will find out what is wrong
            file = os.stat(self.path, follow_symlinks=False)
            return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns
        return None

    def _sync_names(self) -> None:
        """Have a new name in the directory reach the disk."""
        try:
            os.fsync(self._locked)
        except OSError as error:
            # CIFS and shared folders of virtual machines keep names without being asked.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise


# ---- Store: all pairs in memory ----


class StoreClosed(Exception):
    """The write came too late to be saved."""


class Store:
    """A dict of strings that any number of threads may use at once. Closed, it can only be read.

    Its lock makes each access one step for the others. A write that has the lock before `close` is
    part of the save that follows. One that has it afterwards is refused. So no acknowledged write
    is left out.
    """

    def __init__(self, pairs: dict[str, str]) -> None:
        self._pairs = pairs
        self._lock = threading.Lock()
        self._closed = False
        self._changes = self._saved_changes = 0

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
        """Refuse every write from now on."""
        with self._lock:
            self._closed = True

    def save(self, write: Callable[[dict[str, str]], None], anyway: bool = False) -> int | None:
        """Hand all pairs to `write`; return how many.

        Unless it is to be done `anyway`, return None if no write came since the last time. What
        `write` raises is passed on, and the pairs count as unsaved. For one thread at a time.
        """
        with self._lock:
            changes = self._changes
            if changes == self._saved_changes and not anyway:
                return None
            # Requests go on while a copy is written. Copying the dict, not its strings, takes some
            # milliseconds. A closed store does not change, so it needs no copy, nor memory for one.
            pairs = self._pairs if self._closed else self._pairs.copy()
        write(pairs)
        self._saved_changes = changes
        return len(pairs)


# ---- Request syntax: RFC 9110 (HTTP) and RFC 9112 (HTTP/1.1) ----
#
# A server and the proxy in front of it must agree where each request ends, or one client's bytes
# become the start of another client's request. So nothing about that is guessed or repaired: what
# the RFCs do not allow is refused.

# The largest value, in bytes. Receiving it can take three times as much memory, storing it four
# times, as one emoji makes a str use four bytes for every character.
MAX_VALUE = 10 * 1024 * 1024
# The request line, or a chunk's, in bytes. RFC 9112 3 asks for room for 8,000.
MAX_LINE = 8192
# The field lines of a request, in bytes and in lines. Browsers with all their cookies stay under
# 16 KiB and 50 lines. Each connection can hold so much memory.
MAX_HEADER, MAX_FIELDS = 32 * 1024, 100

TOKEN = rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # RFC 9110 5.6.2
TEXT = rb"[^\x00-\x08\x0a-\x1f\x7f]*"  # no control characters but tabs: RFC 9110 5.5
HOST = rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]*)?"
# A target as a proxy may send it begins with http://127.0.0.1:8080, say: RFC 9112 3.2.2.
ORIGIN = rb"(?i:https?)://(?![:/? ])(" + HOST + rb")(?=[/? ])"
# GET /kv/a?query HTTP/1.1
REQUEST_LINE = re.compile(
    rb"(" + TOKEN + rb") (?:(?=/)|" + ORIGIN + rb")([!->@-~]*)(?:\?[!-~]*)? HTTP/1\.([0-9])"
)
# Hosts that cannot be the name of a web page, see Handler._route: an IP address, a name that ends
# in .localhost, or one without a dot, be it plain or percent-encoded.
LOCAL_HOST = re.compile(rb"(?i)(?:\[.*\]|[0-9.]+|[^.%]*|.*\.localhost)(?::[0-9]*)?")
# Accept: text/plain. RFC 9112 5 allows no white space before the colon, and no folded lines.
FIELD = re.compile(rb"(" + TOKEN + rb"):(" + TEXT + rb")")
# 1f;extension, of which the extension is ignored: RFC 9112 7.1.1
CHUNK = re.compile(rb"([0-9A-Fa-f]+)(?:[ \t]*;" + TEXT + rb")?")
# Lines whose end is still to come. A lone CR is not taken for an end, nor is a lone LF, which
# RFC 9112 2.2 would allow. A CR behind all the rest may still get its LF.
UNFINISHED = re.compile(TEXT + rb"(?:\r\n" + TEXT + rb")*\r?")
KEY = re.compile(r"[A-Za-z0-9:_.-]+")


class Refusal(Exception):
    """A request that is answered with an error: its status, a line of text, one more field."""

    def __init__(self, status: int, reason: str, field: bytes = b"") -> None:
        self.status, self.reason, self.field = status, reason, field


def parse_request_line(line: bytes) -> tuple[str, bytes | None, str, bool]:
    """Return the method, the target's host if it has one, its path, and whether it is HTTP/1.1."""
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise Refusal(400, "malformed request line")
    method, host, path, minor = match.groups()
    # A later minor version is HTTP/1.1 with additions that we may ignore: RFC 9110 2.5.
    return method.decode(), host, path.decode(), minor != b"0"


def parse_field_lines(block: bytes) -> list[tuple[bytes, bytes]]:
    """Return the names, in lower case, and the values."""
    lines = block.split(b"\r\n") if block else []
    if len(lines) > MAX_FIELDS:
        raise Refusal(431, "too many field lines")
    fields = []
    for line in lines:
        match = FIELD.fullmatch(line)
        if not match:
            raise Refusal(400, "malformed header field")
        fields.append((match[1].lower(), match[2].strip(b" \t")))
    return fields


class Fields(NamedTuple):
    """What the header fields of a request mean for this server."""

    is_local_host: bool
    length: int  # of the body, in bytes; 0 if it is chunked
    chunked: bool
    keep_alive: bool
    expects_continue: bool


# A client repeats its header fields byte for byte with each request, and parsing them costs more
# than all the rest. What is remembered takes at most 64 times 40 KiB.
@functools.lru_cache(maxsize=64)
def parse_fields(block: bytes, target_host: bytes | None, http11: bool) -> Fields:
    """Decide from a request's header fields how its body is framed and what happens after it."""
    values = collections.defaultdict(list)
    for name, value in parse_field_lines(block):
        values[name].append(value)

    def members(name: bytes) -> set[bytes]:
        """RFC 9110 5.3: a list may stand in several fields."""
        return {each.strip(b" \t") for each in b",".join(values[name]).lower().split(b",")}

    hosts = values[b"host"]  # RFC 9112 3.2
    host = b"".join(hosts)
    if len(hosts) > 1 or (http11 and not hosts) or not re.fullmatch(HOST, host):
        raise Refusal(400, "a request needs one valid Host field")

    lengths, codings = values[b"content-length"], values[b"transfer-encoding"]  # RFC 9112 6.3
    if codings and (lengths or not http11):
        raise Refusal(400, "Transfer-Encoding not allowed here")
    if codings and [coding.lower() for coding in codings] != [b"chunked"]:
        raise Refusal(501, "only the chunked transfer coding")
    digits = lengths[0] if lengths else b"0"
    # With two different lengths, a proxy in front may have gone by the other one. int() takes "+1",
    # "1_0" and " 1 ", too.
    if len(set(lengths)) > 1 or not digits.isdigit():
        raise Refusal(400, "invalid Content-Length")
    if len(digits) > 1000 or int(digits) > MAX_VALUE:  # int() raises an error for 5,000 digits
        raise Refusal(413, "value too large")

    connection = members(b"connection")  # RFC 9112 9.3
    keep_alive = b"close" not in connection and (http11 or b"keep-alive" in connection)
    expects_continue = http11 and b"100-continue" in members(b"expect")  # RFC 9110 10.1.1
    is_local_host = bool(LOCAL_HOST.fullmatch(target_host or host))  # RFC 9112 3.2.2
    return Fields(is_local_host, int(digits), bool(codings), keep_alive, expects_continue)


@functools.lru_cache(maxsize=16)  # made once a second for each status
def answer_head(status: int, second: int) -> bytes:
    """Return the beginning of each answer with this status in this second: RFC 9110 6.6.1."""
    return (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        f"Date: {formatdate(second, usegmt=True)}\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        # Without this, a web page could load a value as a script.
        "X-Content-Type-Options: nosniff\r\n"
    ).encode()


# Made beforehand, as there is no memory to make it then. RFC 9110 6.6.1 asks for no Date here.
OUT_OF_MEMORY = (
    b"HTTP/1.1 507 Insufficient Storage\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Connection: close\r\nContent-Length: 14\r\n\r\nout of memory\n"
)


# ---- Log: lines on stderr ----


class Log:
    """Lines on stderr, written by a thread of its own.

    A pipe that nobody reads, or a paused terminal, blocks its writer. So only this thread writes,
    and nobody waits for it.
    """

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def __call__(self, message: str) -> None:
        if self._lines.qsize() < 1000:  # else nobody reads stderr, and this line is dropped
            self._lines.put(f"kv.py: {message}\n".encode(errors="backslashreplace"))

    def error(self, error: BaseException) -> None:
        """Report a mistake in this program, or a lack of memory; the other clients are served."""
        try:
            place = ""
            for frame, line in traceback.walk_tb(error.__traceback__):
                place = f" in {frame.f_code.co_name}, line {line}"  # the last one raised it
            self(f"error: {error!r}{place}")
        except MemoryError:
            return  # the thread must go on, even without this line

    def close(self, seconds: float) -> None:
        """Wait until all is written, for that many seconds at most."""
        self._lines.put(None)
        self._thread.join(seconds)

    def _write(self) -> None:
        while True:
            try:
                line = self._lines.get()
                if not line:
                    break
                if sys.stderr is not None:  # else 2 may be another file
                    os.write(2, line)
            except (OSError, MemoryError):
                continue  # this line is lost


# ---- Handler: the requests of one connection, while they keep coming ----

# Which method of Handler serves what. Behind "/kv/" comes the key. HEAD is served like GET, as
# `_answer` leaves the body out.
ROUTES = {
    "/kv/": {"GET": "do_GET", "HEAD": "do_GET", "PUT": "do_PUT", "DELETE": "do_DELETE"},
    "/clear": {"DELETE": "do_clear"},
    "/health": {"GET": "do_health", "HEAD": "do_health"},
}
# Input in which no request has begun. Some clients send an empty line behind a body, and
# RFC 9112 2.2 has us ignore one in front of a request.
NO_REQUEST = (b"", b"\r", b"\r\n")
# How many seconds a worker waits for the next request before it parks the connection. A busy client
# sends it within that time, which saves a hand-over between threads. If it were longer, more
# workers would wait for nothing.
PAUSE_SECONDS = 0.1
# How many seconds a request may let a worker wait in all, and how many an answer until its client
# reads more of it. Who needs longer is gone, or wants to hold the worker.
STALL_SECONDS = 15.0
# So many bytes of it that have come, or gone, allow for one second more, as what is large takes
# longer. But a worker never waits longer than STALL_SECONDS for the next of them.
BYTES_PER_SECOND = 1024
# How many seconds a client may go on sending when it has its last answer. In a shutdown, these are
# DRAIN_SECONDS.
LINGER_SECONDS = 5.0
# How many bytes are received at once. Each worker that waits has so much memory allocated.
RECEIVE_SIZE = 16 * 1024


def timeval(seconds: float) -> bytes:
    """Seconds as the C structure that socket options take: whole ones, and microseconds."""
    microseconds = max(1, int(seconds * 1_000_000))  # 0 would mean no limit
    return struct.pack("ll", *divmod(microseconds, 1_000_000))


class Handler(BaseHTTPRequestHandler):
    """Serves the requests of one connection while they keep coming.

    Who knows the base class knows the names: do_GET and its like, command, path, close_connection,
    handle, handle_one_request. Its code is not used, since it reads requests more leniently than
    RFC 9112 allows, and serves a connection to its end. Here the worker calls `handle`.
    """

    server: Server
    connection: socket.socket

    def __init__(self, connection: socket.socket, buffer: bytes, server: Server) -> None:
        """`buffer` has what has already been received of the next request."""
        self.connection, self.buffer, self.server = connection, buffer, server
        self.close_connection = False
        self._receive_limit = 0.0  # in seconds, if `_receive` has set one

    def handle(self) -> None:
        """Serve requests until none comes for a moment, or another connection needs the worker.

        Afterwards `close_connection` says whether the connection is at its end. If not, `buffer`
        has what has been received of the next request. Raises OSError if the client is gone.
        """
        seconds = 0.0 if self.server.is_anybody_waiting() else PAUSE_SECONDS
        try:
            # Nagle's algorithm would hold back an answer until the one before it is acknowledged,
            # which the client's kernel delays by 40 ms.
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            limit = timeval(STALL_SECONDS)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            while self._wait_for_request(seconds):
                self.handle_one_request()
                if self.close_connection or self.server.is_anybody_waiting():
                    break
        except MemoryError as error:
            self.close_connection = True
            self.connection.send(OUT_OF_MEMORY)
            self.server.log.error(error)
            self._linger()

    def _wait_for_request(self, seconds: float) -> bool:
        """Wait for the first bytes of a request; return whether there are any."""
        while self.buffer in NO_REQUEST:
            try:
                received = self._receive(seconds)
            except BlockingIOError:
                return False
            if not received:
                self.close_connection = True
                return False
            self.buffer += received
        return True

    def handle_one_request(self) -> None:
        # Until the request's end is found, an error closes the connection, because nobody knows
        # where the next one starts.
        self.close_connection = self._must_linger = True
        try:
            self._read_head()
            # The body is read even if the request is refused, as the next one starts behind it.
            # But a client that expects 100 is refused before it sends its body.
            if self._fields.expects_continue:
                self._route()
            self._read_body()
            serve = self._route()
            serve()
        except Refusal as refusal:
            self._answer(refusal.status, f"{refusal.reason}\n".encode(), refusal.field)
        except StoreClosed:
            self.close_connection = True
            self._answer(503, b"shutting down\n")
        if self.close_connection and self._must_linger:
            self._linger()

    def _route(self) -> Callable[[], None]:
        """Return the method that serves the request; set `key` if the path has one."""
        # DNS rebinding: a web page has its own name lead to 127.0.0.1, and the browser takes us for
        # the page's server. So a server on such an address refuses that name. RFC 9110 15.5.20.
        if self.server.is_local and not self._fields.is_local_host:
            raise Refusal(421, "misdirected request")
        has_key = self.path.startswith("/kv/")
        methods = ROUTES.get("/kv/" if has_key else self.path)
        if not methods:
            raise Refusal(404, "not found; try /health or /kv/KEY")
        if self.command not in methods:
            allow = f"Allow: {', '.join(methods)}\r\n".encode()
            raise Refusal(405, "method not allowed", allow)
        if has_key:
            self.key = self.path.removeprefix("/kv/")
            if "%" in self.key:  # rarely, and unquote() takes longer to find that out
                self.key = unquote(self.key)
            if not self.key:
                raise Refusal(400, "key cannot be empty")
            if not KEY.fullmatch(self.key):
                raise Refusal(400, "key contains invalid characters")
        serve: Callable[[], None] = getattr(self, methods[self.command])
        return serve

    def do_GET(self) -> None:
        value = self.server.store.get(self.key)
        if value is None:
            raise Refusal(404, "key not found")
        self._answer(200, value.encode())

    def do_PUT(self) -> None:
        if not self._body:
            raise Refusal(400, "value cannot be empty")
        try:
            value = self._body.decode()
        except UnicodeDecodeError:
            raise Refusal(400, "value must be UTF-8 text") from None
        self.server.store.put(self.key, value)
        self._answer(200)

    def do_DELETE(self) -> None:
        self.server.store.delete(self.key)
        self._answer(200)

    def do_clear(self) -> None:
        self.server.store.clear()
        self._answer(200)

    def do_health(self) -> None:
        self._answer(200, b"ok\n")

    # -- Sending --

    def _answer(self, status: int, body: bytes = b"", field: bytes = b"") -> None:
        """Send a whole response in one write: with TCP_NODELAY, each write is a packet."""
        # A full or draining server says `Connection: close`. Closing without a word could lose the
        # client's next request on its way. A request that has already arrived is served first.
        if not self.close_connection and (self.server.full or self.server.draining):
            with contextlib.suppress(BlockingIOError):
                if self.buffer in NO_REQUEST:
                    self.buffer += self._receive(0.0)
            self.close_connection = self.buffer in NO_REQUEST
        if self.close_connection:
            field += b"Connection: close\r\n"
        elif not self._http11:
            field += b"Connection: keep-alive\r\n"
        if self.server.verbose:
            # Quoted and cut, as a client can put anything into it.
            address, line = self.connection.getpeername()[0], repr(self._line)[1:]
            self.server.log(f"{address} {line:.1000} {status} {len(body)}")
        head = answer_head(status, int(time.time()))
        sent_body = b"" if self._line.startswith(b"HEAD ") else body
        self._send(b"".join((head, field, b"Content-Length: %d\r\n\r\n" % len(body), sent_body)))

    def _send(self, data: bytes) -> None:
        """Send all of it. Raises OSError if the client stalls, or reads too slowly on average."""
        sent = self.connection.send(data)  # normally all: so much fits into the kernel's buffer
        patience = STALL_SECONDS
        while sent < len(data):
            if patience <= 0:
                raise TimeoutError
            begin = time.monotonic()
            more = self.connection.send(memoryview(data)[sent:])  # without a copy
            patience += more / BYTES_PER_SECOND - (time.monotonic() - begin)
            sent += more

    def _linger(self) -> None:
        """Let a client that may still be sending read its answer before the connection is closed.

        RFC 9112 9.6: closing with unread input sends a reset, which can overtake the answer. So
        this is a half-close, and what still comes is thrown away until the client closes, too.
        """
        self.connection.shutdown(socket.SHUT_WR)
        begin, limit = time.monotonic(), LINGER_SECONDS
        while time.monotonic() - begin < limit:
            with contextlib.suppress(BlockingIOError):
                # Little at a time, as a server without memory must be able to do this, too.
                if not self._receive(PAUSE_SECONDS, 1024):
                    break
            limit = DRAIN_SECONDS if self.server.stopping else LINGER_SECONDS

    # -- Receiving: to wait for a client, but never for good --

    def _read_head(self) -> None:
        """Take a request's head out of the input: sets command, path, and what the fields mean."""
        self._patience = STALL_SECONDS + len(self.buffer) / BYTES_PER_SECOND  # for the request
        self.buffer = self.buffer.removeprefix(b"\r\n")
        try:
            self._line = self._read_until(b"\r\n", MAX_LINE, 414)
        except Refusal:
            self._line = self.buffer  # for the answer
            raise
        self.command, target_host, self.path, self._http11 = parse_request_line(self._line)
        self._fields = parse_fields(self._read_fields(), target_host, self._http11)

    def _read_body(self) -> None:
        """Take the body out of the input, and so find the request's end: RFC 9112 6.3."""
        fields = self._fields
        self._body: bytes | bytearray = b""
        if fields.length or fields.chunked:
            if fields.expects_continue and not self.buffer:
                self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._body = self._read_chunks() if fields.chunked else self._read(fields.length)
        self.close_connection = not fields.keep_alive
        # Who wants to end it sends nothing more, except perhaps an empty line behind a body.
        self._must_linger = fields.keep_alive or bool(self._body)

    def _read_chunks(self) -> bytearray:
        """RFC 9112 7.1: chunks, one of size 0, then trailer fields, which are only checked."""
        body = bytearray()
        while True:
            match = CHUNK.fullmatch(self._read_until(b"\r\n", MAX_LINE, 431))
            if not match:
                raise Refusal(400, "malformed chunk")
            size = int(match[1], 16)
            if len(body) + size > MAX_VALUE:
                raise Refusal(413, "value too large")
            if size == 0:
                parse_field_lines(self._read_fields())
                return body
            body += self._read(size)
            if self._read(2) != b"\r\n":
                raise Refusal(400, "malformed chunk")

    def _read_fields(self) -> bytes:
        """Take field lines, and the empty line behind them, out of the input."""
        # The end of the line before them goes back. If there are none, it is half of the end here.
        self.buffer = b"\r\n" + self.buffer
        return self._read_until(b"\r\n\r\n", MAX_HEADER, 431)[2:]

    def _read_until(self, end: bytes, limit: int, status: int) -> bytes:
        """Take what stands before `end` out of the input, and `end`, too.

        Refuses with `status` if more than `limit` bytes stand there.
        """
        while True:
            taken, found, rest = self.buffer.partition(end)
            if len(taken) > limit + (0 if found else 3):  # a part of `end` may be there
                raise Refusal(status, "line or header too large")
            if found:
                self.buffer = rest
                return taken
            # A client of another protocol, such as TLS, may wait for an answer before it goes on.
            if not UNFINISHED.fullmatch(taken):
                raise Refusal(400, "malformed request")
            self.buffer += self._receive_more()

    def _read(self, size: int) -> bytearray:
        """Take `size` bytes of a body out of the input."""
        body, self.buffer = bytearray(self.buffer[:size]), self.buffer[size:]
        while len(body) < size:
            body += self._receive_more(size - len(body))
        return body

    def _receive_more(self, size: int = RECEIVE_SIZE) -> bytes:
        """Return up to `size` more bytes of an unfinished request, unless it takes too long."""
        begin = time.monotonic()
        try:
            received = self._receive(min(self._patience, STALL_SECONDS), min(size, RECEIVE_SIZE))
        except BlockingIOError:
            raise Refusal(408, "request took too long") from None
        if not received:
            raise ConnectionAbortedError("the request breaks off")
        self._patience += len(received) / BYTES_PER_SECOND - (time.monotonic() - begin)
        return received

    def _receive(self, seconds: float, size: int = RECEIVE_SIZE) -> bytes:
        """Return up to `size` bytes, none at the end of the input.

        Raises BlockingIOError if none come in that time. The kernel measures it: settimeout()
        would poll first, which is one more system call, and one more wait for the interpreter lock.
        """
        if seconds <= 0:
            return self.connection.recv(size, socket.MSG_DONTWAIT)
        if seconds != self._receive_limit:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(seconds))
            self._receive_limit = seconds
        return self.connection.recv(size)


# ---- Server: the thread that accepts, and the workers ----
#
# A connection is accepted, then in hand (it waits for a worker or has one) or parked (it is idle),
# and at last closed. A parked connection costs no thread, and about 2 KiB.

# How many seconds the acceptor waits for clients. A shutdown may start so much later. If it were
# shorter, an idle server would wake more.
POLL_SECONDS = 0.1
# How many seconds a connection may stay parked. Proxies and clients close theirs after 60 s (nginx,
# most load balancers) or 90 s (Go). If we closed first, a request could be on its way.
IDLE_SECONDS = 120.0
# How many seconds it may stay parked while the server is full. If a first request is lost in a
# burst, the client's kernel may retransmit it only after 6.4 s.
SILENT_SECONDS = 10.0
# How many seconds it may stay parked in a shutdown, which takes as long.
DRAIN_SECONDS = 0.25
# Each client that stalls holds a worker, for STALL_SECONDS or more. Fewer workers would all be held
# by fewer clients. More would take more memory, 25 KB each.
MAX_WORKERS = 1200
# So many connections get their workers at once when no more clients come. Otherwise workers are
# started one after the other, each when the one before has got the interpreter lock, which can take
# 5 ms. Few threads see a large burst through sooner than many.
QUICK_WORKERS = 100
# How many seconds a worker without work stays. To start one takes 100 us.
SPARE_SECONDS = 5.0
# Descriptors that clients cannot have: for the locked directory, the file that is being saved, and
# what the interpreter opens.
RESERVED_DESCRIPTORS = 8


class Server(ThreadingHTTPServer):
    """Accepts connections and gives each to a worker thread while requests keep coming.

    `start` begins, `stop` ends it, `join` waits for what is in flight. There are these threads:

    - The acceptor runs `serve_forever`. It alone accepts connections, takes parked ones out of the
      selector, and closes idle ones, after a last look that nothing has arrived.
    - A worker runs `_work`. It takes a connection from `_jobs`, serves it, and parks or closes it.
      Parking is the last thing that it does with a connection, as another worker may have it
      then. Epoll and kqueue notice at once what a worker registers while the acceptor waits,
      other selectors after POLL_SECONDS.

    `_lock` guards what several threads change: `parked` with the selector, `in_hand`, `full`,
    `_are_coming`, `_workers`, `_expected`, `_next_start`. A look at a flag or a number needs no
    lock where it may be old.
    """

    # Some releases of Python would share the port with another server that listens on it.
    allow_reuse_port = False
    # With the default of 5, a burst of clients is left to retransmission by their kernels: 1 s,
    # 3 s, 7 s. The kernel lowers this to what it allows (somaxconn, 4,096 on Linux).
    request_queue_size = 65_535

    def __init__(self, host: str, port: int, log: Log, verbose: bool) -> None:
        """Bind the address, without listening yet. OSError if that fails."""
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family, address = info[0], cast(Any, info[4])
        super().__init__(address, Handler, bind_and_activate=False)
        # Not the server_bind of HTTPServer, which asks the name service for the name of this host.
        socketserver.TCPServer.server_bind(self)
        # A loopback address: only processes on this machine can reach it, browsers among them.
        self.is_local = bool(re.match(r"127\.|::1$|::ffff:127\.", str(self.server_address[0])))
        self.log, self.verbose = log, verbose
        self.stopping = False  # `stop` was called, after which the backlog is still served
        self.draining = False  # the listener is closed, and answers say `Connection: close`
        self.full = False  # there are as many connections as descriptors for them
        self.in_hand = 0  # how many connections are in `_jobs` or with a worker
        # Since when each connection is parked (monotonic clock), the longest first.
        self.parked: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        # Each with what has been received of its next request. None is the end.
        self._jobs: queue.SimpleQueue[tuple[socket.socket, bytes] | None] = queue.SimpleQueue()
        self._are_coming = False  # whether there were clients in the backlog at the last look
        self._workers = 0  # how many run
        self._expected = 0  # how many will run when all do that have been started
        self._next_start = 0.0  # when these are given up, as without memory a thread may never run
        limit, used = resource.getrlimit(resource.RLIMIT_NOFILE)[0], len(os.listdir("/dev/fd"))
        self._max_connections = max(1, limit - used - RESERVED_DESCRIPTORS)

    @property
    def url(self) -> str:
        host, port = map(str, self.server_address[:2])
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self, store: Store) -> None:
        """Listen, and accept connections in a thread of its own."""
        self.store = store
        self.server_activate()
        self.socket.setblocking(False)
        self._selector.register(self.socket, selectors.EVENT_READ)
        _thread.start_new_thread(self._work, ())  # if the system allows no worker, the start fails
        self._acceptor = threading.Thread(target=self.serve_forever, daemon=True)
        self._acceptor.start()

    def stop(self) -> None:
        """Have the acceptor stop at the end of the backlog. What is in flight goes on."""
        self.socket.listen(0)  # with room for one more client, or the backlog might never end
        with self._lock:
            self.stopping = True
            # Idle connections have DRAIN_SECONDS from now on.
            self.parked = dict.fromkeys(self.parked, time.monotonic())

    def join(self, until: float) -> bool:
        """Wait for the workers and the acceptor, until `until` on the monotonic clock at most.

        Returns whether all have ended. The acceptor is the last one, see `serve_forever`.
        """
        self._acceptor.join(max(0.0, until - time.monotonic()))
        return not self._acceptor.is_alive()

    # -- The acceptor --

    def serve_forever(self, poll_interval: float = POLL_SECONDS) -> None:
        """Accept, resume and close connections, until a drain has closed the last one."""
        while not self.draining or self.in_hand or self.parked:
            try:
                self._serve_once(poll_interval)
            except MemoryError:  # not even for a call, or for a line in the log
                time.sleep(POLL_SECONDS)
        self._jobs.put(None)
        while self._workers:  # none has anything in hand, so they end at once
            time.sleep(poll_interval / 100)

    def _serve_once(self, seconds: float) -> None:
        """Wait for clients, that many seconds at most; have workers serve those who have come."""
        try:
            self._have_one_free()  # if a start has failed, or workers have relied on one
            if self.full or self.stopping:
                # The backlog of a full server would end each wait of the selector at once. When a
                # worker closes the last connection of a drain, nothing would end it.
                time.sleep(seconds / 10)
                seconds = 0.0
            ready = [cast(socket.socket, key.fileobj) for key, _ in self._selector.select(seconds)]
            # Workers wait for this lock before they begin a job, in `_have_one_free`. So the
            # backlog of a burst is emptied first, and does not overflow.
            with self._lock:
                for connection in ready:
                    if connection is not self.socket:
                        self._give_to_worker(connection, self._unpark(connection))
                if not self.draining:
                    self._accept()  # also if there is nobody, as a drain needs to know that
            self._drop_silent()
        except Exception as error:  # no memory, for instance
            self.log.error(error)
            time.sleep(POLL_SECONDS)

    def _accept(self) -> None:
        """With the lock: accept the clients in the backlog. If stopping, close the listener then.

        Only then do answers say close. Who reads it earlier would join the backlog again.
        """
        self._are_coming = False
        for _ in range(1000):  # not without end, as workers wait for the lock
            self.full = self.in_hand + len(self.parked) >= self._max_connections
            if self.full:
                break
            try:
                connection, _ = self.socket.accept()
            except BlockingIOError:
                if self.stopping:
                    self._selector.unregister(self.socket)
                    self.server_close()
                    self.draining = True
                break
            except OSError:  # others have used up the descriptors, or this client has given up
                self.full = True
                break
            connection.setblocking(True)  # on BSD and macOS, it is non-blocking like its listener
            self._give_to_worker(connection, b"")
            self._are_coming = True

    def _give_to_worker(self, connection: socket.socket, received: bytes) -> None:
        """With the lock: have a worker serve a connection."""
        self._jobs.put((connection, received))
        self.in_hand += 1  # not before, as without memory for a job the connection is lost

    def _unpark(self, connection: socket.socket) -> bytes:
        """With the lock: take a connection out of the parked ones; return what it has sent."""
        # Unregistered before it can be closed, as the next descriptor may get its number.
        received: bytes = self._selector.unregister(connection).data
        del self.parked[connection]
        return received

    def _drop_silent(self) -> None:
        """Close what has been parked for too long, unless something has arrived after all."""
        while True:
            # Asked anew each time, as a close ends `full`.
            limit = SILENT_SECONDS if self.full else IDLE_SECONDS
            if self.stopping:
                limit = DRAIN_SECONDS
            with self._lock:
                connection, since = next(iter(self.parked.items()), (None, 0.0))
                if not connection or time.monotonic() - since < limit:
                    break
                received = self._unpark(connection)
                try:
                    connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                    self._give_to_worker(connection, received)
                except OSError:  # nothing has arrived, or the client has reset it
                    connection.close()
                    self.full = False

    # -- The workers --

    def _have_one_free(self) -> None:
        """Start workers if none is free, unless some are about to run."""
        with self._lock:
            now = time.monotonic()
            wanted = min(self.in_hand + 1, MAX_WORKERS)
            if wanted > QUICK_WORKERS or self._are_coming:
                wanted = min(wanted, self._workers + 1)
            are_starting = self._workers < self._expected and now < self._next_start
            if self._workers >= wanted or are_starting:
                return
            missing = wanted - self._workers
            self._expected, self._next_start = wanted, now + POLL_SECONDS
        with contextlib.suppress(RuntimeError, MemoryError):  # the system allows no more threads
            for _ in range(missing):
                # Not by Thread.start(), which would wait for ever for one that never runs.
                _thread.start_new_thread(self._work, ())

    def is_anybody_waiting(self) -> bool:
        """Whether a connection waits for a worker, and none is free."""
        return self.in_hand > self._workers

    def _work(self) -> None:
        with self._lock:
            self._workers += 1
        job = None  # its connection is in hand until it is parked or closed
        while True:
            try:
                if job:
                    self._close(job[0])
                    job = None
                job = self._jobs.get(timeout=SPARE_SECONDS)
                if not job:
                    break
                if self._serve(*job):
                    job = None
            except queue.Empty:
                with self._lock:
                    if self._workers > self.in_hand + 1:  # one stays for the next job
                        self._workers -= 1
                        return
            except MemoryError:  # not even for a call, or for a line in the log
                time.sleep(POLL_SECONDS)
        self._jobs.put(None)  # for the next worker
        with self._lock:
            self._workers -= 1

    def _serve(self, connection: socket.socket, received: bytes) -> bool:
        """Serve a connection while requests keep coming; return False if it is to be closed."""
        try:
            self._have_one_free()  # for the next job, without waiting for the acceptor
            handler = Handler(connection, received, self)
            handler.handle()
            if not handler.close_connection:
                self._park(connection, handler.buffer)
                return True
        except OSError:
            pass  # the client is gone: nobody is left to be told
        except Exception as error:  # a mistake in this program, or a lack of memory
            self.log.error(error)
        return False

    def _park(self, connection: socket.socket, received: bytes) -> None:
        """Park a connection, or put it at the end of the queue if its next request has begun."""
        if received not in NO_REQUEST:
            self._jobs.put((connection, received))  # already read, so no selector reports it
            return
        with self._lock:
            self.parked[connection] = time.monotonic()
            self._selector.register(connection, selectors.EVENT_READ, received)
            self.in_hand -= 1

    def _close(self, connection: socket.socket) -> None:
        connection.close()
        with self._lock:
            self.parked.pop(connection, None)  # if `_park` has failed halfway
            self.in_hand -= 1
            self.full = False


# ---- Process: arguments, signals, when to save, and the order of a shutdown ----

# What ends a process: an operator or a supervisor, Ctrl-C, a terminal that is closed, Ctrl-\, a
# limit of CPU time, a power supply that fails. macOS has no SIGPWR.
STOP_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGPWR")
STOP_SIGNALS = {signal.Signals[name] for name in STOP_NAMES if hasattr(signal, name)}
SAVE_SIGNALS = {signal.SIGUSR1, signal.SIGALRM}  # by an operator, and by the timer of --save-every
# Bytes of address space that are kept for the last save, in case clients use up what `ulimit -v`
# allows. In a try, 1 MiB was not enough.
RESERVED_MEMORY = 8 * 1024 * 1024
# How many seconds the exit waits for the log. If nobody reads it, the last lines are lost.
LOG_SECONDS = 0.5


def reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = error.filename2 or error.filename  # of a rename, the target
        return f"{error.strerror}: {name!r}" if name else error.strerror
    return str(error) or type(error).__name__


def count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


@contextlib.contextmanager
def or_exit(doing: str) -> Iterator[None]:
    """Whatever goes wrong at the start is one line on stderr, and exit code 1."""
    try:
        yield
    except Exception as error:
        sys.exit(f"kv.py: {doing}: {reason(error)}")


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        one_line = message.encode("unicode_escape").decode()  # whatever the arguments contain
        self.exit(2, f"kv.py: {one_line} (see kv.py --help)\n")


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return the type of an argument."""

    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"not a whole number from {least} to {most}")
        return int(text)

    return parse


def parse_arguments() -> argparse.Namespace:
    summary = (__doc__ or "").split("\n", 1)[0]
    parser = ArgumentParser(prog="kv.py", description=summary, allow_abbrev=False)
    directory = os.environ.get("DATA_DIR") or "."
    for name, what, kind, default, text in (
        ("--host", "ADDRESS", str, "127.0.0.1", "where to listen"),
        ("--port", "N", whole_number(0, 65_535), 8080, "0 is any that is free"),
        ("--working-dir", "DIR", str, directory, "for the snapshot; $DATA_DIR or . if not given"),
        ("--graceful-timeout", "SECONDS", whole_number(1, 10**6), 15, "from a signal to the exit"),
        ("--save-every", "SECONDS", whole_number(0, 10**6), 0, "save by itself, too; 0 is never"),
    ):
        text = f"{text} (default: %(default)r)"
        parser.add_argument(name, metavar=what, type=kind, default=default, help=text)
    parser.add_argument("--dump", action="store_true", help="print the snapshot as JSON Lines")
    parser.add_argument("--verbose", action="store_true", help="log every request")
    parser.add_argument("--version", action="version", version=f"kv.py {__version__}")
    arguments = parser.parse_args()
    if not arguments.working_dir:  # a script's unset variable, which does not mean `.`
        parser.error("argument --working-dir: empty")
    return arguments


def set_limits(seconds: int) -> None:
    """Have as many descriptors as this process may have, and CPU time for a shutdown."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY:  # macOS, which allows less than it says
        hard = 10_240
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # A process gets SIGXCPU at the soft limit and SIGKILL at the hard one. `ulimit -t` makes them
    # the same.
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if soft == hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_CPU, (hard - min(seconds, hard // 2), hard))


def stay_on_one_core() -> None:
    """Keep all threads on one processor core, where the system can do that.

    Only the thread that has the interpreter lock runs, so a second core adds little. But passing
    the lock to a thread on another core has to wake that core, which costs half the requests per
    second with 64 busy connections. The core is a random one, as several servers may run here.
    """
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()  # 3.13 may be built without it
    if has_lock and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.sched_setaffinity(0, {random.choice(list(os.sched_getaffinity(0)))})


def dump(snapshot: Snapshot) -> None:
    """Print the snapshot's pairs to stdout, as one JSON object a line."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `kv.py --dump | head` ends quietly
    # Not sys.stdout, which would try again at the exit to write what it could not, and raise.
    with open(1, "wb", closefd=False) as stdout:
        for key, value in read_pairs(snapshot.path).items():
            line = json.dumps({"key": key, "value": value}, ensure_ascii=False)
            stdout.write(line.encode() + b"\n")


class Saver:
    """Saves what has changed, and knows how long a save may take."""

    def __init__(self, store: Store, snapshot: Snapshot, log: Log, longest: float) -> None:
        """`longest` is a first estimate of a save's seconds: those of the load."""
        self._store, self._snapshot, self._log, self.longest = store, snapshot, log, longest
        self._reserve = mmap.mmap(-1, RESERVED_MEMORY, flags=mmap.MAP_PRIVATE)

    def save(self) -> str:
        """Return why it failed, empty if it did not."""
        begin = time.monotonic()
        try:
            saved = self._store.save(self._snapshot.save, not self._snapshot.is_ours())
        except Exception as error:  # whatever it is, there may be another try
            self._log(f"cannot save: {reason(error)}")
            return reason(error)
        finally:
            seconds = time.monotonic() - begin
            self.longest = max(self.longest, seconds)
        if saved is not None:
            self._log(f"saved {count(saved, 'pair')} in {seconds:.2f} s")
        return ""

    def close(self) -> None:
        """The save that follows is the last one: writes are refused, and it has the reserve."""
        self._store.close()
        self._reserve.close()


def save_until_stopped(saver: Saver, stop_signals: set[Any]) -> tuple[float, set[Any]]:
    """Save at each signal for that; return when a stop signal came, and which.

    One that comes during a save counts from the beginning of that save, as nobody knows better.
    """
    received: set[Any] = set()
    while not received:
        first = signal.sigwait(stop_signals | SAVE_SIGNALS)
        begin = time.monotonic()
        if first in SAVE_SIGNALS:
            try:
                saver.save()
            except MemoryError:  # not even for a line in the log
                continue
        else:
            received.add(first)
        # Take all that are pending, so that none of them looks like one that is sent again.
        while pending := signal.sigpending() & stop_signals:
            received.add(signal.sigwait(pending))
    return begin, received


def shut_down(
    server: Server, saver: Saver, log: Log, begin: float, seconds: float, received: set[Any]
) -> str:
    """End what is in flight, and save; return why that failed, empty if it did not.

    `begin` is when the signals came that are in `received`, on the monotonic clock.
    """
    # How often to save, to try again, and to look for the signal.
    step = min(1.0, seconds / 15)

    def is_sent_again() -> bool:
        # A different signal changes nothing: systemd, for one, may send SIGHUP behind SIGTERM. The
        # kernel sends SIGXCPU again by itself.
        return bool(signal.sigpending() & (received - {signal.SIGXCPU}))

    def last_moment() -> float:
        # The last save may take longer than those before, or have to be tried again, if the disk is
        # slow or full. So it gets twice the longest time so far, and a fifth of the time-out. But
        # half a second, or a fifth of a short time-out, is left for clients that do not stall.
        return begin + max(0.8 * seconds - 2 * saver.longest, min(0.5, 0.2 * seconds))

    try:
        log(" and ".join(signal.Signals(number).name for number in received))
        log(f"draining: {count(server.in_hand, 'connection')} in flight, {len(server.parked)} idle")
        server.stop()
        while not server.join(min(time.monotonic() + step, last_moment())):
            now = time.monotonic()
            if is_sent_again() or now >= last_moment():
                break
            # In case SIGKILL comes before the last save, what is acknowledged is on the disk.
            if now + saver.longest < last_moment():
                saver.save()
        log(f"drained in {time.monotonic() - begin:.2f} s, {server.in_hand} given up")
    except Exception as error:  # whatever it is, the last save is made
        log.error(error)
    saver.close()
    while failure := saver.save():
        if is_sent_again() or time.monotonic() + step + saver.longest >= begin + seconds:
            log(f"not saved, {failure}: what was written since the last snapshot is lost")
            break
        time.sleep(step)
    return failure


def main() -> None:
    arguments = parse_arguments()
    using = f"cannot use the working directory {arguments.working_dir!r}"
    listening = f"cannot listen on {arguments.host!r} port {arguments.port}"
    with or_exit(using):
        snapshot = Snapshot(arguments.working_dir)
    if arguments.dump:
        with or_exit(f"cannot dump {snapshot.path!r}"):
            dump(snapshot)
        return
    stop_signals = set(STOP_SIGNALS)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup
        stop_signals.remove(signal.SIGHUP)
    # Blocked in this thread and those it starts, a signal waits until it is asked for. A handler
    # would interrupt this thread halfway, with a lock in its hand that the shutdown then waits for.
    # SIGTTOU could stop us at a line of the log, on a terminal with `stty tostop`.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals | SAVE_SIGNALS | {signal.SIGTTOU})
    os.umask(0o077)  # the snapshot and a new directory are for their owner, who can read them
    stay_on_one_core()
    set_limits(arguments.graceful_timeout)
    with or_exit(listening):  # bound before the load, which may take long; listening after it
        log = Log()
        server = Server(arguments.host, arguments.port, log, arguments.verbose)
    with or_exit(using):
        snapshot.open()
    with or_exit(f"cannot load {snapshot.path!r}"):
        begin = time.monotonic()
        # A damaged one stops the start. After an empty start, the next save would replace it.
        pairs = snapshot.load()
        store = Store(pairs)
        saver = Saver(store, snapshot, log, time.monotonic() - begin)
    # A thread that ends for lack of memory before it runs would print a traceback.
    sys.unraisablehook = lambda unraisable: log.error(unraisable.exc_value or MemoryError())
    with or_exit(listening):
        server.start(store)
    log(f"{count(len(pairs), 'pair')} in {snapshot.path!r}, listening on {server.url}")

    signal.setitimer(signal.ITIMER_REAL, arguments.save_every, arguments.save_every)
    begin, received = save_until_stopped(saver, stop_signals)
    failure = shut_down(server, saver, log, begin, arguments.graceful_timeout, received)
    log.close(LOG_SECONDS)
    # Not by way of sys.exit(): the interpreter would first tidy up, which takes long if there are
    # thousands of threads. Everything is on the disk, and nothing is left to flush.
    os._exit(1 if failure else 0)


if __name__ == "__main__":
    main()
