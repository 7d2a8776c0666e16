#!/usr/bin/env python3
"""Tests of kv.py, in the order of its parts. They start the real program and use real sockets.

python3 test_kv.py [-v] [NAME ...]   the suite, or what is named, such as ShutdownTest
python3 test_kv.py soak [MINUTES]    shutdowns under load and hostile input for a long time
python3 test_kv.py bench             how fast, and how much memory
"""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import heapq
import http.client
import http.server
import itertools
import json
import multiprocessing
import os
import pickle
import queue
import random
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import stat
import string
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import unittest
import unittest.mock
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import kv

HERE = Path(__file__).resolve().parent
DEADLINE = 30.0  # for everything that is waited for; far more than it takes


# ---- Helpers ----


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """Return the first true result of `condition`, asked again and again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.005)
    raise AssertionError(f"not within {seconds} s: {what}")


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), DEADLINE).close()
    except ConnectionRefusedError:
        return False
    return True


def free_port() -> int:
    """Below the ports that systems hand out by themselves, so that nobody gets it meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


SNAPSHOT = "kv.pickle"
NO_LOG = cast(kv.Log, lambda message: None)


class Answer(NamedTuple):
    status: int
    fields: dict[str, str]
    body: bytes


class Client:
    """One connection. Sends bytes as they are, and parses answers by itself."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection((host, port), DEADLINE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, data: bytes | bytearray) -> None:
        self.socket.sendall(data)

    def receive(self, method: str = "GET") -> Answer:
        """The next answer; ConnectionError if the connection is closed instead."""
        status_line = self.file.readline()
        if not status_line:
            raise ConnectionError("closed")
        match = re.fullmatch(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [ -~]+\r\n", status_line)
        assert match, f"malformed status line {status_line!r}"
        fields: dict[str, str] = {}
        while (line := self.file.readline()) != b"\r\n":
            field = re.fullmatch(rb"([A-Za-z-]+): ([ -~]+)\r\n", line)
            assert field and field[1].decode() not in fields, f"bad or repeated field {line!r}"
            fields[field[1].decode()] = field[2].decode()
        length = int(fields.get("Content-Length", 0))
        body = b"" if method == "HEAD" else self.file.read(length)
        return Answer(int(match[1]), fields, body)

    def request(self, method: str, path: str, body: bytes | None = None, *more: str) -> Answer:
        self.send(request(method, path, body, *more))
        return self.receive(method)

    def reset(self) -> None:
        """Close it as a client does that has crashed."""
        linger = struct.pack("ii", 1, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.__exit__()

    def is_closed(self) -> bool:
        """Whether the server has closed the connection; waits for nothing else."""
        with contextlib.suppress(ConnectionResetError):
            return self.file.read(1) == b""
        return True


def request(method: str, path: str, body: bytes | None = None, *more: str) -> bytes:
    fields = ["Host: kv", *more]
    if body is not None:
        fields.append(f"Content-Length: {len(body)}")
    return "\r\n".join([f"{method} {path} HTTP/1.1", *fields, "", ""]).encode() + (body or b"")


def put(key: str, value: str) -> bytes:
    return request("PUT", f"/kv/{key}", value.encode())


class ServerProcess:
    """kv.py as a process of its own, on a free port unless it is given one."""

    def __init__(
        self,
        directory: str | Path,
        *arguments: str,
        python: str = sys.executable,
        command: list[str] | None = None,
        ready: bool = True,
        **popen: Any,
    ) -> None:
        self.directory = Path(directory)
        # Beside the working directory, not in it: the server has that one for itself.
        self.log_path = self.directory.with_name(self.directory.name + ".log")
        self.log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        command = command or [python, str(HERE / "kv.py")]
        if not any(argument.startswith("--port") for argument in arguments):
            arguments += ("--port=0",)
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*command, f"--working-dir={directory}", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **popen,
            )
        atexit.register(self.__exit__)  # unittest runs no cleanups on Ctrl-C
        if ready:
            match = wait_until(
                lambda: (
                    re.search(r"listening on http://(.+):(\d+)\n", self.log)
                    or self.process.poll() is not None
                ),
                "the server is ready",
            )
            assert match is not True, f"exit code {self.process.returncode}: {self.log}"
            self.port = int(match[2])

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no process behind, whatever has happened."""
        atexit.unregister(self.__exit__)
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE)

    @property
    def log(self) -> str:
        with open(self.log_path, "rb") as file:
            file.seek(self.log_start)
            return file.read().decode()

    def wait_for_log(self, text: str) -> None:
        wait_until(lambda: text in self.log, f"{text!r} in the log")

    def connect(self) -> Client:
        return Client(self.port)

    def request(self, method: str, path: str, body: bytes | None = None, *more: str) -> Answer:
        with self.connect() as client:
            return client.request(method, path, body, *more)

    def get(self, key: str) -> str | None:
        answer = self.request("GET", f"/kv/{key}")
        return answer.body.decode() if answer.status == 200 else None

    def send_signal(self, number: int = signal.SIGTERM) -> None:
        os.killpg(self.process.pid, number)

    def exit_code(self, seconds: float = DEADLINE) -> int:
        return self.process.wait(seconds)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.send_signal(number)
        return self.exit_code()

    # What Linux tells of a process, and allows it. The tests that need it are skipped elsewhere.

    def limit(self, what: str, number: int) -> None:
        """Change a limit of `ulimit`: the soft one, so that it can be raised again."""
        which = getattr(resource, f"RLIMIT_{what}")
        _, hard = resource.prlimit(self.process.pid, which)
        resource.prlimit(self.process.pid, which, (number, hard))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def address_space_bytes(self) -> int:
        return self.pages()[0] * resource.getpagesize()

    def resident_bytes(self) -> int:
        return self.pages()[1] * resource.getpagesize()

    def pages(self) -> list[int]:
        return [int(n) for n in Path(f"/proc/{self.process.pid}/statm").read_text().split()]

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


on_linux = unittest.skipUnless(sys.platform == "linux", "asks Linux's /proc")


class KVTest(unittest.TestCase):
    """A test with a working directory of its own, which is gone afterwards."""

    def setUp(self) -> None:
        temporary = tempfile.TemporaryDirectory(prefix="kv-test-")
        self.addCleanup(temporary.cleanup)
        self.top = Path(temporary.name).resolve()
        self.directory = self.top / "data"

    @property
    def snapshot(self) -> Path:
        return self.directory / SNAPSHOT

    def start(self, *arguments: str, **options: Any) -> ServerProcess:
        server = ServerProcess(self.directory, *arguments, **options)
        self.addCleanup(server.__exit__)
        return server

    def start_with(self, changes: str, *arguments: str, **options: Any) -> ServerProcess:
        """Start kv.py with some of its constants changed."""
        command = [sys.executable, "-c", f"import kv; {changes}; kv.main()"]
        return self.start(*arguments, command=command, cwd=HERE, **options)

    def client(self, server: ServerProcess) -> Client:
        client = server.connect()
        self.addCleanup(client.__exit__)
        return client

    def begin_upload(self, server: ServerProcess, key: str) -> Client:
        """A client that has sent "valu" of "value", which the server has begun to read."""
        client = self.client(server)
        client.send(request("PUT", f"/kv/{key}", None, "Content-Length: 5", "Expect: 100-continue"))
        self.assertEqual(client.receive().status, 100)
        client.send(b"valu")
        return client

    def write_snapshot(self, pairs: dict[str, str]) -> None:
        self.directory.mkdir(exist_ok=True)
        kv.write_pairs(str(self.snapshot), pairs)

    def read_snapshot(self) -> dict[str, str]:
        return kv.read_pairs(str(self.snapshot))

    def stop_at_once(self, server: ServerProcess) -> None:
        """Long before the patience with stalled clients ends."""
        self.assertEqual(server.stop(), 0)
        self.assertRegex(server.log, r"drained in \d\.\d\d s, 0 given up")

    def assert_burns_no_core(self, server: ServerProcess) -> None:
        before = server.cpu_seconds()
        time.sleep(1)  # the time over which is measured
        self.assertLess(server.cpu_seconds() - before, 0.3)

    def mount(self, *command: str) -> None:
        """Mount something at the working directory."""
        self.directory.mkdir(exist_ok=True)
        if not shutil.which(command[0]) or subprocess.run(command).returncode:
            self.skipTest("may not mount a file system")
        for register in (self.addCleanup, atexit.register):
            umount = ["umount", "-lq", str(self.directory)]
            register(subprocess.run, umount, stderr=subprocess.DEVNULL)

    def assert_refuses_to_start(
        self, reason: str, *arguments: str, code: int = 1, **options: Any
    ) -> None:
        """One line on stderr, no traceback, soon."""
        server = self.start(*arguments, ready=False, **options)
        self.assertEqual(server.exit_code(), code, server.log)
        self.assertEqual(server.log.count("\n"), 1, server.log)
        self.assertIn(reason, server.log)


class Loop:
    """One of the clients of `keep_alive`: sends a request when the one before is answered."""

    def __init__(self, requests: Iterable[bytes], pause: float = 0.0) -> None:
        self.requests, self.pause = iter(requests), pause
        self.socket: socket.socket | None = None
        self.sent = b""  # empty if no answer is due
        self.received = b""


class Outcome(NamedTuple):
    """What the clients of `keep_alive` have seen."""

    answers: collections.Counter[str]  # by status; what was no answer, by what it was instead
    acknowledged: list[bytes]  # the requests that were answered with 200


def is_whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"\r\nContent-Length: (\d+)", head)
    return bool(end and length) and len(body) == int(cast("re.Match[bytes]", length)[1])


def sees_the_end(client: socket.socket) -> bool:
    """Whether a client can see that the server has closed its connection."""
    timeout = client.gettimeout()
    client.setblocking(False)
    try:
        return client.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        client.settimeout(timeout)


def keep_alive(port: int, loops: list[Loop], seconds: float = DEADLINE) -> Outcome:
    """Run clients that keep their connections, until all have ended.

    All connect at once. One connects anew only after `Connection: close`, or if it sees the end of
    its connection before it sends. A request is never sent again. A client whose connection is
    refused has ended.
    """
    outcome = Outcome(collections.Counter(), [])
    end = time.monotonic() + seconds
    due: list[tuple[float, int]] = []  # when which client sends its next request: a heap
    running = len(loops)
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:

        def disconnect(loop: Loop) -> None:
            assert loop.socket
            selector.unregister(loop.socket)
            loop.socket.close()
            loop.socket, loop.received = None, b""

        def send_next(loop: Loop) -> None:
            nonlocal running
            loop.sent = loop.sent or next(loop.requests, b"")
            if not loop.sent:
                running -= 1
                return
            if loop.socket and sees_the_end(loop.socket):
                disconnect(loop)
            if loop.socket:
                loop.socket.send(loop.sent)
                return
            loop.socket = stack.enter_context(socket.socket())
            loop.socket.setblocking(False)
            loop.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            loop.socket.connect_ex(("127.0.0.1", port))
            selector.register(loop.socket, selectors.EVENT_WRITE, loop)

        def go_on(loop: Loop, events: int) -> None:
            assert loop.socket
            if events & selectors.EVENT_WRITE:  # it is connected
                loop.socket.send(loop.sent)
                selector.modify(loop.socket, selectors.EVENT_READ, loop)
                return
            data = loop.socket.recv(65536)
            loop.received += data
            if not data and loop.sent:
                raise ConnectionAbortedError("closed without an answer")
            if data and not is_whole(loop.received):
                return
            outcome.answers[loop.received[9:12].decode()] += bool(data)
            if loop.received[9:12] == b"200":
                outcome.acknowledged.append(loop.sent)
            closing = not data or b"\r\nConnection: close\r\n" in loop.received
            loop.received = b""
            if closing:
                disconnect(loop)
            if data:
                loop.sent = b""
                if loop.pause:
                    heapq.heappush(due, (time.monotonic() + loop.pause, loops.index(loop)))
                else:
                    send_next(loop)

        for loop in loops:
            send_next(loop)
        while running and time.monotonic() < end:
            for key, events in selector.select(0.001 if due else 0.1):
                try:
                    go_on(key.data, events)
                except OSError as error:
                    running -= 1
                    disconnect(key.data)
                    if not isinstance(error, ConnectionRefusedError):
                        outcome.answers[str(error)] += 1
            while due and due[0][0] <= time.monotonic():
                send_next(loops[heapq.heappop(due)[1]])
    outcome.answers["no answer in time"] += running
    return outcome._replace(answers=+outcome.answers)


def burst(port: int, requests: list[bytes], seconds: float) -> collections.Counter[str]:
    """Send each request on a connection of its own, all at once; count the answers by status."""
    return keep_alive(port, [Loop([each]) for each in requests], seconds).answers


def pooled_burst(port: int, requests: list[bytes], seconds: float) -> collections.Counter[str]:
    """The same with a pool of connections like that of Go's net/http, whose clients share it.

    Each request dials, but takes another connection if one is free before. Then the dialled one
    joins the pool, where all but two that are idle are closed. No request is sent again.
    """
    answers: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + seconds
    waiting, received, idle = collections.deque(requests), dict[socket.socket, bytes](), 0
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:

        def use(client: socket.socket) -> None:
            nonlocal idle
            if waiting:
                client.send(waiting.popleft())
                received[client] = b""
            elif idle < 2:
                idle += 1
            else:
                drop(client)

        def drop(client: socket.socket) -> None:
            selector.unregister(client)
            client.close()

        for _ in requests:
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            selector.register(client, selectors.EVENT_WRITE)
        while (waiting or received) and time.monotonic() < end:
            for key, events in selector.select(1.0):
                client = cast(socket.socket, key.fileobj)
                try:
                    if events & selectors.EVENT_WRITE:
                        selector.modify(client, selectors.EVENT_READ)
                        use(client)
                        continue
                    data = client.recv(65536)
                    if client not in received:  # idle, and now closed
                        drop(client)
                        continue
                    received[client] += data
                    if data and not is_whole(received[client]):
                        continue
                    answer = received.pop(client)
                    answers[answer[9:12].decode() if data else "closed without an answer"] += 1
                    if data and b"\r\nConnection: close\r\n" not in answer:
                        use(client)
                    else:
                        drop(client)
                except OSError as error:
                    received.pop(client, None)
                    answers[str(error)] += 1
                    drop(client)
    answers["no answer in time"] += len(waiting) + len(received)
    return +answers


def load_server(server: ServerProcess, requests: int, connections: int) -> None:
    """Requests with other header fields each time, 50 in a packet; then one per connection."""
    with server.connect() as client:
        for first in range(0, requests, 50):
            numbers = range(first, first + 50)
            client.send(
                b"".join(
                    request("PUT", f"/kv/{number % 100}", b"x" * 100, f"X-Number: {number}")
                    for number in numbers
                )
            )
            for _ in numbers:
                assert client.receive().status == 200
    for number in range(connections):
        answer = server.request("GET", "/kv/1", None, f"X-Large: {number:020000}")
        assert answer.status == 200


def has_signal(server: ServerProcess, which: str, number: signal.Signals) -> bool:
    """Whether a signal is in one of the sets in /proc/PID/status."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    match = re.search(rf"^{which}:\s*(\w+)$", status, re.MULTILINE)
    return bool(match and int(match[1], 16) >> (number - 1) & 1)


def has_met(server: ServerProcess, number: signal.Signals) -> bool:
    """Whether a signal is caught, or has been before we looked, as kv.py has blocked it."""
    return has_signal(server, "SigCgt", number) or has_signal(server, "SigBlk", number)


def found(*commands: str) -> bool:
    return all(map(shutil.which, commands))


def allow_descriptors(number: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(number, hard), hard))


def limited(what: str, number: int) -> Callable[[], None]:
    """For preexec_fn: start with one of the limits of `ulimit`."""
    return lambda: resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (number, number))


def be_bound_by_permissions() -> None:
    """For preexec_fn: take from root the rights to ignore file permissions."""
    if os.getuid() == 0 and sys.platform == "linux":
        capability_bounding_set_drop, dac_override, dac_read_search = 24, 1, 2
        for capability in (dac_override, dac_read_search):
            ctypes.CDLL(None).prctl(capability_bounding_set_drop, capability, 0, 0, 0)


def not_under_nohup() -> None:
    """For preexec_fn: do not ignore SIGHUP, even if the tests do."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def interpreters() -> list[str]:
    """Every CPython from 3.9 on that can be found, one of each version, oldest first."""
    found: dict[tuple[int, ...], str] = {}
    names = [f"python3.{minor}" for minor in range(9, 30)]
    candidates = [sys.executable, *filter(None, map(shutil.which, names))]
    candidates += map(str, Path.home().glob(".pyenv/versions/*/bin/python3"))
    script = "import sys; print(*sys.version_info[:2])"
    for candidate in candidates:
        run = subprocess.run([candidate, "-c", script], capture_output=True, text=True)
        version = tuple(map(int, run.stdout.split())) if run.returncode == 0 else ()
        if version >= (3, 9):
            found.setdefault(version, candidate)
    return [found[version] for version in sorted(found)]


# ---- Snapshot ----


