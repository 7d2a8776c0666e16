#!/usr/bin/env python3
"""A key-value server in one file: HTTP over threads, graceful shutdown, a snapshot on disk.

It needs Linux or macOS and Python 3.9 or later. Keys are made of [A-Za-z0-9:_.-], values are UTF-8
text of 1 byte to 10 MiB, and a value comes back byte for byte. --help lists the flags.

    PUT    /kv/{key}   store the body under key
    GET    /kv/{key}   the value
    DELETE /kv/{key}   remove the key; no error if there is none
    DELETE /clear      remove every key
    GET    /health     the word ok
    HEAD               like GET, without the body

A thread called *acceptor* accepts connections, *workers* serve requests, the main thread saves. In
its life, a connection is *accepted*, then *in hand* (it waits for a worker, or has one), then
*parked* (it is idle, and the acceptor watches it), then in hand again, until it is *closed*.

All pairs live in memory. A signal such as SIGTERM or Ctrl-C begins a shutdown, which writes them to
a snapshot in the working directory. The next start reads the snapshot. A crash loses what was
written since the last snapshot. A shutdown has four steps, of which the first three overlap:

    Stop    New clients are kept out. Clients that are in the listen queue are accepted. Answers say
            `Connection: close`, unless the client's next request has already arrived.
    Idle    A parked connection that sends a request is still served. The others are closed when no
            connection is in hand and the last answer is 0.2 s old, and after 2 s in any case.
    Drain   Requests in flight are waited for, until four fifths of --graceful-timeout have passed
            since the signal (12 s of 15 s). After the first second, changes are saved every second.
    Save    Writes are answered 503, and the last snapshot is written.

If no client stalls and the store is small, this takes about 0.3 s. Exit code 0 means saved.

The file reads from the inside out: each part uses only earlier parts. One exception: a connection
also uses its server. Persistence is in three parts: store, snapshot and shutdown.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import pickle
import queue
import random
import re
import resource
import select
import selectors
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import Any, BinaryIO, NoReturn
from urllib.parse import unquote

if sys.version_info < (3, 9):
    sys.exit("kv.py: needs Python 3.9 or later")

__version__ = "1.1.0"


# ---- Store: all pairs in memory ----


class StoreClosed(Exception):
    """The write came too late to be saved."""


class Store:
    """A dict of strings for any number of threads: each public method holds the lock.

    So each write either comes before `close`, and is part of the last save, or comes after it, and
    raises StoreClosed.
    """

    def __init__(self, pairs: dict[str, str]) -> None:
        self._pairs = pairs
        self._lock = threading.Lock()
        self._closed = False
        self.has_changed = False  # since the last save began
        # Clients may use up the memory. `close` frees these bytes for the last save.
        self._reserve = bytearray(8 * 1024 * 1024)

    def get(self, key: str) -> str | None:
        with self._lock:
            return self._pairs.get(key)

    def put(self, key: str, value: str) -> None:
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
        self.has_changed = True

    def close(self) -> None:
        """Refuse every write from now on, and free the reserve for the last save."""
        with self._lock:
            self._closed = True
            self._reserve.clear()

    def begin_save(self) -> dict[str, str]:
        """Return all pairs, in a dict that later writes do not change."""
        with self._lock:
            self.has_changed = False
            # Writes go on during a save, so a save works on a copy. A copy shares the strings, and
            # takes 30 ms for a million pairs. After `close` there are no more writes.
            return self._pairs if self._closed else self._pairs.copy()


# ---- Snapshot: all pairs in a file ----
#
# The file is a pickle of the dict, then the SHA-256 digest of that pickle. A crash must not leave
# half a file. So each save writes a new file, and renames it over the old one when it is complete.
# A load refuses a damaged file. It also refuses a pickle that names a function to call.


class NoFunctions(pickle.Unpickler):
    """An unpickler that refuses to look up any function or class."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def digest(file: BinaryIO, size: int) -> bytes:
    """Return the digest of the first `size` bytes, and leave the file position just after them."""
    sha256 = hashlib.sha256()
    file.seek(0)
    for start in range(0, size, 1 << 16):
        sha256.update(file.read(min(1 << 16, size - start)))
    return sha256.digest()


def write_pairs(path: str, pairs: dict[str, str]) -> None:
    """Write a file, and sync it to the disk. Raises OSError or MemoryError."""
    with open(path, "w+b") as file:
        pickler = pickle.Pickler(file, protocol=4)
        pickler.fast = True  # else it keeps an index of all strings, a third of the store's size
        pickler.dump(pairs)
        size = file.tell()
        file.write(digest(file, size))  # digest() has read to the end of the pickle
        file.flush()
        os.fsync(file.fileno())


def read_pairs(path: str) -> dict[str, str]:
    """Return the pairs in a file.

    Raises ValueError if the file is not a dict of strings with its digest, OSError if it cannot be
    read (FileNotFoundError if there is none), MemoryError if it does not fit into memory.
    """
    with open(path, "rb") as file:
        # The size of the pickle: the file without the digest.
        size = file.seek(0, os.SEEK_END) - hashlib.sha256().digest_size
        if digest(file, size) != file.read():
            raise ValueError("truncated or altered: its checksum does not match")
        file.seek(0)
        try:
            pairs: dict[str, str] = NoFunctions(file).load()
            for texts in (pairs.keys(), pairs.values()):
                for text in texts:
                    str.encode(text)  # raises for anything but a str, and for half a surrogate pair
        except (MemoryError, OSError):
            raise  # the file may be good
        except Exception as error:  # the pickle module does not promise which
            raise ValueError(f"not a dict of UTF-8 strings: {error}") from error
        if file.tell() != size:  # no save writes such a file, so it is forged
            raise ValueError("there is more than a dict of UTF-8 strings")
    return pairs


class Snapshot:
    """The snapshot in a working directory.

    Each save looks up the whole path again: if a network share has been mounted anew, `.` and open
    descriptors still lead to the old mount. (So does the lock.)
    """

    def __init__(self, directory: str) -> None:
        self._directory = os.path.join(os.getcwd(), directory)
        self.path = os.path.join(self._directory, "kv.pickle")
        self._temporary = self.path + ".tmp"

    def prepare(self) -> None:
        """Create the directory, lock it, and try out a save. Raises OSError or MemoryError."""
        os.makedirs(self._directory, exist_ok=True)
        # Never closed: the kernel releases the lock when the process ends, even in a crash.
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{self._directory!r} is in use by another kv.py") from None
        write_pairs(self._temporary, {})
        self._sync_directory()
        os.unlink(self._temporary)

    def load(self) -> dict[str, str]:
        """Return the saved pairs, none if there is no snapshot; raises what read_pairs does."""
        try:
            return read_pairs(self.path)
        except FileNotFoundError:
            return {}

    def save(self, pairs: dict[str, str]) -> None:
        """Replace the snapshot as a whole. Raises OSError or MemoryError."""
        # The content has to reach the disk before the name. Otherwise a power failure in between
        # could leave an empty file of that name.
        write_pairs(self._temporary, pairs)
        os.replace(self._temporary, self.path)
        self._sync_directory()

    def _sync_directory(self) -> None:
        """Return when the names in the directory are on the disk."""
        directory = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        except OSError as error:
            # CIFS and the shared folders of virtual machines cannot sync a directory.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(directory)


# ---- Log: lines on stderr ----


class Log:
    """Lines on stderr. If nobody reads them, lines are dropped, and no thread waits.

    A pipe that select() calls writable takes PIPE_BUF bytes at once. A terminal may take fewer, so
    the terminal is opened a second time, non-blocking.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptor = 2
        with contextlib.suppress(OSError):  # no terminal, or one that we may not open
            # If set on descriptor 2 itself, O_NONBLOCK would apply to the shell, too.
            self._descriptor = os.open(os.ttyname(2), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)

    def __call__(self, *parts: object) -> None:
        if sys.stderr is None:  # closed before the start, so descriptor 2 may be another file
            return
        # The lock keeps other threads from filling the pipe between select() and write().
        with self._lock, contextlib.suppress(Exception):  # no reader is left, or no memory
            # An exception may have an empty str(): MemoryError().
            message = " ".join(str(part) or repr(part) for part in ("kv.py:", *parts))
            line = message.encode(errors="backslashreplace")
            if select.select([], [self._descriptor], [], 0)[1]:
                os.write(self._descriptor, line[: select.PIPE_BUF - 1] + b"\n")

    def error(self, error: BaseException) -> None:
        """Report a mistake in this program, or a lack of memory."""
        with contextlib.suppress(Exception):  # there may be no memory for this line, either
            *_, (frame, line) = traceback.walk_tb(error.__traceback__)
            self(f"error: {error!r} in {frame.f_code.co_name}, line {line}")


# ---- Request syntax: RFC 9110 (HTTP) and RFC 9112 (HTTP/1.1) ----
#
# A server and the proxy in front of it must agree where each request ends. Otherwise one client's
# bytes become another client's request. So a request whose end is ambiguous is refused.

# The largest value, in bytes. Receiving a value takes several times its size in memory.
MAX_VALUE = 10 * 1024 * 1024
# The request line and the field lines together, or a line of a chunked body, in bytes. Browsers
# with all their cookies stay under 16 KiB.
MAX_HEAD = 32 * 1024

TOKEN = rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # RFC 9110 5.6.2
TEXT = rb"[^\x00-\x08\x0a-\x1f\x7f]*"  # no control characters but tabs: RFC 9110 5.5
# a.example, 127.0.0.1 or [::1], for instance: RFC 3986 3.2.2
HOST = rb"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)"
PORT = rb"(?::[0-9]*)?"
# Host: localhost:8080
HOST_VALUE = re.compile(rb"(?:" + HOST + rb")?" + PORT)
# On a loopback address, Host must be a name without inner dots (localhost), an IP address, or none.
# Any other name may be DNS rebinding: the owner of a.example points it at 127.0.0.1, and then a
# browser lets the pages of a.example read this server.
LOCAL_HOST = re.compile(rb"(?:[A-Za-z0-9_-]*\.?|[0-9.]+|\[.*\])" + PORT)
# GET /kv/a?query HTTP/1.1, or GET http://localhost:8080/kv/a?query HTTP/1.1: RFC 9112 3.2.2
REQUEST_LINE = re.compile(
    rb"(" + TOKEN + rb") (?:(?i:https?)://(" + HOST + PORT + rb"))?(/[!-~]*) HTTP/1\.([0-9])"
)
# Accept: text/plain. RFC 9112 5 allows no white space before the colon, and no folded lines.
FIELD = re.compile(rb"(" + TOKEN + rb"):(" + TEXT + rb")")
LENGTH = re.compile(rb"[0-9]{1,4000}")  # int() refuses more than 4,300 digits
# text/plain; charset=utf-8
CHARSET = re.compile(rb";[ \t]*charset[ \t]*=[ \t]*\"?([^\";, \t]*)")
# 1f;extension, of which the extension is ignored: RFC 9112 7.1.1
CHUNK = re.compile(rb"([0-9A-Fa-f]+)(?:[ \t]*;" + TEXT + rb")?")
# An LF without CR, or a control character other than tab, LF and CR. (A CR may still get its LF.)
NEVER_IN_A_LINE = re.compile(rb"(?<!\r)\n|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Refusal(Exception):
    """The answer to a request that is refused: a status, a line of text, perhaps a field line."""

    def __init__(self, status: int, text: str, field: bytes = b"") -> None:
        self.status, self.text, self.field = status, text, field


def parse_request_line(line: bytes) -> tuple[str, bytes | None, str, bool]:
    """Return the method, the target's host if it has one, its path, and whether it is HTTP/1.1."""
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise Refusal(400, "malformed request line")
    method, host, target, minor = match.groups()
    path = target.partition(b"?")[0]
    # A later minor version is HTTP/1.1 with additions that we may ignore: RFC 9110 2.5.
    return method.decode(), host, path.decode(), minor != b"0"