class CodeRunner:
    """Unpickled without care, creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def bad_snapshots(whole: bytes, trap: Path) -> Iterator[tuple[str, bytes, str]]:
    """What is wrong, the file, and the reason that the refusal gives."""
    yield "empty", b"", "too short"
    yield "half", whole[: len(whole) // 2], "checksum"
    yield "appended", whole + b"\0", "checksum"
    yield "no digest", pickle.dumps({"key": "value" * 10}, 4), "checksum"
    # The others have a digest that is right.
    good = b"\x80\x04}\x8c\x01a\x8c\x01bs."
    evil = [pickle.dumps(CodeRunner(trap), protocol) for protocol in range(6)]
    nested = b")" + b"\x85" * 1_000_000
    laughs = b")" + b"2\x86" * 50
    for what, pickled, reason in (
        ("a list", pickle.dumps(["a"], 4), "not a dict"),
        ("a string", b"\x80\x04\x8c\x01a.", "not a dict"),
        ("a string behind a dict", b"\x80\x04}\x8c\x01a.", "not a dict"),
        ("a number as a value", good.replace(b"\x8c\x01b", b"K\x01"), "opcode 0x4b at byte 6"),
        ("a number as a key", good.replace(b"\x8c\x01a", b"K\x01"), "opcode 0x4b at byte 3"),
        ("bytes as a value", good.replace(b"\x8c\x01b", b"C\x01b"), "opcode 0x43"),
        ("None as a value", good.replace(b"\x8c\x01b", b"N"), "opcode 0x4e"),
        ("a dict as a value", good.replace(b"\x8c\x01b", b"}"), "opcode 0x7d"),
        ("two pickles", good + good, "opcode 0x2e"),
        ("no end", good[:-1], "no end"),
        ("half a pair", b"\x80\x04}(\x8c\x01au.", "not a dict of UTF-8"),
        ("no mark", b"\x80\x04}\x8c\x01a\x8c\x01bu.", "not a dict of UTF-8"),
        ("bad UTF-8", b"\x80\x04}\x8c\x01a\x8c\x01\xffs.", "not a dict of UTF-8"),
        ("a lone surrogate", b"\x80\x04}\x8c\x01a\x8c\x03\xed\xa0\x80s.", "surrogates not allowed"),
        ("one in a key", b"\x80\x04}\x8c\x03\xed\xbf\xbf\x8c\x01as.", "surrogates not allowed"),
        ("text that is not there", b"\x80\x04}X\xff\xff\xff\x7f", "no end"),
        ("bytes that are not there", b"\x80\x04}\x8e" + b"\xff" * 7 + b"\x7f.", "opcode 0x8e"),
        ("a memo entry with a huge number", b"\x80\x04}r\xff\xff\xff\x7f.", "opcode 0x72"),
        ("a tuple nested a million deep", b"\x80\x04}" + nested + b"\x8c\x01vs.", "opcode 0x29"),
        ("a tuple that takes years", b"\x80\x04}" + laughs + b"\x8c\x01vs.", "opcode 0x29"),
        ("code behind a good pickle", good + evil[4], "opcode 0x2e"),
        *((f"code, protocol {number}", data, "not a dict") for number, data in enumerate(evil)),
    ):
        yield what, pickled + hashlib.sha256(pickled).digest(), reason


class SnapshotTest(KVTest):
    PAIRS: ClassVar = {"a": "1", "key:2": "päivää 🌍\n", "long": "x" * 300}

    def test_every_truncation_is_refused(self) -> None:
        self.write_snapshot(self.PAIRS)
        whole = self.snapshot.read_bytes()
        for size in range(len(whole)):
            self.snapshot.write_bytes(whole[:size])
            self.assertRaises(kv.SnapshotError, self.read_snapshot)

    def test_every_flipped_bit_is_refused(self) -> None:
        self.write_snapshot(self.PAIRS)
        whole = self.snapshot.read_bytes()
        for bit in range(len(whole) * 8):
            altered = bytearray(whole)
            altered[bit // 8] ^= 1 << bit % 8
            self.snapshot.write_bytes(altered)
            self.assertRaises(kv.SnapshotError, self.read_snapshot)

    def test_a_bad_snapshot_stops_the_start_and_stays_as_it_is(self) -> None:
        self.write_snapshot(self.PAIRS)
        trap = self.top / "trap"
        for what, data, reason in bad_snapshots(self.snapshot.read_bytes(), trap):
            with self.subTest(what):
                self.snapshot.write_bytes(data)
                self.assert_refuses_to_start(f"'{self.snapshot}': ")
                self.assertIn(reason, (self.top / "data.log").read_text().splitlines()[-1])
                self.assertEqual(self.snapshot.read_bytes(), data)
                self.assertFalse(trap.exists(), "code from the file was run")

    def test_no_opcode_calls_anything(self) -> None:
        """The unpickler refuses by itself, too, should a pickle ever get past the check."""
        trap = self.top / "trap"
        for protocol in range(6):
            self.snapshot.parent.mkdir(exist_ok=True)
            path = self.top / "pickle"
            path.write_bytes(pickle.dumps(CodeRunner(trap), protocol))
            with open(path, "rb") as file, self.assertRaises(pickle.UnpicklingError):
                kv.StringsOnly(file).load()
        self.assertFalse(trap.exists())

    def test_what_is_no_file_is_refused(self) -> None:
        self.snapshot.mkdir(parents=True)
        self.assert_refuses_to_start("not a regular file")
        self.snapshot.rmdir()
        os.mkfifo(self.snapshot)
        self.assert_refuses_to_start("not a regular file")
        self.snapshot.unlink()
        self.snapshot.symlink_to("elsewhere")
        self.assert_refuses_to_start("not a regular file")

    @on_linux
    def test_a_snapshot_that_does_not_fit_into_memory_is_not_called_invalid(self) -> None:
        with self.start() as server:
            used = server.address_space_bytes()
        self.write_snapshot({f"key{number}": "x" * 10_000_000 for number in range(30)})
        # Once, but not twice, even if the running server's threads have some arenas of 64 MiB more.
        self.assert_refuses_to_start("MemoryError", preexec_fn=limited("AS", used + 330_000_000))

    def test_people_can_read_it_with_pickle(self) -> None:
        self.write_snapshot(self.PAIRS)
        with open(self.snapshot, "rb") as file:
            self.assertEqual(pickle.load(file), self.PAIRS)

    def test_only_the_owner_can_read_it(self) -> None:
        """Whatever the umask, and the owner can."""
        for umask in (0, 0o022, 0o400, 0o777):
            self.directory = self.top / f"{umask:o}"
            left_by_a_killed_save = self.directory / "kv.pickle.tmp"
            for _ in range(2):
                with self.start(preexec_fn=functools.partial(os.umask, umask)) as server:
                    server.request("PUT", "/kv/a", b"1")
                    left_by_a_killed_save.write_text("")  # and readable by all
                    self.assertEqual(server.stop(), 0)
                self.assertEqual(stat.S_IMODE(self.directory.stat().st_mode), 0o700)
                self.assertEqual(stat.S_IMODE(self.snapshot.stat().st_mode), 0o600)
                self.assertEqual(os.listdir(self.directory), [SNAPSHOT])

    def test_every_python_reads_what_every_other_writes(self) -> None:
        pythons = interpreters()
        expected: dict[str, str] = {}
        for number, python in enumerate([*pythons, *reversed(pythons)]):
            with self.start(python=python) as server:
                for key, value in expected.items():
                    self.assertEqual(server.get(key), value)
                expected[f"key{number}"] = "🌍" * number + "."
                server.request("PUT", f"/kv/key{number}", expected[f"key{number}"].encode())
                self.assertEqual(server.stop(), 0)
        self.assertEqual(self.read_snapshot(), expected)

    def test_sizes_at_which_the_pickle_changes_its_form(self) -> None:
        for count in (0, 1, 2, 999, 1000, 1001, 2001):
            for size in (1, 255, 256, 65_535, 65_536, 70_000):
                if count * size < 3_000_000:
                    pairs = {f"key{number}": "v" * size for number in range(count)}
                    self.write_snapshot(pairs)
                    self.assertEqual(self.read_snapshot(), pairs)


# ---- Store ----


class StoreTest(unittest.TestCase):
    def test_a_save_gets_what_has_changed_since_the_last_one(self) -> None:
        store = kv.Store({"a": "1"})
        saved: list[dict[str, str]] = []
        self.assertFalse(store.save(saved.append))
        store.put("b", "2")
        self.assertTrue(store.save(saved.append))
        self.assertFalse(store.save(saved.append))
        store.delete("a")
        store.save(saved.append)
        store.clear()
        store.save(saved.append)
        store.save(saved.append, anyway=True)
        self.assertEqual(saved, [{"a": "1", "b": "2"}, {"b": "2"}, {}, {}])

    def test_what_a_save_failed_to_write_is_still_unsaved(self) -> None:
        store = kv.Store({})
        store.put("a", "1")

        def fail(pairs: dict[str, str]) -> None:
            raise OSError

        self.assertRaises(OSError, store.save, fail)
        saved: list[dict[str, str]] = []
        self.assertTrue(store.save(saved.append))
        self.assertEqual(saved, [{"a": "1"}])

    def test_a_write_during_a_save_is_not_in_it_but_in_the_next(self) -> None:
        store = kv.Store({})
        store.put("a", "1")
        saved: list[dict[str, str]] = []

        def write(pairs: dict[str, str]) -> None:
            store.put("b", "2")
            saved.append(pairs)

        store.save(write)
        self.assertTrue(store.save(saved.append))
        self.assertEqual(saved, [{"a": "1"}, {"a": "1", "b": "2"}])

    def test_a_closed_store_refuses_writes_and_still_reads(self) -> None:
        store = kv.Store({"a": "1"})
        store.close()
        self.assertRaises(kv.StoreClosed, store.put, "a", "2")
        self.assertRaises(kv.StoreClosed, store.delete, "a")
        self.assertRaises(kv.StoreClosed, store.clear)
        self.assertEqual(store.get("a"), "1")

    def test_everything_waits_for_the_lock(self) -> None:
        store = kv.Store({})
        arguments: dict[str, tuple[Any, ...]] = {
            "get": ("a",),
            "put": ("a", "1"),
            "delete": ("a",),
            "clear": (),
            "close": (),
            "save": (lambda pairs: None,),
        }
        self.assertEqual(set(arguments), {name for name in vars(kv.Store) if name[0] != "_"})
        for name in arguments:
            access = getattr(store, name)
            thread = threading.Thread(target=access, args=arguments[name], daemon=True)
            with store._lock:
                thread.start()
                thread.join(0.02)
                self.assertTrue(thread.is_alive())
            thread.join(DEADLINE)
            self.assertFalse(thread.is_alive())


# ---- Handler: the API ----


ALL_CHARACTERS = string.ascii_letters + string.digits + ":_.-"


class APITest(unittest.TestCase):
    server: ServerProcess

    @classmethod
    def setUpClass(cls) -> None:
        top = tempfile.TemporaryDirectory(prefix="kv-test-")
        cls.addClassCleanup(top.cleanup)
        cls.server = ServerProcess(Path(top.name) / "data")
        cls.addClassCleanup(cls.server.__exit__)

    def setUp(self) -> None:
        self.client = self.server.connect()
        self.addCleanup(self.client.__exit__)

    def check(self, answer: Answer, status: int, body: bytes) -> None:
        self.assertEqual((answer.status, answer.body), (status, body))
        self.assertEqual(answer.fields["Content-Type"], "text/plain; charset=utf-8")
        self.assertEqual(answer.fields["Content-Length"], str(len(body)))
        # What a web page needs to read an answer, and what keeps a value from being a script.
        self.assertNotRegex("".join(answer.fields), "Access-Control")
        self.assertEqual(answer.fields["X-Content-Type-Options"], "nosniff")
        self.assertRegex(
            answer.fields["Date"], r"^[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} [\d:]+ GMT$"
        )

    def test_a_value_comes_back_byte_for_byte(self) -> None:
        for value in ("x", "päivää 🌍", "\ufeffa\tb\r\n\n ", "\0", "long " * 2000, "é" * 5_000_000):
            self.check(self.client.request("PUT", "/kv/a", value.encode()), 200, b"")
            self.check(self.client.request("GET", "/kv/a"), 200, value.encode())

    def test_keys_of_every_allowed_character(self) -> None:
        for key in ("a", "A", "0", ":", "_", ".", "-", "..", ALL_CHARACTERS, "k" * 8000):
            self.check(self.client.request("PUT", f"/kv/{key}", key.encode()), 200, b"")
        self.check(self.client.request("GET", "/kv/a"), 200, b"a")
        self.check(self.client.request("GET", "/kv/A"), 200, b"A")
        self.client.request("PUT", "/kv/a:b_c.d-e", b"value")
        self.check(self.client.request("GET", "/kv/%61%3ab_c%2Ed-e"), 200, b"value")

    def test_bad_keys_are_refused_by_every_method(self) -> None:
        for method in ("GET", "PUT", "DELETE"):
            empty = self.client.request(method, "/kv/", b"value")
            self.check(empty, 400, b"key cannot be empty\n")
            escaped = ["%" + code for code in ("20", "2F", "C3%A4", "FF", "00", "25", "0A")]
            for key in ("a/b", "a+b", "a~", *("a" + each for each in escaped)):
                answer = self.client.request(method, f"/kv/{key}", b"value")
                self.check(answer, 400, b"key contains invalid characters\n")
                self.assertEqual(self.client.request("HEAD", f"/kv/{key}").status, 400)

    def test_bad_values_are_refused_and_not_stored(self) -> None:
        self.check(self.client.request("PUT", "/kv/bad", b""), 400, b"value cannot be empty\n")
        self.check(self.client.request("PUT", "/kv/bad"), 400, b"value cannot be empty\n")
        for value in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"ok \xe4 ok"):
            answer = self.client.request("PUT", "/kv/bad", value)
            self.check(answer, 400, b"value must be UTF-8 text\n")
        self.check(self.client.request("GET", "/kv/bad"), 404, b"key not found\n")

    def test_a_value_of_10_mib_is_the_largest(self) -> None:
        value = b"x" * 10 * 1024 * 1024
        self.check(self.client.request("PUT", "/kv/large", value), 200, b"")
        self.check(self.client.request("GET", "/kv/large"), 200, value)
        self.check(self.client.request("PUT", "/kv/large", value + b"x"), 413, b"value too large\n")

    def test_deleting_a_missing_key_is_a_success(self) -> None:
        self.client.request("PUT", "/kv/gone", b"value")
        self.check(self.client.request("DELETE", "/kv/gone"), 200, b"")
        self.check(self.client.request("GET", "/kv/gone"), 404, b"key not found\n")
        self.check(self.client.request("DELETE", "/kv/gone"), 200, b"")

    def test_clear_removes_every_key(self) -> None:
        for key in ("gone", "too"):
            self.client.request("PUT", f"/kv/{key}", b"value")
        self.check(self.client.request("DELETE", "/clear"), 200, b"")
        for key in ("gone", "too"):
            self.check(self.client.request("GET", f"/kv/{key}"), 404, b"key not found\n")
        self.check(self.client.request("DELETE", "/clear"), 200, b"")

    def test_health_is_ok(self) -> None:
        self.check(self.client.request("GET", "/health"), 200, b"ok\n")

    def test_head_is_get_without_the_body(self) -> None:
        self.client.request("PUT", "/kv/head", b"value")
        for path in ("/kv/head", "/kv/none", *kv.ROUTES, "/other"):
            head = self.client.request("HEAD", path)
            get = self.client.request("GET", path)
            self.assertEqual(head.status, get.status)
            self.assertEqual({**head.fields, "Date": ""}, {**get.fields, "Date": ""})

    def test_a_head_that_comes_again_has_another_body(self) -> None:
        for value in (b"one", b"two"):
            self.check(self.client.request("PUT", "/kv/again", value), 200, b"")
            for _ in range(2):
                self.check(self.client.request("GET", "/kv/again"), 200, value)
            for _ in range(2):
                answer = self.client.request("PUT", "/kv/a+b", value)
                self.check(answer, 400, b"key contains invalid characters\n")
        for _ in range(2):
            self.check(self.client.request("DELETE", "/kv/again"), 200, b"")
            self.check(self.client.request("GET", "/kv/again"), 404, b"key not found\n")
            answer = self.client.request("POST", "/kv/again", b"value")
            self.check(answer, 405, b"method not allowed\n")

    def test_a_refusal_does_not_take_the_method_of_the_request_before(self) -> None:
        """It has a body, unlike the answer to HEAD."""
        self.client.request("HEAD", "/health")
        self.client.send(b"\n")
        self.check(self.client.receive(), 400, b"malformed request\n")

    def test_other_methods_are_not_allowed(self) -> None:
        allowed = {"/kv/": "GET, HEAD, PUT, DELETE", "/clear": "DELETE", "/health": "GET, HEAD"}
        self.assertEqual(set(allowed), set(kv.ROUTES))
        methods = {"GET", "PUT", "DELETE", "POST", "PATCH", "OPTIONS", "TRACE", "get", "QUERY"}
        for path, allow in allowed.items():
            keys = ("", "a", "a%20b") if path == "/kv/" else ("",)
            for method in methods - set(allow.split(", ")):
                for key in keys:
                    answer = self.client.request(method, path + key, b"value")
                    self.check(answer, 405, b"method not allowed\n")
                    self.assertEqual(answer.fields["Allow"], allow)

    def test_the_documents_name_every_route(self) -> None:
        readme = (HERE / "README.md").read_text()
        for path, methods in kv.ROUTES.items():
            for method in set(methods) - {"HEAD"}:
                self.assertRegex(kv.__doc__ or "", rf" {method} +{path}")
                self.assertIn(f"| `{method} {path}", readme)

    def test_other_paths_are_not_found(self) -> None:
        for path in ("/", "/kv", "/KV/a", "//kv/a", "/clear/", "/health/x", "/kv%2Fa"):
            for method in ("GET", "PUT", "POST"):
                self.check(
                    self.client.request(method, path, b"value"),
                    404,
                    b"not found; try /health or /kv/KEY\n",
                )

    def test_the_query_is_ignored(self) -> None:
        self.check(self.client.request("PUT", "/kv/query?a=b&c=/?", b"value"), 200, b"")
        self.check(self.client.request("GET", "/kv/query?"), 200, b"value")
        self.check(self.client.request("GET", "/health?x=%20"), 200, b"ok\n")

    def test_http_client_of_the_standard_library(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=DEADLINE)
        connection.request("PUT", "/kv/std", "väl".encode(), {"Content-Type": "text/plain"})
        self.assertEqual(connection.getresponse().read(), b"")
        connection.request("PUT", "/kv/chunks", iter([b"a", b"bc"]))
        self.assertEqual(connection.getresponse().read(), b"")
        for key, value in (("std", "väl"), ("chunks", "abc")):
            connection.request("GET", f"/kv/{key}")
            self.assertEqual(connection.getresponse().read().decode(), value)
        connection.close()

    def test_reading_one_key_10_000_times_over_one_connection(self) -> None:
        """With an answer in two writes this takes 400 s: each waits 40 ms for a delayed ACK."""
        self.client.request("PUT", "/kv/a", b"value")
        end = time.monotonic() + 4 * DEADLINE
        for _ in range(10_000):
            self.check(self.client.request("GET", "/kv/a"), 200, b"value")
            self.assertLess(time.monotonic(), end)


# ---- Handler: HTTP as the RFCs have it ----


class Rule(NamedTuple):
    """What is sent on a new connection, which answers come, and what then becomes of it."""

    section: str  # of RFC 9112, or of RFC 9110 if it says so
    what: str
    sent: bytes
    answers: str  # status codes, then "open" or "closed"


GET = b"GET /health HTTP/1.1\r\n"
PUT = b"PUT /kv/rule HTTP/1.1\r\nHost: x\r\n"
HOST = b"Host: x\r\n"
CHUNKED = PUT + b"Transfer-Encoding: chunked\r\n\r\n"
END = b"\r\n"

# A rule is a line, two, or three.
# fmt: off
RULES = [
    # The request line
    Rule("3", "a plain request", GET + HOST + END, "200 open"),
    Rule("3", "two spaces", b"GET  /health HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3", "a tab", b"GET\t/health HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3", "a space behind", b"GET /health HTTP/1.1 \r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3", "a space before", b" GET /health HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3", "no version", b"GET /health\r\n\r\n", "400 closed"),
    Rule("3", "no target", b"GET HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3", "a space in the target", b"GET /he alth HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3", "nothing but garbage", b"\x16\x03\x01\x02\x00\x01\r\n\r\n", "400 closed"),
    Rule("3", "too long", b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", "414 closed"),
    Rule("3", "too long, without an end", b"GET /" + b"x" * 42_000, "414 closed"),
    Rule("3", "the longest head, behind an empty line",
         END + b"GET /health?" + b"x" * (8192 - 21) + b" HTTP/1.1\r\n"
         + HOST + b"A: " + b"x" * (32_768 - 14) + END * 2, "200 open"),
    Rule("3.1", "a method that is no token",
         b"G(T /health HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3.1", "an unknown method", b"BREW /health HTTP/1.1\r\nHost: x\r\n\r\n", "405 open"),
    Rule("3.1", "methods are case-sensitive",
         b"get /health HTTP/1.1\r\nHost: x\r\n\r\n", "405 open"),
    Rule("2.3", "HTTP/2.0", b"GET /health HTTP/2.0\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("9110 2.5", "HTTP/1.2", b"GET /health HTTP/1.2\r\nHost: x\r\n\r\n", "200 open"),
    Rule("9110 2.5", "which needs Host", b"GET /health HTTP/1.9\r\n\r\n", "400 closed"),
    Rule("2.3", "HTTP/0.9", b"GET /health HTTP/0.9\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("2.3", "the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400 closed"),
    Rule("3", "too long, behind an empty line", END + b"GET /" + b"x" * 9000, "414 closed"),
    Rule("2.3", "lower-case name", b"GET /health http/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("2.3", "two digits", b"GET /health HTTP/1.10\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("2.2", "an empty line before", END + GET + HOST + END, "200 open"),
    Rule("2.2", "two empty lines before", END + END + GET + HOST + END, "400 closed"),
    Rule("2.2", "LF as a line end", b"GET /health HTTP/1.1\nHost: x\n\n", "400 closed"),
    Rule("2.2", "LF once", b"GET /health HTTP/1.1\nHost: x\r\n\r\n", "400 closed"),
    Rule("2.2", "CR as a line end", b"GET /health HTTP/1.1\rHost: x\r\r", "400 closed"),
    Rule("2.2", "CR once", b"GET /health HTTP/1.1\rHost: x\r\n\r\n", "400 closed"),
    # What cannot become a request line any more
    *(
        Rule("3", f"early, {sent!r}", sent, "400 closed")
        for sent in (
            b"\x16\x03\x01\x02", b"SSH-2.0-x\r\n", b"*1\r\n$4\r\nPING\r\n", b"GET /\x01", b"\0",
            b"GET / HTTP/2.0\r\n", b"GET / x\r\n", b"GET /a\n", b"GET /a\ra",
            b"GET / HTTP/1.1\r\nA: b\n", b"GET / HTTP/1.1\r\nA: b\0",
        )
    ),
    # The target
    Rule("3.2.1", "no slash at the start", b"GET health HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3.2.1", "a fragment", b"GET /health#a HTTP/1.1\r\nHost: x\r\n\r\n", "404 open"),
    Rule("3.2.1", "not ASCII", b"GET /kv/\xc3\xa4 HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3.2.1", "a control character", b"GET /kv/\x01 HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3.2.1", "a quotation mark", b'GET /kv/" HTTP/1.1\r\nHost: x\r\n\r\n', "400 open"),
    Rule("3.2.1", "percent and no digits", b"GET /kv/% HTTP/1.1\r\nHost: x\r\n\r\n", "400 open"),
    Rule("3.2.1", "percent, one digit", b"GET /kv/%4 HTTP/1.1\r\nHost: x\r\n\r\n", "400 open"),
    Rule("3.2.1", "percent, not hex", b"GET /kv/%4g HTTP/1.1\r\nHost: x\r\n\r\n", "400 open"),
    Rule("3.2.1", "a query, which means nothing here",
         b"GET /health?a=/%zz?\"<> HTTP/1.1\r\nHost: x\r\n\r\n", "200 open"),
    Rule("3.2.2", "absolute", b"GET http://a:80/health HTTP/1.1\r\nHost: x\r\n\r\n", "200 open"),
    Rule("3.2.2", "https", b"GET HTTPS://[::1]/health?q HTTP/1.1\r\nHost: x\r\n\r\n", "200 open"),
    Rule("3.2.2", "without a path", b"GET http://a HTTP/1.1\r\nHost: x\r\n\r\n", "404 open"),
    Rule("3.2.2", "only a query", b"GET http://a?/health HTTP/1.1\r\nHost: x\r\n\r\n", "404 open"),
    Rule("3.2.2", "needs Host, too", b"GET http://a/health HTTP/1.1\r\n\r\n", "400 closed"),
    Rule("3.2.2", "no host", b"GET http:///health HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3.2.2", "nothing else", b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3.2.2", "only a port",
         b"GET http://:80/health HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3.2.2", "user name", b"GET http://u@a/health HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3.2.2", "other scheme", b"GET ftp://a/health HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3.2.3", "authority-form", b"CONNECT a:80 HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    Rule("3.2.4", "asterisk-form", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", "400 closed"),
    # Host
    Rule("3.2", "missing", GET + END, "400 closed"),
    Rule("3.2", "repeated", GET + HOST + HOST + END, "400 closed"),
    Rule("3.2", "empty", GET + b"Host:\r\n\r\n", "200 open"),
    Rule("3.2", "with a port", GET + b"Host: localhost:8080\r\n\r\n", "200 open"),
    Rule("3.2", "IPv6", GET + b"Host: [::1]:8080\r\n\r\n", "200 open"),
    Rule("3.2", "percent-encoded", GET + b"Host: %41\r\n\r\n", "421 open"),
    # On a loopback address, a name that somebody could have lead there
    *(
        Rule("9110 7.4", host, GET + b"Host: " + host.encode() + END + END, "421 open")
        for host in ("attacker.example", "a.b:8080", "localhost.a.b", "1.2.3.4.a", "localhost.")
    ),
    *(
        Rule("9110 7.4", host, GET + b"Host: " + host.encode() + END + END, "200 open")
        for host in ("127.0.0.1", "10.1.2.3:80", "[::1]", "LOCALHOST", "a.LocalHost:1", "kv", ":80")
    ),
    Rule("3.2.2", "the target counts", b"GET http://a.b/health HTTP/1.1\r\n" + HOST + END,
         "421 open"),
    Rule("3.2.2", "and not the field",
         b"GET http://kv/health HTTP/1.1\r\nHost: a.b\r\n\r\n", "200 open"),
    Rule("9110 7.4", "after its body",
         PUT.replace(b" x", b" a.b") + b"Content-Length: 5\r\n\r\nvalue", "421 open"),
    Rule("3.2", "a slash", GET + b"Host: a/b\r\n\r\n", "400 closed"),
    Rule("3.2", "a space", GET + b"Host: a b\r\n\r\n", "400 closed"),
    Rule("3.2", "a user name", GET + b"Host: u@a\r\n\r\n", "400 closed"),
    Rule("3.2", "a list", GET + b"Host: a, b\r\n\r\n", "400 closed"),
    Rule("3.2", "port not a number", GET + b"Host: a:b\r\n\r\n", "400 closed"),
    Rule("3.2", "not needed in HTTP/1.0", b"GET /health HTTP/1.0\r\n\r\n", "200 closed"),
    Rule("3.2", "but not repeated", b"GET /health HTTP/1.0\r\n" + HOST + HOST + END, "400 closed"),
    Rule("3.2", "or invalid", b"GET /health HTTP/1.0\r\nHost: a b\r\n\r\n", "400 closed"),
    # Field lines
    Rule("5.1", "white space before the colon", GET + HOST + b"A : b\r\n\r\n", "400 closed"),
    Rule("5.1", "white space around the value", GET + b"Host: \t x \t \r\n\r\n", "200 open"),
    Rule("5.1", "no white space", GET + b"Host:x\r\n\r\n", "200 open"),
    Rule("5.1", "names in any case", GET + b"hOST: x\r\n\r\n", "200 open"),
    Rule("5.1", "no colon", GET + HOST + b"A\r\n\r\n", "400 closed"),
    Rule("5.1", "no name", GET + HOST + b": b\r\n\r\n", "400 closed"),
    Rule("5.1", "a name that is no token", GET + HOST + b"A(: b\r\n\r\n", "400 closed"),
    Rule("5.1", "a name that is not ASCII", GET + HOST + b"\xc3\xa4: b\r\n\r\n", "400 closed"),
    Rule("5.2", "a folded line", GET + HOST + b"A: b\r\n c\r\n\r\n", "400 closed"),
    Rule("5.2", "folded with a tab", GET + HOST + b"A: b\r\n\tc\r\n\r\n", "400 closed"),
    Rule("2.2", "white space before the first", GET + b" Host: x\r\n\r\n", "400 closed"),
    Rule("9110 5.5", "CR in a value", GET + HOST + b"A: b\rc\r\n\r\n", "400 closed"),
    Rule("9110 5.5", "LF in a value", GET + HOST + b"A: b\nc: d\r\n\r\n", "400 closed"),
    Rule("9110 5.5", "NUL in a value", GET + HOST + b"A: b\0c\r\n\r\n", "400 closed"),
    Rule("9110 5.5", "another control", GET + HOST + b"A: b\x1bc\r\n\r\n", "400 closed"),
    Rule("9110 5.5", "DEL in a value", GET + HOST + b"A: b\x7fc\r\n\r\n", "400 closed"),
    Rule("9110 5.5", "Latin-1 in a value", GET + HOST + b"A: b\xe4c\td\r\n\r\n", "200 open"),
    Rule("9110 5.5", "an empty value", GET + HOST + b"A:\r\n\r\n", "200 open"),
    Rule("9110 5.4", "100 fields", GET + HOST + b"A: b\r\n" * 99 + END, "200 open"),
    Rule("9110 5.4", "101 fields", GET + HOST + b"A: b\r\n" * 100 + END, "431 closed"),
    Rule("9110 5.4", "30 KB", GET + HOST + b"A: " + b"b" * 30_000 + END + END, "200 open"),
    Rule("9110 5.4", "33 KB", GET + HOST + b"A: " + b"b" * 33_000 + END + END, "431 closed"),
    Rule("9110 5.4", "42 KB, no end", GET + HOST + b"A: " + b"b" * 42_000, "431 closed"),
    # Content-Length
    Rule("6.2", "a body", PUT + b"Content-Length: 5\r\n\r\nvalue", "200 open"),
    Rule("6.2", "leading zeros", PUT + b"Content-Length: 0005\r\n\r\nvalue", "200 open"),
    Rule("6.3", "a sign", PUT + b"Content-Length: +5\r\n\r\nvalue", "400 closed"),
    Rule("6.3", "negative", PUT + b"Content-Length: -5\r\n\r\nvalue", "400 closed"),
    Rule("6.3", "hexadecimal", PUT + b"Content-Length: 0x5\r\n\r\nvalue", "400 closed"),
    Rule("6.3", "an underscore", PUT + b"Content-Length: 1_0\r\n\r\nvaluevalue", "400 closed"),
    Rule("6.3", "a decimal", PUT + b"Content-Length: 5.0\r\n\r\nvalue", "400 closed"),
    Rule("6.3", "other digits", PUT + "Content-Length: ٥\r\n\r\nvalue".encode(), "400 closed"),
    Rule("6.3", "superscript", PUT + b"Content-Length: \xb2\r\n\r\nva", "400 closed"),
    Rule("6.3", "empty", PUT + b"Content-Length:\r\n\r\nvalue", "400 closed"),
    Rule("6.3", "a list", PUT + b"Content-Length: 5, 5\r\n\r\nvalue", "400 closed"),
    Rule("6.3", "repeated, same", PUT + b"Content-Length: 5\r\n" * 2 + b"\r\nvalue", "200 open"),
    Rule("6.3", "and other",
         PUT + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nvalue", "400 closed"),
    Rule("9110 8.6", "too large", PUT + b"Content-Length: 10485761\r\n\r\n", "413 closed"),
    Rule("9110 8.6", "5,000 digits",
         PUT + b"Content-Length: " + b"9" * 5000 + END * 2, "413 closed"),
    Rule("9110 8.6", "also with GET",
         GET + HOST + b"Content-Length: 10485761\r\n\r\n", "413 closed"),
    Rule("9110 8.6", "with GET", GET + HOST + b"Content-Length: 5\r\n\r\nvalue", "200 open"),
    Rule("9110 9.3.5", "with DELETE",
         b"DELETE /kv/a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab", "200 open"),
    Rule("6.3", "a request inside an unwanted body",
         b"POST /kv/a HTTP/1.1\r\nHost: x\r\nContent-Length: 33\r\n\r\n" + GET + HOST + END,
         "405 open"),
    Rule("6.3", "none", PUT + END, "400 open"),
    # Transfer-Encoding
    Rule("6.1", "with Content-Length",
         PUT + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400 closed"),
    Rule("6.1", "in HTTP/1.0",
         b"PUT /kv/a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400 closed"),
    Rule("6.1", "gzip", PUT + b"Transfer-Encoding: gzip\r\n\r\n", "501 closed"),
    Rule("6.1", "gzip, chunked",
         PUT + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "501 closed"),
    Rule("6.1", "chunked twice",
         PUT + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n", "501 closed"),
    Rule("6.1", "identity", PUT + b"Transfer-Encoding: identity\r\n\r\n", "501 closed"),
    Rule("6.1", "almost chunked",
         PUT + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "501 closed"),
    Rule("6.1", "with a vertical tab",
         PUT + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", "400 closed"),
    Rule("6.1", "empty", PUT + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n", "501 closed"),
    Rule("6.1", "in any case",
         PUT + b"transfer-encoding: CHUNKED\r\n\r\n1\r\na\r\n0\r\n\r\n", "200 open"),
    # Chunks
    Rule("7.1", "two chunks", CHUNKED + b"5\r\nvalue\r\nA\r\n0123456789\r\n0\r\n\r\n", "200 open"),
    Rule("7.1", "leading zeros", CHUNKED + b"0001\r\na\r\n000\r\n\r\n", "200 open"),
    Rule("7.1", "an empty body", CHUNKED + b"0\r\n\r\n", "400 open"),
    Rule("7.1", "an unwanted body",
         CHUNKED.replace(b"PUT", b"POST") + b"1\r\na\r\n0\r\n\r\n", "405 open"),
    Rule("7.1", "no size", CHUNKED + b"\r\na\r\n0\r\n\r\n", "400 closed"),
    Rule("7.1", "size not hexadecimal", CHUNKED + b"g\r\na\r\n0\r\n\r\n", "400 closed"),
    Rule("7.1", "size with a prefix", CHUNKED + b"0x1\r\na\r\n0\r\n\r\n", "400 closed"),
    Rule("7.1", "size with a sign", CHUNKED + b"+1\r\na\r\n0\r\n\r\n", "400 closed"),
    Rule("7.1", "negative size", CHUNKED + b"-1\r\na\r\n0\r\n\r\n", "400 closed"),
    Rule("7.1", "a space before the size", CHUNKED + b" 1\r\na\r\n0\r\n\r\n", "400 closed"),
    Rule("7.1", "a space behind the size", CHUNKED + b"1 \r\na\r\n0\r\n\r\n", "400 closed"),
    Rule("7.1", "17 digits", CHUNKED + b"0" * 16 + b"1\r\na\r\n0\r\n\r\n", "200 open"),
    Rule("7.1", "much too large", CHUNKED + b"F" * 5000 + b"\r\n", "413 closed"),
    Rule("7.1", "data too long", CHUNKED + b"1\r\nab\r\n0\r\n\r\n", "400 closed"),
    Rule("7.1", "data too short", CHUNKED + b"3\r\na\r\n0\r\n\r\n", "400 closed"),
    Rule("7.1", "LF behind the size", CHUNKED + b"1\na\r\n0\r\n\r\n", "400 closed"),
    Rule("7.1", "LF behind the data", CHUNKED + b"1\r\na\n0\r\n\r\n", "400 closed"),
    Rule("7.1", "only LF", CHUNKED + b"1\na\n0\n\n", "400 closed"),
    Rule("7.1", "the longest line, with 8,192 bytes up to the middle of its end",
         PUT + b"A: " + b"x" * 8124 + END + b"Transfer-Encoding: chunked\r\n\r\n"
         + b"1;a=" + b"b" * 8188 + END + b"a\r\n0\r\n\r\n", "200 open"),
    Rule("7.1", "longer", CHUNKED + b"1;" + b"a" * 8191 + b"\r\na\r\n0\r\n\r\n", "431 closed"),
    Rule("7.1", "a line without an end", CHUNKED + b"1" * 9000, "431 closed"),
    Rule("7.1", "together too large",
         CHUNKED + b"A00000\r\n" + b"x" * 0xA00000 + b"\r\n1\r\n", "413 closed"),
    Rule("7.1", "one too large", CHUNKED + b"A00001\r\n", "413 closed"),
    Rule("7.1.1", "extensions",
         CHUNKED + b'1;a\r\na\r\n1 ; b = "c\\"; d" ;e=f\r\nb\r\n0;g\r\n\r\n', "200 open"),
    Rule("7.1.1", "a space, and no extension", CHUNKED + b"1 a\r\na\r\n0\r\n\r\n", "400 closed"),
    Rule("7.1.1", "CR in an extension", CHUNKED + b"1;a=\rb\r\na\r\n0\r\n\r\n", "400 closed"),
    Rule("7.1.1", "LF in an extension", CHUNKED + b"1;a\nb\r\na\r\n0\r\n\r\n", "400 closed"),
    Rule("7.1.1", "NUL in an extension", CHUNKED + b"1;a=\0b\r\na\r\n0\r\n\r\n", "400 closed"),
    Rule("7.1.1", "20 KB of extensions",
         CHUNKED + b"1;a=" + b"b" * 20_000 + b"\r\na\r\n0\r\n\r\n", "431 closed"),
    Rule("7.1.2", "a trailer",
         CHUNKED + b"1\r\na\r\n0\r\nA: b\r\nContent-Length: 9\r\n\r\n", "200 open"),
    Rule("7.1.2", "a malformed one", CHUNKED + b"1\r\na\r\n0\r\nA : b\r\n\r\n", "400 closed"),
    Rule("7.1.2", "a folded one", CHUNKED + b"1\r\na\r\n0\r\nA: b\r\n c\r\n\r\n", "400 closed"),
    Rule("7.1.2", "101 fields",
         CHUNKED + b"1\r\na\r\n0\r\n" + b"A: b\r\n" * 101 + END, "431 closed"),
    Rule("6.5.1", "32 KiB of them",
         CHUNKED + b"0\r\n" + (b"A: " + b"b" * 507 + END) * 63 + b"A: " + b"b" * 506 + END * 2,
         "400 open"),
    Rule("6.5.1", "more", CHUNKED + b"0\r\n" + (b"A: " + b"b" * 507 + END) * 65 + END,
         "431 closed"),
    Rule("7.1.2", "33 KB in a line", CHUNKED + b"0\r\nA: " + b"b" * 33_000 + END * 2, "431 closed"),
    # What happens to the connection
    Rule("9.3", "close", GET + HOST + b"Connection: close\r\n\r\n", "200 closed"),
    Rule("9.3", "close among others",
         GET + HOST + b"Connection: a,\tClose ,b\r\n\r\n", "200 closed"),
    Rule("9.3", "in a second line",
         GET + HOST + b"Connection: a\r\nConnection: close\r\n\r\n", "200 closed"),
    Rule("9.3", "keep-alive", GET + HOST + b"Connection: keep-alive\r\n\r\n", "200 open"),
    Rule("9.3", "HTTP/1.0", b"GET /health HTTP/1.0\r\n\r\n", "200 closed"),
    Rule("9.3", "HTTP/1.0, keep-alive",
         b"GET /health HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", "200 open"),
    Rule("9.3", "both", GET + HOST + b"Connection: keep-alive, close\r\n\r\n", "200 closed"),
    Rule("9.3.2", "pipelining", (GET + HOST + END) * 50, "200 " * 50 + "open"),
    Rule("9.3.2", "with bodies",
         (PUT + b"Content-Length: 2\r\n\r\nab") * 3 + GET + HOST + END, "200 200 200 200 open"),
    Rule("9.3.2", "an error in between",
         GET + HOST + END + b"?\r\n\r\n" + GET + HOST + END, "200 400 closed"),
    Rule("9.6", "nothing behind close",
         GET + HOST + b"Connection: close\r\n\r\n" + GET + HOST + END, "200 closed"),
    # Expect
    Rule("9110 10.1.1", "continue",
         PUT + b"Content-Length: 1\r\nExpect: 100-Continue\r\n\r\n", "100"),
    Rule("9110 10.1.1", "and chunks",
         PUT + b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n", "100"),
    Rule("9110 10.1.1", "body on the way",
         PUT + b"Content-Length: 1\r\nExpect: 100-continue\r\n\r\na", "200 open"),
    Rule("9110 10.1.1", "no body", GET + HOST + b"Expect: 100-continue\r\n\r\n", "200 open"),
    Rule("9110 10.1.1", "too large",
         PUT + b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n", "413 closed"),
    Rule("9110 10.1.1", "wrong key",
         PUT.replace(b"rule", b"!") + b"Content-Length: 1\r\nExpect: 100-continue\r\n\r\n",
         "400 closed"),
    Rule("9110 10.1.1", "none", GET + HOST + b"Expect:\r\n\r\n", "200 open"),
    Rule("9110 10.1.1", "twice",
         GET + HOST + b"Expect: 100-continue,,100-continue\r\n\r\n", "200 open"),
    Rule("9110 10.1.1", "another", GET + HOST + b"Expect: cake\r\n\r\n", "200 open"),
    Rule("9110 10.1.1", "one of two",
         GET + HOST + b"Expect: 100-continue\r\nExpect: cake\r\n\r\n", "200 open"),
    Rule("9110 10.1.1", "ignored in HTTP/1.0",
         b"PUT /kv/a HTTP/1.0\r\nContent-Length: 0\r\nExpect: 100-continue\r\n\r\n", "400 closed"),
]
# fmt: on


class HTTPTest(KVTest):
    def test_each_rule_has_its_outcome(self) -> None:
        server = self.start()
        for rule in RULES:
            self.check(server, rule)
        self.assertEqual(server.log.count("\n"), 1, server.log)

    def check(self, server: ServerProcess, rule: Rule) -> None:
        with self.subTest(f"RFC 9112 {rule.section}: {rule.what}"), server.connect() as client:
            client.send(rule.sent)
            *statuses, then = rule.answers.split()
            if then == "100":
                statuses.append(then)
            answers = [client.receive() for _ in statuses]
            self.assertEqual([str(answer.status) for answer in answers], statuses)
            if then == "open":
                self.assertNotEqual(answers[-1].fields.get("Connection"), "close")
                self.assertEqual(client.request("GET", "/health").body, b"ok\n")
            elif then == "closed":
                self.assertEqual(answers[-1].fields["Connection"], "close")
                self.assertTrue(client.is_closed())
            for answer in answers:
                self.assertEqual("Date" in answer.fields, answer.status >= 200)

    def test_however_the_bytes_arrive_the_outcomes_are_the_same(self) -> None:
        server = self.start_with("kv.Handler._receive.__defaults__ = (1,)")
        for rule in RULES:
            # Whether the body is on the way is not known before its first byte is read.
            if len(rule.sent) < 4000 and rule.what != "body on the way":
                self.check(server, rule)

    @on_linux
    def test_a_second_empty_line_is_refused_however_late_it_comes(self) -> None:
        server = self.start()
        client = self.client(server)
        client.send(END)
        wait_until_read(server, client)
        client.send(END)
        self.assertEqual(client.receive().status, 400)

    def test_a_web_page_by_another_name_changes_nothing(self) -> None:
        for host, status in (("127.0.0.1", 421), ("::1", 421), ("0.0.0.0", 200)):
            with self.subTest(host), self.start(f"--host={host}") as server:
                address = host.replace("0.0.0.0", "127.0.0.1")
                with Client(server.port, address) as client:
                    client.request("PUT", "/kv/a", b"1")
                    for method, path in (("PUT", "/kv/a"), ("DELETE", "/kv/a"), ("GET", "/kv/a")):
                        sent = request(method, path, b"2").replace(b"Host: kv", b"Host: a.example")
                        client.send(sent)
                        answer = client.receive()
                        self.assertEqual(
                            answer.status in (421, 404), status == 421 or method == "GET"
                        )
                    if status == 421:
                        self.assertEqual(answer.body, b"misdirected request\n")
                        self.assertEqual(client.request("GET", "/kv/a").body, b"1")

    def test_a_short_body_is_not_stored(self) -> None:
        server = self.start()
        server.request("PUT", "/kv/whole", b"value")
        for part in (put("cut", "value")[:-1], CHUNKED + b"5\r\nval", CHUNKED + b"5\r\nvalue\r\n"):
            for how in (socket.SHUT_WR, socket.SHUT_RDWR):
                with server.connect() as client:
                    client.send(part)
                    client.socket.shutdown(how)
                    self.assertTrue(client.is_closed())
        self.assertEqual(server.stop(), 0)
        self.assertEqual(set(self.read_snapshot()), {"whole"})

    def test_who_is_still_sending_can_read_the_refusal(self) -> None:
        """Closing with unread input would reset the connection and lose the answer."""
        server = self.start_with("kv.LINGER_SECONDS = 60.0")
        size = 15_000_000  # more than fits into the sockets' buffers
        for _ in range(5):
            with server.connect() as client:
                client.send(request("PUT", "/kv/a", None, f"Content-Length: {size}"))
                client.send(b"x" * size)
                self.assertEqual(client.receive().status, 413)
                self.assertTrue(client.is_closed())

    @on_linux
    def test_an_empty_line_behind_the_last_body_does_not_reset_the_connection(self) -> None:
        server = self.start()
        client = self.client(server)
        client.send(request("PUT", "/kv/a", None, "Content-Length: 1", "Connection: close"))
        wait_until_read(server, client)
        client.send(b"1\r\n")
        self.assertEqual(client.receive().status, 200)
        self.assertEqual(client.file.read(1), b"")

    def test_a_refused_head_has_no_body_either(self) -> None:
        server = self.start()
        for rest in (
            b"\x01",
            b" HTTP/1.1\r\n\r\n",
            b" HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999\r\n\r\n",
            b" HTTP/1.1\r\nA: \x01\r\n\r\n",
            b" HTTP/1.1\r\nA: \x01",
        ):
            with server.connect() as client:
                client.send(b"HEAD /health" + rest)
                self.assertIn(client.receive("HEAD").status, (400, 413))
                self.assertEqual(client.file.read(), b"")

    @on_linux
    def test_no_head_takes_long_to_refuse(self) -> None:
        """A search that goes back quadratically would stop all threads for seconds."""
        server = self.start()
        n = 8_000
        for sent in (
            *(GET + HOST + b"A:" + run * 30_000 + b"\x01\r\n\r\n" for run in (b" ", b"\t", b"a")),
            *(GET + HOST + run * 15_000 + b"\x01\r\n\r\n" for run in (b"a", b"a:", b": ")),
            *(
                GET + b"Host:" + run * 10_000 + b"\x01\r\n\r\n"
                for run in (b" ", b"a", b"%41", b":")
            ),
            *(b"GET /" + run * (n // len(run)) + b"\x01\r\n\r\n" for run in (b"a", b"%41", b"?a")),
            *(
                b"GET http://" + run * (n // len(run)) + b"\r\n\r\n"
                for run in (b"a", b"%41", b":1")
            ),
            *(b"G" * n + end for end in (b"\r\n\r\n", b" / HTTP/9.9\r\n\r\n")),
            *(run * 4000 + b"\r\x01" for run in (b"a", b"\r\n" + GET, GET + b"a")),
            *(GET + HOST + run * 10_000 + b"\r\x01" for run in (b"a", b"a\r\n")),
            *(
                CHUNKED + b"1" + run * (n // len(run)) + b"\x01\r\n"
                for run in (b" ", b";a", b"; a =b ", b';a="', b';a="\\', b"1", b";a=b")
            ),
        ):
            with server.connect() as client:
                before = server.cpu_seconds()
                client.send(sent)
                self.assertIn(client.receive().status, (400, 413, 414, 431))
                self.assertLess(server.cpu_seconds() - before, 0.5, sent[:60])

    def test_hostile_bytes_stop_nothing(self) -> None:
        with self.start() as server:
            fuzz(server, 1500, seed=1)
            self.assertEqual(server.stop(), 0)
            self.assertNotIn("kv.py: error", server.log)

    def test_an_upload_that_is_fast_enough_may_take_longer(self) -> None:
        """Also if each of its chunks arrives at once, or much of it together with its head."""
        server = self.start_with("kv.STALL_SECONDS = 1.0")
        plain, chunked, early = clients = [self.client(server) for _ in range(3)]
        plain.send(request("PUT", "/kv/a", None, "Content-Length: 10000"))
        chunked.send(CHUNKED)
        early.send(put("b", "x" * 3010)[:-10])
        for _ in range(10):
            time.sleep(0.2)  # the rate that is tested: 5 KB/s
            plain.send(b"x" * 1000)
            chunked.send(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
            early.send(b"x")
        chunked.send(b"0\r\n\r\n")
        self.assertEqual([client.receive().status for client in clients], [200] * 3)

    def test_each_request_of_a_connection_has_its_own_time(self) -> None:
        client = self.client(self.start_with("kv.STALL_SECONDS = 1.0"))
        for _ in range(3):
            client.send(b"GET /health")
            time.sleep(0.5)  # the time that is tested: 1.5 s for all of them
            client.send(b" HTTP/1.1\r\n" + HOST + END)
            self.assertEqual(client.receive().status, 200)

    def test_slow_requests_end_after_their_time(self) -> None:
        """A head that never ends, byte by byte; a body that stalls late; one that dribbles."""
        seconds = 4.0
        server = self.start_with(f"kv.STALL_SECONDS = {seconds}")
        head, stall, dribble = clients = [self.client(server) for _ in range(3)]
        begin = time.monotonic()
        stall.send(put("slow", "x" * 100_000)[:-1])
        dribble.send(request("PUT", "/kv/slow", None, "Content-Length: 1000"))
        head.send(b"GET /")
        with selectors.DefaultSelector() as selector:
            for client in clients:
                selector.register(client.socket, selectors.EVENT_READ, client)
            while len(selector.get_map()) and time.monotonic() - begin < 3 * seconds:
                for client in (head, dribble):
                    with contextlib.suppress(OSError):
                        client.send(b"x")
                for key, _ in selector.select(0.25):
                    self.assertEqual(key.data.receive().status, 408)
                    self.assertGreater(time.monotonic() - begin, seconds - 1)
                    selector.unregister(key.fileobj)
            self.assertEqual(len(selector.get_map()), 0)


def fuzz(server: ServerProcess, count: int, seed: int) -> None:
    """Send mutated requests in random pieces, some cut off. Each must be answered or closed."""
    chance = random.Random(seed)
    valid = [rule.sent for rule in RULES if len(rule.sent) < 1000]
    parts = [b"\r\n", *(bytes([byte]) for byte in b"\r\n\0 :\xff0%"), b"Content-Length: 3\r\n"]
    for number in range(count):
        data = bytearray(b"".join(chance.choices(valid, k=chance.randint(1, 3))))
        for _ in range(chance.randint(0, 4)):
            at = chance.randrange(len(data) + 1)
            action = chance.randrange(5)
            if action == 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            elif action == 1:
                data[at:at] = chance.choice(parts)
            elif action == 2:
                del data[at : at + chance.randint(1, 10)]
            elif action == 3:
                data[at:at] = data[at : at + chance.randint(1, 30)]
            elif chance.random() < 0.5:
                del data[at:]
        with server.connect() as client:
            with contextlib.suppress(OSError):  # closed meanwhile
                for _ in range(chance.randint(0, 2)):
                    at = chance.randrange(len(data) + 1)
                    client.send(data[:at])
                    del data[:at]
                client.send(data)
                client.socket.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                for _ in range(1000):
                    client.receive()
                raise AssertionError(f"request {number} with seed {seed}: no end")
    wait_until(lambda: server.request("GET", "/health").status == 200, "an answer")
    if sys.platform == "linux":
        wait_until(lambda: server.threads() <= 5, "the threads to end", 10 + kv.SPARE_SECONDS)
        wait_until(lambda: server.descriptors() <= 8, "the descriptors to be closed", 10)


# ---- Server: many connections ----


class ServerTest(KVTest):
    def burst_and_restart(self, **options: Any) -> None:
        allow_descriptors(10_100)
        server = self.start(f"--port={free_port()}", **options)
        requests = [put(f"key{number}", f"value {number}") for number in range(10_000)]
        self.assertEqual(pooled_burst(server.port, requests, 15), {"200": 10_000}, server.log)
        server.send_signal()
        self.assertEqual(server.exit_code(15), 0)
        server = self.start(f"--port={server.port}")
        client = self.client(server)
        for number in range(10_000):
            answer = client.request("GET", f"/kv/key{number}")
            self.assertEqual(answer.body, f"value {number}".encode())

    def test_10_000_clients_of_a_pool_at_the_same_instant(self) -> None:
        self.burst_and_restart()

    def test_10_000_clients_of_a_pool_and_256_descriptors(self) -> None:
        self.burst_and_restart(preexec_fn=limited("NOFILE", 256))

    def test_10_000_clients_that_stay(self) -> None:
        allow_descriptors(10_100)
        server = self.start()
        requests = [put(f"key{number}", "value") for number in range(10_000)]
        self.assertEqual(burst(server.port, requests, 15), {"200": 10_000}, server.log)

    def test_more_keep_alive_clients_than_descriptors(self) -> None:
        """Each answer says close while others wait, and so each client comes to its turn."""
        changes = "kv.SILENT_SECONDS = 1.0"  # for those that have their last answer
        server = self.start_with(changes, preexec_fn=limited("NOFILE", 256))
        loops = [Loop(put(f"{n}-{m}", "value") for m in range(20)) for n in range(400)]
        self.assertEqual(keep_alive(server.port, loops).answers, {"200": 8000})

    @on_linux
    def test_9_000_busy_clients(self) -> None:
        allow_descriptors(10_100)
        server = self.start()
        loops = [Loop(put(f"{n}-{m}", "value") for m in range(3)) for n in range(9_000)]
        self.assertEqual(keep_alive(server.port, loops).answers, {"200": 27_000})
        self.assertLess(server.threads(), kv.MAX_WORKERS + 5)

    @on_linux
    def test_15_000_idle_connections_are_cheap_and_do_not_delay_the_exit(self) -> None:
        allow_descriptors(20_000)
        number = min(15_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500)
        server = self.start_with("kv.SPARE_SECONDS = 0.1")
        server.request("PUT", "/kv/a", b"1")
        before = 0
        with contextlib.ExitStack() as clients:
            for count in range(number):
                client = clients.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                client.send(request("GET", "/health"))
                client.recv(1000)
                if count == 1000:
                    before = server.resident_bytes()
            self.assertGreater(server.descriptors(), number)
            each = (server.resident_bytes() - before) / (number - 1000)
            self.assertLess(each, 3 * 1024)
            self.stop_at_once(server)


class IdleTest(KVTest):
    """Idle connections, and how requests come to a worker."""

    def test_a_connection_that_has_been_silent_makes_room_for_a_new_one(self) -> None:
        """Whether it has never sent anything or has been answered."""
        server = self.start_with("kv.SILENT_SECONDS = 1.0", preexec_fn=limited("NOFILE", 64))
        silent = [self.client(server) for _ in range(30)]
        clients = [self.client(server) for _ in range(50)]
        for client in clients:
            self.assertEqual(client.request("PUT", "/kv/a", b"x").status, 200)
        # Not always the first: they are parked in another order than they have connected.
        self.assertTrue(any(sees_the_end(client.socket) for client in silent))

    def test_who_has_been_silent_for_less_is_answered(self) -> None:
        server = self.start(preexec_fn=limited("NOFILE", 64))
        clients = [self.client(server) for _ in range(100)]
        time.sleep(7)  # longer than a retransmission normally takes
        for client in clients:
            client.send(request("GET", "/health"))
        for client in clients:
            answer = client.receive()
            self.assertEqual(answer.status, 200)
            if answer.fields.get("Connection") == "close":
                client.__exit__()

    def test_a_request_that_comes_as_silent_ones_are_closed_is_answered(self) -> None:
        """Either it is answered, or its client could see the end before."""
        changes = "kv.SILENT_SECONDS = kv.IDLE_SECONDS = 0.5; kv.POLL_SECONDS = 0.001"
        for limit in (64, 1024):
            with self.start_with(changes, preexec_fn=limited("NOFILE", limit)) as server:
                loops = [Loop((put("a", "1") for _ in range(6)), 0.45 + n / 500) for n in range(50)]
                self.assertEqual(keep_alive(server.port, loops).answers, {"200": 300})

    def test_who_sends_at_the_sight_of_the_first_end_is_answered(self) -> None:
        """600 connections go idle together, and so they are closed together."""
        server = self.start_with("kv.IDLE_SECONDS = 1.0")
        clients = [self.client(server) for _ in range(600)]
        for client in clients:
            self.assertEqual(client.request("GET", "/health").status, 200)
        self.assertTrue(clients[0].is_closed())
        late = []
        for client in reversed(clients[-40:]):
            if not sees_the_end(client.socket):
                client.send(request("GET", "/health"))
                late.append(client)
        self.assertGreater(len(late), 0)
        self.assertEqual([client.receive().status for client in late], [200] * len(late))

    def test_an_idle_connection_is_kept_for_its_time_and_then_closed(self) -> None:
        server = self.start_with("kv.IDLE_SECONDS = 1.5")
        clients = [self.client(server) for _ in range(10)]
        for client in clients:
            client.request("GET", "/health")
        time.sleep(1.0)
        for client in clients[:5]:
            self.assertEqual(client.request("GET", "/health").status, 200)
        begin = time.monotonic()
        self.assertTrue(all(client.is_closed() for client in clients[5:]))
        self.assertTrue(all(client.is_closed() for client in clients))
        self.assertGreater(time.monotonic() - begin, 1.0)

    def test_the_number_of_a_closed_connection_is_that_of_another(self) -> None:
        """The selector must have forgotten it."""
        server = self.start_with("kv.IDLE_SECONDS = 0.2")
        for _ in range(3):
            for _ in range(5):
                with server.connect() as client:
                    self.assertEqual(client.request("GET", "/health").status, 200)
                    self.assertTrue(client.is_closed())
            client = self.client(server)
            for pause in (0.0, 0.15, 0.15):
                time.sleep(pause)
                self.assertEqual(client.request("GET", "/health").status, 200)
        self.assertNotIn("error", server.log)

    def test_clients_that_pause_hold_no_worker(self) -> None:
        """Twice as many as workers: the median of who comes new is far below their pause."""
        server = self.start_with("kv.MAX_WORKERS = 32")
        loops = [Loop((request("GET", "/health") for _ in range(14)), 0.15) for _ in range(64)]
        seconds = []
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            others = pool.submit(keep_alive, server.port, loops)
            while not others.done():
                begin = time.monotonic()
                self.assertEqual(server.request("GET", "/health").status, 200)
                seconds.append(time.monotonic() - begin)
                time.sleep(0.02)
            self.assertEqual(others.result().answers, {"200": 64 * 14})
        self.assertLess(sorted(seconds)[len(seconds) // 2], 0.05)

    def test_busy_clients_let_others_have_their_worker(self) -> None:
        server = self.start_with("kv.MAX_WORKERS = 2")
        loops = [Loop(itertools.repeat(request("GET", "/health"), 3000)) for _ in range(4)]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            others = pool.submit(keep_alive, server.port, loops)
            for _ in range(20):
                self.assertEqual(server.request("GET", "/health").status, 200)
            self.assertFalse(others.done())
            self.assertEqual(others.result().answers, {"200": 12_000})

    def test_a_client_that_sends_ahead_lets_others_have_its_worker(self) -> None:
        """Its next request is in our buffer, where no selector finds it."""
        server = self.start_with("kv.MAX_WORKERS = 1")
        server.request("PUT", "/kv/a", b"x" * 1000)
        ahead = [self.client(server) for _ in range(3)]
        for client in ahead:
            client.send(request("GET", "/kv/a") * 300)
        self.assertEqual(server.request("GET", "/health").status, 200)
        for client in ahead:
            self.assertEqual([client.receive().status for _ in range(300)], [200] * 300)

    def test_connections_that_send_nothing_hold_no_worker(self) -> None:
        server = self.start_with("kv.MAX_WORKERS = 2")
        for _ in range(20):
            self.client(server)
        seconds = []
        for _ in range(11):
            begin = time.monotonic()
            self.assertEqual(server.request("GET", "/health").status, 200)
            seconds.append(time.monotonic() - begin)
        self.assertLess(sorted(seconds)[5], kv.STALL_SECONDS / 10)

    def test_more_stalled_uploads_than_workers(self) -> None:
        """Others are served when the first is given up, and a shutdown saves in time."""
        server = self.start_with(
            "kv.MAX_WORKERS = 4; kv.STALL_SECONDS = 2.0; kv.LINGER_SECONDS = 0.5"
        )
        stalled = [self.client(server) for _ in range(6)]
        for client in stalled:
            client.send(put("stalled", "value")[:-1])
        answer = server.request("PUT", "/kv/a", b"1")
        self.assertEqual(answer.status, 200)
        if sys.platform == "linux":
            self.assertEqual(server.threads(), 3 + 4)  # main thread, log, acceptor; workers
        self.assertEqual(stalled[0].receive().status, 408)
        self.assertEqual(server.stop(), 0)
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    def test_where_the_selector_is_none_that_notices_at_once(self) -> None:
        server = self.start_with("kv.selectors.DefaultSelector = kv.selectors.PollSelector")
        client = self.client(server)
        for _ in range(3):
            self.assertEqual(client.request("GET", "/health").status, 200)
            time.sleep(2 * kv.PAUSE_SECONDS)  # until it is parked
        self.stop_at_once(server)

    @on_linux
    def test_a_parked_connection_that_is_reset_burns_no_core(self) -> None:
        server = self.start()
        with server.connect() as client:
            client.request("GET", "/health")
            time.sleep(2 * kv.PAUSE_SECONDS)
            client.reset()
        self.assert_burns_no_core(server)
        self.assertNotIn("error", server.log)

    def test_a_connection_that_is_parked_in_the_drain_is_closed_by_it(self) -> None:
        """The acceptor goes on until none is in hand, as that one may be parked next."""
        server = self.start_with("kv.PAUSE_SECONDS = 0.4")
        with server.connect() as client:
            client.request("PUT", "/kv/a", b"1")  # its worker pauses, and then parks it
            self.stop_at_once(server)
            self.assertTrue(client.is_closed())

    def test_parking_and_resuming_wait_for_the_lock(self) -> None:
        """Or one could be closed between the two steps of being parked."""
        with kv.Server("127.0.0.1", 0, NO_LOG, False) as server, socket.socket() as connection:
            for action in (lambda: server._park(connection, b""), server._drop_silent):
                thread = threading.Thread(target=action, daemon=True)
                with server._lock:
                    thread.start()
                    thread.join(0.05)
                    self.assertTrue(thread.is_alive())
                thread.join(DEADLINE)
                self.assertFalse(thread.is_alive())

    def test_a_parked_connection_that_is_reset_before_the_last_look(self) -> None:
        with (
            kv.Server("127.0.0.1", 0, NO_LOG, False) as server,
            socket.create_server(("127.0.0.1", 0)) as listener,
        ):
            client = Client(listener.getsockname()[1])
            connection, _ = listener.accept()
            server._park(connection, b"")
            client.reset()
            with unittest.mock.patch.object(kv, "IDLE_SECONDS", 0.0):
                server._drop_silent()
            self.assertEqual((connection.fileno(), server.parked), (-1, {}))

    def test_what_cannot_be_parked_is_not_half_parked(self) -> None:
        with kv.Server("127.0.0.1", 0, NO_LOG, False) as server, socket.socket() as connection:
            with unittest.mock.patch.object(server._selector, "register", side_effect=MemoryError):
                self.assertRaises(MemoryError, server._park, connection, b"")
            server._close(connection)
            self.assertEqual(server.parked, {})


class ScarcityTest(KVTest):
    """Too few descriptors, too little memory or time."""

    def test_raises_the_soft_limit_of_descriptors(self) -> None:
        allow_descriptors(1000)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        limit = (resource.RLIMIT_NOFILE, (64, hard))
        server = self.start(preexec_fn=lambda: resource.setrlimit(*limit))
        clients = [self.client(server) for _ in range(300)]
        for client in clients:
            self.assertEqual(client.request("GET", "/health").status, 200)
        for client in clients:
            self.assertEqual(client.request("GET", "/health").status, 200)

    @on_linux
    def test_waiting_at_the_limit_burns_no_core_and_ends_with_a_save(self) -> None:
        server = self.start(preexec_fn=limited("NOFILE", 128))
        server.request("PUT", "/kv/a", b"1")
        clients = [self.client(server) for _ in range(300)]
        most = 128 - kv.RESERVED_DESCRIPTORS - 5
        wait_until(lambda: server.descriptors() > most, "the limit is reached")
        self.assert_burns_no_core(server)
        self.assertEqual(server.stop(), 0)
        self.assertTrue(all(client.is_closed() for client in clients))
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    @on_linux
    def test_running_out_of_descriptors_burns_no_core_and_ends_with_a_save(self) -> None:
        """The same when the limit is lowered, or others have used up the descriptors."""
        server = self.start()
        server.request("PUT", "/kv/a", b"1")
        descriptors = server.descriptors()
        server.limit("NOFILE", descriptors + 10)
        clients = [self.client(server) for _ in range(50)]
        wait_until(lambda: server.descriptors() == descriptors + 10, "the limit is reached")
        self.assert_burns_no_core(server)
        for client in clients:
            client.__exit__()
        self.assertEqual(server.stop(), 0)
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    def test_many_idle_and_dribbling_connections_do_not_delay_others(self) -> None:
        allow_descriptors(2100)
        server = self.start()
        clients = [self.client(server) for _ in range(2000)]
        for number, client in enumerate(clients[:1000]):
            client.request("PUT", f"/kv/{number}", b"x")
        seconds = []
        for number in range(50):
            for client in clients[1000 + number % 10 :: 10]:
                client.send(b"G" if number < 10 else b"x")
            begin = time.monotonic()
            self.assertEqual(server.request("GET", "/health").status, 200)
            seconds.append(time.monotonic() - begin)
        self.assertLess(sorted(seconds)[25], 0.1)

    @on_linux
    def test_a_burst_leaves_nothing_behind(self) -> None:
        allow_descriptors(1100)
        server = self.start_with("kv.SPARE_SECONDS = 0.5")
        threads, descriptors = server.threads(), server.descriptors()
        burst(server.port, [put(f"key{number}", "value") for number in range(1000)], 15)
        wait_until(lambda: server.descriptors() == descriptors, "all descriptors closed")
        wait_until(lambda: server.threads() <= threads + 1, "threads ended")

    @on_linux
    def test_memory_does_not_grow_with_requests_or_connections(self) -> None:
        server = self.start()
        load_server(server, 2_000, 100)  # what it may remember, it does by now
        before = server.resident_bytes()
        load_server(server, 20_000, 2_000)
        self.assertLess(server.resident_bytes() - before, 1_500_000)

    @on_linux
    def test_an_idle_connection_does_not_keep_its_last_value(self) -> None:
        # So that memory which is not needed any more goes back to the system at once.
        server = self.start(env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"})
        before = server.resident_bytes()
        for _ in range(20):
            self.client(server).request("PUT", "/kv/a", b"x" * 10_000_000)
        wait_until(lambda: server.resident_bytes() - before < 30_000_000, "it is given back")

    @on_linux
    def test_an_idle_connection_does_not_keep_a_large_head(self) -> None:
        server = self.start(env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "20000"})
        before = server.resident_bytes()
        for _ in range(300):
            client = self.client(server)
            for _ in range(2):
                client.request("GET", "/health", None, "Cookie: " + "x" * 30_000)
        wait_until(lambda: server.resident_bytes() - before < 300 * 20_000, "it is given back")

    def test_a_client_that_hangs_up_leaves_no_trace_in_the_log(self) -> None:
        server = self.start()
        server.request("PUT", "/kv/a", b"x" * 5_000_000)
        for data in (b"", b"GET", put("b", "value")[:-1], CHUNKED, request("GET", "/kv/a") * 10):
            for reset in (False, True):
                with server.connect() as client:
                    client.send(data)
                    if reset:
                        client.reset()
        self.assertEqual(server.stop(), 0)
        self.assertNotRegex(server.log, "kv.py: error|Traceback")

    def test_answers_to_pipelined_requests_do_not_wait_for_each_other(self) -> None:
        """Without TCP_NODELAY the second of two waits for the client to acknowledge the first."""
        client = self.client(self.start())
        seconds = []
        for _ in range(300):
            begin = time.monotonic()
            client.send(request("GET", "/health") * 2)
            client.receive()
            client.receive()
            seconds.append(time.monotonic() - begin)
        self.assertLess(sorted(seconds)[150], 0.02)  # it would be 0.04

    @on_linux
    def test_out_of_memory_is_answered_and_reported_and_the_others_are_served(self) -> None:
        server = self.start()
        server.request("PUT", "/kv/a", b"1")
        server.limit("AS", server.address_space_bytes() + 40_000_000)
        statuses = [
            server.request("PUT", f"/kv/large{number}", b"x" * 10_000_000).status
            for number in range(20)
        ]
        self.assertEqual(set(statuses), {200, 507})
        server.limit("AS", resource.RLIM_INFINITY)
        self.assertEqual(server.get("a"), "1")
        self.assertRegex(server.log, r"\nkv\.py: error: MemoryError\(.*\) in \w+, line \d+\n$")

    @on_linux
    def test_when_no_more_threads_are_to_be_had_connections_take_turns(self) -> None:
        server = self.start()
        # For a few threads, as each has a stack of 8 MB.
        server.limit("AS", server.address_space_bytes() + 50_000_000)
        for _ in range(50):
            self.assertEqual(self.client(server).request("GET", "/health").status, 200)
        self.assertLess(server.threads(), 20)
        self.assertNotIn("kv.py: error", server.log)

    def test_without_memory_for_a_moment_the_next_client_is_accepted(self) -> None:
        """Even if there is none to report it."""
        failures = iter([MemoryError])
        reported: list[type] = []

        def report(error: BaseException) -> None:
            reported.append(type(error))
            raise MemoryError

        class Jobs(queue.SimpleQueue[Any]):
            def put(self, *them: Any) -> None:
                for failure in failures:
                    raise failure  # made now, or the error would keep the connection
                super().put(*them)

        # Python 3.9 crashes if it has to warn of the lost connection while it frees the error.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            server = kv.Server("127.0.0.1", 0, NO_LOG, False)
            server._jobs = Jobs()
            server.log = unittest.mock.Mock(error=report)
            server.start(kv.Store({}))
            with Client(server.server_address[1]) as client:
                self.assertTrue(client.is_closed())
            with Client(server.server_address[1]) as client:
                self.assertEqual(client.request("GET", "/health").status, 200)
            server.stop()
            self.assertTrue(server.join(time.monotonic() + 5))
        self.assertEqual(reported, [MemoryError])

    def test_without_memory_even_to_report_it_a_worker_goes_on(self) -> None:
        """The connection is closed, and another one is served by the same worker."""
        server = kv.Server("127.0.0.1", 0, NO_LOG, False)
        server.log = unittest.mock.Mock()
        server.log.error.side_effect = MemoryError
        with unittest.mock.patch.object(kv, "MAX_WORKERS", 1):
            server.start(kv.Store({}))
            failing = unittest.mock.patch.object(kv.Handler, "handle", side_effect=MemoryError)
            with failing, Client(server.server_address[1]) as client:
                self.assertTrue(client.is_closed())
            with Client(server.server_address[1]) as client:
                self.assertEqual(client.request("GET", "/health").status, 200)
            server.stop()
            self.assertTrue(server.join(time.monotonic() + DEADLINE))

    def test_a_line_that_cannot_be_written_is_the_only_one_that_is_lost(self) -> None:
        with unittest.mock.patch("os.write", side_effect=[MemoryError, OSError, 0]) as write:
            log = kv.Log()
            for line in ("lost", "lost", "written"):
                log(line)
            log.close(DEADLINE)
        self.assertEqual(write.call_args, unittest.mock.call(2, b"kv.py: written\n"))

    def test_a_log_that_nobody_reads_does_not_fill_the_memory(self) -> None:
        is_read = threading.Event()
        with unittest.mock.patch("os.write", side_effect=lambda *_: is_read.wait()) as write:
            log = kv.Log()
            for _ in range(3000):
                log("line")
            is_read.set()
            log.close(DEADLINE)
        self.assertLess(write.call_count, 1500)

    def test_without_memory_even_to_report_it_the_thread_goes_on(self) -> None:
        log = kv.Log()
        with unittest.mock.patch("traceback.walk_tb", side_effect=MemoryError):
            log.error(MemoryError())

    @on_linux
    def test_after_a_spell_without_memory_everybody_is_served(self) -> None:
        """A thread may end before it runs, and a worker anywhere; none may be counted for good."""
        server = self.start()
        server.limit("AS", server.address_space_bytes() + 30_000_000)
        sizes = itertools.cycle((10, 1000, 50_000, 400_000))
        end = time.monotonic() + 2
        while time.monotonic() < end:
            loops = [Loop(put(f"{n}", "x" * next(sizes)) for _ in range(5)) for n in range(150)]
            keep_alive(server.port, loops, 5)
        server.limit("AS", resource.RLIM_INFINITY)
        clients = [self.client(server) for _ in range(50)]
        for client in clients:
            client.send(request("GET", "/health"))
        for client in clients:
            self.assertEqual(client.receive().status, 200)
        self.assertFalse("Traceback" in server.log)
        self.stop_at_once(server)

    def test_a_mistake_in_a_request_costs_one_connection(self) -> None:
        server = self.start_with("kv.Handler.do_health = lambda self: 1 / 0")
        client = self.client(server)
        client.send(request("GET", "/health"))
        self.assertTrue(client.is_closed())
        server.wait_for_log("kv.py: error: ZeroDivisionError('division by zero') in <lambda>")
        self.assertEqual(server.request("PUT", "/kv/a", b"1").status, 200)
        self.stop_at_once(server)

    @on_linux
    def test_a_client_that_is_gone_when_memory_is_short_is_no_mistake(self) -> None:
        server = self.start_with(
            "import select; kv.Handler.do_health = lambda self:"
            " (select.select([self.connection], [], []), bytearray(1 << 62))"
        )
        client = server.connect()
        client.send(request("GET", "/health"))
        wait_until_read(server, client)
        client.reset()
        self.assertEqual(server.request("PUT", "/kv/a", b"1").status, 200)
        self.stop_at_once(server)
        self.assertNotIn("error", server.log)

    def test_threads_that_end_before_they_run_are_replaced(self) -> None:
        server = self.start_with(
            "work, dying = kv.Server._work, [1, 1, 1];"
            " kv.Server._work = lambda self: dying.pop() / 0 if dying else work(self)"
        )
        self.assertEqual(server.request("GET", "/health").status, 200)
        self.assertIn("kv.py: error: ZeroDivisionError", server.log)
        self.assertEqual(server.stop(), 0)
        self.assertNotIn("Traceback", server.log)

    @unittest.skipUnless(hasattr(os, "sched_getaffinity"), "asks for the cores of a process")
    def test_stays_on_one_core(self) -> None:
        with self.start() as server:
            self.assertEqual(len(os.sched_getaffinity(server.process.pid)), 1)
        # Without the interpreter lock, threads run on all of them.
        server = self.start_with("kv.sys._is_gil_enabled = lambda: False")
        cores = os.sched_getaffinity(0)
        self.assertEqual(os.sched_getaffinity(server.process.pid), cores)

    def test_joining_tells_whether_the_acceptor_has_ended(self) -> None:
        with kv.Server("127.0.0.1", 0, NO_LOG, False) as server:
            over = threading.Event()
            server._acceptor = threading.Thread(target=over.wait, daemon=True)
            server._acceptor.start()
            self.assertFalse(server.join(time.monotonic()))
            over.set()

    def test_the_start_does_not_ask_the_name_service(self) -> None:
        """Which can take seconds to say that it does not know."""
        with unittest.mock.patch("socket.getfqdn", side_effect=AssertionError):
            kv.Server("127.0.0.1", 0, NO_LOG, False).server_close()

    @on_linux
    def test_who_reads_too_slowly_is_given_up(self) -> None:
        """At 100 bytes/s, its kernel makes no room for more within a second."""
        server = self.start_with("kv.STALL_SECONDS = 1.0")
        before = server.descriptors()
        server.request("PUT", "/kv/a", b"x" * 10_000_000)
        wait_until(lambda: server.descriptors() == before, "that connection is closed")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.connect(("127.0.0.1", server.port))
            client.send(request("GET", "/kv/a") * 2)
            wait_until(lambda: server.descriptors() > before, "it is accepted")
            end = time.monotonic() + DEADLINE
            while server.descriptors() > before:
                client.recv(10)
                time.sleep(0.1)
                self.assertLess(time.monotonic(), end)

    @on_linux
    def test_a_steady_reader_is_given_up_only_if_it_is_too_slow_on_average(self) -> None:
        server = self.start_with("kv.STALL_SECONDS = 1.0; kv.BYTES_PER_SECOND = 1_000_000")
        server.request("PUT", "/kv/a", b"x" * 10_000_000)
        before = server.descriptors()
        with socket.socket() as fast, socket.socket() as slow:
            received = {fast: 0, slow: 0}
            for client in received:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
                client.connect(("127.0.0.1", server.port))
                client.send(request("GET", "/kv/a", None, "Connection: close"))
            begin = time.monotonic()
            while server.descriptors() > before or received[fast] < 10_000_000:
                time.sleep(0.01)
                seconds = time.monotonic() - begin
                self.assertLess(seconds, 20)
                for client, rate in ((fast, 2_000_000), (slow, 400_000)):
                    if received[client] < rate * seconds:
                        received[client] += len(client.recv(100_000))
            while data := slow.recv(1_000_000):
                received[slow] += len(data)
            self.assertLess(received[slow], 10_000_000)

    def test_slow_readers_get_the_whole_value(self) -> None:
        server = self.start()
        value = b"0123456789" * 1_000_000
        client = self.client(server)
        client.request("PUT", "/kv/a", value)
        client.send(request("GET", "/kv/a") * 3)  # more than fits into the sockets' buffers
        self.assertEqual(server.get("a"), value.decode())
        for _ in range(3):
            self.assertEqual(client.receive().body, value)


# ---- Process: the shutdown ----


FSYNC_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>
int fsync(int descriptor) {
    struct stat status;
    char number[8] = "";
    fstat(descriptor, &status);
    int file = open(getenv(S_ISDIR(status.st_mode) ? "FAIL_DIRECTORY" : "FAIL_FILE"), O_RDONLY);
    if (file >= 0 && read(file, number, 7) > 0) {
        close(file);
        errno = atoi(number);
        return -1;
    }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(descriptor);
}
"""