def parse_field(line: bytes) -> tuple[bytes, bytes]:
    """Return the name, in lower case, and the value."""
    match = FIELD.fullmatch(line)
    if not match:
        raise Refusal(400, "malformed header field")
    return match[1].lower(), match[2].strip(b" \t")


# The values of each field by its name, one for each line on which it stands.
FieldValues = dict[bytes, list[bytes]]


def list_members(values: FieldValues, name: bytes) -> set[bytes]:
    """Return what a field lists, separated by commas, in lower case: RFC 9110 5.6.1."""
    joined = b",".join(values.get(name, [])).lower()
    return {member.strip(b" \t") for member in joined.split(b",")} - {b""}


def find_host(values: FieldValues, http11: bool) -> bytes:
    """Return the value of the Host field: RFC 9112 3.2."""
    hosts = values.get(b"host", [])
    host = b"".join(hosts)
    if len(hosts) > 1 or (http11 and not hosts) or not HOST_VALUE.fullmatch(host):
        raise Refusal(400, "a request needs one valid Host field")
    return host


def find_length(values: FieldValues, http11: bool) -> int | None:
    """Return how many bytes the body has, None if it comes in chunks: RFC 9112 6.3."""
    lengths = values.get(b"content-length", [b"0"])
    codings = values.get(b"transfer-encoding", [])
    if codings and (b"content-length" in values or not http11):
        raise Refusal(400, "Transfer-Encoding not allowed here")
    if codings and [coding.lower() for coding in codings] != [b"chunked"]:
        raise Refusal(501, "only the chunked transfer coding")
    if codings:
        return None
    # If there are two, a proxy may have used the other one. And int() would take "+1" and "1_0".
    if len(set(lengths)) > 1 or not LENGTH.fullmatch(lengths[0]):
        raise Refusal(400, "invalid Content-Length")
    if int(lengths[0]) > MAX_VALUE:
        raise Refusal(413, "value too large")
    return int(lengths[0])


def check_write(values: FieldValues) -> None:
    """Refuse a write with a field that would change its meaning."""
    if b"content-range" in values:  # the body is a part of the value: RFC 9110 14.5
        raise Refusal(400, "Content-Range is not supported: send the whole value")
    if values.keys() & {b"if-match", b"if-none-match", b"if-unmodified-since"}:  # RFC 9110 13.1
        raise Refusal(501, "conditional writes are not supported: there are no entity tags here")
    if list_members(values, b"content-encoding") - {b"identity"}:  # RFC 9110 8.4
        raise Refusal(415, "Content-Encoding is not supported: send the value as it is")
    for content_type in values.get(b"content-type", []):  # RFC 9110 8.3.2
        if set(CHARSET.findall(content_type.lower())) - {b"utf-8", b"us-ascii"}:
            raise Refusal(415, "a value is UTF-8 text, not of another charset")


# Parsing a header costs more than the rest of a request, and most clients repeat theirs byte for
# byte. So up to 128 results are remembered. Refusals are not. A result depends on the arguments
# alone. The path and the body, which differ from request to request, are not arguments.
@functools.lru_cache
def parse_fields(
    block: bytes, method: str, target_host: bytes | None, http11: bool, checks_host: bool
) -> tuple[int | None, bool, bool]:
    """Return the body's length, whether to keep the connection, and whether to send a 100.

    `block` is all field lines. Raises a Refusal if they are invalid or not supported.
    """
    values: FieldValues = {}
    for line in block.split(b"\r\n") if block else ():
        name, value = parse_field(line)
        values.setdefault(name, []).append(value)
    host = find_host(values, http11)
    if checks_host and not LOCAL_HOST.fullmatch(target_host or host):  # RFC 9110 15.5.20
        raise Refusal(421, "misdirected request: here the host is localhost or an IP address")
    if method in ("PUT", "DELETE"):
        check_write(values)
    options = list_members(values, b"connection")  # RFC 9112 9.3
    keep_alive = b"close" not in options and (http11 or b"keep-alive" in options)
    expects_continue = http11 and b"100-continue" in list_members(values, b"expect")
    return find_length(values, http11), keep_alive, expects_continue


# ---- API: what a request does to the store, and how it is answered ----
#
# These functions return the body of an answer with the status 200, or raise a Refusal. All have the
# same arguments, so that a table can hold them. The statuses that come from other parts:
#
#     400, 415, 501             for a write with a field that changes its meaning: see check_write
#     413                       for a value over MAX_VALUE
#     421                       for another host, on a loopback address: see LOCAL_HOST
#     503                       for a write that is too late to be saved: see StoreClosed
#     400, 408, 414, 431, 501   for a request against the rules of HTTP, too slow or too large
#
# An answer to HEAD has no body. An unexpected error closes the connection without an answer.
# No answer has a CORS field, so a browser does not let a page of another origin read it. Before a
# PUT or DELETE from such a page, the browser asks with OPTIONS, which is refused here.

KEY = re.compile(r"[A-Za-z0-9:_.-]+")


def get_value(store: Store, key: str, body: bytes) -> bytes:
    value = store.get(key)
    if value is None:
        raise Refusal(404, "key not found")
    return value.encode()


def put_value(store: Store, key: str, body: bytes) -> bytes:
    if not body:
        raise Refusal(400, "value cannot be empty")
    try:
        value = body.decode()
    except UnicodeDecodeError:
        raise Refusal(400, "value must be UTF-8 text") from None
    store.put(key, value)
    return b""


def delete_key(store: Store, key: str, body: bytes) -> bytes:
    store.delete(key)
    return b""


def clear(store: Store, key: str, body: bytes) -> bytes:
    store.clear()
    return b""


def health(store: Store, key: str, body: bytes) -> bytes:
    return b"ok\n"


ROUTES = {
    "/kv/": {"GET": get_value, "HEAD": get_value, "PUT": put_value, "DELETE": delete_key},
    "/clear": {"DELETE": clear},
    "/health": {"GET": health, "HEAD": health},
}


def handle(store: Store, method: str, path: str, body: bytes) -> bytes:
    """Do what a request asks for, and return the body of its answer."""
    key = ""
    if path.startswith("/kv/"):
        path, key = "/kv/", unquote(path[len("/kv/") :])
    functions = ROUTES.get(path)
    if not functions:
        raise Refusal(404, "not found; try /health or /kv/KEY")
    if method not in functions:
        raise Refusal(405, "method not allowed", f"Allow: {', '.join(functions)}\r\n".encode())
    if path == "/kv/":
        if not key:
            raise Refusal(400, "key cannot be empty")
        if not KEY.fullmatch(key):
            raise Refusal(400, "key contains invalid characters; valid are A-Z a-z 0-9 : _ . -")
    return functions[method](store, key, body)


# ---- Workers: the threads that serve connections ----


class Workers:
    """The worker threads, and the queue in which connections wait for one of them.

    A worker that takes a connection starts another worker if none is free. In a burst, each worker
    starts the next one, while the acceptor only accepts. Workers never leave: 1,000 take 20 MB.
    """

    # A compromise: this many stalled clients hold up all others, and more threads take more memory.
    MAX_THREADS = 1200

    def __init__(self, serve: Callable[[Connection], None]) -> None:
        self._serve = serve
        self._queue: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._lock = threading.Lock()  # to change the two numbers below
        self._threads = 0
        self.in_hand = 0  # connections that wait for a worker, or have one
        self._start_one_if_none_is_free()

    def give(self, connection: Connection) -> None:
        with self._lock:  # a worker needs the lock, too, to count the connection off
            self._queue.put(connection)
            self.in_hand += 1

    def has_waiting(self) -> bool:
        """Whether more connections are in hand than there are workers."""
        return self.in_hand > self._threads

    def _start_one_if_none_is_free(self) -> None:
        with self._lock:
            is_one_free = self.in_hand < self._threads
            if not is_one_free and self._threads < self.MAX_THREADS:
                # Not by Thread.start(), which waits until the new thread has begun to run.
                _thread.start_new_thread(self._work, ())
                self._threads += 1

    def _work(self) -> None:
        while True:
            connection = self._queue.get()
            try:
                with contextlib.suppress(RuntimeError, MemoryError):  # no more threads are possible
                    self._start_one_if_none_is_free()
                self._serve(connection)
            finally:
                with self._lock:
                    self.in_hand -= 1


# ---- Connection: the requests of one client ----

# How many seconds a worker waits for the next request before it parks a connection. A busy client
# sends it within that time, which saves a hand-over between threads. A longer time would tie up
# workers for idle clients.
TICK = 0.2
# How many seconds a request may take (a large one more: see _receive), and for how long a send may
# make no progress. A shorter time cuts off slow networks, a longer one lets clients hold workers.
STALL_SECONDS = 15.0
# How many bytes are received at once. Each worker that waits has that much memory allocated.
RECEIVE_SIZE = 16 * 1024


@functools.lru_cache  # so it is made once a second for each status
def answer_head(status: int, second: int) -> bytes:
    """Return the beginning of each answer with this status in this second: RFC 9110 6.6.1."""
    return (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        f"Date: {formatdate(second, usegmt=True)}\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        "X-Content-Type-Options: nosniff\r\n"  # or a web page could load a value as a script
        "Cache-Control: no-store\r\n"  # or a cache in front could serve a value that is gone
    ).encode()