class FsyncShim:
    """Has a process's fsync fail, of files or of directories, from the moment that `fail` says."""

    def __init__(self, top: Path) -> None:
        (top / "shim.c").write_text(FSYNC_SHIM)
        command = f"cc -shared -fPIC -o '{top}/shim.so' '{top}/shim.c' -ldl"
        subprocess.run(command, shell=True, check=True)
        self.top = top
        self.env = {
            **os.environ,
            "LD_PRELOAD": str(top / "shim.so"),
            "FAIL_FILE": str(top / "fail-file"),
            "FAIL_DIRECTORY": str(top / "fail-directory"),
        }

    def fail(self, what: str, number: int) -> None:
        (self.top / f"fail-{what}").write_text(str(number))


needs_compiler = unittest.skipUnless(
    shutil.which("cc") and sys.platform == "linux", "builds a library that is preloaded"
)


class ShutdownTest(KVTest):
    def test_each_signal_saves(self) -> None:
        names = ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGXCPU"]
        names += ["SIGPWR"] if sys.platform == "linux" else []
        for name in names:
            with self.start(preexec_fn=not_under_nohup) as server:
                server.request("PUT", f"/kv/{name}", b"value")
                self.assertEqual(server.stop(signal.Signals[name]), 0)
                self.assertIn(name, server.log)
                self.assertRegex(server.log, r"saved \d pairs? in \d+\.\d\d s")
        self.assertEqual(set(self.read_snapshot()), set(names))

    @on_linux
    def test_a_limit_of_cpu_time_saves(self) -> None:
        """`ulimit -t` sets the hard limit, too, at which a process is killed."""
        server = self.start(preexec_fn=limited("CPU", 2))
        client = self.client(server)
        with contextlib.suppress(ConnectionError):
            while server.process.poll() is None:
                client.request("PUT", "/kv/a", b"1")
        self.assertEqual(server.exit_code(), 0)
        self.assertIn("SIGXCPU", server.log)
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    def test_another_signal_does_not_end_the_waiting(self) -> None:
        """Systemd and a terminal that is closed send SIGHUP right behind SIGTERM, or before.

        The kernel sends SIGXCPU each second.
        """
        term, hup, xcpu = signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU
        for numbers in ((term, hup), (hup, term), (xcpu, xcpu)):
            for together in (True, False):
                with self.start(preexec_fn=not_under_nohup) as server:
                    client = self.begin_upload(server, "a")
                    if together:  # they are pending when the server goes on
                        server.send_signal(signal.SIGSTOP)
                    server.send_signal(numbers[0])
                    if not together:
                        server.wait_for_log("draining")
                    server.send_signal(numbers[1])
                    server.send_signal(signal.SIGCONT)
                    time.sleep(1.5)  # longer than a second signal takes to be noticed
                    client.send(b"e")
                    self.assertEqual(client.receive().status, 200)
                    self.assertEqual(server.exit_code(), 0)
                    self.assertIn("0 given up", server.log)

    def test_nohup_is_respected(self) -> None:
        server = self.start(command=["nohup", sys.executable, str(HERE / "kv.py")])
        server.send_signal(signal.SIGHUP)
        self.assertEqual(server.request("PUT", "/kv/a", b"1").status, 200)
        self.assertEqual(server.stop(), 0)
        self.assertNotIn("SIGHUP", server.log)

    def test_what_was_acknowledged_is_saved_before_the_stalled_are_given_up(self) -> None:
        server = self.start()
        self.begin_upload(server, "stalled")
        server.request("PUT", "/kv/a", b"1")
        server.send_signal()
        server.wait_for_log("saved 1 pair ")
        self.assertNotIn("given up", server.log)
        server.send_signal(signal.SIGKILL)
        server.exit_code()
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    def test_a_second_signal_ends_the_waiting(self) -> None:
        server = self.start()
        self.begin_upload(server, "stalled")
        server.request("PUT", "/kv/a", b"1")
        server.send_signal()
        server.wait_for_log("draining")
        server.send_signal()
        self.assertEqual(server.exit_code(), 0)
        self.assertRegex(server.log, r"drained in \d\.\d\d s, 1 given up")
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    @on_linux
    def test_stalled_clients_on_a_full_disk_still_end_in_a_save(self) -> None:
        """All that can go wrong at once, and the process still ends by itself and has saved.

        Clients stall in a head, in a body and while they are answered; nothing can be written
        until shortly before the end, and a write that comes too late is refused.
        """
        server = self.start("--graceful-timeout=6")
        server.request("PUT", "/kv/large", b"x" * 1_000_000)
        self.begin_upload(server, "stalled")
        late = self.begin_upload(server, "late")
        in_a_head = self.client(server)
        in_a_head.send(request("GET", "/health") + b"GET /kv/a HT")
        in_a_head.receive()
        self.client(server).send(request("GET", "/kv/large") * 30)  # and does not read the answers
        server.request("PUT", "/kv/a", b"1")

        server.limit("FSIZE", 1000)
        server.send_signal()
        server.wait_for_log("4 given up\nkv.py: cannot save: File too large")

        # A second is left for the next lines, until the last try to save.
        late.send(b"e" + put("later", "value"))
        answer = late.receive()
        self.assertEqual((answer.status, answer.fields["Connection"]), (503, "close"))
        server.limit("FSIZE", resource.RLIM_INFINITY)
        self.assertEqual(server.exit_code(), 0)
        self.assertEqual(set(self.read_snapshot()), {"a", "large"})
        self.assertEqual(os.listdir(self.directory), [SNAPSHOT])

    def test_a_signal_during_the_start_never_costs_the_snapshot(self) -> None:
        self.write_snapshot({f"key{number}": "value" * 20 for number in range(100_000)})
        before = self.snapshot.read_bytes()
        chance = random.Random(1)
        for _ in range(20):
            server = self.start(ready=False, preexec_fn=not_under_nohup)
            time.sleep(chance.uniform(0, 0.4))  # the moment is left to chance
            number = chance.choice([signal.SIGTERM, signal.SIGHUP])
            server.send_signal(number)
            self.assertIn(server.exit_code(), (0, -number))
            self.assertNotIn("Traceback", server.log)
            self.assertEqual(self.snapshot.read_bytes(), before)

    def test_without_changes_nothing_is_written(self) -> None:
        self.write_snapshot({"a": "1"})
        before = self.snapshot.stat()
        server = self.start()
        self.assertEqual(server.get("a"), "1")
        self.assertEqual(server.stop(), 0)
        after = self.snapshot.stat()
        self.assertEqual((after.st_ino, after.st_mtime_ns), (before.st_ino, before.st_mtime_ns))

    def test_shutdowns_under_load_lose_nothing(self) -> None:
        report = shutdowns_under_load(self.directory, cycles=8, seed=1)
        self.assertEqual(report.lost, [])
        self.assertGreater(report.acknowledged, 0)