class Connection:
    """Reads the requests of one client, and answers them.

    The server knows what one connection does not: whether answers say `Connection: close`, and
    whether other connections wait for a worker. What follows serve() is in Server._serve_or_park.
    """

    # Slots keep an idle connection small.
    __slots__ = ("_address", "_buffer", "_deadline", "_server", "_socket", "idle_since", "is_over")

    def __init__(self, sock: socket.socket, address: Any, server: Server) -> None:
        self._socket, self._address, self._server = sock, address[0], server
        self._buffer = b""  # what has been received, and is not taken yet
        self.idle_since = 0.0  # when it was parked, on the monotonic clock
        self.is_over = False  # whether it is to be closed
        sock.setblocking(True)  # on BSD and macOS, it begins non-blocking like the listener
        # Nagle's algorithm would hold back an answer until the one before it is acknowledged, which
        # the client's kernel delays by 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A receive raises BlockingIOError after a tick, a send after STALL_SECONDS. settimeout()
        # would cost one more system call for each of them.
        tick = struct.pack("ll", 0, int(TICK * 1_000_000))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
        stall = struct.pack("ll", int(STALL_SECONDS), 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, stall)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def has_begun_request(self) -> bool:
        """Whether the buffer has a part of a request, and not only empty lines."""
        return bool(self._buffer.strip(b"\r\n"))

    def has_input(self) -> bool:
        """Whether more has arrived, in the buffer or behind it, other than the stream's end."""
        try:
            peek = socket.MSG_PEEK | socket.MSG_DONTWAIT
            return self.has_begun_request() or bool(self._socket.recv(1, peek))
        except OSError:
            return False

    def serve(self) -> None:
        """Serve requests until none comes for a tick, another needs the worker, or it is over."""
        while self._wait_for_request():
            self._serve_request()
            if self.is_over or self._server.workers.has_waiting():
                break

    def _wait_for_request(self) -> bool:
        """Wait for a tick, or not at all if others wait; return whether a request has begun."""
        if not self.has_begun_request():
            flags = socket.MSG_DONTWAIT if self._server.workers.has_waiting() else 0
            try:
                self._buffer = self._socket.recv(RECEIVE_SIZE, flags)
            except BlockingIOError:  # nothing has come
                return False
            self.is_over = not self._buffer  # the client has ended the connection
        return self.has_begun_request()

    def _serve_request(self) -> None:
        """Read a request, do what it asks for, and answer it."""
        self._deadline = time.monotonic() + STALL_SECONDS
        self._buffer = self._buffer.lstrip(b"\r\n")  # empty lines before it: RFC 9112 2.2
        head, extra_fields = b"", b""
        is_end_known = keep_alive = http11 = False  # until the request has been read
        try:
            head = self._take_until(b"\r\n\r\n")
            line, _, block = head.partition(b"\r\n")
            method, host, path, http11 = parse_request_line(line)
            length, keep_alive, expects_continue = parse_fields(
                block, method, host, http11, self._server.checks_host
            )
            # A client that has already begun to send the body does not wait for this.
            if expects_continue and length != 0 and not self._buffer:
                self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = self._take_chunks() if length is None else self._take(length)
            is_end_known = True
            status, content = 200, handle(self._server.store, method, path, body)
        except Refusal as refusal:
            status, content = refusal.status, refusal.text.encode() + b"\n"
            extra_fields = refusal.field
        except StoreClosed:
            status, content = 503, b"shutting down\n"
        # If the end of this request is unknown, so is the beginning of the next one.
        we_close = not is_end_known or (self._server.says_close() and not self.has_input())
        self.is_over = we_close or not keep_alive
        if self.is_over:
            extra_fields += b"Connection: close\r\n"
        elif not http11:
            extra_fields += b"Connection: keep-alive\r\n"
        # The beginning of a head that never became whole is still in the buffer.
        self._answer(head or self._buffer, status, extra_fields, content)
        if we_close:  # the client did not ask for it, so it may still be sending
            self._linger(TICK if is_end_known else 5.0)

    def _answer(self, head: bytes, status: int, extra_fields: bytes, content: bytes) -> None:
        """Send an answer in one write: two would be two packets."""
        if self._server.verbose:
            # Quoted and cut, as a client can put anything into it.
            line = repr(head.partition(b"\r\n")[0])[1:]  # without the b of b'GET ...'
            self._server.log(f"{self._address} {line:.1000} {status} {len(content)}")
        beginning = answer_head(status, int(time.time()))
        length_field = b"Content-Length: %d\r\n\r\n" % len(content)
        body = b"" if head.startswith(b"HEAD ") else content
        self._socket.sendall(b"".join((beginning, extra_fields, length_field, body)))
        self._server.last_answer = time.monotonic()

    def _linger(self, seconds: float) -> None:
        """Half-close, and throw away what comes until the client closes, that long at most.

        Closing with unread input would send a reset, which can reach the client before it has read
        the answer: RFC 9112 9.6.
        """
        self._socket.shutdown(socket.SHUT_WR)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):  # nothing has come for a tick
                if not self._socket.recv(RECEIVE_SIZE):
                    break

    def _take_until(self, end: bytes) -> bytes:
        """Take everything up to `end` out of the buffer, and return it without its end."""
        while True:
            text, found, rest = self._buffer.partition(end)
            if len(text) > MAX_HEAD:
                is_request_line = end == b"\r\n\r\n" and b"\r\n" not in text
                raise Refusal(414 if is_request_line else 431, "line or header too long")
            if found:
                self._buffer = rest
                return text
            # The end may never come, if the client speaks another protocol, such as TLS, or is a
            # person with an `nc` that ends lines with LF alone.
            if NEVER_IN_A_LINE.search(text):
                raise Refusal(400, "malformed request: lines of text must end with CR LF")
            self._buffer += self._receive()

    def _take_chunks(self) -> bytes:
        """Take a chunked body and its trailer fields, which are not used: RFC 9112 7.1."""
        body = bytearray()
        while True:
            match = CHUNK.fullmatch(self._take_until(b"\r\n"))
            if not match:
                raise Refusal(400, "malformed chunk")
            size = int(match[1], 16)
            if size == 0:
                break
            if len(body) + size > MAX_VALUE:
                raise Refusal(413, "value too large")
            body += self._take(size)
            if self._take_until(b"\r\n"):
                raise Refusal(400, "malformed chunk")
        for _ in range(101):  # a hundred fields and the empty line; more could go on for ever
            line = self._take_until(b"\r\n")
            if not line:
                return bytes(body)
            parse_field(line)  # refuses a bare LF: a proxy may take it for a line's end
        raise Refusal(431, "too many field lines")

    def _take(self, size: int) -> bytes:
        """Take `size` bytes of a body out of the buffer."""
        body, self._buffer = bytearray(self._buffer[:size]), self._buffer[size:]
        while len(body) < size:
            body += self._receive(size - len(body))
        return bytes(body)

    def _receive(self, size: int = RECEIVE_SIZE) -> bytes:
        """Return up to `size` more bytes of a request that has begun, unless it takes too long."""
        while time.monotonic() < self._deadline:
            try:
                received = self._socket.recv(min(size, RECEIVE_SIZE))
            except BlockingIOError:  # after each tick
                continue
            if not received:
                raise ConnectionAbortedError("the request breaks off")
            # Large bodies take longer. So each KiB moves the deadline by a second, but never beyond
            # STALL_SECONDS from now.
            later = self._deadline + len(received) / 1024
            self._deadline = min(later, time.monotonic() + STALL_SECONDS)
            return received
        raise Refusal(408, "request took too long")


# ---- Server: the listener, and the parked connections ----


class Server(ThreadingHTTPServer):
    """The listener, the parked connections, and the acceptor thread, which takes care of both.

    A ThreadingHTTPServer was asked for. It listens, accepts, and gives each connection a thread,
    even an idle one. Here, process_request() hands the connection to a worker instead, and the
    acceptor replaces serve_forever(). Do not call shutdown(): it waits until serve_forever() ends.

    The acceptor and the workers meet at the selector, and hold `_lock` to change it:
    - A worker registers a connection, which parks it. From then on, the worker must not touch it,
      as another worker may already have it.
    - The acceptor unregisters a connection, to give it to a worker when something has arrived, or
      to close it when it has been idle for too long.
    """

    allow_reuse_port = False  # or some releases of Python share the port with another server
    # The length of the listen queue, which the kernel lowers to what it allows (4,096 on Linux). A
    # client that finds the queue full tries again after 1, 3 and 7 s.
    request_queue_size = 65_535
    # HTTPServer's own would ask the name service for this host's name, which can take long.
    server_bind = socketserver.TCPServer.server_bind
    # How many seconds a connection may stay parked. Clients and proxies close theirs sooner (nginx
    # 60 s, Go 90 s), and it is better if they do: a close by the server may cross a request.
    IDLE_SECONDS = 120.0
    # The same in a full server, which has to make room. It is more than the 7 s after which a new
    # client's first packets, if they are lost, have been sent again.
    IDLE_SECONDS_FULL = 10.0
    # Descriptors for the selector, the file that is being saved, its directory, the interpreter.
    RESERVED_DESCRIPTORS = 16

    def __init__(self, host: str, port: int, store: Store, log: Log, verbose: bool) -> None:
        """Listen, and begin to serve. Raises OSError or RuntimeError."""
        info: Any = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family = info[0]
        super().__init__(info[4], socketserver.BaseRequestHandler)  # required, but never used
        self.socket.setblocking(False)
        # Only on a loopback address: on others, clients may know this machine by any name.
        address = self.socket.getsockname()[0]
        self.checks_host = bool(re.match(r"127\.|::1$|::ffff:127\.", address))
        self.store, self.log, self.verbose = store, log, verbose
        self.workers = Workers(self._serve_or_park)
        self._lock = threading.Lock()
        # Epoll and kqueue see at once what a worker registers while the acceptor waits.
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.socket, selectors.EVENT_READ)
        # The system hands out the lowest free descriptor. So all below the listener's are in use.
        # The others are for the listener, the connections, and what RESERVED_DESCRIPTORS is for.
        available = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - self.fileno()
        self._max_open = max(2, available - self.RESERVED_DESCRIPTORS)  # the listener counts
        self._is_full = False
        self._is_listening = True
        self.last_answer = 0.0  # when one was sent, on the monotonic clock
        self._stopping_since = 0.0  # on the same clock, 0 if not stopping
        self._acceptor = threading.Thread(target=self._run_acceptor, daemon=True)
        self._acceptor.start()

    def stop(self) -> None:
        """Let no more clients into the listen queue; the acceptor ends after the last connection.

        Otherwise, clients that read `Connection: close` would connect again, and the queue might
        never be empty. And a client that came just before the listener is closed would be reset.
        """
        SO_BINDTOIFINDEX = 62
        try:
            # Binds the listener to a network interface that does not exist, which Linux does not
            # check. So no new client reaches it. Those in the listen queue stay there.
            self.socket.setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, 2**31 - 1)
        except OSError:  # on macOS, on Linux before 5.7, in some sandboxes
            self.socket.listen(1)  # the next best: make the queue short
        self._stopping_since = time.monotonic()

    def wait_until_drained(self, end: float) -> bool:
        """Wait up to 1 s, not beyond `end`, for the acceptor to finish; return whether it did."""
        self._acceptor.join(max(0.0, min(1.0, end - time.monotonic())))
        return not self._acceptor.is_alive()

    def says_close(self) -> bool:
        """Whether answers say `Connection: close`, to have fewer connections."""
        return self._is_full or self._stopping_since > 0

    def _count_open(self) -> int:
        """Count the connections, and the listener until it is closed."""
        # In_hand is read first: a worker registers a parked connection before it lowers in_hand. So
        # the acceptor may count one twice, but misses none.
        return self.workers.in_hand + len(self._selector.get_map())

    def _run_acceptor(self) -> None:
        while not self._stopping_since or self._count_open():
            try:
                self._take_turn()
            except Exception as error:  # whatever it is, the others are served
                self.log.error(error)
                time.sleep(TICK)

    def _take_turn(self) -> None:
        """Give to workers what has arrived, accept, and close what is idle for too long."""
        must_poll = self.says_close()
        if must_poll:
            # In a full server, a client in the listen queue wakes each select() at once. In a
            # server that stops, nothing wakes select() when a worker closes the last connection.
            time.sleep(0.02)
        for ready, _ in self._selector.select(0.0 if must_poll else TICK):
            if ready.data:  # a connection, not the listener
                self._unpark(ready.data)
                self.workers.give(ready.data)
        may_hang_up = self._may_hang_up()
        if self._is_listening:
            self._accept(may_hang_up)
        if may_hang_up:
            self._close_idle(0.0)
        else:
            self._close_idle(self.IDLE_SECONDS_FULL if self._is_full else self.IDLE_SECONDS)

    def _accept(self, may_hang_up: bool) -> None:
        """Accept all clients in the listen queue. Then, if `may_hang_up`, close the listener."""
        try:
            for _ in range(1000):  # not without end, as parked connections wait, too
                self._is_full = self._count_open() >= self._max_open
                if self._is_full:
                    return
                self.process_request(*self.get_request())
        except BlockingIOError:  # the queue is empty
            if may_hang_up:
                with self._lock:
                    self._selector.unregister(self.socket)
                self._is_listening = False
                self.server_close()
        except OSError as error:  # others have used up the descriptors, or the client has left
            self._is_full = error.errno in (errno.EMFILE, errno.ENFILE)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.workers.give(Connection(request, client_address, self))

    def _may_hang_up(self) -> bool:
        """Whether the server stops, and the parked connections and the listener can be closed."""
        if not self._stopping_since:
            return False
        # A client with several connections may send its next request on any of them. And a client
        # may be about to come into the listen queue. So wait until all is quiet for a tick.
        is_busy = self.workers.in_hand > 0  # read first: a worker lowers it after its answer
        last_event = max(self._stopping_since, self.last_answer)
        is_quiet = not is_busy and time.monotonic() - last_event >= TICK
        return is_quiet or time.monotonic() - self._stopping_since >= 2.0

    def _close_idle(self, limit: float) -> None:
        """Close what has been parked for that many seconds, unless something has just arrived."""
        while True:
            connection = self._longest_parked()
            if not connection or time.monotonic() - connection.idle_since < limit:
                break
            self._unpark(connection)
            if connection.has_input():
                self.workers.give(connection)
                break  # its client is not idle, and may send on the others, too
            connection.close()

    def _longest_parked(self) -> Connection | None:
        with self._lock:
            # In the order in which they were registered; the listener is the first, without data.
            watched = self._selector.get_map().values()
            return next((each.data for each in watched if each.data), None)

    def _park(self, connection: Connection) -> None:
        with self._lock:
            connection.idle_since = time.monotonic()
            self._selector.register(connection, selectors.EVENT_READ, connection)

    def _unpark(self, connection: Connection) -> None:
        # Unregister before close(): after that, another connection may get the same descriptor.
        with self._lock:
            self._selector.unregister(connection)

    def _serve_or_park(self, connection: Connection) -> None:
        """Serve a connection in a worker; then close it, queue it again, or park it."""
        try:
            connection.serve()
            if connection.is_over:
                connection.close()
            elif connection.has_begun_request():
                self.workers.give(connection)
            else:
                self._park(connection)
        except OSError:
            connection.close()  # mostly, the client is gone, or does not read
        except Exception as error:  # a mistake in this program, or a lack of memory
            connection.close()
            self.log.error(error)