class DrainTest(KVTest):
    """What becomes of the connections when the server stops."""

    def test_idle_connections_do_not_delay_the_exit(self) -> None:
        allow_descriptors(1100)
        server = self.start()
        clients = [self.client(server) for _ in range(1000)]
        for client in clients[:500]:  # the others have never sent anything
            client.request("PUT", "/kv/a", b"1")
        self.stop_at_once(server)
        self.assertTrue(all(client.is_closed() for client in clients))

    @on_linux
    def test_an_empty_line_behind_a_body_leaves_the_connection_idle(self) -> None:
        server = self.start()
        for with_the_body, later in ((b"\r\n", b""), (b"", b"\r\n"), (b"\r", b"\n"), (b"", b"\r")):
            client = self.client(server)
            client.send(put("a", "1") + with_the_body)
            self.assertEqual(client.receive().status, 200)
            client.send(later)
            wait_until_read(server, client)
        self.stop_at_once(server)

    def test_everything_on_the_wire_is_answered_and_saved(self) -> None:
        """Stopped, the server accepts nothing: 200 connections are in the listen queue."""
        server = self.start()
        server.send_signal(signal.SIGSTOP)
        clients = [self.client(server) for _ in range(200)]
        for number, client in enumerate(clients):
            client.send(put(f"{number}a", "1") + put(f"{number}b", "2"))
        server.send_signal()
        server.send_signal(signal.SIGCONT)
        for client in clients:
            first, second = client.receive(), client.receive()
            self.assertEqual((first.status, second.status), (200, 200))
            # Not on the first, behind which there is one more, even when the drain has begun.
            self.assertEqual(first.fields.get("Connection"), None)
            self.assertTrue(client.is_closed())
        self.assertEqual(server.exit_code(), 0)
        self.assertEqual(len(self.read_snapshot()), 400)
        self.assertRaises(ConnectionRefusedError, server.connect)

    @on_linux
    def test_a_listen_queue_that_is_never_empty_does_not_delay_the_exit(self) -> None:
        """There are few connections for clients that come faster than they are answered."""
        for _ in range(3):
            server = self.start(preexec_fn=limited("NOFILE", 40))
            server.request("PUT", "/kv/a", b"1")
            clients = multiprocessing.get_context("fork").Process(
                target=connect_until_refused, args=[server.port], daemon=True
            )
            clients.start()
            self.addCleanup(clients.join)
            self.addCleanup(clients.kill)
            wait_until(functools.partial(is_queue_long, server.port), "clients are waiting")
            self.stop_at_once(server)

    def test_busy_clients_are_all_answered(self) -> None:
        """A third of them without a pause, the others with one of up to 4 or 60 ms."""
        chance = random.Random(1)
        for number in (64, 200) * 10:
            server = self.start("--port=0")
            loops = [
                Loop(endless_puts(client), chance.random() * (0, 0.004, 0.06)[client % 3])
                for client in range(number)
            ]
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                running = pool.submit(keep_alive, server.port, loops)
                time.sleep(chance.uniform(0.1, 0.3))  # the moment is left to chance
                server.send_signal()
                self.assertEqual(server.exit_code(), 0)
                outcome = running.result()
            self.assertEqual(set(outcome.answers), {"200"}, server.log)
            self.assertRegex(server.log, r"drained in \d\.\d\d s, 0 given up")
            stored = {}
            for sent in outcome.acknowledged:
                head, _, value = sent.partition(b"\r\n\r\n")
                stored[head.split()[1].decode()[len("/kv/") :]] = value.decode()
            self.assertEqual(self.read_snapshot(), stored)
            server.__exit__()
            self.snapshot.unlink()

    def test_a_slow_upload_finishes_and_is_saved(self) -> None:
        server = self.start()
        client = self.begin_upload(server, "slow")
        server.send_signal()
        server.wait_for_log("draining: 1 connection in flight")
        wait_until(lambda: not listens(server.port), "new connections are refused")
        client.send(b"e")
        answer = client.receive()
        self.assertEqual((answer.status, answer.fields["Connection"]), (200, "close"))
        self.assertEqual(server.exit_code(), 0)
        self.assertEqual(self.read_snapshot(), {"slow": "value"})

    def test_a_refused_client_that_stays_does_not_delay_the_exit(self) -> None:
        server = self.start_with("kv.LINGER_SECONDS = 60.0")
        client = self.client(server)
        # Two in a packet: after the first answer, the server has begun with the second.
        client.send(request("GET", "/health") + request("GET", "/other", b"value")[:-1])
        client.receive()
        late = self.begin_upload(server, "late")
        server.send_signal()
        server.wait_for_log("draining: 2 connections in flight")
        client.send(b"e")
        late.send(b"e")
        self.assertEqual(client.receive().status, 404)
        self.assertEqual(server.exit_code(), 0)
        self.assertRegex(server.log, r"drained in \d\.\d\d s, 0 given up")
        self.assertTrue(client.is_closed())

    def test_a_client_that_could_go_on_sending_does_not_delay_the_exit(self) -> None:
        """It has its answer, so it is not in flight any more."""
        server = self.start_with("kv.LINGER_SECONDS = 60.0")
        client = self.client(server)
        client.send(request("PUT", "/kv/a", None, "Content-Length: 99999999"))
        self.assertEqual(client.receive().status, 413)
        self.stop_at_once(server)

    @on_linux
    def test_an_empty_line_behind_the_last_request_is_not_one_more(self) -> None:
        server = self.start()
        client = self.client(server)
        client.send(GET + HOST)
        wait_until_read(server, client)
        server.send_signal()
        wait_until(lambda: not listens(server.port), "new connections are refused")
        client.send(END + END)
        answer = client.receive()
        self.assertEqual((answer.status, answer.fields.get("Connection")), (200, "close"))
        self.assertEqual(server.exit_code(), 0)

    def test_who_sends_one_more_request_is_answered(self) -> None:
        """Also if it is not in our buffer yet, but has arrived."""
        server = self.start()
        client = self.begin_upload(server, "a")
        server.send_signal()
        wait_until(lambda: not listens(server.port), "new connections are refused")
        client.send(b"e" + request("GET", "/kv/a"))
        answers = [client.receive() for _ in range(2)]
        self.assertEqual([answer.status for answer in answers], [200, 200])
        self.assertEqual([answer.fields.get("Connection") for answer in answers], [None, "close"])
        self.assertEqual(client.file.read(), b"")
        self.assertEqual(server.exit_code(), 0)

    def test_the_backlog_is_served_also_when_there_are_no_descriptors(self) -> None:
        server = self.start(preexec_fn=limited("NOFILE", 40))
        idle = [self.client(server) for _ in range(40 - 5 - kv.RESERVED_DESCRIPTORS)]
        for client in idle:
            client.request("GET", "/health")
        waiting = [self.client(server) for _ in range(60)]  # which stay when they are answered
        for number, client in enumerate(waiting):
            client.send(put(f"{number}", "value"))
        time.sleep(0.5)  # until all are idle
        server.send_signal()
        self.assertEqual([client.receive().status for client in waiting], [200] * len(waiting))
        self.assertEqual(server.exit_code(), 0)
        self.assertRegex(server.log, r"drained in \d\.\d\d s, 0 given up")
        self.assertEqual(len(self.read_snapshot()), len(waiting))


class LastSaveTest(KVTest):
    """It depends on nothing that clients or the system can take away."""

    @on_linux
    def test_clients_have_used_up_the_descriptors(self) -> None:
        """Of which the parent process has left 40 open."""
        server = self.start("--graceful-timeout=2", close_fds=False, preexec_fn=inherit_40_of_256)
        server.request("PUT", "/kv/a", b"1")
        clients = [self.client(server) for _ in range(276)]
        for client in clients:
            client.send(put("half", "value")[:-1])
        most = 256 - kv.RESERVED_DESCRIPTORS - 5
        wait_until(lambda: server.descriptors() > most, "the limit is reached")
        self.assertEqual(server.stop(), 0)
        self.assertNotIn("cannot save", server.log)
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    @on_linux
    def test_clients_have_used_up_the_memory(self) -> None:
        """To the last kilobyte, with a dict of which no copy would fit into the reserve."""
        stored = {f"key{number}": "value" for number in range(400_000)}
        self.write_snapshot(stored)
        # Else each thread has address space that the limit does not reach.
        server = self.start(env={**os.environ, "MALLOC_ARENA_MAX": "1"})
        server.limit("AS", server.address_space_bytes() + 20_000_000)
        for size in (1_000_000, 100_000, 10_000, 1_000, 100, 10):
            with server.connect() as client:
                for number in itertools.count():
                    key, value = f"{size}-{number}", "x" * size
                    status = client.request("PUT", f"/kv/{key}", value.encode()).status
                    if status != 200:
                        break
                    stored[key] = value
                self.assertEqual(status, 507)
        self.assertEqual(server.stop(), 0)
        self.assertEqual(self.read_snapshot(), stored)

    def test_a_file_system_that_shares_no_map(self) -> None:
        (self.top / "source").mkdir()
        self.mount("bindfs", "-o", "direct_io", str(self.top / "source"), str(self.directory))
        for expected in (None, "1"):
            with self.start() as server:
                self.assertEqual(server.get("a"), expected)
                server.request("PUT", "/kv/a", b"1")
                self.assertEqual(server.stop(), 0)

    @needs_compiler
    def test_a_file_system_that_cannot_sync_a_directory(self) -> None:
        for number in (errno.EINVAL, errno.ENOTSUP):
            shim = FsyncShim(self.top)
            shim.fail("directory", number)
            with self.start(env=shim.env) as server:
                server.request("PUT", "/kv/a", b"1")
                self.assertEqual(server.stop(), 0)
                self.assertNotIn("cannot save", server.log)

    def test_inherited_descriptors_with_high_numbers(self) -> None:
        allow_descriptors(2000)

        def inherit() -> None:
            for number in range(3, 1040):
                os.dup2(0, number)

        server = self.start(close_fds=False, preexec_fn=inherit)
        client = self.client(server)
        self.assertEqual(client.request("PUT", "/kv/a", b"1").status, 200)
        self.stop_at_once(server)
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    def test_a_terminal_that_stops_who_writes_in_the_background(self) -> None:
        reader, terminal = os.openpty()
        kv_py = [sys.executable, str(HERE / "kv.py"), "--port=0", f"--working-dir={self.directory}"]
        shell = subprocess.Popen(
            ["sh", "-c", 'stty tostop; set -m; "$@" & wait $!', "sh", *kv_py],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(terminal)
        self.addCleanup(os.close, reader)
        self.addCleanup(shell.wait)
        self.addCleanup(shell.kill)
        ready, _, _ = select.select([reader], [], [], DEADLINE)
        self.assertTrue(ready, "stopped at its first line")
        match = re.search(rb"listening on http://127\.0\.0\.1:(\d+)", os.read(reader, 1000))
        assert match
        with Client(int(match[1])) as client:
            client.request("PUT", "/kv/a", b"1")
        (child,) = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        self.assertEqual(shell.wait(DEADLINE), 0)
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    def test_something_else_in_the_place_of_ours(self) -> None:
        """Everything is to be found under the path that was given, also what was saved before."""
        moved, older = self.top / "moved", self.top / "older"
        older.mkdir()
        kv.write_pairs(str(older / SNAPSHOT), {"a": "0"})

        def move(replacement: Path | None = None) -> None:
            self.directory.rename(moved)
            if replacement:
                shutil.copytree(replacement, self.directory)

        changes: dict[str, Callable[[], object]] = {
            "no directory": lambda: shutil.rmtree(self.directory),
            "a new directory": move,
            "an older directory": lambda: move(older),
            "no file": lambda: self.snapshot.unlink(missing_ok=True),
            "an older file": lambda: shutil.copy(older / SNAPSHOT, self.snapshot),
            "an empty file": lambda: self.snapshot.write_text(""),
        }
        for what, saved in itertools.product(changes, (False, True)):
            with self.subTest(what, saved=saved), self.start() as server:
                server.request("PUT", "/kv/a", b"1")
                if saved:
                    server.send_signal(signal.SIGUSR1)
                    server.wait_for_log("saved")
                changes[what]()
                self.directory.mkdir(exist_ok=True)
                self.assertEqual(server.stop(), 0)
                self.assertEqual(self.read_snapshot(), {"a": "1"})
            shutil.rmtree(self.directory)
            shutil.rmtree(moved, ignore_errors=True)

    def test_a_directory_in_its_place_that_another_server_uses(self) -> None:
        server = self.start()
        server.request("PUT", "/kv/a", b"1")
        self.directory.rename(self.top / "moved")
        other = self.start()
        other.request("PUT", "/kv/b", b"2")
        server.send_signal()
        server.wait_for_log("cannot save: in use by another kv.py")
        server.send_signal()
        self.assertEqual(server.exit_code(), 1)
        self.assertEqual(other.stop(), 0)
        self.assertEqual(self.read_snapshot(), {"b": "2"})

    def test_whatever_happens_in_the_drain_there_is_a_last_save(self) -> None:
        for mistake in ("Server.stop", "Server.join", "Server._drop_silent"):
            with self.start_with(f"kv.{mistake} = lambda *_: 1 / 0") as server:
                with server.connect() as client:
                    client.request("PUT", f"/kv/{mistake}", b"1")
                    time.sleep(2 * kv.PAUSE_SECONDS)  # until it is parked
                    server.send_signal()
                    server.wait_for_log("drain")
                    server.send_signal()
                    self.assertEqual(server.exit_code(), 0)
                self.assertIn(mistake, self.read_snapshot())

    def test_the_temporary_file_cannot_be_replaced(self) -> None:
        temporary = self.directory / "kv.pickle.tmp"
        temporary.mkdir(parents=True)
        self.assert_refuses_to_start(f"'{temporary}'")

    def test_the_graceful_timeout(self) -> None:
        server = self.start("--graceful-timeout=2")
        self.begin_upload(server, "stalled")
        server.request("PUT", "/kv/a", b"1")
        self.assertEqual(server.stop(), 0)
        self.assertRegex(server.log, r"saved 1 pair in .*\n.*drained in [01]\.\d\d s, 1 given up")
        for wrong in ("0", "-1", "1.5", "x", ""):
            argument = f"--graceful-timeout={wrong}"
            self.assert_refuses_to_start("--graceful-timeout", argument, code=2)


def inherit_40_of_256() -> None:
    """For preexec_fn."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    for number in (*range(3, 23), *range(230, 250)):
        os.dup2(0, number)


class SaveTest(KVTest):
    """A save without a stop."""

    def begin_a_save(self, server: ServerProcess) -> None:
        """Send the signal, and wait until the server has taken it."""
        server.send_signal(signal.SIGUSR1)
        wait_until(lambda: not has_signal(server, "ShdPnd", signal.SIGUSR1), "it has begun")

    def test_a_signal_saves_what_has_changed(self) -> None:
        server = self.start()
        client = self.client(server)
        for value in ("1", "2"):
            client.request("PUT", f"/kv/{value}", value.encode())
            server.send_signal(signal.SIGUSR1)
            server.wait_for_log(f"saved {value} pair")
        self.assertEqual(self.read_snapshot(), {"1": "1", "2": "2"})
        before = self.snapshot.stat().st_ino
        self.begin_a_save(server)
        self.assertEqual(client.request("GET", "/kv/2").body, b"2")
        self.assertEqual(server.stop(), 0)
        self.assertEqual(server.log.count("saved"), 2)
        self.assertEqual(self.snapshot.stat().st_ino, before)

    def test_by_itself_every_so_often(self) -> None:
        server = self.start("--save-every=1")
        for number in range(1, 3):
            server.request("PUT", f"/kv/{number}", b"x")
            server.wait_for_log(f"saved {number} pair")
        server.send_signal(signal.SIGKILL)
        server.exit_code()
        self.assertEqual(self.read_snapshot(), {"1": "x", "2": "x"})
        self.assert_refuses_to_start("--save-every", "--save-every=-1", code=2)

    @on_linux
    def test_a_failure_is_a_line_in_the_log(self) -> None:
        server = self.start()
        server.request("PUT", "/kv/a", b"x" * 10_000)
        server.limit("FSIZE", 1000)
        server.send_signal(signal.SIGUSR1)
        server.wait_for_log("cannot save: File too large")
        self.assertEqual(server.request("PUT", "/kv/b", b"1").status, 200)
        server.limit("FSIZE", resource.RLIM_INFINITY)
        self.assertEqual(server.stop(), 0)
        self.assertEqual(set(self.read_snapshot()), {"a", "b"})

    def test_without_memory_even_to_report_it_the_server_goes_on(self) -> None:
        server = self.start_with(
            "saves = iter([lambda _: b'x' * 2**60, *[kv.Saver.save] * 10]);"
            "kv.Saver.save = lambda self: next(saves)(self)"
        )
        server.request("PUT", "/kv/a", b"1")
        self.begin_a_save(server)
        self.assertEqual(server.get("a"), "1")
        self.assertEqual(server.stop(), 0)
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    def test_a_stop_in_the_middle_of_a_save(self) -> None:
        """Its time counts from the beginning of that save, which is not made again."""
        server = self.start_with(
            "save = kv.Snapshot.save;"
            "kv.Snapshot.save = lambda *them: (kv.time.sleep(2), save(*them))"
        )
        server.request("PUT", "/kv/a", b"1")
        self.begin_a_save(server)
        self.assertEqual(server.stop(), 0)
        self.assertEqual(server.log.count("saved"), 1)
        self.assertRegex(server.log, r"drained in 2\.\d\d s")
        self.assertEqual(self.read_snapshot(), {"a": "1"})


class ShutdownStepsTest(unittest.TestCase):
    """How long each step waits, by a clock that moves only when something waits or saves."""

    def shut_down(
        self,
        graceful: float = 15,
        seconds: float = 0,
        estimate: float = 0,
        errors: Iterable[Exception] = (),
        drained: bool = False,
        log: Any = NO_LOG,
    ) -> tuple[bool, list[float]]:
        """Return whether it saved, and when each try to save ended and, at last, the whole.

        Each try takes some seconds, and the first ones end with `errors`. The requests in flight
        have all ended, or go on for ever.
        """
        now = 0.0
        ended: list[float] = []
        outcomes = itertools.chain(errors, itertools.repeat(None))

        class Clock:
            @staticmethod
            def monotonic() -> float:
                return now

            @staticmethod
            def sleep(seconds: float) -> None:
                nonlocal now
                now += seconds

        class Server:
            in_hand, parked = 1, ()

            def stop(self) -> None: ...

            def join(self, until: float) -> bool:
                Clock.sleep(0 if drained else max(0, until - now))
                return drained

        class Snapshot:
            def is_ours(self) -> bool:
                return True

            def save(self, pairs: dict[str, str]) -> None:
                Clock.sleep(seconds)
                ended.append(round(now, 2))
                if error := next(outcomes):
                    raise error

        store = kv.Store({})
        store.put("a", "1")
        saver = kv.Saver(store, cast(kv.Snapshot, Snapshot()), NO_LOG, estimate)
        with unittest.mock.patch.object(kv, "time", Clock):
            server = cast(kv.Server, Server())
            failure = kv.shut_down(server, saver, log, 0.0, graceful, set())
        return not failure, [*ended, round(now, 2)]

    def test_waits_for_what_is_in_flight_until_there_is_just_time_for_a_save(self) -> None:
        self.assertEqual(self.shut_down(), (True, [1, 12]))

    def test_the_time_follows_from_the_graceful_timeout(self) -> None:
        self.assertEqual(self.shut_down(graceful=1), (True, [0.07, 0.8]))
        self.assertEqual(self.shut_down(graceful=90), (True, [1, 72]))
        self.assertEqual(self.shut_down(graceful=1, estimate=9), (True, [0.2, 0.2]))
        outcome = self.shut_down(graceful=5, errors=itertools.repeat(OSError()), drained=True)
        self.assertEqual((outcome[0], outcome[1][-1]), (False, 5.0))

    def test_the_longer_a_save_takes_the_more_time_is_kept_for_the_last_one(self) -> None:
        """Also when there was nothing to save in between."""
        self.assertEqual(self.shut_down(seconds=3), (True, [4, 6]))

    def test_the_first_estimate_is_what_the_load_took(self) -> None:
        """No early save unless it and the last one fit: here, one ends at 7.5 s, not at 15 s."""
        self.assertEqual(self.shut_down(seconds=7, estimate=7), (True, [7.5, 7.5]))
        self.assertEqual(self.shut_down(seconds=4, estimate=4), (True, [8, 8]))

    def test_after_an_early_save_that_took_long_there_is_no_more_waiting(self) -> None:
        self.assertEqual(self.shut_down(seconds=7), (True, [8, 8]))

    def test_a_save_for_which_memory_is_short_is_tried_again(self) -> None:
        outcome = self.shut_down(errors=[MemoryError(), OSError(), ValueError()])
        self.assertEqual(outcome, (True, [1, 2, 3, 4, 12]))

    def test_without_memory_for_a_line_in_the_log_the_last_save_is_made_at_once(self) -> None:
        log = unittest.mock.Mock(side_effect=MemoryError)
        self.assertEqual(self.shut_down(log=log), (True, [0, 0]))

    def test_after_a_slow_failure_there_is_another_try_if_there_is_time(self) -> None:
        outcome = self.shut_down(seconds=5, errors=itertools.repeat(OSError()), drained=True)
        self.assertEqual(outcome, (False, [5, 11, 11]))

    def test_a_save_that_always_fails_is_reported_in_time(self) -> None:
        outcome = self.shut_down(errors=itertools.repeat(OSError()))
        self.assertEqual(outcome, (False, [*range(1, 15), 14]))


class FailingSaveTest(KVTest):
    """The save fails: a line that says so, exit code 1, and the old snapshot is as it was."""

    def setUp(self) -> None:
        super().setUp()
        self.write_snapshot({"old": "1"})
        self.before = self.snapshot.read_bytes()

    def check_fails(self, server: ServerProcess, reason: str) -> None:
        server.send_signal()
        server.wait_for_log(f"cannot save: {reason}")
        server.send_signal()  # or it would try for 15 s
        self.assertEqual(server.exit_code(), 1)
        self.assertRegex(server.log, rf"not saved, {reason}.*: .*\n$")
        self.assertEqual(self.snapshot.read_bytes(), self.before)
        self.assertEqual(os.listdir(self.directory), [SNAPSHOT])

    def start_with_changes(self, **options: Any) -> ServerProcess:
        server = self.start(**options)
        server.request("PUT", "/kv/large", b"x" * 100_000)
        return server

    def test_a_file_size_limit_leaves_the_old_snapshot(self) -> None:
        server = self.start_with_changes(preexec_fn=limited("FSIZE", 50_000))
        self.check_fails(server, "File too large")
        self.assertEqual(self.start().get("old"), "1")

    @needs_compiler
    def test_a_failed_fsync_leaves_the_old_snapshot(self) -> None:
        shim = FsyncShim(self.top)
        server = self.start_with_changes(env=shim.env)
        shim.fail("file", errno.EIO)
        self.check_fails(server, "Input/output error")

    @needs_compiler
    def test_a_failed_fsync_of_the_directory_is_no_save(self) -> None:
        """Then nobody knows whether the new snapshot or the old one survives a power failure."""
        shim = FsyncShim(self.top)
        server = self.start_with_changes(env=shim.env)
        shim.fail("directory", errno.EIO)
        server.send_signal()
        server.wait_for_log("cannot save: Input/output error")
        server.send_signal()
        self.assertEqual(server.exit_code(), 1)
        self.assertEqual(set(self.read_snapshot()), {"old", "large"})

    @needs_compiler
    def test_a_file_system_that_cannot_sync_stops_the_start(self) -> None:
        shim = FsyncShim(self.top)
        for what in ("file", "directory"):
            shim.fail(what, errno.EIO)
            self.assert_refuses_to_start("Input/output error", env=shim.env)
            (self.top / f"fail-{what}").unlink()

    @on_linux
    def test_lost_permissions_leave_the_old_snapshot(self) -> None:
        server = self.start_with_changes(preexec_fn=be_bound_by_permissions)
        self.directory.chmod(0o555)
        self.check_fails(server, "Permission denied")

    def test_a_directory_that_is_gone_is_reported(self) -> None:
        server = self.start_with_changes()
        shutil.rmtree(self.directory)
        server.send_signal()
        server.wait_for_log(f"cannot save: No such file or directory: '{self.directory}'")
        server.send_signal()
        self.assertEqual(server.exit_code(), 1)
        self.assertIn(f"not saved, No such file or directory: '{self.directory}'", server.log)

    def test_a_full_disk_with_room_in_time_costs_nothing(self) -> None:
        self.mount("mount", "-t", "tmpfs", "-o", "size=64k", "kv", str(self.directory))
        self.write_snapshot({"old": "1"})
        server = self.start_with_changes()
        self.check_fails(server, "No space left on device")
        server = self.start_with_changes()
        server.send_signal()
        server.wait_for_log("cannot save: No space left on device")
        subprocess.run(["mount", "-o", "remount,size=1m", self.directory], check=True)
        self.assertEqual(server.exit_code(), 0)
        self.assertEqual(set(self.read_snapshot()), {"old", "large"})

    def test_sigkill_at_any_moment_of_a_save_leaves_a_whole_snapshot(self) -> None:
        old = {f"key{number}": "value" * 20 for number in range(50_000)}

        def begin_shutdown() -> ServerProcess:
            self.write_snapshot(old)
            server = self.start()
            server.request("PUT", "/kv/new", b"1")
            server.send_signal()
            server.wait_for_log("draining")
            return server

        delay = 0.05
        outcomes: collections.Counter[int] = collections.Counter()
        for _ in range(20):
            server = begin_shutdown()
            time.sleep(delay)
            server.send_signal(signal.SIGKILL)
            server.exit_code()
            pairs = self.read_snapshot()
            self.assertTrue(pairs in (old, {**old, "new": "1"}))
            outcomes[len(pairs)] += 1
            delay *= 1.3 if pairs == old else 1 / 1.3  # so it comes just before or just after
        self.assertEqual(len(outcomes), 2, "neither all before nor all after the rename")


def endless_puts(client: int) -> Iterator[bytes]:
    for count in itertools.count():
        yield put(f"{client}-{count % 100}", str(count))


def connect_until_refused(port: int) -> None:
    """Open connections as fast as possible, each with a request, and wait for no answer."""
    end = time.monotonic() + DEADLINE
    with contextlib.ExitStack() as clients, contextlib.suppress(ConnectionRefusedError):
        for number in itertools.count():
            if number % 500 == 0:
                clients.close()
            if time.monotonic() > end:
                return
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                client.send(request("GET", "/kv/a"))


def receive_queue(port: int, client_port: int = 0) -> int:
    """How many bytes from that client, or connections, the server has not taken yet."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        ports = [int(address.partition(":")[2], 16) for address in fields[1:3]]
        if ports == [port, client_port]:
            return int(fields[4].partition(":")[2], 16)
    return 0


def is_queue_long(port: int) -> bool:
    return receive_queue(port) > 20


def wait_until_read(server: ServerProcess, client: Client) -> None:
    """Until the server has taken everything that the client has sent."""
    port = client.socket.getsockname()[1]
    wait_until(lambda: receive_queue(server.port, port) == 0, "all is read")


class Operation(NamedTuple):
    """A write by a client. Times are of the monotonic clock, which all processes share."""

    begin: float
    end: float  # infinite if there was no answer
    key: str  # empty: clear
    value: str | None  # None: delete


class Report(NamedTuple):
    acknowledged: int
    lost: list[str]


def write_until_refused(
    port: int, name: str, keep_alive: bool, clears: bool, seed: float
) -> list[Operation]:
    """Write to keys of one's own until the server is gone; return what was done."""
    chance = random.Random(seed)
    done: list[Operation] = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    for number in range(100_000):
        key, value = f"{name}-{chance.randrange(200)}", f"{seed} {number}"
        method, path, body = "PUT", f"/kv/{key}", cast("str | None", value)
        kind = chance.random()
        if kind < 0.002 and clears:
            method, path, key, body = "DELETE", "/clear", "", None
        elif kind < 0.2:
            method, body = "DELETE", None
        begin, end = time.monotonic(), float("inf")
        fields = {} if keep_alive else {"Connection": "close"}
        try:
            connection.request(method, path, body, fields)
            response = connection.getresponse()
            response.read()
            assert response.status in (200, 503), response.status
            end = time.monotonic()
        except ConnectionRefusedError:
            return done
        except (OSError, http.client.HTTPException):
            connection.close()
        else:
            if response.status == 503:
                continue  # it says that this was not done
        done.append(Operation(begin, end, key, body))
    return done


def shutdowns_under_load(
    directory: Path, cycles: int, seed: int, seconds: float = 0.5, *arguments: str
) -> Report:
    """Stop the server at random moments of a load; count the acknowledged writes it lost.

    Before that, it saves now and then. Each load lasts up to so many seconds.
    """
    chance = random.Random(seed)
    acknowledged, lost = 0, []
    context = multiprocessing.get_context("fork")
    state: dict[str, str] = {}
    for cycle in range(cycles):
        with ServerProcess(directory, *arguments) as server, context.Pool(4) as pool:
            runs = [
                pool.apply_async(
                    write_until_refused,
                    (
                        server.port,
                        f"client{number}",
                        number % 2 == 0,
                        cycle % 2 == 0,
                        cycle + number / 10,
                    ),
                )
                for number in range(4)
            ]
            pauses = [chance.uniform(0.0, seconds / 3) for _ in range(3)]  # left to chance
            for pause in pauses[chance.randrange(3) :]:
                time.sleep(pause)
                server.send_signal(signal.SIGUSR1)
            time.sleep(pauses[0])
            exit_code = server.stop()
            operations = [operation for run in runs for operation in run.get(DEADLINE)]
        if exit_code != 0:
            lost.append(f"cycle {cycle}: exit code {exit_code}")
        after = kv.read_pairs(str(directory / SNAPSHOT))
        acknowledged += sum(operation.end < float("inf") for operation in operations)
        lost += [f"cycle {cycle}: {each}" for each in differences(state, operations, after)]
        state = after
    return Report(acknowledged, lost)


def differences(
    before: dict[str, str], operations: list[Operation], after: dict[str, str]
) -> Iterator[str]:
    """What cannot be: keys whose state no order of the operations that clients saw leads to."""
    clears = [operation for operation in operations if not operation.key]
    keys = {operation.key for operation in operations if operation.key}
    by_key = {key: [Operation(0, 0, key, before.get(key))] for key in keys | set(before)}
    for operation in operations:
        if operation.key:
            by_key[operation.key].append(operation)  # in order, because each key has one client
    for key, history in by_key.items():
        # The last acknowledged one holds, unless a later one was done without an answer.
        last = max(n for n, each in enumerate(history) if each.end < float("inf"))
        possible = {each.value for each in history[last:]}
        if any(history[last].end < clear.begin and clear.end < float("inf") for clear in clears):
            possible.discard(history[last].value)
        if any(clear.end > history[last].begin for clear in clears):
            possible.add(None)
        if after.get(key) not in possible:
            yield f"{key} is {after.get(key)!r} and not one of {possible}"
    yield from (f"{key} came from nowhere" for key in after.keys() - by_key.keys())


# ---- Process: the command line ----


class CommandLineTest(KVTest):
    def test_version_and_help_go_to_stdout(self) -> None:
        # Also on a terminal that cannot show the default.
        strict = {**os.environb, b"DATA_DIR": b"\xff", b"PYTHONIOENCODING": b"utf-8:strict"}
        for option in ("--version", "--help"):
            command = [sys.executable, str(HERE / "kv.py"), option]
            run = subprocess.run(command, capture_output=True, env=strict)
            self.assertEqual((run.returncode, run.stderr), (0, b""))
            self.assertIn(b"kv.py", run.stdout)

    def test_wrong_arguments_are_one_line(self) -> None:
        for argument in ("--port=x", "--port=65536", "--port=-1", "--port="):
            self.assert_refuses_to_start("--port", argument, code=2)
        for argument in ("--por=1", "extra", "two\nlines", "--verbose=1", "--host"):
            self.assert_refuses_to_start(re.split("=|\n", argument)[0], argument, code=2)
        self.assert_refuses_to_start("--working-dir: empty", "--working-dir=", code=2)
        # Not x.invalid, for which the system would ask a name server.
        for host in ("fe80::1%x", "x" * 100, "203.0.113.1"):
            self.assert_refuses_to_start(f"cannot listen on '{host}'", f"--host={host}")

    def test_a_port_in_use_stops_the_start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            self.assert_refuses_to_start(f"port {port}: Address already in use", f"--port={port}")
        # Some releases of Python have this.
        script = "import kv; kv.ThreadingHTTPServer.allow_reuse_port = True; kv.main()"
        sharing: dict[str, Any] = {"command": [sys.executable, "-c", script], "cwd": HERE}
        with ServerProcess(self.top / "first", **sharing) as server:
            self.assert_refuses_to_start("in use", f"--port={server.port}", **sharing)

    @on_linux
    def test_without_a_thread_that_accepts_the_start_is_refused(self) -> None:
        too_large = limited("STACK", 2**47)  # for the stack of a thread
        self.assert_refuses_to_start("can't start new thread", preexec_fn=too_large)

    def test_a_directory_whose_name_is_not_text(self) -> None:
        self.directory = Path(os.fsdecode(os.fsencode(self.top) + b"/data\xff"))
        server = self.start()
        self.assertIn(r"/data\udcff/kv.pickle', ", server.log)
        server.request("PUT", "/kv/a", b"1")
        self.assertEqual(server.stop(), 0)

    def test_working_directory_that_is_a_file(self) -> None:
        self.directory.write_text("")
        self.assert_refuses_to_start("Not a directory")

    def test_working_directory_that_cannot_be_created(self) -> None:
        self.assert_refuses_to_start("cannot use", "--working-dir=/dev/null/data")

    def test_working_directory_that_cannot_be_written(self) -> None:
        self.directory.mkdir()
        self.directory.chmod(0o555)
        self.assert_refuses_to_start("Permission denied", preexec_fn=be_bound_by_permissions)

    def test_working_directory_that_is_gone(self) -> None:
        script = f'mkdir gone; cd gone; rmdir ../gone; exec "{sys.executable}" "{HERE}/kv.py" "$@"'
        command = ["sh", "-c", script, "sh"]
        self.assert_refuses_to_start(
            "cannot use the working directory 'x': ",
            "--working-dir=x",
            command=command,
            cwd=self.top,
        )

    def test_working_directory_in_use(self) -> None:
        server = self.start()
        server.request("PUT", "/kv/a", b"1")
        self.assert_refuses_to_start("in use by another kv.py")
        self.assertEqual(server.get("a"), "1")
        server.send_signal(signal.SIGKILL)
        server.exit_code()
        self.start()  # at once

    def test_working_directory_is_created_with_its_parents(self) -> None:
        self.directory = self.top / "a" / "b"
        with ServerProcess(self.top / "log", f"--working-dir={self.directory}") as server:
            server.request("PUT", "/kv/a", b"1")
            self.assertEqual(server.stop(), 0)
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    def test_working_directory_from_the_environment(self) -> None:
        for data_dir, place in (("from-env", "from-env"), ("", ".")):
            environment = {**os.environ, "DATA_DIR": data_dir}
            command = [sys.executable, str(HERE / "kv.py"), "--port=0"]
            with subprocess.Popen(
                command, cwd=self.top, env=environment, stderr=subprocess.PIPE, text=True
            ) as process:
                assert process.stderr
                expected = str(self.top / place / SNAPSHOT)
                self.addCleanup(process.kill)
                line = process.stderr.readline()
                process.terminate()
                self.assertIn(f" {expected!r}, ", line)

    @unittest.skipUnless(socket.has_dualstack_ipv6(), "needs IPv6")
    def test_ipv6_and_all_interfaces(self) -> None:
        for host, url in (("::1", "http://[::1]:"), ("0.0.0.0", "http://0.0.0.0:")):
            with self.start(f"--host={host}") as server:
                self.assertIn(url, server.log)
                with Client(server.port, host.replace("0.0.0.0", "127.0.0.1")) as client:
                    self.assertEqual(client.request("GET", "/health").status, 200)

    def test_the_ready_line(self) -> None:
        self.write_snapshot({"a": "1", "b": "2"})
        server = self.start()
        place = re.escape(repr(str(self.snapshot)))
        url = rf"http://127\.0\.0\.1:{server.port}"
        self.assertRegex(server.log, rf"^kv\.py: 2 pairs in {place}, listening on {url}\n$")

    def test_requests_are_not_logged(self) -> None:
        server = self.start()
        server.request("PUT", "/kv/a", b"1")
        self.assertEqual(server.stop(), 0)
        self.assertNotIn("PUT", server.log)

    def test_requests_are_logged_with_verbose(self) -> None:
        command = [sys.executable, "-bb", str(HERE / "kv.py")]  # no bytes where text belongs
        server = self.start("--verbose", command=command)
        # On one connection: the line follows the answer, so those of two could change places.
        with server.connect() as client:
            client.request("PUT", "/kv/a", b"1")
            client.request("GET", "/kv/" + "x" * 8000)
            client.request("GET", "/kv/a?\x1b[31m")
        server.wait_for_log("' 400 23\n")
        with server.connect() as client:
            client.send(b"\r\n" + request("GET", "/health") + b"\n")
            client.receive()
            client.receive()
        self.assertEqual(server.stop(), 0)
        lines = [line for line in server.log.split("\n") if line.startswith("kv.py: 127.0.0.1 ")]
        self.assertEqual(lines[0], "kv.py: 127.0.0.1 'PUT /kv/a HTTP/1.1' 200 0")
        self.assertLess(len(lines[1]), 2000)
        self.assertEqual(lines[2], r"kv.py: 127.0.0.1 'GET /kv/a?\x1b[31m HTTP/1.1' 400 23")
        self.assertEqual(lines[3], "kv.py: 127.0.0.1 'GET /health HTTP/1.1' 200 3")
        self.assertEqual(lines[4], r"kv.py: 127.0.0.1 '\n' 400 18")

    def log_into(
        self, reader: int, writer: int, *command: str
    ) -> tuple[subprocess.Popen[bytes], int]:
        """Return a server that logs into a pipe or terminal, and its port."""
        arguments = [f"--working-dir={self.directory}", "--port=0", "--verbose"]
        process = subprocess.Popen([*command, *arguments], stderr=writer, cwd=HERE)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        os.close(writer)
        match = re.search(rb"listening on http://127\.0\.0\.1:(\d+)", os.read(reader, 1000))
        assert match
        return process, int(match[1])

    def test_a_log_that_nobody_reads_does_not_delay_the_exit(self) -> None:
        """Nor one that is read slowly, so that there is often room for some lines, but not all."""
        # On all cores, or no thread would ever write between another's look and its write.
        script = "import kv; kv.stay_on_one_core = lambda: None; kv.main()"
        reader, writer = os.pipe()
        process, port = self.log_into(reader, writer, sys.executable, "-c", script)
        key = "k" * 900
        load = threading.Thread(target=requests_per_second, args=[port, 64, [put(key, "1")], 1.0])
        load.start()
        while load.is_alive():
            if select.select([reader], [], [], 0.1)[0]:
                os.read(reader, 4096)
            time.sleep(0.001)
        process.terminate()
        self.assertEqual(process.wait(10), 0)  # with a worker stuck in a write it would be 12 s
        self.assertEqual(self.read_snapshot(), {key: "1"})
        os.close(reader)

    def test_a_terminal_that_nobody_reads_does_not_delay_the_exit(self) -> None:
        reader, writer = os.openpty()
        process, port = self.log_into(reader, writer, sys.executable, str(HERE / "kv.py"))
        with Client(port) as client:
            for _ in range(2000):  # lines of 43 bytes
                client.request("PUT", "/kv/a", b"1")
        process.terminate()
        self.assertEqual(process.wait(10), 0)
        self.assertEqual(self.read_snapshot(), {"a": "1"})
        os.close(reader)

    def test_a_log_that_is_closed_does_not_stop_the_save(self) -> None:
        reader, writer = os.pipe()
        process, port = self.log_into(reader, writer, sys.executable, str(HERE / "kv.py"))
        os.close(reader)
        with Client(port) as client:
            client.request("PUT", "/kv/a", b"1")
        process.terminate()
        self.assertEqual(process.wait(DEADLINE), 0)
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    def test_without_standard_streams(self) -> None:
        port = free_port()
        command = f'exec "{sys.executable}" "{HERE}/kv.py" --port={port} --verbose <&- >&- 2>&-'
        process = subprocess.Popen(["sh", "-c", command], cwd=self.top)
        self.addCleanup(process.kill)

        def answers() -> bool:
            with contextlib.suppress(OSError), Client(port) as client:
                return client.request("PUT", "/kv/a", b"1").status == 200
            return False

        wait_until(answers, "an answer")
        process.terminate()
        self.assertEqual(process.wait(DEADLINE), 0)
        self.directory = self.top
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    def test_an_old_python_is_told(self) -> None:
        for python in Path.home().glob(".pyenv/versions/3.8*/bin/python3"):
            run = subprocess.run([python, HERE / "kv.py"], capture_output=True, text=True)
            self.assertEqual(run.returncode, 1)
            self.assertEqual(run.stderr, "kv.py: needs Python 3.9 or later\n")

    @on_linux
    def test_signals_while_modules_are_imported(self) -> None:
        """Ctrl-C ends the process without a traceback; the signal to save does not end it."""
        moments = [(signal.SIGINT, delay) for delay in range(0, 60, 4)]
        moments += [(signal.SIGUSR1, delay) for delay in (0, 10, 30)]
        for number, delay in moments:
            server = self.start(ready=False)
            # The interpreter catches Ctrl-C at first. It is ours as soon as kv.py has its way.
            wait_until(functools.partial(has_met, server, signal.SIGINT), "a start")
            while has_signal(server, "SigCgt", signal.SIGINT):
                pass
            time.sleep(delay / 1000)
            server.send_signal(number)
            if number == signal.SIGUSR1:
                server.wait_for_log("listening")
                self.assertEqual(server.stop(), 0)
            self.assertIn(server.exit_code(), (0, -signal.SIGINT))
            self.assertNotIn("Traceback", server.log)
            server.__exit__()

    def test_a_control_character_in_a_path_does_not_reach_the_terminal(self) -> None:
        self.directory = self.top / "a\x1b[31mb"
        with self.start() as server:
            self.assertEqual(server.stop(), 0)
            self.assertNotIn("\x1b", server.log)
        self.snapshot.write_text("")
        self.assert_refuses_to_start(r"a\x1b[31mb")

    def test_a_directory_that_was_created_for_nothing_is_not_left_behind(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.assert_refuses_to_start("in use", f"--port={taken.getsockname()[1]}")
        self.assertFalse(self.directory.exists())


class RunScriptTest(KVTest):
    """The way in which the lsfr harness starts, stops and restarts the server."""

    def test_restarts_on_the_same_port_and_directory(self) -> None:
        shutil.copy(HERE / "kv.py", self.top)
        shutil.copy(HERE / "run.sh", self.top)
        port = free_port()
        working_directory = self.top / ".lsfr" / "run-1"
        working_directory.mkdir(parents=True)
        expected: dict[str, str] = {}
        for restart in range(6):
            with open(working_directory / "node.log", "ab") as log:
                process = subprocess.Popen(
                    ["./run.sh", f"--port={port}", "--working-dir=.lsfr/run-1"],
                    cwd=self.top,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.addCleanup(process.wait)
            self.addCleanup(process.kill)
            wait_until(functools.partial(listens, port), "the server listens", 15)
            with Client(port) as client:
                for key, value in expected.items():
                    self.assertEqual(client.request("GET", f"/kv/{key}").body.decode(), value)
                expected[f"key{restart}"] = "päivää 🌍\t" * (restart + 1)
                for key, value in expected.items():
                    self.assertEqual(
                        client.request("PUT", f"/kv/{key}", value.encode()).status, 200
                    )
                os.killpg(process.pid, signal.SIGTERM)
                self.assertEqual(process.wait(15), 0)
        self.assertEqual(set(os.listdir(working_directory)), {SNAPSHOT, "node.log"})

    def test_from_any_directory_with_the_interpreter_from_the_environment(self) -> None:
        script = self.top / "directory with spaces" / "run.sh"
        script.parent.mkdir()
        shutil.copy(HERE / "kv.py", script.parent)
        shutil.copy(HERE / "run.sh", script)
        python = self.top / "python"
        python.write_text(f'#!/bin/sh\necho "this one" >&2\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        environment = {**os.environ, "PYTHON": str(python)}
        link, link_to_it = self.top / "link", self.top / "link-to-it"
        link.symlink_to(script)
        link_to_it.symlink_to("link")
        for command in (script, link, link_to_it):
            run = subprocess.run(
                [command, "--port=x y"], cwd="/", env=environment, capture_output=True, text=True
            )
            self.assertEqual(run.returncode, 2)
            self.assertIn("this one", run.stderr)

    def test_the_scripts_have_unix_line_ends_wherever_they_are_checked_out(self) -> None:
        attributes = (HERE / ".gitattributes").read_text()
        self.assertIn("* text=auto eol=lf", attributes)


class DumpTest(KVTest):
    def dump(self) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, str(HERE / "kv.py"), "--dump", f"--working-dir={self.directory}"]
        environment = {**os.environ, "LC_ALL": "C"}
        return subprocess.run(command, capture_output=True, env=environment, timeout=DEADLINE)

    def test_prints_the_pairs_as_json_lines(self) -> None:
        pairs = {"a": "1", "b": 'päivää 🌍\n"\\\0'}
        self.write_snapshot(pairs)
        run = self.dump()
        self.assertEqual((run.returncode, run.stderr), (0, b""))
        lines = [json.loads(line) for line in run.stdout.decode().splitlines()]
        self.assertEqual({line["key"]: line["value"] for line in lines}, pairs)
        self.assertIn("päivää 🌍", run.stdout.decode())

    def test_beside_a_running_server(self) -> None:
        self.write_snapshot({"a": "1"})
        self.start()
        self.assertEqual(self.dump().stdout, b'{"key": "a", "value": "1"}\n')

    def test_what_cannot_be_dumped_is_an_error(self) -> None:
        self.assertEqual((self.dump().returncode, self.directory.exists()), (1, False))
        self.directory.mkdir()
        self.assertEqual(self.dump().returncode, 1)
        self.snapshot.write_bytes(b"x" * 100)
        run = self.dump()
        self.assertEqual((run.returncode, run.stdout), (1, b""))
        self.assertRegex(run.stderr.decode(), r"^kv\.py: cannot dump .*checksum.*\n$")

    def test_stops_quietly_with_its_reader(self) -> None:
        self.write_snapshot({f"key{number}": "value" for number in range(50_000)})
        command = (
            f'"{sys.executable}" "{HERE}/kv.py" --dump --working-dir="{self.directory}" | head -1'
        )
        run = subprocess.run(["sh", "-c", command], capture_output=True)
        self.assertEqual((run.stdout.count(b"\n"), run.stderr), (1, b""))

    def test_without_stdout(self) -> None:
        self.write_snapshot({"a": "1"})
        command = f'"{sys.executable}" "{HERE}/kv.py" --dump --working-dir="{self.directory}" >&-'
        run = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
        self.assertEqual(run.returncode, 1)
        self.assertRegex(run.stderr, "Bad file descriptor\n$")

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_is_an_error(self) -> None:
        self.write_snapshot({"a": "1"})
        command = [sys.executable, str(HERE / "kv.py"), "--dump", f"--working-dir={self.directory}"]
        with open("/dev/full", "w") as full:
            run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=DEADLINE)
        self.assertEqual(run.returncode, 1)
        self.assertRegex(run.stderr.decode(), r"^kv\.py: cannot dump .*No space left on device\n$")


# ---- Clients that people use, and proxies ----

# These take the URL in front of the key and how many requests are in flight at a time. They PUT the
# pairs that come on stdin as JSON, then GET them, and print a line for each answer, see run_client.
GO_CLIENT = r"""
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
)

func send(method, url, body string) (int, string, error) {
	request, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	return response.StatusCode, string(answer), err
}

func main() {
	clients, _ := strconv.Atoi(os.Args[2])
	var pairs map[string]string
	json.NewDecoder(os.Stdin).Decode(&pairs)
	for _, method := range []string{"PUT", "GET"} {
		keys := make(chan string)
		var running sync.WaitGroup
		for n := 0; n < clients; n++ {
			running.Add(1)
			go func() {
				defer running.Done()
				for key := range keys {
					body, expected := pairs[key], ""
					if method == "GET" {
						body, expected = "", pairs[key]
					}
					status, answer, err := send(method, os.Args[1]+key, body)
					if err != nil {
						fmt.Println(method, err)
					} else if answer != expected {
						fmt.Println(method, status, "and not the value")
					} else {
						fmt.Println(method, status)
					}
				}
			}()
		}
		for key := range pairs {
			keys <- key
		}
		close(keys)
		running.Wait()
	}
}
"""
NODE_CLIENT = r"""
const http = require("http"), [way, url, clients] = process.argv.slice(1);
const pairs = Object.entries(JSON.parse(require("fs").readFileSync(0)));
const agent = new http.Agent({ keepAlive: true });
const send = {
  agent: (method, url, body) => new Promise((resolve, reject) => {
    const request = http.request(url, { method, agent }, (response) => {
      let text = "";
      response.setEncoding("utf8").on("data", (piece) => { text += piece; });
      response.on("error", reject).on("end", () => resolve([response.statusCode, text]));
    });
    request.on("error", reject).end(body);
  }),
  fetch: async (method, url, body) => {
    const response = await fetch(url, { method, body });
    return [response.status, await response.text()];
  },
}[way];

async function client(method, waiting) {
  for (let pair; pair = waiting.pop();) {
    const [key, value] = pair;
    const [body, expected] = method === "PUT" ? [value, ""] : [undefined, value];
    try {
      const [status, answer] = await send(method, url + key, body);
      console.log(method, status, ...(answer === expected ? [] : ["and not the value"]));
    } catch (error) {
      console.log(method, error.message, String(error.cause));
    }
  }
}

(async () => {
  for (const method of ["PUT", "GET"]) {
    const waiting = [...pairs];
    await Promise.all(Array.from({ length: clients }, () => client(method, waiting)));
  }
})();
"""


@contextlib.contextmanager
def running(command: list[str], **popen: Any) -> Iterator[subprocess.Popen[str]]:
    """A program with all the processes that it starts, until the end of the block."""
    with subprocess.Popen(command, start_new_session=True, text=True, **popen) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


class ClientsTest(KVTest):
    """As they come: with the pool of connections and the retries that they have by default."""

    PAIRS: ClassVar = {f"key{n}": f"päivää {n} 🌍\n" * (n % 50 + 1) for n in range(1000)}
    ANSWERS: ClassVar = {"PUT 200": len(PAIRS), "GET 200": len(PAIRS)}

    def run_client(self, *command: str, text: str = "") -> str:
        """Run a program that must succeed; return what it prints."""
        run = subprocess.run(
            command,
            input=text,
            cwd=self.top,
            env={**os.environ, "GO111MODULE": "off"},
            capture_output=True,
            text=True,
            timeout=4 * DEADLINE,  # Go may have its library to compile first
        )
        self.assertEqual(run.returncode, 0, run.stdout[-1000:] + run.stderr)
        return run.stdout

    def store_and_read(self, port: int, clients: int, *command: str) -> None:
        url, pairs = f"http://127.0.0.1:{port}/kv/", json.dumps(self.PAIRS)
        self.check_answers(self.run_client(*command, url, str(clients), text=pairs))

    def check_answers(self, lines: str) -> None:
        answers = collections.Counter(lines.splitlines())
        self.assertEqual(answers, self.ANSWERS, answers.most_common(5))

    def go(self, port: int, clients: int = 50) -> None:
        (self.top / "client.go").write_text(GO_CLIENT)
        self.store_and_read(port, clients, "go", "run", "client.go")

    def node(self, port: int, clients: int = 50) -> None:
        for way in ("agent", "fetch"):
            with self.subTest(way):
                self.store_and_read(port, clients, "node", "-e", NODE_CLIENT, way)

    def check_stored(self, server: ServerProcess) -> None:
        self.stop_at_once(server)
        self.assertEqual(self.read_snapshot(), self.PAIRS)

    @unittest.skipUnless(found("curl"), "needs curl")
    def test_curl(self) -> None:
        """One request at a time, and 50."""
        server = self.start()
        url = f"http://127.0.0.1:{server.port}/kv/key"
        puts = "next\n".join(
            f'url = "{url}{number}"\nrequest = PUT\nwrite-out = "PUT %{{http_code}}\\n"\n'
            f"data-binary = {json.dumps(value, ensure_ascii=False)}\n"
            for number, value in enumerate(self.PAIRS.values())
        )
        get = ["-o", "got#1", "-w", "GET %{http_code}\n", f"{url}[0-{len(self.PAIRS) - 1}]"]
        for curl in (["curl", "-sS"], ["curl", "-sS", "--parallel"]):
            server.request("DELETE", "/clear")
            lines = self.run_client(*curl, "--noproxy", "*", "-K", "-", text=puts)
            lines += self.run_client(*curl, "--noproxy", "*", *get)
            self.check_answers(lines)
            for number, value in enumerate(self.PAIRS.values()):
                self.assertEqual((self.top / f"got{number}").read_text(), value)
        self.check_stored(server)

    @unittest.skipUnless(found("wget"), "needs wget")
    def test_wget(self) -> None:
        """A process for each of 100 PUTs, and one for 1,000 GETs."""
        server = self.start()
        url = f"http://127.0.0.1:{server.port}/kv/"
        wget = ["wget", "-nv", "--no-proxy", "--tries=1", "-O", "-"]
        pairs = dict(list(self.PAIRS.items())[:100])
        for key, value in pairs.items():
            put = ["--method=PUT", f"--body-data={value}", url + key]
            self.assertEqual(self.run_client(*wget, *put), "")
        urls = "".join(f"{url}{key}\n" for key in pairs) * 10
        got = self.run_client(*wget, "-i", "-", text=urls)
        self.assertEqual(got, "".join(pairs.values()) * 10)

    @unittest.skipUnless(found("go"), "needs Go")
    def test_go(self) -> None:
        server = self.start()
        self.go(server.port)
        self.check_stored(server)

    @unittest.skipUnless(found("node"), "needs Node")
    def test_node(self) -> None:
        server = self.start()
        self.node(server.port)
        self.check_stored(server)

    @unittest.skipUnless(found("go"), "needs Go")
    def test_100_clients_of_go_and_64_descriptors(self) -> None:
        server = self.start(preexec_fn=limited("NOFILE", 64))
        self.go(server.port, 100)
        self.check_stored(server)

    @unittest.skipUnless(found("node"), "needs Node")
    def test_100_clients_of_node_and_64_descriptors(self) -> None:
        server = self.start(preexec_fn=limited("NOFILE", 64))
        self.node(server.port, 100)
        self.check_stored(server)

    def block(self, language: str, *changes: tuple[str, str]) -> str:
        """A configuration that the README has."""
        readme = (HERE / "README.md").read_text()
        (block,) = re.findall(rf"```{language}\n(.*?)```", readme, re.DOTALL)
        for old, new in changes:
            self.assertIn(old, block)
            block = block.replace(old, new)
        return str(block)

    def check_proxy(self, port: int) -> None:
        wait_until(lambda: listens(port), "the proxy")
        self.go(port)
        large = b"x" * kv.MAX_VALUE
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as client:
            for method, path, body, expected in (
                ("GET", "/health", b"", b"ok\n"),
                ("PUT", "/kv/large", large, b""),
                ("GET", "/kv/large", b"", large),
                ("DELETE", "/kv/large", b"", b""),
            ):
                client.request(method, path, body or None, {"Host": "kv.example.com"})
                answer = client.getresponse()
                self.assertEqual((answer.status, answer.read() == expected), (200, True))

    @unittest.skipUnless(found("nginx", "go"), "needs nginx and Go")
    def test_go_through_nginx(self) -> None:
        server, port = self.start(), free_port()
        block = self.block(
            "nginx",
            ("127.0.0.1:8080", f"127.0.0.1:{server.port}"),
            ("listen 80", f"listen 127.0.0.1:{port}"),
        )
        names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{name}_temp_path {name}; " for name in names)
        (self.top / "nginx.conf").write_text(
            "daemon off; master_process off; pid nginx.pid; error_log stderr; events {}"
            f"http {{ access_log off; {paths} {block} }}"
        )
        command = ["nginx", "-p", str(self.top), "-c", "nginx.conf"]
        with running(command, stderr=subprocess.DEVNULL):
            self.check_proxy(port)
        self.check_stored(server)

    @unittest.skipUnless(found("haproxy", "go"), "needs HAProxy and Go")
    def test_go_through_haproxy(self) -> None:
        server, port, stats = self.start(), free_port(), str(self.top / "stats")
        block = self.block(
            "haproxy",
            ("127.0.0.1:8080", f"127.0.0.1:{server.port}"),
            ("bind :80", f"bind 127.0.0.1:{port}"),
        )
        (self.top / "haproxy.cfg").write_text(f"global\n    stats socket {stats}\n{block}")

        def is_healthy() -> bool:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(stats)
                client.send(b"show stat\n")
                return ",L7OK,200," in client.makefile().read()

        command = ["haproxy", "-db", "-f", str(self.top / "haproxy.cfg")]
        with running(command, stderr=subprocess.DEVNULL):
            self.check_proxy(port)
            wait_until(is_healthy, "the health check")
        self.check_stored(server)


# ---- Browsers: pages of other origins ----

# Tries what a page may try, and reports how each attempt has ended. Where kv.py is and where the
# report goes to, is behind the # of its URL.
PAGE = rb"""<!doctype html>
<meta charset="utf-8">
<body>
<iframe name="sink"></iframe>
<script>
const [kv, reports] = location.hash.slice(1).split(",");

const tell = (report) => fetch(reports, { method: "POST", mode: "no-cors", body: report });

const add = (tag, attributes) => {
  const element = Object.assign(document.createElement(tag), attributes);
  document.body.append(element);
  return element;
};

const loaded = (element) => new Promise((resolve) => {
  element.onload = element.onerror = resolve;
});

const text = (frame) => frame.contentDocument && frame.contentDocument.body.textContent;

async function read(path, options) {
  const response = await fetch(kv + path, options);
  return `${response.type} ${response.status} ${await response.text()}`;
}

async function script() {
  await loaded(add("script", { src: kv + "/kv/script" }));
  return String(window.stolen);
}

async function frame() {
  const frame = add("iframe", { src: kv + "/kv/script" });
  await loaded(frame);
  return text(frame);
}

async function post(path) {
  const method = "POST", enctype = "text/plain", target = "sink";
  const form = add("form", { action: kv + path, method, enctype, target });
  form.append(add("input", { name: "changed", value: "value" }));
  form.submit();
  const sink = document.querySelector("iframe");
  await loaded(sink);
  return text(sink);
}

const attempts = {
  script, frame, "form": () => post("/kv/script"), "form /clear": () => post("/clear"),
};
for (const mode of ["cors", "no-cors"]) {
  for (const method of ["GET", "POST", "PUT", "DELETE"]) {
    const body = method[0] === "P" ? "changed" : undefined;
    attempts[`${mode} ${method}`] = () => read("/kv/script", { mode, method, body });
  }
}
attempts["DELETE /clear"] = () => read("/clear", { method: "DELETE" });

onload = async () => {
  await tell('"loaded"');
  let status = 404;  // of the server of this page
  while (status === 404) {
    await new Promise((resolve) => setTimeout(resolve, 20));
    ({ status } = await fetch(kv + "/health", { mode: "no-cors" }).catch(() => ({ status })));
  }
  const report = {};
  for (const what in attempts) {
    report[what] = await attempts[what]().catch((error) => error.name);
  }
  await tell(JSON.stringify(report));
};
</script>
"""


class PageServer(http.server.ThreadingHTTPServer):
    """Serves the page, and takes what it tells."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", free_port()), PageHandler)
        self.told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class PageHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        cast(PageServer, self.server).told.put(json.loads(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@unittest.skipUnless(found("chromium"), "needs Chromium")
class BrowserTest(KVTest):
    SCRIPT = "window.stolen = 'the secret';"

    def setUp(self) -> None:
        super().setUp()
        self.write_snapshot({"script": self.SCRIPT})

    def serve_pages(self) -> PageServer:
        pages = PageServer()
        self.addCleanup(pages.server_close)
        self.addCleanup(pages.shutdown)
        return pages

    def chromium(self, *arguments: str) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        """With every name meaning this host, so that nothing is sent to another one."""
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
        command += ["--no-first-run", "--disable-background-networking", "--disable-sync"]
        command += ["--disable-component-update", "--host-resolver-rules=MAP * 127.0.0.1"]
        command += [f"--user-data-dir={tempfile.mkdtemp(dir=self.top)}", *arguments]
        return running(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def test_a_page_of_another_origin_reads_and_changes_nothing(self) -> None:
        server, pages = self.start("--verbose"), self.serve_pages()
        origin = f"http://127.0.0.1:{pages.server_port}/"
        with self.chromium(f"{origin}#http://127.0.0.1:{server.port},{origin}"):
            self.assertEqual(pages.told.get(timeout=DEADLINE), "loaded")
            report = pages.told.get(timeout=DEADLINE)
        self.assertEqual(report.pop("script"), "undefined")
        self.assertEqual({report.pop("no-cors GET"), report.pop("no-cors POST")}, {"opaque 0 "})
        self.assertEqual(set(report.values()), {None, "TypeError"})
        self.assertEqual(server.get("script"), self.SCRIPT)
        # It has been asked for all this, except that nobody sends PUT or DELETE without CORS.
        server.wait_for_log("'GET /kv/script HTTP/1.1' 200")
        for method in ("OPTIONS", "POST"):
            for path in ("/kv/script", "/clear"):
                server.wait_for_log(f"'{method} {path} HTTP/1.1' 405")

    def test_a_page_whose_host_comes_to_mean_this_one(self) -> None:
        """DNS rebinding: a page may read its own origin, which is a name and a port."""
        pages, evil = self.serve_pages(), self.serve_pages()
        origin = f"http://attacker.example:{evil.server_port}"
        with self.chromium(f"{origin}/#{origin},http://127.0.0.1:{pages.server_port}"):
            self.assertEqual(pages.told.get(timeout=DEADLINE), "loaded")
            evil.shutdown()
            evil.server_close()
            server = self.start(f"--port={evil.server_port}")
            report = pages.told.get(timeout=DEADLINE)
        refused = "misdirected request\n"
        self.assertEqual(report.pop("script"), "undefined")
        self.assertEqual({report.pop("no-cors PUT"), report.pop("no-cors DELETE")}, {"TypeError"})
        self.assertEqual(set(report.values()), {refused, f"basic 421 {refused}"})
        self.assertEqual(server.get("script"), self.SCRIPT)

    def test_names_of_this_host(self) -> None:
        server = self.start()
        for host in ("127.0.0.1", "localhost", "kv.localhost", "kv"):
            url = f"http://{host}:{server.port}/kv/script"
            with self.chromium("--dump-dom", url) as browser:
                self.assertIn(self.SCRIPT, browser.communicate(timeout=DEADLINE)[0], host)


# ---- README: its commands, as they stand there ----


class ReadmeTest(KVTest):
    PAIRS: ClassVar = {"a": "päivää 🌍\n", "-b:c": "two words", "c": "'\"$\\"}

    def setUp(self) -> None:
        super().setUp()
        self.directory.mkdir()
        for name in ("kv.py", "run.sh", "README.md"):
            shutil.copy(HERE / name, self.directory)

    def run_block(
        self,
        start: str,
        *changes: tuple[str, str],
        code: int = 0,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run the block of shell commands that begins like that."""
        readme = (HERE / "README.md").read_text()
        blocks = re.findall(r"```(sh|bash)\n(.*?)```", readme, re.DOTALL)
        ((shell, block),) = (found for found in blocks if found[1].startswith(start))
        for old, new in changes:
            self.assertIn(old, block)
            block = block.replace(old, new)
        run = subprocess.run(
            [shell, "-ec", block],
            cwd=self.directory,
            env={**os.environ, "no_proxy": "*", "PYTHON": sys.executable, **(env or {})},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        self.assertEqual(run.returncode, code, run.stderr)
        return run

    def test_the_tests_that_it_names_exist(self) -> None:
        names = re.findall(r"\*(\w+Test)(?:\.(test_\w+))?\*", (HERE / "README.md").read_text())
        self.assertGreater(len(names), 10)
        for name, method in names:
            self.assertTrue(hasattr(globals()[name], method or "setUp"), (name, method))

    def test_the_start(self) -> None:
        shutil.copy(HERE / "test_kv.py", self.directory)
        printed = self.run_block(
            "python3", ("test_kv.py", "test_kv.py StoreTest"), ("./run.sh", "./run.sh --version")
        )
        self.assertRegex(printed.stdout, r"^kv\.py [\d.]+\n$")
        self.assertRegex(printed.stderr, r"\nOK\n$")

    @unittest.skipUnless(found("curl", "cmp"), "needs curl")
    def test_the_curl_session(self) -> None:
        server = self.start()
        printed = self.run_block("curl", ("localhost:8080", f"127.0.0.1:{server.port}"))
        self.assertRegex(printed.stdout, r"(?s)^hello\nsame\nHTTP/1\.1 404 .*key not found\nok\n$")

    @unittest.skipUnless(found("redis-server", "redis-cli"), "needs Redis")
    def test_moving_to_redis(self) -> None:
        self.write_snapshot(self.PAIRS)
        port = str(free_port())
        command = ["redis-server", "--port", port, "--save", "", "--bind", "127.0.0.1"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=self.top) as redis:
            try:
                wait_until(lambda: listens(int(port)), "Redis")
                start = "set -o pipefail\n./run.sh --dump | python3 -c '\nimport json, sys"
                here = ("redis-cli", f"redis-cli -p {port}")
                printed = self.run_block(start, here, env={"LC_ALL": "C"})
                self.assertIn("errors: 0, replies: 3", printed.stdout)
                for key, value in self.PAIRS.items():
                    get = ["redis-cli", "-p", port, "--raw", "get", key]
                    self.assertEqual(subprocess.check_output(get).decode(), value + "\n")
                self.snapshot.unlink()
                self.run_block(start, here, code=1)
            finally:
                redis.kill()

    @unittest.skipUnless(found("etcd", "etcdctl"), "needs etcd")
    def test_moving_to_etcd(self) -> None:
        self.write_snapshot(self.PAIRS)
        port = free_port()
        url, peers = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
        environment = {"ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": url}
        command = ["etcd", "--data-dir", str(self.top / "etcd"), "--listen-peer-urls", peers]
        command += ["--listen-client-urls", url, "--advertise-client-urls", url]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as etcd:
            try:
                wait_until(lambda: listens(port), "etcd")
                start = "set -o pipefail\n./run.sh --dump | python3 -c '\nimport json, subprocess"
                self.run_block(start, env=environment)
                for key, value in self.PAIRS.items():
                    get = ["etcdctl", "get", "--print-value-only", "--", key]
                    answer = subprocess.check_output(get, env={**os.environ, **environment})
                    self.assertEqual(answer.decode(), value + "\n")
                self.write_snapshot({"large": "x" * 2_000_000, "later": "1"})
                printed = self.run_block(start, code=1, env=environment)
                self.assertIn("refused: large\n", printed.stderr)
                self.assertEqual(printed.stdout, "OK\n")
            finally:
                etcd.kill()


# ---- Soak: for a long time ----


def soak(minutes: float) -> int:
    """Many requests, then shutdowns under load and hostile bytes; return how much was lost."""
    with tempfile.TemporaryDirectory(prefix="kv-soak-") as top:
        with ServerProcess(Path(top) / "many") as server:
            load_server(server, 1_000, 1_000)
            before = server.resident_bytes(), server.threads(), server.descriptors()
            load_server(server, 200_000, 20_000)
            after = server.resident_bytes(), server.threads(), server.descriptors()
        print("resident bytes, threads, descriptors after 2,000 requests:", *before)
        print("the same after 200,000 more and 20,000 more connections:  ", *after, flush=True)
        with ServerProcess(Path(top) / "reader") as server:
            idle = server.descriptors()
            server.request("PUT", "/kv/large", b"x" * 10_000_000)
            with server.connect() as client:
                client.send(request("GET", "/kv/large") * 5)  # and does not read the answers
                begin = time.monotonic()
                wait_until(lambda: server.descriptors() == idle + 1, "only that connection")
                wait_until(lambda: server.descriptors() == idle, "it is given up", 90)
            seconds = time.monotonic() - begin
            print(f"a client that never reads was given up after {seconds:.0f} s", flush=True)
        end = time.monotonic() + minutes * 60
        seed = time.time_ns() % 1_000_000
        acknowledged = cycles = 0
        lost: list[str] = []
        while time.monotonic() < end:
            with ServerProcess(Path(top) / "fuzz") as server:
                fuzz(server, 5_000, seed)
                assert server.stop() == 0
                assert "kv.py: error" not in server.log, server.log
            report = shutdowns_under_load(
                Path(top) / f"load-{seed}", 25, seed, 3.0, "--save-every=1"
            )
            acknowledged += report.acknowledged
            lost += report.lost
            cycles += 25
            seed += 1
            print(
                f"{(end - time.monotonic()) / 60:5.1f} minutes left, seed {seed}:"
                f" {cycles} shutdowns, {acknowledged:,} writes acknowledged, {len(lost)} lost",
                flush=True,
            )
    print(*lost, sep="\n")
    return len(lost)


# ---- Bench: kv.py beside the textbook and the least that a server can do ----


def textbook(port: int) -> None:
    """What the documentation of http.server leads to, with a listen queue that is long enough."""
    store: dict[str, bytes] = {}
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: bytes = b"") -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            with lock:
                value = store.get(self.path)
            self.answer(200 if value else 404, value or b"key not found\n")

        def do_PUT(self) -> None:
            value = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                store[self.path] = value
            self.answer(200)

        def log_message(self, *_: object) -> None:
            pass

    class TextbookServer(http.server.ThreadingHTTPServer):
        request_queue_size = 4096

        def handle_error(self, *_: object) -> None:
            pass

    TextbookServer(("127.0.0.1", port), Handler).serve_forever()


def bare_sockets(port: int) -> None:
    """Parses nothing and gives always the same answer: as fast as threads in Python can be."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nvalue"
    connections: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
    idle = threading.Semaphore(0)

    def work() -> None:
        while True:
            with contextlib.suppress(OSError), connections.get() as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while data := connection.recv(65536):
                    connection.sendall(answer)
                    if b"Connection: close" in data:
                        break
            idle.release()

    with socket.create_server(("127.0.0.1", port), backlog=4096) as listener:
        while True:
            connection, _ = listener.accept()
            if not idle.acquire(blocking=False):
                threading.Thread(target=work, daemon=True).start()
            connections.put(connection)


def answer_size(port: int, sent: bytes) -> int:
    """How many bytes the answer has; the same for each, as only their dates differ."""
    with Client(port) as client:
        client.send(sent)
        client.socket.settimeout(0.2)
        received = b""
        with contextlib.suppress(TimeoutError, socket.timeout):
            while piece := client.socket.recv(65536):
                received += piece
        return len(received)


def requests_per_second(port: int, clients: int, requests: list[bytes], seconds: float) -> float:
    """Have that many clients send one request after another; the next when one is answered."""
    size = answer_size(port, requests[0])
    closing = b"close" in requests[0]
    selector = selectors.DefaultSelector()
    missing = {}

    def connect() -> None:
        client = socket.create_connection(("127.0.0.1", port))
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(client, selectors.EVENT_READ)
        missing[client] = size
        client.sendall(requests[count % len(requests)])

    count = 0
    for _ in range(clients):
        connect()
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        for key, _ in selector.select():
            client = cast(socket.socket, key.fileobj)
            missing[client] -= len(client.recv(65536))
            if missing[client] <= 0:
                count += 1
                if closing:
                    selector.unregister(client)
                    del missing[client]
                    client.close()
                    connect()
                else:
                    missing[client] = size
                    client.sendall(requests[count % len(requests)])
    elapsed = time.monotonic() - begin
    for client in missing:
        client.close()
    return count / elapsed


def bench() -> None:
    """Print one table. Absolute figures differ from run to run; compare within one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"Python {sys.version.split()[0]}, {sys.platform}, {cores} cores")
    gets = [request("GET", f"/kv/key{number}") for number in range(1000)]
    puts = [put(f"key{number}", "value") for number in range(1000)]
    loads = {
        "PUT, 64 connections": (64, puts),
        "GET, 1 connection": (1, gets[:1]),
        "GET, 64 connections": (64, gets),
        "GET, 64 clients, a new connection each": (
            64,
            [request("GET", "/kv/key0", None, "Connection: close")],
        ),
    }
    figures: dict[str, dict[str, float]] = {name: {} for name in loads}
    with tempfile.TemporaryDirectory(prefix="kv-bench-") as top:
        for name in ("kv.py", "http.server", "bare sockets"):
            progress(name)
            with contextlib.ExitStack() as stack:
                if name == "kv.py":
                    port = stack.enter_context(ServerProcess(Path(top) / "kv")).port
                else:
                    port = free_port()
                    target = textbook if name == "http.server" else bare_sockets
                    process = multiprocessing.get_context("fork").Process(
                        target=target, args=[port]
                    )
                    process.start()
                    stack.callback(process.join)
                    stack.callback(process.kill)
                    wait_until(functools.partial(listens, port), name)
                for load, (clients, requests) in loads.items():
                    rounds = [requests_per_second(port, clients, requests, 1.0) for _ in range(3)]
                    figures[load][name] = sorted(rounds)[1]
        print(f"\n{'requests per second':40}{'kv.py':>9}{'http.server':>13}{'bare sockets':>14}")
        for load, row in figures.items():
            print(f"{load:40}{row['kv.py']:9,.0f}{row['http.server']:13,.0f}", end="")
            print(f"{row['bare sockets']:14,.0f}")
        print(f"\n{'kv.py beside the plain thing':40}{'kv.py':>9}{'plain':>9}{'ratio':>8}")
        for what, ours, plain, unit in measurements(Path(top)):
            ratio = f"{ours / plain:8.2f}" if plain else ""
            print(f"{what:40}{ours:9.3f}{f'{plain:9.3f}' if plain else '':9}{ratio:8} {unit}")


def progress(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


def seconds_of(*actions: Callable[[], Any]) -> list[float]:
    """The median for each action; they take turns, so that each finds the machine alike."""
    durations: list[list[float]] = [[] for _ in actions]
    for _ in range(5):
        for action, list_ in zip(actions, durations):
            begin = time.monotonic()
            action()
            list_.append(time.monotonic() - begin)
    return [sorted(list_)[len(list_) // 2] for list_ in durations]


def measurements(top: Path) -> Iterator[tuple[str, float, float, str]]:
    """What is measured, kv.py's figure, the plain thing's or 0, and the unit."""
    progress("start")

    def start_and_stop() -> None:
        with ServerProcess(top / "start") as server:
            server.send_signal(signal.SIGKILL)

    imports = [sys.executable, "-c", "import http.server, argparse"]
    ours, plain = seconds_of(start_and_stop, lambda: subprocess.run(imports, check=True))
    yield "start, plain: importing http.server", ours, plain, "s"

    progress("64 busy clients")
    puts = [put(f"key{number}", "value") for number in range(1000)]
    pairs_of_rates = []
    for _ in range(3):
        with ServerProcess(top / "first") as server:
            first, _, last = (requests_per_second(server.port, 64, puts, 0.3) for _ in range(3))
            pairs_of_rates.append((first / 1000, last / 1000))
    yield "first PUTs of 64 clients, plain: later", *sorted(pairs_of_rates)[1], "1,000/s"

    progress("10,000 clients at once")
    allow_descriptors(10_100)
    with ServerProcess(top / "burst") as server:
        requests = [put(f"key{number}", "value") for number in range(10_000)]
        begin = time.monotonic()
        answers = burst(server.port, requests, 15)
        assert answers == {"200": 10_000}, answers
        yield "10,000 clients PUT at the same instant", time.monotonic() - begin, 0, "s"

    progress("15,000 idle connections")
    allow_descriptors(20_000)
    number = min(15_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500)
    with ServerProcess(top / "idle") as server, contextlib.ExitStack() as stack:
        stack.enter_context(server.connect()).request("GET", "/health")
        gets = [request("GET", "/health")]
        before = requests_per_second(server.port, 64, gets, 1.0)
        resident = server.resident_bytes() if sys.platform == "linux" else 0
        for _ in range(number):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            client.send(gets[0])
            client.recv(1000)
        if resident:
            each = (server.resident_bytes() - resident) / number / 1024
            yield f"memory of one of {number:,} idle connections", each, 0, "KiB"
        beside = requests_per_second(server.port, 64, gets, 1.0)
        yield "GET beside them, plain: without", beside / 1000, before / 1000, "1,000/s"
        begin = time.monotonic()
        server.stop()
        yield "SIGTERM to exit with them", time.monotonic() - begin, 0, "s"

    progress("9,000 busy clients")
    with ServerProcess(top / "busy") as server:
        loops = [Loop(put(f"{n}-{m}", "value") for m in range(3)) for n in range(9_000)]
        begin = time.monotonic()
        assert keep_alive(server.port, loops).answers == {"200": 27_000}
        yield "9,000 clients PUT 3 times each", time.monotonic() - begin, 0, "s"

    progress("1,000,000 pairs of 16 and 100 bytes")
    pairs = {f"key{number:013}": f"{number:0100}" for number in range(1_000_000)}

    def dump() -> None:
        with open(top / "plain", "wb") as file:
            pickle.dump(pairs, file)
            file.flush()
            os.fsync(file.fileno())

    def load() -> Any:
        with open(top / "plain", "rb") as file:
            return pickle.load(file)

    snapshot = kv.Snapshot(str(top / "large"))
    snapshot.open()
    ours, plain = seconds_of(lambda: snapshot.save(pairs), dump)
    yield "save 1,000,000 pairs, plain: pickle.dump", ours, plain, "s"
    ours, plain = seconds_of(snapshot.load, load)
    yield "load 1,000,000 pairs, plain: pickle.load", ours, plain, "s"
    os.close(snapshot._locked)
    with ServerProcess(top / "large") as server:
        # From all over the dict, as the processor's cache would hold a few.
        keys = list(pairs)
        many = [request("GET", f"/kv/{key}") for key in random.sample(keys, 20_000)]
        some = [request("GET", f"/kv/{key}") for key in keys[:1000]]
        rates = []
        with ServerProcess(top / "few") as few:
            for key in keys[:1000]:
                few.request("PUT", f"/kv/{key}", pairs[key].encode())
            for _ in range(3):
                ours = requests_per_second(server.port, 64, many, 1.0) / 1000
                plain = requests_per_second(few.port, 64, some, 1.0) / 1000
                rates.append((ours / plain, ours, plain))
        yield "GET, 1,000,000 keys, plain: 1,000", *sorted(rates)[1][1:], "1,000/s"
        with server.connect() as asking:
            slowest = []
            for name in ("one", "two"):
                begin = longest = 0.0
                end = time.monotonic() + 1.0
                if name == "two":
                    asking.request("PUT", "/kv/two", b"value")
                    server.send_signal(signal.SIGUSR1)
                while "saved" not in server.log if name == "two" else time.monotonic() < end:
                    begin = time.monotonic()
                    asking.request("GET", "/health")
                    longest = max(longest, time.monotonic() - begin)
                slowest.append(longest)
        yield "slowest GET in a save, plain: without", slowest[1], slowest[0], "s"
        if sys.platform == "linux":
            server.request("PUT", "/kv/one-more", b"value")
            before = highest = server.resident_bytes()
            server.send_signal()
            with contextlib.suppress(FileNotFoundError, IndexError):
                while server.process.poll() is None:
                    highest = max(highest, server.resident_bytes())
            yield "memory during a save, plain: before", highest / 1e6, before / 1e6, "MB"


def run_all() -> bool:
    """Run each class in a process of its own, four at a time, as most of a test is waiting."""

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, __file__, "-v", name]
        pipe = subprocess.PIPE
        return subprocess.run(
            command, stdout=pipe, stderr=subprocess.STDOUT, text=True, timeout=20 * DEADLINE
        )

    begin = time.monotonic()
    names = [name for name in globals() if name.endswith("Test") and name != "KVTest"]
    number = failed = 0
    skipped: collections.Counter[str] = collections.Counter()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for name, result in zip(names, pool.map(run, names)):
            failed += result.returncode != 0
            ran = re.search(r"^Ran (\d+) tests? in .*$", result.stdout, re.MULTILINE)
            number += int(ran[1]) if ran else 0
            skipped.update(re.findall(r"skipped ['\"](.*)['\"]$", result.stdout, re.MULTILINE))
            if result.returncode or not ran:
                print(result.stdout)
            print(f"{name}: {ran[0] if ran else 'did not run'}", flush=True)
    seconds = time.monotonic() - begin
    outcome = f"{failed} classes failed" if failed else "OK"
    reasons = ", ".join(f"{count}x {reason}" for reason, count in skipped.items())
    print(f"{number} tests in {seconds:.0f} s: {outcome}; skipped: {reasons or 'none'}")
    return failed == 0


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children of `&` would ignore it
    if sys.argv[1:2] == ["soak"]:
        return 1 if soak(float(sys.argv[2]) if sys.argv[2:] else 10) else 0
    if sys.argv[1:] == ["bench"]:
        bench()
        return 0
    if not sys.argv[1:]:
        return 0 if run_all() else 1
    unittest.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