# ---- Shutdown: when to save, and how long to wait ----

# SIGUSR1 comes from an operator, SIGALRM from the timer of --save-every.
SAVE_SIGNALS = {signal.SIGUSR1, signal.SIGALRM}
# Ctrl-C, kill and Ctrl-\, which people and supervisors send again when they have lost patience.
IMPATIENT = {signal.SIGINT, signal.SIGTERM, signal.SIGQUIT}
Save = Callable[[], bool]  # a function that saves the store, and returns whether that worked


def save_pairs(store: Store, snapshot: Snapshot, log: Log) -> bool:
    """Save the store; return whether that worked. For one thread at a time."""
    begin = time.monotonic()
    try:
        pairs = store.begin_save()
        snapshot.save(pairs)
    except Exception as error:  # whatever it is, there may be another try
        store.has_changed = True
        log("cannot save:", error)
        return False
    log("saved", len(pairs), "pair(s) in", round(time.monotonic() - begin, 2), "s")
    return True


def wait_for_stop(store: Store, save: Save, stop_signals: set[int]) -> tuple[int, float]:
    """Save when asked to. Return the signal that stops the server, and when it came."""
    while True:
        received = signal.sigwait(stop_signals | SAVE_SIGNALS)
        begin = time.monotonic()
        if received in stop_signals:
            return received, begin
        if received == signal.SIGUSR1 or store.has_changed:
            save()
        if signal.sigpending() & stop_signals:
            # It came at some time during the save. So count from the beginning of the save.
            return signal.sigwait(stop_signals), begin


def drain(server: Server, save: Save, begin: float, end: float) -> None:
    """Take the steps Stop, Idle and Drain, until `end` or an impatient signal."""
    server.stop()  # the acceptor does the step Idle: see Server._take_turn
    is_drained = server.wait_until_drained(end)
    # Drop the signals of the first second: under npm, one Ctrl-C arrives as two.
    while signal.sigpending() & IMPATIENT:
        signal.sigwait(IMPATIENT)
    if not is_drained:
        left = max(0.0, end - time.monotonic())
        what = f"{server.workers.in_hand} connection(s), {left:.0f} s at most"
        server.log(f"waiting for {what}; SIGTERM or Ctrl-C ends that")
    while not is_drained and time.monotonic() < end and not signal.sigpending() & IMPATIENT:
        # In case SIGKILL comes before the last save.
        if server.store.has_changed:
            save()
        is_drained = server.wait_until_drained(end)
    server.log(f"drained in {time.monotonic() - begin:.2f} s, {server.workers.in_hand} given up")


def shut_down(server: Server, save: Save, begin: float, seconds: float) -> bool:
    """Drain, and save; return whether all is saved.

    `begin` is when the signal came, on the monotonic clock, and `seconds` the graceful time-out.
    """
    try:
        drain(server, save, begin, begin + 0.8 * seconds)  # the rest is for the last save
    except Exception as error:  # whatever it is, the last save is made
        server.log.error(error)
    server.store.close()  # step Save: a write that comes later is answered 503
    return save()


# ---- Start: arguments, signals, exit codes ----

EPILOG = """\
try it in another terminal:
  curl -X PUT -d hello http://127.0.0.1:8080/kv/greeting
  curl http://127.0.0.1:8080/kv/greeting

SIGTERM and Ctrl-C save and end the server. SIGUSR1 saves while it goes on.
"""


def whole_number(least: int, most: int, text: str) -> int:
    if re.fullmatch("[0-9]{1,9}", text) and least <= int(text) <= most:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kv.py",
        description="A key-value server: HTTP over threads, and a snapshot on disk.",
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    directory = os.environ.get("DATA_DIR", ".")
    for name, what, limits, default, text in (
        ("--host", "ADDRESS", (), "127.0.0.1", "where to listen"),
        ("--port", "N", (0, 65_535), 8080, "0 is any that is free"),
        ("--working-dir", "DIR", (), directory, "for the snapshot; $DATA_DIR or . if not given"),
        ("--graceful-timeout", "SECONDS", (1, 10**6), 15, "how long a shutdown may take"),
        ("--save-every", "SECONDS", (0, 10**6), 0, "save by itself, too; 0 is never"),
    ):
        kind = functools.partial(whole_number, *limits) if limits else str
        text = f"{text} (default: %(default)r)"
        parser.add_argument(name, metavar=what, type=kind, default=default, help=text)
    parser.add_argument("--dump", action="store_true", help="print the snapshot as JSON Lines")
    parser.add_argument("--verbose", action="store_true", help="log every request")
    parser.add_argument("--version", action="version", version=f"kv.py {__version__}")
    return parser.parse_args()


def raise_descriptor_limit() -> None:
    """Have as many descriptors as this process may have, since each connection needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:  # macOS, which allows less than it says
        hard = max(soft, 10_240)
    with contextlib.suppress(OSError, ValueError):  # it works with fewer, too
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def stay_on_one_core() -> None:
    """Keep all threads on one processor core.

    Only one thread at a time has the interpreter lock. Waking another core each time the lock is
    passed on costs half the requests per second with 64 busy connections.
    """
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()  # 3.13 may be built without it
    if has_gil and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            # A random one, as several servers may run here.
            os.sched_setaffinity(0, {random.choice(list(os.sched_getaffinity(0)))})


def dump(snapshot: Snapshot) -> None:
    """Print the snapshot's pairs to stdout, as one JSON object a line."""
    # Not sys.stdout, which would try a failed write again at the exit, and raise there.
    with open(1, "wb", closefd=False) as stdout:
        for key, value in read_pairs(snapshot.path).items():
            line = json.dumps({"key": key, "value": value}, ensure_ascii=False)
            stdout.write(line.encode() + b"\n")


def block_signals() -> set[int]:
    """Have signals wait until the main thread asks for them; return those that stop the server.

    A signal handler runs on top of the main thread's code, which goes on when the handler returns.
    So a handler that waits for that code to release a lock, or, in shutdown(), to end
    serve_forever(), waits for ever.
    """
    # All signals but these and SAVE_SIGNALS stop the server. Some exist only on some systems.
    names = (
        "SIGABRT SIGBUS SIGEMT SIGFPE SIGILL SIGSEGV SIGSYS SIGTRAP "  # signs of a crash
        "SIGKILL "  # cannot be blocked
        "SIGSTOP SIGTSTP SIGTTIN SIGTTOU SIGCONT "  # pause and continue
        "SIGCHLD SIGINFO SIGURG SIGWINCH"  # ignored by default
    )
    not_stopping = {getattr(signal, name, None) for name in names.split()} | SAVE_SIGNALS
    # What nohup or Python ignores stays ignored, except SIGTERM, on which supervisors rely.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    possible = signal.valid_signals() - not_stopping
    stop_signals: set[int] = {n for n in possible if signal.getsignal(n) != signal.SIG_IGN}
    # Threads that start later inherit this.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals | SAVE_SIGNALS)
    return stop_signals


def main() -> None:
    arguments = parse_arguments()
    attempt = f"use the working directory {arguments.working_dir!r} (see --working-dir)"
    try:
        snapshot = Snapshot(arguments.working_dir)
        if arguments.dump:
            attempt = f"dump {snapshot.path!r}, which a server writes at SIGUSR1 or its stop"
            dump(snapshot)
            return
        stop_signals = block_signals()
        os.umask(0o077)  # only the owner may read the snapshot
        stay_on_one_core()
        raise_descriptor_limit()
        snapshot.prepare()
        attempt = f"load {snapshot.path!r} (move it away to start empty, or restore a backup)"
        pairs = snapshot.load()
        attempt = f"listen on {arguments.host!r} port {arguments.port} (see --host and --port)"
        log, store = Log(), Store(pairs)
        server = Server(arguments.host, arguments.port, store, log, arguments.verbose)
    except Exception as error:
        sys.exit(f"kv.py: cannot {attempt}: {str(error) or repr(error)}")
    host, port = server.socket.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    log(f"{len(pairs)} pair(s) in {snapshot.path!r}, listening on {url}, process {os.getpid()}")
    save = functools.partial(save_pairs, store, snapshot, log)
    signal.setitimer(signal.ITIMER_REAL, arguments.save_every, arguments.save_every)
    received, begin = wait_for_stop(store, save, stop_signals)
    log(getattr(received, "name", f"signal {received}"))  # real-time signals have no name
    is_saved = shut_down(server, save, begin, arguments.graceful_timeout)
    # Not sys.exit(): the interpreter would take itself apart while threads are at work.
    os._exit(0 if is_saved else 1)


if __name__ == "__main__":
    main()
