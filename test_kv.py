#!/usr/bin/env python3
"""Tests of kv.py, in the order of its parts. They start the real program and use real sockets.

python3 test_kv.py [-v] [NAME ...]   the suite, or what is named, such as ShutdownTest
python3 test_kv.py soak [MINUTES]    shutdowns under load and hostile input for a long time
python3 test_kv.py bench             how fast, and how much memory
python3 test_kv.py --run PROGRAM [WORD ...]
                                     whether any executable file solves the challenge: all tests
                                     for that, or those that have the words in their names
"""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import heapq
import http.client
import http.server
import io
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
import threading
import time
import unittest
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import kv

HERE = Path(__file__).resolve().parent
DEADLINE = 30.0  # for everything that is waited for; far more than it takes
GRACE = 15.0  # what the challenge gives a program to start and to end, and a request to be answered


# ---- Helpers for any program that solves the challenge ----


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


class Answer(NamedTuple):
    status: int
    fields: dict[str, str]
    body: bytes
    to: str = "a request"


class Client:
    """One connection. Sends bytes as they are, and parses answers by itself."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection((host, port), GRACE)
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
        match = re.fullmatch(rb"HTTP/1\.[01] ([1-5][0-9][0-9])[ -~]*\r\n", status_line)
        assert match, f"malformed status line {status_line!r}"
        status = int(match[1])
        fields: dict[str, str] = {}
        while (line := self.file.readline()) != b"\r\n":
            field = re.fullmatch(rb"([^\s:]+):[ \t]*([ -~]*)\r\n", line)
            assert field, f"malformed field {line!r}"
            fields[field[1].decode().title()] = field[2].decode()
        body = b""
        if method != "HEAD" and status >= 200 and status not in (204, 304):
            if fields.get("Transfer-Encoding") == "chunked":
                while size := int(self.file.readline(), 16):
                    body += self.file.read(size)
                    self.file.readline()
                self.file.readline()
            elif "Content-Length" in fields:
                body = self.file.read(int(fields["Content-Length"]))
            else:
                body = self.file.read()
        return Answer(status, fields, body)

    def request(self, method: str, path: str, body: bytes | None = None, *more: str) -> Answer:
        self.send(request(method, path, body, *more))
        return self.receive(method)._replace(to=f"{method} {path}")

    def is_closed(self) -> bool:
        """Whether the server has closed the connection; waits for nothing else."""
        with contextlib.suppress(ConnectionResetError):
            return self.file.read(1) == b""
        return True


def request(
    method: str, path: str, body: bytes | None = None, *more: str, host: str = "localhost"
) -> bytes:
    fields = [f"Host: {host}", *more]
    if body is not None:
        fields.append(f"Content-Length: {len(body)}")
    return "\r\n".join([f"{method} {path} HTTP/1.1", *fields, "", ""]).encode() + (body or b"")


def put(key: str, value: str) -> bytes:
    return request("PUT", f"/kv/{key}", value.encode())


class Program:
    """A program as a process group of its own, started and stopped as the challenge does it.

    It has a port, a working directory and signals, and nothing else is known of it.
    """

    def __init__(
        self, command: list[str], directory: Path, port: int, *arguments: str, **popen: Any
    ) -> None:
        self.directory, self.port = directory, port
        # Beside the working directory, not in it: the program has that one for itself.
        self.log_path = directory.with_name(directory.name + ".log")
        self.log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*command, f"--port={port}", f"--working-dir={directory}", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **popen,
            )
        atexit.register(self.__exit__)  # unittest runs no cleanups on Ctrl-C

    def wait_until_ready(self) -> None:
        with contextlib.suppress(AssertionError):
            wait_until(lambda: self.has_ended() or listens(self.port), "it listens", GRACE)
        printed = f"and it printed {self.log[-1000:] or 'nothing'}"
        assert not self.has_ended(), f"exit code {self.process.returncode}, {printed}"
        nobody = f"nobody listens on port {self.port} after {GRACE:.0f} s"
        assert listens(self.port), f"with --port={self.port} {nobody}, {printed}"

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no process behind, whatever has happened."""
        atexit.unregister(self.__exit__)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE)

    @property
    def log(self) -> str:
        with open(self.log_path, "rb") as file:
            file.seek(self.log_start)
            return file.read().decode(errors="replace")

    def connect(self) -> Client:
        return Client(self.port)

    def request(self, method: str, path: str, body: bytes | None = None, *more: str) -> Answer:
        with self.connect() as client:
            return client.request(method, path, body, *more)

    def get(self, key: str) -> str | None:
        answer = self.request("GET", f"/kv/{key}")
        return answer.body.decode() if answer.status == 200 else None

    def read(self, keys: Iterable[str]) -> dict[str, str]:
        """Those of the keys that it has, with their values."""
        found = {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=GRACE)
        with contextlib.closing(connection):
            for key in keys:
                connection.request("GET", f"/kv/{key}")
                response = connection.getresponse()
                body = response.read()
                if response.status == 200:
                    found[key] = body.decode()
        return found

    def send_signal(self, number: int = signal.SIGTERM) -> None:
        os.killpg(self.process.pid, number)

    def exit_code(self, seconds: float = GRACE) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"expected an exit within {seconds:.0f} s, saw none") from None

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.send_signal(number)
        return self.exit_code()


class ProgramTest(unittest.TestCase):
    """A test with a working directory of its own, which is gone afterwards."""

    command: ClassVar[list[str]] = [sys.executable, str(HERE / "kv.py")]
    seconds = 60.0  # no test takes longer, whatever the program does

    def setUp(self) -> None:
        temporary = tempfile.TemporaryDirectory(prefix="kv-test-")
        self.addCleanup(temporary.cleanup)
        self.top = Path(temporary.name).resolve()
        self.directory = self.top / "data"
        self.port = free_port()
        signal.signal(signal.SIGALRM, self.give_up)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        self.addCleanup(signal.setitimer, signal.ITIMER_REAL, 0)

    def give_up(self, *_: object) -> None:
        raise AssertionError(f"expected to be through within {self.seconds:.0f} s")

    def assertEqual(self, first: Any, second: Any, msg: Any = None) -> None:
        """In words that can be understood without a look into the test."""
        if first != second:
            seen, expected = (
                text if len(text) < 150 else f"{text[:150]}... ({len(value)} in all)"
                for value, text in ((first, repr(first)), (second, repr(second)))
            )
            self.fail(f"expected {expected}, saw {seen}{f' ({msg})' if msg else ''}")

    def launch(self, **popen: Any) -> Program:
        """Start the program, again on the same port and directory."""
        self.directory.mkdir(exist_ok=True)
        program = Program(self.command, self.directory, self.port, **popen)
        self.addCleanup(program.__exit__)
        program.wait_until_ready()
        return program

    def restart(self, program: Program) -> Program:
        self.check_stops(program)
        return self.launch()

    def check_stops(self, program: Program) -> None:
        code = program.stop()
        why = ", which is how SIGTERM ends a script without `exec`" if code == -15 else ""
        self.assertEqual(code, 0, f"the exit code after SIGTERM{why}")

    def client(self, program: Program) -> Client:
        client = program.connect()
        self.addCleanup(client.__exit__)
        return client

    def check(self, answer: Answer, status: int, body: bytes = b"") -> None:
        self.assertEqual((answer.status, answer.body), (status, body), f"for {answer.to}")

    def store_at_once(self, program: Program, number: int) -> dict[str, str]:
        pairs = {f"key{n}": f"value {n}" for n in range(number)}
        requests = list(itertools.starmap(put, pairs.items()))
        self.assertEqual(pooled_burst(program.port, requests), {"200": number})
        return pairs


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

    def apply_to(self, pairs: dict[str, str]) -> dict[str, str]:
        """Do what the acknowledged PUTs and DELETEs have done."""
        for sent in self.acknowledged:
            head, _, value = sent.decode().partition("\r\n\r\n")
            method, path, *_ = head.split()
            if method == "PUT":
                pairs[path[len("/kv/") :]] = value
            else:
                pairs.pop(path[len("/kv/") :], None)
        return pairs


def is_whole(answer: bytes, at_the_end: bool = False) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    if length:
        return bool(end) and len(body) == int(length[1])
    if re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
        return body.endswith(b"0\r\n\r\n")
    return bool(end) and at_the_end


def is_last(answer: bytes) -> bool:
    """Whether no other answer comes on that connection."""
    keeps = re.search(rb"(?i)\r\nconnection: *(close|keep-alive)", answer.partition(b"\r\n\r\n")[0])
    return keeps[1].lower() == b"close" if keeps else answer.startswith(b"HTTP/1.0")


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


def keep_alive(
    port: int, loops: list[Loop], seconds: float = DEADLINE, pool: list[socket.socket] | None = None
) -> Outcome:
    """Run clients that keep their connections, until all have ended.

    All connect at once. One connects anew only after `Connection: close`, or if it sees the end of
    its connection before it sends. A request is never sent again. A client whose connection is
    refused has ended. With a pool, they share their connections, like those of Node's fetch, and
    who is refused tries again.
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
            while pool and not loop.socket:
                pooled = pool.pop()
                if sees_the_end(pooled):
                    pooled.close()
                else:
                    loop.socket = pooled
                    selector.register(pooled, selectors.EVENT_READ, loop)
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
            if not data and loop.sent and not is_whole(loop.received, True):
                raise ConnectionAbortedError("closed without an answer")
            if data and not is_whole(loop.received):
                return
            if not loop.received:  # the end of an idle connection
                disconnect(loop)
                return
            outcome.answers[loop.received[9:12].decode()] += 1
            if loop.received[9:12] == b"200":
                outcome.acknowledged.append(loop.sent)
            if not data or is_last(loop.received):
                disconnect(loop)
            elif pool is not None:
                selector.unregister(loop.socket)
                pool.append(loop.socket)
                loop.socket = None
            loop.sent = loop.received = b""
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
                    disconnect(key.data)
                    if isinstance(error, ConnectionRefusedError) and pool is not None:
                        heapq.heappush(due, (time.monotonic() + 0.02, loops.index(key.data)))
                        continue
                    running -= 1
                    if not isinstance(error, ConnectionRefusedError):
                        outcome.answers[str(error)] += 1
            while due and due[0][0] <= time.monotonic():
                send_next(loops[heapq.heappop(due)[1]])
    outcome.answers["no answer in time"] += running
    return outcome._replace(answers=+outcome.answers)


def burst(port: int, requests: list[bytes], seconds: float = GRACE) -> collections.Counter[str]:
    """Send each request on a connection of its own, all at once; count the answers by status."""
    return keep_alive(port, [Loop([each]) for each in requests], seconds).answers


def pooled_burst(port: int, requests: list[bytes]) -> collections.Counter[str]:
    """The same with a pool of connections like that of Go's net/http, whose clients share it.

    Each request dials, but takes another connection if one is free before. Then the dialled one
    joins the pool, where all but two that are idle are closed. No request is sent again.
    """
    answers: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + GRACE
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
        while (waiting or received) and selector.get_map() and time.monotonic() < end:
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
                    if not is_whole(received[client], not data) and data:
                        continue
                    answer = received.pop(client)
                    answers[answer[9:12].decode() if answer else "closed without an answer"] += 1
                    if data and not is_last(answer):
                        use(client)
                    else:
                        drop(client)
                except OSError as error:
                    received.pop(client, None)
                    answers[str(error)] += 1
                    drop(client)
    answers["no answer in time"] += len(waiting) + len(received)
    return +answers


def writes(client: int, chance: random.Random) -> Iterator[bytes]:
    """PUTs and DELETEs, without an end, of keys that no other client has."""
    for number in itertools.count():
        key = f"{client}-{chance.randrange(200)}"
        deletes = chance.random() < 0.2
        yield request("DELETE", f"/kv/{key}") if deletes else put(key, str(number))


def stop_under_load(
    program: Program, clients: int, chance: random.Random, saves: int = 0
) -> Outcome:
    """Stop a program while clients write. Each that is not refused must be answered 200.

    A third of them have no pause, the others one of up to 4 or 60 ms.
    """
    pauses = [chance.random() * (0, 0.004, 0.06)[client % 3] for client in range(clients)]
    loops = [Loop(writes(client, chance), pause) for client, pause in enumerate(pauses)]
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        running = thread.submit(keep_alive, program.port, loops)
        for _ in range(saves):
            time.sleep(chance.uniform(0, 0.2))  # the moments are left to chance
            program.send_signal(signal.SIGUSR1)
        time.sleep(chance.uniform(0.1, 0.3))
        code = program.stop()
        outcome = running.result()
    seen = f"saw exit code {code} and {dict(outcome.answers)}"
    assert (code, set(outcome.answers)) == (0, {"200"}), f"expected exit code 0 and 200s, {seen}"
    return outcome


def allow_descriptors(number: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(number, hard), hard))


def limited(what: str, number: int) -> Callable[[], None]:
    """For preexec_fn: start with one of the limits of `ulimit`."""
    return lambda: resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (number, number))


# ---- What the challenge asks for ----


ALL_CHARACTERS = string.ascii_letters + string.digits + ":_.-"


class AskedForTest(ProgramTest):
    """Stages 1 and 2 of the challenge."""

    def test_a_value_comes_back_byte_for_byte(self) -> None:
        program = self.launch()
        for value in ("x", "päivää 🌍", "\ta b\r\n\n ", "long " * 2000, "a=b&c", '{"a": 1}'):
            self.check(program.request("PUT", "/kv/a", value.encode()), 200)
            self.check(program.request("GET", "/kv/a"), 200, value.encode())

    def test_keys_of_every_allowed_character(self) -> None:
        program = self.launch()
        keys = ["a", "A", "0", "a:b", "a_b", "a.b", "a-b", ALL_CHARACTERS]
        for key in keys:
            self.check(program.request("PUT", f"/kv/{key}", key.encode()), 200)
        self.assertEqual(program.read(keys), dict(zip(keys, keys)))

    def test_an_empty_value_or_key_is_refused(self) -> None:
        program = self.launch()
        self.check(program.request("PUT", "/kv/a", b""), 400, b"value cannot be empty\n")
        for method in ("PUT", "GET", "DELETE"):
            answer = program.request(method, "/kv/", b"x" if method == "PUT" else None)
            self.check(answer, 400, b"key cannot be empty\n")

    def test_delete_removes_a_key_and_succeeds_without_one(self) -> None:
        program = self.launch()
        program.request("PUT", "/kv/gone", b"value")
        for _ in range(2):
            self.check(program.request("DELETE", "/kv/gone"), 200)
            self.check(program.request("GET", "/kv/gone"), 404, b"key not found\n")

    def test_clear_removes_every_key(self) -> None:
        program = self.launch()
        keys = [f"key{number}" for number in range(10)]
        for key in keys:
            program.request("PUT", f"/kv/{key}", b"value")
        for _ in range(2):
            self.check(program.request("DELETE", "/clear"), 200)
            self.assertEqual(program.read(keys), {})

    def test_other_methods_are_not_allowed(self) -> None:
        program = self.launch()
        wrong = {"/kv/a": ("POST", "PATCH"), "/clear": ("GET", "POST", "PUT", "PATCH")}
        for path, methods in wrong.items():
            for method in methods:
                answer = program.request(method, path, None if method == "GET" else b"x")
                self.check(answer, 405, b"method not allowed\n")

    def test_100_puts_at_once_to_many_keys_and_to_one(self) -> None:
        program = self.launch()
        pairs = self.store_at_once(program, 100)
        self.assertEqual(program.read(pairs), pairs)
        to_one = [put("one", value) for value in pairs.values()]
        self.assertEqual(pooled_burst(program.port, to_one), {"200": 100})
        self.assertIn(program.get("one"), pairs.values())

    def test_10_000_puts_at_once_of_a_pool_are_there_after_a_restart(self) -> None:
        allow_descriptors(10_100)
        program = self.launch()
        pairs = self.store_at_once(program, 10_000)
        self.assertEqual(self.restart(program).read(pairs), pairs)

    def test_six_restarts_in_a_row(self) -> None:
        program, expected = self.launch(), dict[str, str]()
        for restart in range(6):
            expected[f"key{restart}"] = "päivää 🌍\t" * (restart + 1)
            expected["overwritten"] = str(restart)
            for key, value in expected.items():
                self.check(program.request("PUT", f"/kv/{key}", value.encode()), 200)
            program = self.restart(program)
            self.assertEqual(program.read(expected), expected)

    def test_deleted_and_cleared_keys_are_gone_after_a_restart(self) -> None:
        program = self.launch()
        for key in ("kept", "deleted"):
            program.request("PUT", f"/kv/{key}", b"value")
        program = self.restart(program)
        program.request("DELETE", "/kv/deleted")
        program = self.restart(program)
        self.assertEqual(program.read(["kept", "deleted"]), {"kept": "value"})
        program.request("DELETE", "/clear")
        self.assertEqual(self.restart(program).read(["kept", "deleted"]), {})


# ---- What goes wrong next, each a chapter of "Where a first version fails" in the README ----


class BeyondTest(ProgramTest):
    def test_listen_queue_10_000_clients_that_stay(self) -> None:
        """Those for whom there is no room try again after 1 s, 3 s, 7 s."""
        allow_descriptors(10_100)
        program = self.launch()
        requests = [put(f"key{number}", "value") for number in range(10_000)]
        self.assertEqual(burst(program.port, requests), {"200": 10_000})

    def test_two_writes_for_an_answer(self) -> None:
        """The second waits until the client acknowledges the first, after 40 ms."""
        client = self.client(self.launch())
        seconds = []
        for number in range(200):
            begin = time.monotonic()
            self.check(client.request("PUT", f"/kv/{number}", b"value"), 200)
            self.check(client.request("GET", f"/kv/{number}"), 200, b"value")
            seconds.append(time.monotonic() - begin)
        self.assertLess(sorted(seconds)[100], 0.03, "seconds for a PUT and a GET")

    def test_pool_of_10_000_clients_and_256_descriptors(self) -> None:
        """Who closes idle connections for want of descriptors hits requests on their way."""
        allow_descriptors(10_100)
        program = self.launch(preexec_fn=limited("NOFILE", 256))
        pairs = self.store_at_once(program, 10_000)
        self.assertEqual(self.restart(program).read(pairs), pairs)

    def test_pool_of_150_clients_through_three_restarts(self) -> None:
        self.keep_a_pool_through_three_restarts()

    def test_pool_of_150_clients_and_64_descriptors_through_three_restarts(self) -> None:
        self.keep_a_pool_through_three_restarts(preexec_fn=limited("NOFILE", 64))

    def keep_a_pool_through_three_restarts(self, **popen: Any) -> None:
        """No request is sent twice, and each gets its answer, unless its connection is refused."""
        program, is_over = self.launch(**popen), threading.Event()

        def until_it_is_over(requests: Iterator[bytes]) -> Iterator[bytes]:
            return itertools.takewhile(lambda _: not is_over.is_set(), requests)

        chance = random.Random(1)
        loops = [Loop(until_it_is_over(writes(client, chance))) for client in range(150)]
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            clients = thread.submit(keep_alive, program.port, loops, DEADLINE, [])
            try:
                for _ in range(3):
                    time.sleep(0.7)  # the load in between
                    self.check_stops(program)
                    program = self.launch(**popen)
                time.sleep(0.3)
            finally:
                is_over.set()
            outcome = clients.result()
        self.assertEqual(set(outcome.answers), {"200"}, outcome.answers)
        stored = outcome.apply_to({})
        self.assertEqual(self.restart(program).read(stored), stored)

    def test_slow_to_accept(self) -> None:
        """Each of 200 clients that are busy from the first answer on has that one soon."""
        program, answered = self.launch(), list[float]()
        begin = time.monotonic()

        def requests(client: int) -> Iterator[bytes]:
            yield put(str(client), "0")
            answered.append(time.monotonic() - begin)
            while time.monotonic() < begin + 3:
                yield put(str(client), "1")

        loops = [Loop(requests(client)) for client in range(200)]
        outcome = keep_alive(program.port, loops, GRACE)
        self.assertEqual(set(outcome.answers), {"200"})
        self.assertLess(max(answered), 2.0, "seconds until the last client has an answer")

    def test_idle_keep_alive_connections_at_sigterm(self) -> None:
        program = self.launch()
        clients = [self.client(program) for _ in range(40)]
        for client in clients[:20]:  # the others have never sent anything
            self.check(client.request("PUT", "/kv/a", b"1"), 200)
        begin = time.monotonic()
        program = self.restart(program)
        self.assertLess(time.monotonic() - begin, 5.0, "seconds until it has ended")
        self.assertTrue(all(client.is_closed() for client in clients))
        self.assertEqual(program.get("a"), "1")

    def test_stalled_client_at_sigterm(self) -> None:
        program = self.launch()
        stalled = self.client(program)
        stalled.send(put("stalled", "value")[:-1])
        program.request("PUT", "/kv/a", b"1")
        program = self.restart(program)
        self.assertEqual(program.read(["a", "stalled"]), {"a": "1"})

    def test_busy_clients_at_sigterm_drain_and_lose_nothing_acknowledged(self) -> None:
        chance, expected = random.Random(1), dict[str, str]()
        keys = [f"{client}-{number}" for client in range(64) for number in range(200)]
        for clients in (64, 200):
            outcome = stop_under_load(self.launch(), clients, chance)
            outcome.apply_to(expected)
            program = self.launch()
            self.assertEqual(program.read(expected), expected)
            if clients == 64:
                self.assertEqual(
                    program.read(keys), {k: expected[k] for k in keys if k in expected}
                )
            self.check_stops(program)

    def test_slow_upload_that_ends_after_sigterm(self) -> None:
        """A write that was acknowledged while the program stops is saved."""
        program = self.launch()
        client = self.client(program)
        client.send(put("slow", "value")[:-1])
        program.request("PUT", "/kv/a", b"1")
        program.send_signal()
        wait_until(lambda: not listens(self.port), "new connections are refused", GRACE)
        client.send(b"e")
        self.assertEqual(client.receive().status, 200)
        self.assertEqual(program.exit_code(), 0)
        self.assertEqual(self.launch().read(["a", "slow"]), {"a": "1", "slow": "value"})

    def test_backlog_at_sigterm(self) -> None:
        """While it is paused, the program accepts nothing: 200 clients are in the listen queue."""
        program = self.launch()
        program.send_signal(signal.SIGSTOP)
        clients = [self.client(program) for _ in range(200)]
        for number, client in enumerate(clients):
            client.send(put(str(number), "value"))
        program.send_signal()
        program.send_signal(signal.SIGCONT)
        self.assertEqual([client.receive().status for client in clients], [200] * 200)
        self.assertEqual(program.exit_code(), 0)
        self.assertEqual(len(self.launch().read(map(str, range(200)))), 200)

    def test_sigkill_in_the_middle_of_a_save(self) -> None:
        """There is the whole old state or the whole new one, at whatever moment it comes."""
        program = self.launch()
        state = {f"key{number}": f"{number} " * 250_000 for number in range(20)}
        for key, value in state.items():
            self.check(program.request("PUT", f"/kv/{key}", value.encode()), 200)
        state["n"] = "0"
        program.request("PUT", "/kv/n", b"0")
        program = self.restart(program)
        for number in range(1, 11):
            program.request("PUT", "/kv/n", str(number).encode())
            before = self.files()
            program.send_signal()
            while self.files() == before and not program.has_ended():
                time.sleep(0.0005)  # until it writes something into its directory
            time.sleep((0, 0.01, 0, 0.03)[number % 4])
            with contextlib.suppress(ProcessLookupError):
                program.send_signal(signal.SIGKILL)
            program.exit_code()
            program = self.launch()
            found = program.read(state)
            if found not in (state, {**state, "n": str(number)}):
                self.fail(f"expected the whole old or new state, saw the keys {sorted(found)}")
            state["n"] = found["n"]

    def files(self) -> set[tuple[str, int]]:
        """The files in the working directory, and when they were written last."""
        with contextlib.suppress(FileNotFoundError):  # one that is gone by now
            return {(file.name, file.stat().st_mtime_ns) for file in os.scandir(self.directory)}
        return set()

    def test_disk_full_at_the_stop_is_no_success_and_keeps_the_old_state(self) -> None:
        program = self.launch()
        program.request("PUT", "/kv/old", b"1")
        self.check_stops(program)
        program = self.launch(preexec_fn=limited("FSIZE", 50_000))  # bytes in a file
        self.check(program.request("PUT", "/kv/large", b"x" * 100_000), 200)
        program.send_signal()
        time.sleep(1.5)
        with contextlib.suppress(ProcessLookupError):  # so that nobody tries for 15 s
            program.send_signal()
        self.assertNotEqual(program.exit_code(), 0, "the exit code, although nothing is saved")
        self.assertEqual(self.launch().get("old"), "1", "what was saved before")

    def test_second_signal_does_not_cost_the_save(self) -> None:
        program = self.launch()
        self.client(program).send(put("stalled", "value")[:-1])
        program.request("PUT", "/kv/a", b"1")
        program.send_signal()
        time.sleep(1.5)  # as somebody who has lost patience
        with contextlib.suppress(ProcessLookupError):
            program.send_signal()
        self.assertEqual(program.exit_code(), 0)
        self.assertEqual(self.launch().get("a"), "1")

    def test_request_with_two_ends(self) -> None:
        """RFC 9112 6.3: what one takes for the body may be a request to another."""
        program = self.launch()
        hidden = put("hidden", "value")
        lengths = f"Content-Length: {len(hidden)}"
        for sent in (
            request("PUT", "/kv/a", None, "Content-Length: 5", lengths) + hidden,
            request("PUT", "/kv/a", None, "Transfer-Encoding: chunked", lengths)
            + b"0\r\n\r\n"
            + hidden,
            request("PUT", "/kv/a", None, "Content-Length: +5") + b"value" + hidden,
            request("PUT", "/kv/a", None, "Transfer-Encoding: xchunked") + b"0\r\n\r\n" + hidden,
        ):
            with self.subTest(sent=sent), program.connect() as client:
                client.send(sent)
                answer = client.receive()
                self.assertIn(answer.status, (400, 501), f"the status for {sent!r}")
                self.assertTrue(client.is_closed(), f"no second answer, and the end, for {sent!r}")
        self.assertEqual(program.read(["a", "hidden"]), {})

    def test_value_that_is_not_text(self) -> None:
        program = self.launch()
        for value in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"ok \xe4 ok"):
            self.assertEqual(program.request("PUT", "/kv/a", value).status, 400)
        self.assertEqual(program.get("a"), None)
        self.check_stops(program)

    def test_name_that_is_not_this_machines(self) -> None:
        """A web page can have its own name lead to 127.0.0.1: DNS rebinding."""
        program = self.launch()
        program.request("PUT", "/kv/a", b"1")
        for method, body in (("GET", None), ("PUT", b"2"), ("DELETE", None)):
            with program.connect() as client:
                client.send(request(method, "/kv/a", body, host="attacker.example"))
                status = client.receive().status
                self.assertGreaterEqual(status, 400, f"the status for {method}, attacker.example")
        self.assertEqual(program.get("a"), "1")


# ---- Check your own: what any solution of the challenge can be held against ----

FIRST_VERSION = """\
import http.server, pickle, signal, socketserver, sys, threading

options = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
path, lock = options["working-dir"] + "/data.pickle", threading.Lock()
try:
    store = pickle.load(open(path, "rb"))
except Exception:
    store = {}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, text=""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key, known = self.path[len("/kv/"):], ("GET", "PUT", "DELETE")
        with lock:
            if self.path == "/clear" and self.command == "DELETE":
                store.clear()
                self.answer(200)
            elif not self.path.startswith("/kv/") or self.command not in known:
                self.answer(405, "method not allowed\\n")
            elif not key:
                self.answer(400, "key cannot be empty\\n")
            elif self.command == "PUT" and not body:
                self.answer(400, "value cannot be empty\\n")
            elif self.command == "GET" and key not in store:
                self.answer(404, "key not found\\n")
            elif self.command == "GET":
                self.answer(200, store[key])
            else:
                store.pop(key, None)
                if self.command == "PUT":
                    store[key] = body.decode()
                self.answer(200)

    do_GET = do_PUT = do_DELETE = do_POST = do_PATCH = serve


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = False


def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    server.server_close()
    pickle.dump(store, open(path, "wb"))
    sys.exit(0)


server = Server(("127.0.0.1", int(options["port"])), Handler)
signal.signal(signal.SIGTERM, stop)
server.serve_forever()
"""


class Verdict(unittest.TestResult):
    """Why a check fails, in words that need no look into its code."""

    reason = ""

    def addFailure(self, test: Any, err: Any) -> None:
        error = err[1]
        name = "" if isinstance(error, AssertionError) else f"saw {type(error).__name__}: "
        self.reason = self.reason or f"{name}{error}"[:500]

    addError = addFailure

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err:
            self.addFailure(test, err)


def does_start(command: list[str]) -> bool:
    """Whether a program can be held against anything; if not, say what it said."""
    with tempfile.TemporaryDirectory(prefix="kv-test-") as top:
        directory = Path(top) / "data"
        directory.mkdir()
        try:
            with Program(command, directory, free_port()) as program:
                program.wait_until_ready()
        except (OSError, AssertionError) as error:
            print(f"{command[0]} does not start: {error}")
            return False
    return True


def check(program: str, class_name: str, name: str, seconds: float) -> None:
    """Hold a program against one test; print why it fails, nothing if it does not."""
    test, verdict = globals()[class_name](name), Verdict()
    test.command, test.seconds = [program], seconds
    test.run(verdict)
    print(verdict.reason)


def tests_of(class_: type) -> list[str]:
    return [name for name in vars(class_) if name.startswith("test_")]


def is_burst(name: str) -> bool:
    """Whether a test has 10,000 clients at once, and so must not run beside another such test."""
    return "10_000" in name


def check_program(program: str, words: list[str]) -> dict[str, bool]:
    """Hold a program against what the challenge asks for, and against what goes wrong next.

    Prints a line for each test whose name has the words, and returns how it went. Each test has a
    process of its own, some at a time, as most of it is waiting. All of them together take three
    minutes at most: the last one begins in time for the waiting in it to end.
    """
    end = time.monotonic() + 140

    def run(class_: type[unittest.TestCase], name: str) -> str:
        seconds = min(30.0, end - time.monotonic())
        if seconds < 1:
            return "not tried, as three minutes are over"
        command = [sys.executable, __file__, "--check", program, class_.__name__, name]
        return subprocess.check_output([*command, str(seconds)], text=True).strip()

    kinds = {"asked for": AskedForTest, "beyond": BeyondTest}
    readme = (HERE / "README.md").read_text().split("\n\n")
    outcomes: dict[str, bool] = {}
    summary = []
    executor = concurrent.futures.ThreadPoolExecutor
    with executor(4) as pool, executor(1) as one_by_one:
        runs = {
            kind: {
                name: (one_by_one if is_burst(name) else pool).submit(run, class_, name)
                for name in tests_of(class_)
                if all(word.lower() in name for word in words)
            }
            for kind, class_ in kinds.items()
        }
        for kind, tests in runs.items():
            for name, outcome in tests.items():
                text = name[len("test_") :].replace("_", " ")
                if sys.stdout.isatty():
                    print(f"...    {text}", end="\r", flush=True)
                reason = outcome.result()
                outcomes[name] = not reason
                print(f"{'FAILS' if reason else 'ok':6} {text}", flush=True)
                if reason:
                    chapter = [text for text in readme if f".{name}" in text] or ["**The API**"]
                    print(
                        f"       {reason}\n       see: {chapter[0].split('**')[1].rstrip('.')}",
                        flush=True,
                    )
            held = [outcomes[name] for name in tests]
            summary.append(f"{kind}: {sum(held)} of {len(held)}")
    if outcomes:
        print(", ".join(summary))
    return outcomes


class FirstVersionTest(unittest.TestCase):
    """A program as people write it first shows that each check can fail."""

    FAILS: ClassVar = {
        "test_10_000_puts_at_once_of_a_pool_are_there_after_a_restart",
        *tests_of(BeyondTest),
    }

    def test_it_fails_what_it_must_and_nothing_else(self) -> None:
        with tempfile.TemporaryDirectory(prefix="kv-test-") as top:
            program = Path(top) / "first_version"
            program.write_text(f"#!{sys.executable}\n{FIRST_VERSION}")
            program.chmod(0o755)
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                outcomes = check_program(str(program), [])
                # On a busy machine, SIGKILL can miss a short save.
                for name in [name for name in self.FAILS if outcomes[name]] * 3:
                    outcomes[name] &= check_program(str(program), [name])[name]
        failed = {name for name, holds in outcomes.items() if not holds}
        self.assertEqual(failed, self.FAILS, printed.getvalue())

    def test_what_does_not_start_is_not_checked(self) -> None:
        for command, reason in (
            (["/dev/null"], "Permission denied"),
            (["./nothing"], "No such file"),
            (["sh", "-c", "echo out of order; exit 3"], "out of order"),
        ):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                self.assertFalse(does_start(command))
            self.assertIn(reason, printed.getvalue())


# ---- Helpers for kv.py ----


SNAPSHOT = "kv.pickle"


class ServerProcess(Program):
    """kv.py, on a free port unless it is given one."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        command: list[str] | None = None,
        port: int = 0,
        ready: bool = True,
        **popen: Any,
    ) -> None:
        super().__init__(command or ProgramTest.command, directory, port, *arguments, **popen)
        if ready:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        listening = re.compile(r"listening on http://.+:(\d+), process (\d+)\n")
        wait_until(lambda: self.has_ended() or listening.search(self.log), "the server is ready")
        match = listening.search(self.log)
        assert match, f"exit code {self.process.returncode}: {self.log}"
        self.port = int(match[1])

    def wait_for_log(self, pattern: str) -> None:
        try:
            wait_until(lambda: re.search(pattern, self.log), pattern)
        except AssertionError as error:
            raise AssertionError(f"{error}, but {self.log}") from None

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

    def address_space_bytes(self, which: int = 0) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[which]
        return int(pages) * resource.getpagesize()

    def resident_bytes(self) -> int:
        return self.address_space_bytes(1)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


on_linux = unittest.skipUnless(sys.platform == "linux", "asks Linux's /proc")


class KVTest(ProgramTest):
    """A test of kv.py itself, with its log, its flags and its files."""

    seconds = 4 * DEADLINE

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

    def failing_fsync(self) -> list[str]:
        return [sys.executable, "-c", FSYNC % self.top]

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
        self.assertEqual(server.stop(), 0, server.log)
        self.assertRegex(server.log, r"drained in [0-3]\.\d\d s, 0 given up")

    def assert_burns_no_core(self, server: ServerProcess) -> None:
        before = server.cpu_seconds()
        time.sleep(1)  # the time over which is measured
        self.assertLess(server.cpu_seconds() - before, 0.3)

    def assert_refuses_to_start(
        self, reason: str, *arguments: str, code: int = 1, **options: Any
    ) -> None:
        """One line on stderr, soon. Behind argparse's usage if the arguments are wrong."""
        server = self.start(*arguments, ready=False, **options)
        self.assertEqual(server.exit_code(), code, server.log)
        usage, _, line = server.log.rpartition("kv.py: ")
        self.assertEqual(usage.partition(" ")[0], "usage:" if code == 2 else "", server.log)
        self.assertEqual(line.count("\n"), 1, server.log)
        self.assertIn(reason, line)


def wait_until_read(server: ServerProcess, client: Client) -> None:
    """Until the server has taken everything that the client has sent."""
    ports = f":{server.port:04X} 0100007F:{client.socket.getsockname()[1]:04X} 01 "
    queues = re.compile(rf"{ports}\w+:(\w+)")

    def is_read() -> bool:
        match = queues.search(Path("/proc/net/tcp").read_text())
        return bool(match and not int(match[1], 16))

    wait_until(is_read, "all is read")


def found(*commands: str) -> bool:
    return all(map(shutil.which, commands))


def interpreters(*minors: int) -> list[str]:
    """Every CPython of these minor versions that can be found, one of each, oldest first."""
    found = {sys.version_info[1]: sys.executable}
    for minor in range(40):
        pyenv = Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3")
        for python in (*map(str, pyenv), shutil.which(f"python3.{minor}")):
            if python and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
                found.setdefault(minor, python)
    return [found[minor] for minor in minors or range(9, 40) if minor in found]


# ---- Snapshot ----


class CodeRunner:
    """Unpickled without care, creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def bad_snapshots(whole: bytes, trap: Path) -> Iterator[tuple[str, bytes, str]]:
    """What is wrong, the file, and the reason that the refusal gives."""
    yield "empty", b"", "checksum"
    yield "half", whole[: len(whole) // 2], "checksum"
    yield "no digest", pickle.dumps({"key": "value" * 10}, 4), "checksum"
    # The others have a digest that is right.
    good = b"\x80\x04}\x8c\x01a\x8c\x01bs."
    for what, pickled in (
        ("a list", pickle.dumps(["a"], 4)),
        ("a string", b"\x80\x04\x8c\x01a."),
        ("a number as a value", good.replace(b"\x8c\x01b", b"K\x01")),
        ("a number as a key", good.replace(b"\x8c\x01a", b"K\x01")),
        ("bytes as a value", good.replace(b"\x8c\x01b", b"C\x01b")),
        ("two pickles", good + good),
        ("no end", good[:-1]),
        ("bad UTF-8", b"\x80\x04}\x8c\x01a\x8c\x01\xffs."),
        ("a lone surrogate", b"\x80\x04}\x8c\x01a\x8c\x03\xed\xa0\x80s."),
        ("one in a key", b"\x80\x04}\x8c\x03\xed\xbf\xbf\x8c\x01as."),
        *((f"code, protocol {n}", pickle.dumps(CodeRunner(trap), n)) for n in range(6)),
    ):
        yield what, pickled + hashlib.sha256(pickled).digest(), "a dict of UTF-8 strings"


class SnapshotTest(KVTest):
    PAIRS: ClassVar = {"a": "1", "key:2": "päivää 🌍\n", "long": "x" * 300}

    def test_every_truncation_and_every_flipped_bit_is_refused(self) -> None:
        self.write_snapshot(self.PAIRS)
        whole = self.snapshot.read_bytes()
        damaged = [whole[:size] for size in range(len(whole))] + [whole + b"\0"]
        for bit in range(len(whole) * 8):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            damaged.append(bytes(flipped))
        for data in damaged:
            self.snapshot.write_bytes(data)
            self.assertRaises(ValueError, self.read_snapshot)

    def test_a_bad_snapshot_stops_the_start_and_stays_as_it_is(self) -> None:
        self.write_snapshot(self.PAIRS)
        trap = self.top / "trap"
        what_to_do = f"cannot load '{self.snapshot}' (move it away to start empty, or restore a"
        for what, data, reason in bad_snapshots(self.snapshot.read_bytes(), trap):
            with self.subTest(what):
                self.snapshot.write_bytes(data)
                self.assert_refuses_to_start(what_to_do)
                self.assertIn(reason, self.top.joinpath("data.log").read_text().splitlines()[-1])
                self.assertEqual(self.snapshot.read_bytes(), data)
                self.assertFalse(trap.exists(), "code from the file was run")

    def test_a_snapshot_that_is_truncated_while_it_is_loaded(self) -> None:
        """One line and exit code 1, or it was read before."""
        self.write_snapshot({f"key{number}": "x" * 1_000_000 for number in range(40)})
        whole, delay, codes = self.snapshot.read_bytes(), 0.15, set[int]()
        for _ in range(10):
            self.snapshot.write_bytes(whole)
            with self.start(ready=False) as server:
                time.sleep(delay)  # a moment in the load, sooner or later
                os.truncate(self.snapshot, 1_000_000)
                server.wait_for_log("cannot load .*\n$|^kv.py: 40 pair.s. .*\n$")
                if "40 pair(s)" in server.log:
                    server.send_signal(signal.SIGKILL)
                codes.add(server.exit_code())
                delay *= 1.15 if "cannot load" in server.log else 1 / 1.15
        self.assertIn(codes, ({1}, {1, -signal.SIGKILL}))

    @on_linux
    def test_a_snapshot_that_does_not_fit_into_memory_is_not_called_invalid(self) -> None:
        self.write_snapshot({f"key{number}": "x" * 10_000_000 for number in range(15)})
        self.assert_refuses_to_start("MemoryError", preexec_fn=limited("AS", 150_000_000))

    def test_the_format_is_a_pickle_and_its_digest(self) -> None:
        """People can read it with pickle, and what an earlier version has saved is loaded."""
        self.write_snapshot(self.PAIRS)
        with open(self.snapshot, "rb") as file:
            self.assertEqual(pickle.load(file), self.PAIRS)
        pickled = pickle.dumps(self.PAIRS, protocol=4)
        self.snapshot.write_bytes(pickled + hashlib.sha256(pickled).digest())
        self.assertEqual(self.start().read(self.PAIRS), self.PAIRS)

    def test_only_the_owner_can_read_it(self) -> None:
        """Whatever the umask, and whatever a killed save has left."""
        for umask in (0, 0o777) * 2:
            with self.start(preexec_fn=functools.partial(os.umask, umask)) as server:
                self.assertEqual(server.stop(), 0)
            self.assertEqual(stat.S_IMODE(self.directory.stat().st_mode), 0o700)
            self.assertEqual(stat.S_IMODE(self.snapshot.stat().st_mode), 0o600)
            self.assertEqual(os.listdir(self.directory), [SNAPSHOT])
            (self.directory / "kv.pickle.tmp").write_text("half")

    def test_every_python_reads_what_every_other_writes(self) -> None:
        pythons = interpreters()
        expected: dict[str, str] = {}
        for number, python in enumerate([*pythons, *reversed(pythons)]):
            with self.start(command=[python, str(HERE / "kv.py")]) as server:
                self.assertEqual(server.read(expected), expected)
                expected[f"key{number}"] = "🌍" * number + "."
                server.request("PUT", f"/kv/key{number}", expected[f"key{number}"].encode())
                self.assertEqual(server.stop(), 0)
        self.assertEqual(self.read_snapshot(), expected)


# ---- API: what goes beyond the challenge ----


class APITest(KVTest):
    def check_fields(self, answer: Answer) -> None:
        self.assertEqual(answer.fields["Content-Type"], "text/plain; charset=utf-8")
        self.assertEqual(answer.fields["Cache-Control"], "no-store")
        # What a web page needs to read an answer, and what keeps a value from being a script.
        self.assertNotRegex("".join(answer.fields), "Access-Control")
        self.assertEqual(answer.fields["X-Content-Type-Options"], "nosniff")
        date = r"^[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} [\d:]+ GMT$"
        self.assertRegex(answer.fields["Date"], date)

    def test_each_request_has_its_answer_with_the_same_fields(self) -> None:
        client = self.client(self.start())
        invalid = b"key contains invalid characters; valid are A-Z a-z 0-9 : _ . -\n"
        unknown = b"not found; try /health or /kv/KEY\n"
        long, largest, euros = "k" * 8000, b"x" * 10 * 1024 * 1024, "€".encode() * 3_000_000
        for method, path, body, status, expected in (
            ("GET", "/health", None, 200, b"ok\n"),
            ("PUT", "/kv/a:b_c.d-e?query", b"value", 200, b""),
            ("GET", "/kv/%61%3ab_c%2Ed-e", None, 200, b"value"),
            ("PUT", "/kv/..", "\ufeff\0".encode(), 200, b""),
            ("GET", "/kv/..", None, 200, "\ufeff\0".encode()),
            ("PUT", f"/kv/{long}", euros, 200, b""),
            ("GET", f"/kv/{long}", None, 200, euros),
            ("PUT", "/kv/large", largest, 200, b""),
            ("GET", "/kv/large", None, 200, largest),
            ("PUT", "/kv/a", b"\xff", 400, b"value must be UTF-8 text\n"),
            ("PUT", "/kv/a", None, 400, b"value cannot be empty\n"),
            *((m, p, b"x", 404, unknown) for m in ("GET", "PUT", "POST") for p in ("/", "/kv")),
            *(("GET", p, None, 404, unknown) for p in ("/KV/a", "//kv/a", "/clear/", "/kv%2Fa")),
            *(
                (method, f"/kv/a{key}", b"x", 400, invalid)
                for method in ("GET", "PUT", "DELETE")
                for key in ("/b", "+", "~", "%20", "%2F", "%C3%A4", "%FF", "%00", "%25", "%0A")
            ),
            ("PUT", "/kv/large", largest + b"x", 413, b"value too large\n"),  # and it is closed
        ):
            with self.subTest(f"{method} {path[:50]}"):
                answer = client.request(method, path, body)
                self.check(answer, status, expected)
                self.check_fields(answer)

    def test_a_field_that_changes_what_a_write_means_is_refused(self) -> None:
        """And changes nothing about a GET."""
        server = self.start()
        client = self.client(server)
        client.request("PUT", "/kv/kept", b"value")
        conditional = 501, b"conditional writes are not supported: there are no entity tags here\n"
        encoded = 415, b"Content-Encoding is not supported: send the value as it is\n"
        charset = 415, b"a value is UTF-8 text, not of another charset\n"
        partial = 400, b"Content-Range is not supported: send the whole value\n"
        refused = {
            "Content-Range: bytes 5-9/10": partial,
            "If-Match: *": conditional,
            "If-None-Match: *": conditional,
            "If-Unmodified-Since: Mon, 01 Jan 2024 00:00:00 GMT": conditional,
            "Content-Encoding: gzip": encoded,
            "content-encoding: identity, BR": encoded,
            "Content-Type: text/plain; charset=ISO-8859-1": charset,
            'Content-Type: text/plain;a=b ;Charset="utf-16"': charset,
        }
        for field, (status, text) in refused.items():
            with self.subTest(field):
                for method, path in (("PUT", "/kv/kept"), ("DELETE", "/kv/kept")):
                    self.check(server.request(method, path, b"other", field), status, text)
                self.check(server.request("DELETE", "/clear", None, field), status, text)
                self.check(client.request("GET", "/kv/kept", None, field), 200, b"value")
                self.check(client.request("HEAD", "/kv/kept", None, field), 200)
        for field in (
            "Content-Encoding: Identity",
            "Content-Type: text/plain; charset=UTF-8",
            'Content-Type: text/plain; charset="us-ascii"',
            "Content-Type: application/x-www-form-urlencoded",
            "Content-Type:",
            "If-Modified-Since: Mon, 01 Jan 2024 00:00:00 GMT",
            "Range: bytes=0-1",
        ):
            with self.subTest(field):
                self.check(client.request("PUT", "/kv/a", b"value", field), 200)
                self.check(client.request("GET", "/kv/a", None, field), 200, b"value")

    def test_other_methods_are_not_allowed_and_head_is_get_without_the_body(self) -> None:
        client = self.client(self.start())
        allowed = {"/kv/a": "GET, HEAD, PUT, DELETE", "/clear": "DELETE", "/health": "GET, HEAD"}
        for path, allow in allowed.items():
            for method in {"GET", "PUT", "DELETE", "POST", "OPTIONS", "get"} - set(
                allow.split(", ")
            ):
                answer = client.request(method, path, b"value")
                self.check(answer, 405, b"method not allowed\n")
                self.assertEqual(answer.fields["Allow"], allow)
            for _ in range(2):  # with a value, and without one
                head, get = client.request("HEAD", path), client.request("GET", path)
                self.assertEqual((head.status, head.body), (get.status, b""))
                self.assertEqual({**head.fields, "Date": ""}, {**get.fields, "Date": ""})
                client.request("PUT", "/kv/a", b"value")

    def test_the_documents_name_every_route(self) -> None:
        readme = (HERE / "README.md").read_text()
        for path, methods in kv.ROUTES.items():
            for method in set(methods) - {"HEAD"}:
                self.assertRegex(kv.__doc__ or "", rf" {method} +{path}")
                self.assertIn(f"| `{method} {path}", readme)


# ---- HTTP as the RFCs have it ----


class Rule(NamedTuple):
    """What is sent on a new connection, which answers come, and what then becomes of it."""

    section: str  # of RFC 9112, or of RFC 9110 if it says so
    answers: str  # status codes, then "open" or "closed"
    sent: bytes


def rules(section: str, answers: str, frame: bytes, *parts: bytes) -> list[Rule]:
    """A rule for each part, set into the frame."""
    return [Rule(section, answers, frame.replace(b"%", part)) for part in parts]


GET = b"GET /health HTTP/1.1\r\n"
PUT = b"PUT /kv/rule HTTP/1.1\r\nHost: x\r\n"
HOST = b"Host: x\r\n"
END = b"\r\n"
CHUNKED = PUT + b"Transfer-Encoding: chunked\r\n\r\n"
# Frames
LINE = b"%\r\n" + HOST + END
TARGET = b"GET % HTTP/1.1\r\n" + HOST + END
FOR_HOST = GET + b"Host: %\r\n\r\n"
FIELDS = GET + HOST + b"%\r\n\r\n"
LENGTH = PUT + b"Content-Length: %\r\n\r\nvalue"
CODING = PUT + b"Transfer-Encoding: %\r\n\r\n0\r\n\r\n"
EXPECT = b"Expect: 100-continue\r\n\r\n"

# fmt: off
RULES = [
    # The request line
    *rules("3", "400 closed", LINE, b"GET  /health HTTP/1.1", b"GET\t/health HTTP/1.1",
           b"GET /health HTTP/1.1 ", b" GET /health HTTP/1.1", b"GET /health", b"GET HTTP/1.1",
           b"GET /he alth HTTP/1.1", b"GET /a\ra HTTP/1.1",
           b"\x16\x03\x01\x02\x00\x01", b"G(T /health HTTP/1.1"),
    *rules("2.3", "400 closed", LINE, b"PRI * HTTP/2.0", b"GET /health HTTP/0.9",
           b"GET /health http/1.1", b"GET /health HTTP/1.10"),
    *rules("3", "414 closed", b"%GET /" + b"x" * 33_000, b"", END, END * 2),
    Rule("3", "200 open", END + b"GET /health?" + b"x" * (8192 - 21) + b" HTTP/1.1\r\n"
         + HOST + b"A: " + b"x" * (32_768 - 8192 - 14) + END * 2),  # the longest head
    *rules("2.2", "200 open", b"%" + GET + HOST + END, END, END * 2, END * 5),
    # What is no text is refused before the head is complete
    *rules("2.2", "400 closed", b"%", b"GET /health HTTP/1.1\n", b"GET /\x01", b"\0",
           b"\x16\x03\x01\x02", b"GET /a\x7f", GET + b"A: b\n", GET + b"A: b\0", GET + b"\n",
           GET + HOST + b"\n\n"),
    # The target
    *rules("3.2.1", "400 closed", TARGET, b"health", b"/kv/\xc3\xa4", b"/kv/\x01"),
    *rules("3.2.1", "400 open", TARGET, b"/kv/\"", b"/kv/#a", b"/kv/%", b"/kv/%4", b"/kv/%4g"),
    *rules("3.2.1", "200 open", TARGET, b"/health?a=/%zz?\"<>"),
    *rules("3.2.2", "200 open", TARGET, b"http://a:80/health", b"HTTPS://[::1]/health?q"),
    *rules("3.2.2", "400 closed", TARGET, b"http://a", b"http://a?/health", b"http:///health",
           b"http://", b"http://:80/health", b"http://u@a/health", b"ftp://a/health", b"a:80",
           b"*"),
    # Host. On a loopback address, a name is refused that somebody could have lead there.
    *rules("3.2", "400 closed", GET + b"%" + END, b"", HOST * 2, b" Host: x\r\n"),
    *rules("3.2", "400 closed", FOR_HOST, b"a/b", b"a b", b"u@a", b"a, b", b"a:b", b"%zz", b"a%4"),
    *rules("9110 7.4", "200 open", FOR_HOST, b"", b"localhost:8080", b"[::1]:8080", b"127.0.0.1",
           b"10.1.2.3:80", b"LOCALHOST", b"kv", b":80", b"localhost.", b"localhost.:80"),
    *rules("9110 7.4", "421 closed", FOR_HOST, b"attacker.example", b"a.b:8080", b"localhost.a.b",
           b"a.localhost", b"1.2.3.4.a", b"%41", b"a.localhost.b"),
    Rule("3.2.2", "421 closed", b"GET http://a.b/health HTTP/1.1\r\n" + HOST + END),
    Rule("9110 7.4", "421 closed", LENGTH.replace(b"Host: x", b"Host: a.b").replace(b"%", b"5")),
    *rules("3.2", "400 closed", b"GET /health HTTP/1.0\r\n%\r\n", HOST * 2, b"Host: a b\r\n"),
    # Field lines
    *rules("5.1", "400 closed", FIELDS, b"A : b", b"A", b": b", b"A(: b", b"\xc3\xa4: b"),
    *rules("5.1", "200 open", GET + b"%\r\n\r\n", b"Host:x", b"hOST: x", b"Host: \t x \t "),
    *rules("5.2", "400 closed", FIELDS, b"A: b\r\n c", b"A: b\r\n\tc"),
    *rules("9110 5.5", "400 closed", FIELDS, b"A: b\rc", b"A: b\nc: d", b"A: b\0c", b"A: b\x1bc",
           b"A: b\x7fc"),
    *rules("9110 5.5", "200 open", FIELDS, b"A: b\xe4c\td", b"A:", b"A: b\r\n" * 98 + b"A: b",
           b"A: " + b"b" * 30_000),
    Rule("9110 5.4", "431 closed", FIELDS.replace(b"%", b"A: " + b"b" * 33_000)),
    Rule("9110 5.4", "431 closed", GET + HOST + b"A: " + b"b" * 42_000),
    # Content-Length
    *rules("6.2", "200 open", LENGTH, b"5", b"0005", b"5\r\nContent-Length: 5"),
    *rules("6.3", "400 closed", LENGTH, b"+5", b"-5", b"0x5", b"1_0", b"5.0", "٥".encode(), b"\xb2",
           b"", b"5, 5", b"5\r\nContent-Length: 6"),
    *rules("9110 8.6", "413 closed", LENGTH, b"10485761", b"9" * 1000),
    *rules("9110 8.6", "200 open", b"%\r\nHost: x\r\nContent-Length: 5\r\n\r\nvalue",
           b"GET /health HTTP/1.1", b"DELETE /kv/a HTTP/1.1"),
    Rule("6.3", "405 open",
         b"POST /kv/a HTTP/1.1\r\nHost: x\r\nContent-Length: 33\r\n\r\n" + GET + HOST + END),
    # Transfer-Encoding
    *rules("6.1", "400 closed", CODING, b"chunked\r\nContent-Length: 5", b"\x0bchunked"),
    *rules("6.1", "501 closed", CODING, b"gzip", b"gzip, chunked", b"identity", b"xchunked", b"",
           b"chunked\r\nTransfer-Encoding: chunked"),
    Rule("6.1", "400 closed", CODING.replace(b"1.1", b"1.0").replace(b"%", b"chunked")),
    *rules("6.1", "400 open", CODING, b"chunked", b"CHUNKED"),  # and the value is empty
    # Chunks
    *rules("7.1", "200 open", CHUNKED + b"%\r\n0\r\n\r\n", b"5\r\nvalue\r\nA\r\n0123456789",
           b"0001\r\na", b"0" * 16 + b"1\r\na", b'1;a\r\na\r\n1 ; b = "c\\"; d" ;e=f\r\nb'),
    *rules("7.1", "405 open", CHUNKED.replace(b"PUT", b"POST") + b"1\r\na\r\n0\r\n\r\n"),
    *rules("7.1", "400 closed", CHUNKED + b"%\r\n0\r\n\r\n", b"\r\na", b"g\r\na", b"0x1\r\na",
           b"+1\r\na", b"-1\r\na", b" 1\r\na", b"1 \r\na", b"1\r\nab", b"3\r\na", b"1\na",
           b"1 a\r\na", b"1;a=\rb\r\na", b"1;a\nb\r\na", b"1;a=\0b\r\na"),
    Rule("7.1", "400 closed", CHUNKED + b"1\r\na\n0\r\n\r\n"),
    *rules("7.1", "413 closed", CHUNKED + b"%", b"F" * 5000 + END, b"A00001\r\n",
           b"A00000\r\n" + b"x" * 0xA00000 + b"\r\n1\r\n"),
    *rules("7.1", "431 closed", CHUNKED + b"%", b"1;" + b"a" * 33_000 + b"\r\na", b"1" * 33_000,
           b"0\r\nA: " + b"b" * 33_000 + END * 2),
    Rule("7.1", "431 closed", CHUNKED + b"0\r\n" + b"A: b\r\n" * 101 + END),
    # A long line, of which its end may come later
    Rule("7.1", "200 open", PUT + b"A: " + b"x" * 8124 + END + b"Transfer-Encoding: chunked\r\n\r\n"
         + b"1;a=" + b"b" * 8186 + END + b"a\r\n0\r\n\r\n"),
    *rules("7.1.2", "200 open", CHUNKED + b"1\r\na\r\n0\r\n%\r\n\r\n", b"A: b", b"A: b\r\nC: d"),
    *rules("7.1.2", "400 closed", CHUNKED + b"1\r\na\r\n0\r\n%\r\n\r\n", b"A : b", b"A: b\r\n c"),
    # What happens to the connection
    *rules("9.3", "200 closed", FIELDS, b"Connection: close", b"Connection: a,\tClose ,b",
           b"Connection: a\r\nConnection: close", b"Connection: keep-alive, close"),
    *rules("9.3", "200 closed", b"GET /health HTTP/1.0\r\n%\r\n", b"", HOST),
    Rule("9.3", "200 open", b"GET /health HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"),
    Rule("9.3.2", "200 " * 50 + "open", (GET + HOST + END) * 50),
    Rule("9.3.2", "200 200 200 open", LENGTH.replace(b"%", b"5") * 2 + GET + HOST + END),
    Rule("9.3.2", "200 400 closed", GET + HOST + END + b"?\r\n\r\n" + GET + HOST + END),
    # Expect
    *rules("9110 10.1.1", "100", PUT + b"%" + EXPECT, b"Content-Length: 1\r\n",
           b"Transfer-Encoding: chunked\r\n"),
    Rule("9110 10.1.1", "200 open", PUT + b"Content-Length: 1\r\n" + EXPECT + b"a"),
    *rules("9110 10.1.1", "200 open", FIELDS, b"Expect: 100-continue", b"Expect:", b"Expect: cake",
           b"Expect: 100-continue,,100-continue", b"Expect: 100-continue\r\nExpect: cake"),
    Rule("9110 10.1.1", "400 closed",
         b"PUT /kv/a HTTP/1.0\r\nContent-Length: 0\r\nExpect: 100-continue\r\n\r\n"),
]
# fmt: on


class HTTPTest(KVTest):
    def test_each_rule_has_its_outcome(self) -> None:
        server = self.start()
        for rule in RULES:
            self.check_rule(server, rule)
        self.assertEqual(server.log.count("\n"), 1, server.log)
        wait_until(lambda: sys.platform != "linux" or server.descriptors() <= 8, "all are closed")

    def check_rule(self, server: ServerProcess, rule: Rule) -> None:
        with self.subTest(rule.section, sent=rule.sent[-200:]), server.connect() as client:
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
        """Among others, the last empty line of a head comes by itself."""
        server = self.start_with("kv.RECEIVE_SIZE = 1")
        for rule in RULES:
            # Whether the body is on the way is not known before its first byte is read.
            if len(rule.sent) < 4000 and not rule.sent.endswith(EXPECT + b"a"):
                self.check_rule(server, rule)

    def test_another_name_in_the_request_is_for_servers_that_others_can_reach(self) -> None:
        text = b"misdirected request: here the host is localhost or an IP address\n"
        for host, status, body in (("127.0.0.1", 421, text), ("0.0.0.0", 200, b"ok\n")):
            with self.start(f"--host={host}") as server, server.connect() as client:
                client.send(request("GET", "/health", host="a.example"))
                self.check(client.receive(), status, body)

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
        server = self.start()
        size = 15_000_000  # more than fits into the sockets' buffers
        for pause in (0, 0, 0, 0, 4 * kv.TICK):
            with server.connect() as client:
                client.send(request("PUT", "/kv/a", None, f"Content-Length: {size}"))
                client.send(b"x" * (size // 2))
                time.sleep(pause)
                client.send(b"x" * (size - size // 2))
                self.assertEqual(client.receive().status, 413)
                self.assertTrue(client.is_closed())

    def test_line_ends_of_lf_are_told_what_is_wrong(self) -> None:
        client = self.client(self.start())
        client.request("HEAD", "/health")  # unlike the answer to this, the refusal has a body
        client.send(b"GET /health HTTP/1.1\n")
        text = b"malformed request: lines of text must end with CR LF\n"
        self.check(client.receive(), 400, text)

    @on_linux
    def test_no_head_takes_long_to_refuse(self) -> None:
        """A search that goes back quadratically would stop all threads for seconds."""
        server, n = self.start(), 8_000
        line, head = b"GET /%\x01\r\n\r\n", GET + HOST + b"%\x01\r\n\r\n"
        frames: dict[bytes, tuple[bytes, ...]] = {
            line: (b"a", b"%41", b"?a"),
            b"GET http://%\r\n\r\n": (b"a", b"%41", b":1"),
            b"% / HTTP/9.9\r\n\r\n": (b"G",),
            head.replace(b"%", b"A:%"): (b" ", b"\t", b"a"),
            head: (b"a", b"a:", b": ", b"a\r\n"),
            GET + b"Host:%\x01\r\n\r\n": (b" ", b"a", b"%41", b":"),
            CHUNKED + b"1%\x01\r\n": (b" ", b";a", b"; a =b ", b';a="', b';a="\\', b"1", b";a=b"),
        }
        for frame, runs in frames.items():
            for run in runs:
                with server.connect() as client:
                    before = server.cpu_seconds()
                    client.send(frame.replace(b"%", run * (n // len(run))))
                    self.assertIn(client.receive().status, (400, 413, 414, 431))
                    self.assertLess(server.cpu_seconds() - before, 0.5, (frame, run))

    def test_hostile_bytes_stop_nothing(self) -> None:
        with self.start() as server:
            fuzz(server, 1500, seed=1)
            self.assertEqual(server.stop(), 0)
            self.assertNotIn("kv.py: error", server.log)

    def test_an_upload_that_is_fast_enough_may_take_longer(self) -> None:
        """Also if each of its chunks arrives at once."""
        server = self.start_with("kv.STALL_SECONDS = 1.0")
        plain, chunked = clients = [self.client(server) for _ in range(2)]
        plain.send(request("PUT", "/kv/a", None, "Content-Length: 10000"))
        chunked.send(CHUNKED)
        for _ in range(10):
            time.sleep(0.2)  # the rate that is tested: 5 KB/s
            plain.send(b"x" * 1000)
            chunked.send(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        chunked.send(b"0\r\n\r\n")
        self.assertEqual([client.receive().status for client in clients], [200, 200])

    def test_slow_requests_end_after_their_time(self) -> None:
        """A head or a body that comes byte by byte; a body that stalls after much of it."""
        server = self.start_with("kv.STALL_SECONDS = 3.0")
        head, dribble, stall = clients = [self.client(server) for _ in range(3)]
        stall.send(put("slow", "x" * 100_000)[:-1])
        dribble.send(request("PUT", "/kv/slow", None, "Content-Length: 1000"))
        head.send(b"GET /")
        for number in range(24):
            for client in (head, dribble):
                with contextlib.suppress(OSError):
                    client.send(b"x")
            time.sleep(0.25)  # the rate that is too slow
            ready = select.select([client.socket for client in clients], [], [], 0)[0]
            self.assertFalse(ready and number < 8)
        self.assertEqual(len(ready), 3)
        self.assertEqual([client.receive().status for client in clients], [408] * 3)


def fuzz(server: ServerProcess, count: int, seed: int) -> None:
    """Send mutated requests in random pieces, some cut off. Each must be answered or closed."""
    chance = random.Random(seed)
    valid = [rule.sent for rule in RULES if len(rule.sent) < 1000]
    parts = [b"", b"\r\n", *(bytes([byte]) for byte in b"\r\n\0 :\xff0%"), b"Content-Length: 3\r\n"]
    for number in range(count):
        data = bytearray(b"".join(chance.choices(valid, k=chance.randint(1, 3))))
        for _ in range(chance.randint(0, 4)):  # replace something, or repeat it
            at, size = chance.randrange(len(data) + 1), chance.choice((0, 1, 1, 30))
            again = bytes(data[at : at + chance.randint(1, 30)])
            data[at : at + size] = chance.choice((*parts, again, chance.randbytes(1)))
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


# ---- Server: many connections ----


class ServerTest(KVTest):
    @on_linux
    def test_more_clients_than_descriptors(self) -> None:
        """Answers say close while others wait, and so each client comes to its turn."""
        server = self.start(preexec_fn=limited("NOFILE", 64))
        before, clients = server.descriptors(), [self.client(server) for _ in range(80)]
        wait_until(lambda: server.descriptors() > before + 38, "it is full")
        answers = [client.request("GET", "/health") for client in clients]
        closing = [answer for answer in answers if answer.fields.get("Connection") == "close"]
        self.assertGreater(len(closing), 10)
        self.assertEqual({answer.status for answer in answers}, {200})

    @on_linux
    def test_9_000_busy_clients(self) -> None:
        allow_descriptors(10_100)
        server = self.start()
        loops = [Loop(put(f"{n}-{m}", "value") for m in range(3)) for n in range(9_000)]
        self.assertEqual(keep_alive(server.port, loops).answers, {"200": 27_000})
        self.assertLess(server.threads(), kv.Workers.MAX_THREADS + 5)

    @on_linux
    def test_15_000_idle_connections_are_cheap_and_do_not_delay_the_exit(self) -> None:
        server = self.start()
        with contextlib.ExitStack() as clients:
            self.assertLess(idle_bytes(server, clients), 3.5 * 1024)
            self.stop_at_once(server)


def idle_bytes(server: ServerProcess, clients: contextlib.ExitStack) -> float:
    """Have 15,000 idle connections; return how much memory one takes."""
    allow_descriptors(20_000)
    number = min(15_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500)
    before = 0
    for count in range(number):
        client = clients.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        client.send(request("GET", "/health"))
        client.recv(1000)
        if count == 1000:
            before = server.resident_bytes()
    assert server.descriptors() > number
    return (server.resident_bytes() - before) / (number - 1000)


class IdleTest(KVTest):
    """Idle connections, and how requests come to a worker."""

    def test_a_connection_that_has_been_silent_makes_room_for_a_new_one(self) -> None:
        changes = "kv.Server.IDLE_SECONDS_FULL = 1.0"
        server = self.start_with(changes, preexec_fn=limited("NOFILE", 64))
        silent = [self.client(server) for _ in range(60)]
        self.assertEqual(server.request("PUT", "/kv/a", b"x").status, 200)
        # Not always the first: they are parked in another order than they have connected.
        self.assertTrue(any(sees_the_end(client.socket) for client in silent))

    def test_who_sends_at_the_sight_of_the_first_end_is_answered(self) -> None:
        """600 connections go idle together, and so they are closed together."""
        server = self.start_with("kv.Server.IDLE_SECONDS = 1.0")
        clients = []
        for _ in range(600):
            clients.append(self.client(server))
            self.assertEqual(clients[-1].request("GET", "/health").status, 200)
        self.assertTrue(clients[0].is_closed())
        late = []
        for client in reversed(clients[-40:]):
            if not sees_the_end(client.socket):
                client.send(request("GET", "/health"))
                late.append(client)
        self.assertGreater(len(late), 0)
        self.assertEqual([client.receive().status for client in late], [200] * len(late))

    def test_the_number_of_a_closed_connection_is_that_of_another(self) -> None:
        """The selector must have forgotten it."""
        server = self.start_with("kv.Server.IDLE_SECONDS = 0.2")
        for _ in range(4):
            with server.connect() as client:
                for pause in (0.0, 0.15, 0.15):
                    time.sleep(pause)
                    self.assertEqual(client.request("GET", "/health").status, 200)
                self.assertTrue(client.is_closed())
        self.assertNotIn("error", server.log)

    def test_connections_that_send_nothing_hold_no_worker_while_others_wait(self) -> None:
        server = self.start_with("kv.Workers.MAX_THREADS = 1")
        for _ in range(20):
            self.client(server)
        begin = time.monotonic()
        self.assertEqual(server.request("GET", "/health").status, 200)
        self.assertLess(time.monotonic() - begin, 10 * kv.TICK)

    def test_a_client_that_sends_ahead_lets_others_have_its_worker(self) -> None:
        """Its next request is in our buffer, where no selector finds it."""
        server = self.start_with("kv.Workers.MAX_THREADS = 1")
        ahead = [self.client(server) for _ in range(3)]
        for client in ahead:
            client.send(request("GET", "/kv/a") * 3000 + put("last", "value"))
        self.assertEqual(server.get("last"), None)
        for client in ahead:
            answers = collections.Counter(client.receive().status for _ in range(3001))
            self.assertEqual(answers, {404: 3000, 200: 1})

    @on_linux
    def test_more_stalled_uploads_than_workers(self) -> None:
        """Others are served when the first is given up, and a shutdown saves in time."""
        server = self.start_with("kv.Workers.MAX_THREADS = 4; kv.STALL_SECONDS = 2.0")
        stalled = [self.client(server) for _ in range(6)]
        for client in stalled:
            client.send(put("stalled", "value")[:-1])
        self.assertEqual(server.request("PUT", "/kv/a", b"1").status, 200)
        self.assertEqual(server.threads(), 2 + 4)  # main thread, acceptor; workers
        self.assertEqual(stalled[0].receive().status, 408)
        self.assertEqual(server.stop(), 0)
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    @on_linux
    def test_a_parked_connection_that_is_reset_burns_no_core(self) -> None:
        server = self.start()
        with server.connect() as client:
            client.request("GET", "/health")
            time.sleep(2 * kv.TICK)
            linger = struct.pack("ii", 1, 0)  # so that the close is a reset
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.assert_burns_no_core(server)
        self.assertNotIn("error", server.log)


class ScarcityTest(KVTest):
    """Too few descriptors, too little memory or time."""

    def test_raises_the_soft_limit_of_descriptors(self) -> None:
        allow_descriptors(1000)
        limit = resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        server = self.start(preexec_fn=lambda: resource.setrlimit(*limit))
        clients = [self.client(server) for _ in range(300)]
        for client in clients * 2:
            self.assertEqual(client.request("GET", "/health").status, 200)

    @on_linux
    def test_a_full_server_burns_no_core_and_stops_with_a_save(self) -> None:
        server = self.start(preexec_fn=limited("NOFILE", 256))
        server.request("PUT", "/kv/a", b"1")
        clients = [self.client(server) for _ in range(300)]
        most = 256 - kv.Server.RESERVED_DESCRIPTORS - 5
        wait_until(lambda: server.descriptors() > most, "the limit is reached")
        self.assert_burns_no_core(server)
        server.send_signal(signal.SIGUSR1)
        server.wait_for_log("saved 1 pair")
        self.stop_at_once(server)
        self.assertTrue(all(client.is_closed() for client in clients))
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    @on_linux
    def test_an_exactly_full_server_stops(self) -> None:
        """Nobody is in the backlog: then `accept` is not tried, and is not needed."""
        server = self.start(preexec_fn=limited("NOFILE", 64))
        listener = max(
            int(path.name)
            for path in Path(f"/proc/{server.process.pid}/fd").iterdir()
            if str(path.readlink()).startswith("socket:")
        )
        most, before = 64 - (listener + 1) - kv.Server.RESERVED_DESCRIPTORS, server.descriptors()
        clients = [self.client(server) for _ in range(most)]
        wait_until(lambda: server.descriptors() == before + len(clients), "all are accepted")
        time.sleep(2 * kv.TICK)  # until all are parked
        self.assertEqual(server.stop(), 0)
        self.assertRegex(server.log, r"drained in [01]\.\d\d s, 0 given up")

    @on_linux
    def test_running_out_of_descriptors_burns_no_core_and_ends_with_a_save(self) -> None:
        """The limit is lowered, or others have used up the descriptors."""
        server = self.start()
        server.limit("NOFILE", server.descriptors() + 10)
        clients = [self.client(server) for _ in range(50)]
        time.sleep(0.2)
        self.assert_burns_no_core(server)
        for client in clients:
            client.__exit__()
        self.assertEqual(server.stop(), 0)

    @on_linux
    def test_memory_does_not_grow_with_requests(self) -> None:
        """Though what the header fields mean is remembered."""
        server, sizes = self.start(), []
        with server.connect() as client:
            for number in range(1500):
                client.request("PUT", "/kv/a", b"x" * 100, f"X-Large: {number:020000}")
                sizes.append(server.resident_bytes())
        self.assertLess(sizes[-1] - sizes[200], 1_500_000)

    @on_linux
    def test_an_idle_connection_keeps_neither_its_last_value_nor_its_head(self) -> None:
        # So that memory which is not needed any more goes back to the system at once.
        server = self.start(env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "10000"})
        before = server.resident_bytes()
        for _ in range(20):
            self.client(server).request("PUT", "/kv/a", b"x" * 10_000_000)
        wait_until(lambda: server.resident_bytes() - before < 15_000_000, "all but one are gone", 5)
        server.request("DELETE", "/clear")
        for _ in range(300):
            client = self.client(server)
            for _ in range(2):
                client.request("GET", "/health", None, "Cookie: " + "x" * 30_000)
        wait_until(lambda: server.resident_bytes() - before < 9_000_000, "the heads are gone", 5)

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
    def test_after_a_spell_without_memory_everybody_is_served(self) -> None:
        """A worker may fail anywhere; no connection may be counted for good."""
        server = self.start()
        server.limit("AS", server.address_space_bytes() + 30_000_000)
        sizes = itertools.cycle((10, 1000, 50_000, 400_000))
        failed, begin = r"\nkv\.py: error: MemoryError\(.*\) in \w+, line \d+\n", time.monotonic()
        while time.monotonic() < begin + 2 or not re.search(failed, server.log):
            loops = [Loop(put(f"{n}", "x" * next(sizes)) for _ in range(5)) for n in range(150)]
            keep_alive(server.port, loops, 5)
        server.limit("AS", resource.RLIM_INFINITY)
        clients = [self.client(server) for _ in range(50)]
        for client in clients:
            client.send(request("GET", "/health"))
        for client in clients:
            self.assertEqual(client.receive().status, 200)
        self.stop_at_once(server)

    def test_a_mistake_in_a_request_costs_one_connection(self) -> None:
        server = self.start_with("kv.ROUTES['/health']['GET'] = lambda *_: 1 / 0")
        for _ in range(2):
            client = self.client(server)
            client.send(request("GET", "/health"))
            self.assertTrue(client.is_closed())
        server.wait_for_log(
            r"kv.py: error: ZeroDivisionError\('division by zero'\) in <lambda>, line 1"
        )
        self.assertEqual(server.request("PUT", "/kv/a", b"1").status, 200)
        self.stop_at_once(server)

    @on_linux
    def test_stays_on_one_core_if_there_is_an_interpreter_lock(self) -> None:
        cores = os.sched_getaffinity(0)
        for has_lock, expected in ((True, 1), (False, len(cores))):
            server = self.start_with(f"kv.sys._is_gil_enabled = lambda: {has_lock}")
            self.assertEqual(len(os.sched_getaffinity(server.process.pid)), expected)
            server.__exit__()

    def test_the_start_does_not_ask_the_name_service(self) -> None:
        """Which can take seconds to say that it does not know."""
        self.start_with("kv.socket.getfqdn = lambda *_: 1 / 0")

    @on_linux
    def test_who_does_not_read_is_given_up_and_who_reads_slowly_gets_the_whole_value(self) -> None:
        server = self.start_with("kv.STALL_SECONDS = 1.0")
        value = b"0123456789" * 1_000_000
        slow = self.client(server)
        slow.request("PUT", "/kv/a", value)
        before = server.descriptors()
        with server.connect() as client:
            client.send(request("GET", "/kv/a") * 3)  # more than fits into the sockets' buffers
            slow.send(request("GET", "/kv/a") * 3)
            wait_until(lambda: server.descriptors() > before, "it is accepted")
            while server.descriptors() > before:
                self.assertTrue(slow.file.read(100_000))
                time.sleep(0.02)
        self.assertEqual(server.get("a"), value.decode())


# ---- The shutdown ----


# Has fsync fail, of files or of directories, as soon as a file says so and with which number.
FSYNC = """
import os, pathlib, stat, kv
def fsync(descriptor, real=os.fsync):
    what = "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
    number = pathlib.Path("%s", "fail-" + what)
    if number.exists():
        raise OSError(int(number.read_text()), os.strerror(int(number.read_text())))
    real(descriptor)
os.fsync = fsync
kv.main()
"""


# Those that end a process that does not ask for them, less those of a crash.
STOPS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR2", "SIGVTALRM", "SIGPROF", "SIGXCPU"]
STOPS += ["SIGPWR", "SIGIO"] if sys.platform == "linux" else []
# Those that the system or Python ignores.
NO_STOPS = ["SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH", "SIGPIPE", "SIGXFSZ"]


def with_signals(option: str) -> list[str]:
    """A command that starts kv.py with signals ignored, as nohup does, or not."""
    return ["env", option, *ProgramTest.command]


class ShutdownTest(KVTest):
    def test_each_signal_that_would_end_the_process_saves(self) -> None:
        numbers = {name: int(signal.Signals[name]) for name in STOPS}
        if sys.platform == "linux":
            numbers[f"signal {signal.SIGRTMIN + 3}"] = signal.SIGRTMIN + 3
        for name, number in numbers.items():
            with self.subTest(name), self.start(command=with_signals("--default-signal")) as server:
                server.request("PUT", f"/kv/{number}", b"value")
                self.assertEqual(server.stop(number), 0)
                self.assertIn(f"\nkv.py: {name}\nkv.py: drained ", server.log)
                self.assertRegex(server.log, r"\nkv\.py: saved \d+ pair\(s\) in \d+\.\d+ s\n$")
        self.assertEqual(set(self.read_snapshot()), {str(number) for number in numbers.values()})

    def test_other_signals_do_nothing_and_sigterm_always_stops(self) -> None:
        """Also a signal that was ignored at the start, but SIGTERM."""
        ignored = ["SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR2"]
        option = f"--ignore-signal={','.join([*ignored, 'SIGTERM'])}"
        server = self.start(command=with_signals(option))
        for name in ignored + NO_STOPS:
            server.send_signal(signal.Signals[name])
        self.assertEqual(server.request("PUT", "/kv/a", b"1").status, 200)
        self.assertEqual(server.stop(), 0)
        self.assertRegex(server.log, r"process \d+\nkv\.py: SIGTERM\n")

    @on_linux
    def test_a_second_signal_ends_the_waiting(self) -> None:
        """Not in the first second, and not SIGHUP, which systemd may send behind SIGTERM."""
        server = self.start(command=with_signals("--default-signal"))
        first, second = self.begin_upload(server, "a"), self.begin_upload(server, "b")
        third = self.begin_upload(server, "c")
        server.send_signal()
        wait_until(lambda: not listens(server.port), "new clients are refused")
        server.send_signal()
        first.send(b"e")
        self.assertEqual(first.receive().status, 200)
        server.wait_for_log(
            r"waiting for 2 connection\(s\), 1[01] s at most; SIGTERM or Ctrl-C ends"
        )
        server.send_signal(signal.SIGHUP)
        server.wait_for_log("saved 1 pair")  # in case SIGKILL comes next
        self.assertEqual(self.read_snapshot(), {"a": "value"})
        time.sleep(1.2)  # longer than it takes to be noticed
        second.send(b"e")
        self.assertEqual(second.receive().status, 200)
        server.send_signal()
        self.assertEqual(server.exit_code(), 0)
        self.assertTrue(third.is_closed())
        self.assertRegex(server.log, r"drained in [1-4]\.\d\d s, 1 given up\n")
        self.assertEqual(self.read_snapshot(), {"a": "value", "b": "value"})

    @on_linux
    def test_stalled_clients_on_a_full_disk_still_end_in_a_save(self) -> None:
        """All that can go wrong at once, and the process still ends by itself and has saved.

        Clients stall in a head, in a body and while they are answered. Nothing can be written until
        the waiting is over. The last save takes a second, in which a write comes too late.
        """
        changes = "save = kv.write_pairs; kv.write_pairs = lambda *_: (kv.time.sleep(1), save(*_))"
        server = self.start_with(changes, "--graceful-timeout=6")
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
        server.wait_for_log(r"cannot save: \[Errno 27\] File too large")
        server.wait_for_log("4 given up")
        server.limit("FSIZE", resource.RLIM_INFINITY)
        late.send(b"e" + put("later", "value"))
        for connection in (None, "close"):
            answer = late.receive()
            self.assertEqual((answer.status, answer.body), (503, b"shutting down\n"))
            self.assertEqual(answer.fields.get("Connection"), connection)
        self.assertEqual(server.exit_code(), 0)
        self.assertEqual(set(self.read_snapshot()), {"a", "large"})
        self.assertEqual(os.listdir(self.directory), [SNAPSHOT])

    def test_whatever_happens_in_the_drain_there_is_a_last_save(self) -> None:
        for mistake in ("Server.stop", "Server.wait_until_drained", "Server._close_idle"):
            changes = f"kv.{mistake} = lambda *_: 1 / 0"
            with self.start_with(changes, "--graceful-timeout=1") as server:
                with server.connect() as client:
                    client.request("PUT", f"/kv/{mistake}", b"1")
                    time.sleep(2 * kv.TICK)  # until it is parked
                    self.assertEqual(server.stop(), 0)
                self.assertIn(mistake, self.read_snapshot())
                self.assertIn("error: ZeroDivisionError", server.log)


class DrainTest(KVTest):
    """What becomes of the connections when the server stops."""

    @on_linux
    def test_an_empty_line_behind_a_body_leaves_the_connection_idle(self) -> None:
        server = self.start()
        for with_the_body, later in ((b"\r\n", b""), (b"", b"\r\n"), (b"\r\n\r\n", b"")):
            client = self.client(server)
            client.send(put("a", "1") + with_the_body)
            self.assertEqual(client.receive().status, 200)
            client.send(later)
            wait_until_read(server, client)
        self.stop_at_once(server)

    @on_linux
    def test_what_came_with_a_request_is_served_before_the_close(self) -> None:
        """But an empty line is not one more request."""
        server = self.start()
        one, two = self.client(server), self.client(server)
        for client in (one, two):
            client.send(GET + HOST)
            wait_until_read(server, client)
        server.send_signal()
        wait_until(lambda: not listens(server.port), "new clients are refused")
        one.send(END + END)
        two.send(END + put("a", "1"))
        self.assertEqual(one.receive().fields["Connection"], "close")
        answers = [two.receive() for _ in range(2)]
        self.assertEqual([answer.status for answer in answers], [200, 200])
        self.assertEqual([answer.fields.get("Connection") for answer in answers], [None, "close"])
        self.assertEqual(server.exit_code(), 0)
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    def test_the_backlog_is_served_also_when_there_are_no_descriptors(self) -> None:
        """And a full server goes on saying close."""
        server = self.start(preexec_fn=limited("NOFILE", 40))
        idle = [self.client(server) for _ in range(40 - (5 + 1) - kv.Server.RESERVED_DESCRIPTORS)]
        for client in idle:
            client.request("GET", "/health")
        waiting = [self.client(server) for _ in range(60)]  # which stay when they are answered
        for number, client in enumerate(waiting):
            client.send(put(f"{number}", "value"))
        time.sleep(0.5)  # until all are idle
        server.send_signal()
        answers = [client.receive() for client in waiting]
        self.assertEqual([answer.status for answer in answers], [200] * len(waiting))
        self.assertEqual({answer.fields["Connection"] for answer in answers}, {"close"})
        self.stop_at_once(server)
        self.assertEqual(len(self.read_snapshot()), len(waiting))


class LastSaveTest(KVTest):
    """It depends on nothing that clients or the system can take away."""

    @on_linux
    def test_clients_have_used_up_the_memory(self) -> None:
        """To the last kilobyte, with a dict of which no copy would fit into the reserve."""
        stored = {f"key{number}": "value" for number in range(400_000)}
        self.write_snapshot(stored)
        # Else each thread has address space that the limit does not reach.
        server = self.start(env={**os.environ, "MALLOC_ARENA_MAX": "1"})
        server.limit("AS", server.address_space_bytes() + 20_000_000)
        for size in (1_000_000, 100_000, 10_000, 1_000, 100, 10):
            with contextlib.suppress(OSError), server.connect() as client:
                for number in itertools.count():
                    key, value = f"{size}-{number}", "x" * size
                    client.send(put(key, value))
                    self.assertEqual(client.receive().status, 200)
                    stored[key] = value
        self.assertEqual(server.stop(), 0, server.log)
        saved = self.read_snapshot()
        # One may have been stored without an answer, for which there was no memory.
        self.assertEqual({key: saved.get(key) for key in stored}, stored)

    @unittest.skipUnless(found("bindfs", "umount"), "needs bindfs")
    def test_a_file_system_that_was_mounted_anew_under_the_same_path(self) -> None:
        for directory in ("source", "data"):
            (self.top / directory).mkdir()
        self.addCleanup(self.unmount)
        with self.bindfs():
            server = self.start()
            server.request("PUT", "/kv/a", b"1")
        self.unmount()
        with self.bindfs():
            self.assertEqual(server.stop(), 0, server.log)
        self.assertEqual(kv.read_pairs(str(self.top / "source" / SNAPSHOT)), {"a": "1"})

    @contextlib.contextmanager
    def bindfs(self) -> Iterator[None]:
        """A file system that dies at the end of the block."""
        command = ["bindfs", "-f", str(self.top / "source"), str(self.directory)]
        with running(command, stderr=subprocess.DEVNULL) as process:
            wait_until(lambda: self.directory.is_mount() or process.poll(), "it is mounted")
            if process.returncode:
                self.skipTest("may not mount a file system")
            yield

    def unmount(self) -> None:
        subprocess.run(["umount", "-lq", str(self.directory)], stderr=subprocess.DEVNULL)

    def test_a_file_system_that_cannot_sync_a_directory(self) -> None:
        for number in (errno.EINVAL, errno.ENOTSUP):
            (self.top / "fail-directory").write_text(str(number))
            with self.start(command=self.failing_fsync(), cwd=HERE) as server:
                server.request("PUT", "/kv/a", b"1")
                self.assertEqual(server.stop(), 0)
                self.assertNotIn("cannot save", server.log)

    def test_the_temporary_file_cannot_be_replaced(self) -> None:
        """What would make a save fail is found at the start."""
        temporary = self.directory / "kv.pickle.tmp"
        temporary.mkdir(parents=True)
        self.assert_refuses_to_start(f"'{temporary}'")


class SaveTest(KVTest):
    """A save without a stop."""

    def test_a_signal_saves_whether_anything_has_changed_or_not(self) -> None:
        server = self.start()
        server.request("PUT", "/kv/a", b"1")
        for _ in range(2):
            server.send_signal(signal.SIGUSR1)
            wait_until(self.snapshot.exists, "it is saved")
            self.assertEqual(self.read_snapshot(), {"a": "1"})
            self.snapshot.unlink()
        self.assertEqual(server.get("a"), "1")

    def test_by_itself_every_so_often_if_anything_has_changed(self) -> None:
        server = self.start("--save-every=1")
        for number in range(1, 4):
            server.request("PUT", f"/kv/{number}", b"x")
            server.wait_for_log(f"saved {number} pair")
        server.request("DELETE", "/kv/3")
        wait_until(lambda: server.log.count("saved 2 pair(s)") == 2, "a save without it")
        time.sleep(1.2)  # one more period, in which nothing changes
        self.assertEqual(server.log.count("saved"), 4)
        server.send_signal(signal.SIGKILL)
        server.exit_code()
        self.assertEqual(self.read_snapshot(), {"1": "x", "2": "x"})

    @on_linux
    def test_a_failure_is_a_line_in_the_log_and_leaves_the_changes_unsaved(self) -> None:
        server = self.start("--save-every=1")
        server.limit("FSIZE", 1000)
        server.request("PUT", "/kv/a", b"x" * 10_000)
        server.wait_for_log(r"cannot save: \[Errno 27\] File too large\n")
        server.limit("FSIZE", resource.RLIM_INFINITY)
        server.wait_for_log("saved 1 pair")
        self.assertEqual(os.listdir(self.directory), [SNAPSHOT])

    def test_a_write_in_the_middle_of_a_save_is_in_the_next(self) -> None:
        """And the time of a stop there counts from the beginning of that save."""
        server = self.start_with(
            "save = kv.Snapshot.save;"
            "kv.Snapshot.save = lambda *them: (kv.time.sleep(2), save(*them))"
        )
        server.request("PUT", "/kv/a", b"1")
        server.send_signal(signal.SIGUSR1)
        time.sleep(0.5)  # so that it has begun
        server.request("PUT", "/kv/b", b"1")
        self.assertEqual(server.stop(), 0)
        self.assertIn("saved 1 pair(s) ", server.log)
        self.assertRegex(
            server.log, r"drained in [2-4]\.\d\d s, 0 given up\nkv.py: saved 2 pair\(s\)"
        )
        self.assertEqual(self.read_snapshot(), {"a": "1", "b": "1"})


class FailingSaveTest(KVTest):
    """The save fails: a line that says so, exit code 1, and the old snapshot is as it was."""

    def check_fails(self, server: ServerProcess, reason: str) -> None:
        self.assertEqual(server.stop(), 1)
        self.assertRegex(server.log, rf"\nkv.py: cannot save: {re.escape(reason)}.*\n$")

    def test_a_failed_fsync_of_the_file_or_of_its_name(self) -> None:
        """Without the latter, nobody knows which one survives a power failure."""
        self.write_snapshot({"old": "1"})
        failing: dict[str, Any] = {"command": self.failing_fsync(), "cwd": HERE}
        for what, expected in (("file", {"old": "1"}), ("directory", {"old": "1", "new": "2"})):
            with self.start(**failing) as server:
                server.request("PUT", "/kv/new", b"2")
                (self.top / f"fail-{what}").write_text(str(errno.EIO))
                self.check_fails(server, "[Errno 5] Input/output error")
            self.assertEqual(self.read_snapshot(), expected)
            self.assert_refuses_to_start("[Errno 5] Input/output error", **failing)
            (self.top / f"fail-{what}").unlink()

    def test_a_directory_that_is_gone(self) -> None:
        server = self.start()
        shutil.rmtree(self.directory)
        self.check_fails(server, "[Errno 2] No such file or directory")


# ---- The command line ----


def kv_py(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run kv.py to its end."""
    command = [sys.executable, HERE / "kv.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, **options)


class CommandLineTest(KVTest):
    def test_version_and_help_go_to_stdout(self) -> None:
        # Also on a terminal that cannot show the default.
        strict = {**os.environb, b"DATA_DIR": b"\xff", b"PYTHONIOENCODING": b"utf-8:strict"}
        for option in ("--version", "--help"):
            run = kv_py(option, env=strict)
            self.assertEqual((run.returncode, run.stderr), (0, ""))
            self.assertIn("kv.py", run.stdout)
        self.assertEqual(run.stdout.count("\n  curl "), 2)
        self.assertRegex(run.stdout, "SIGTERM .*SIGUSR1")

    def test_wrong_arguments_are_named(self) -> None:
        for wrong in ("x", "65536", "-1", "", "1_0"):
            text = f"--port: {wrong!r} is not a whole number from 0 to 65535\n"
            self.assert_refuses_to_start(text, f"--port={wrong}", code=2)
        for argument in ("--graceful-timeout=0", "--save-every=1.5", "--por=1", "extra", "--host"):
            self.assert_refuses_to_start(argument.partition("=")[0], argument, code=2)

    def test_an_address_that_cannot_be_had_stops_the_start(self) -> None:
        # Not x.invalid, for which the system would ask a name server.
        for host in ("fe80::1%x", "x" * 100, "203.0.113.1"):
            self.assert_refuses_to_start(f"cannot listen on '{host}'", f"--host={host}")
        # Some releases of Python have this.
        script = "import kv; kv.ThreadingHTTPServer.allow_reuse_port = True; kv.main()"
        sharing: dict[str, Any] = {"command": [sys.executable, "-c", script], "cwd": HERE}
        with ServerProcess(self.top / "first", **sharing) as server:
            text = f"port {server.port} (see --host and --port): [Errno {errno.EADDRINUSE}] "
            self.assert_refuses_to_start(text, port=server.port, **sharing)

    def test_working_directories_that_cannot_be_used(self) -> None:
        self.assert_refuses_to_start("cannot use", "--working-dir=/dev/null/data")
        script = f'mkdir gone; cd gone; rmdir ../gone; exec "{sys.executable}" "{HERE}/kv.py" "$@"'
        gone: dict[str, Any] = {"command": ["sh", "-c", script, "sh"], "cwd": self.top}
        self.assert_refuses_to_start(
            "the working directory 'x' (see --working-dir): ", "--working-dir=x", **gone
        )
        server = self.start()
        self.assert_refuses_to_start("in use by another kv.py")
        server.send_signal(signal.SIGKILL)
        server.exit_code()
        self.start()  # at once

    def test_working_directory_is_the_one_that_the_system_means(self) -> None:
        """`link/..` is the parent of where the link leads to. Missing parents are created."""
        (self.top / "a" / "b").mkdir(parents=True)
        (self.top / "link").symlink_to("a/b")
        with self.start("--working-dir=link/../c/d", cwd=self.top) as server:
            server.request("PUT", "/kv/a", b"1")
            self.assertEqual(server.stop(), 0)
        self.assertEqual(kv.read_pairs(str(self.top / "a" / "c" / "d" / SNAPSHOT)), {"a": "1"})

    def test_working_directory_from_the_environment(self) -> None:
        self.write_snapshot({"a": "1"})
        run = kv_py("--dump", cwd=self.top, env={**os.environ, "DATA_DIR": "data"})
        self.assertEqual((run.returncode, run.stdout), (0, '{"key": "a", "value": "1"}\n'))

    def test_the_ready_line(self) -> None:
        """With the process number, for SIGUSR1, and no control characters for the terminal."""
        self.directory = Path(os.fsdecode(os.fsencode(self.top) + b"/a\x1b[31mb\xff"))
        self.write_snapshot({"a": "1", "b": "2"})
        place = re.escape(f"{self.top}/a\\x1b[31mb\\udcff/kv.pickle")
        for host, url in (("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")):
            with self.start(f"--host={host}") as server:
                listening = re.escape(f"http://{url}:{server.port}, process {server.process.pid}")
                ready = rf"^kv\.py: 2 pair\(s\) in '{place}', listening on {listening}\n$"
                self.assertRegex(server.log, ready)
                with Client(server.port, host) as client:
                    client.request("PUT", "/kv/a", b"1")
                self.assertEqual(server.stop(), 0)
                self.assertNotRegex(server.log, "PUT|\x1b")

    def test_requests_are_logged_with_verbose(self) -> None:
        command = [sys.executable, "-bb", str(HERE / "kv.py")]  # no bytes where text belongs
        server = self.start("--verbose", command=command)
        with server.connect() as client:
            client.request("PUT", "/kv/a", b"1")
            client.request("GET", "/kv/" + "x" * 8000)
            client.request("GET", "/kv/a?\x1b[31m")
        self.assertEqual(server.stop(), 0)
        lines = [line for line in server.log.split("\n") if line.startswith("kv.py: 127.0.0.1 ")]
        self.assertEqual(lines[0], "kv.py: 127.0.0.1 'PUT /kv/a HTTP/1.1' 200 0")
        self.assertLess(len(lines[1]), 2000)
        self.assertRegex(lines[2], r"^kv.py: 127.0.0.1 'GET /kv/a\?\\x1b\[31m HTTP/1.1.*' 400 \d+$")

    def log_into(self, reader: int, writer: int, *change: str) -> tuple[subprocess.Popen[str], int]:
        """Return a server that logs into a pipe or terminal, and its port."""
        script = "; ".join(["import kv", *change, "kv.main()"])
        command = [sys.executable, "-c", script, f"--working-dir={self.directory}", "--verbose"]
        process = subprocess.Popen([*command, "--port=0"], stderr=writer, cwd=HERE, text=True)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.addCleanup(os.close, reader)
        os.close(writer)
        match = re.search(rb"listening on http://127\.0\.0\.1:(\d+)", os.read(reader, 1000))
        assert match
        return process, int(match[1])

    def test_a_log_that_nobody_reads_does_not_delay_the_exit(self) -> None:
        """Nor one that is read slowly, so that there is often room for some lines, but not all."""
        # On all cores, or no thread would ever write between another's look and its write.
        reader, writer = os.pipe()
        process, port = self.log_into(reader, writer, "kv.stay_on_one_core = lambda: None")
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

    def test_a_terminal_that_nobody_reads_does_not_delay_the_exit(self) -> None:
        """It may have room for a part of a line."""
        process, port = self.log_into(*os.openpty())
        with Client(port) as client:
            for _ in range(2000):  # lines of 43 bytes
                client.request("PUT", "/kv/a", b"1")
        process.terminate()
        self.assertEqual(process.wait(10), 0)
        self.assertEqual(self.read_snapshot(), {"a": "1"})

    def test_without_standard_streams(self) -> None:
        """Closed at the start, or the reader of the log goes away."""
        closed = ["sh", "-c", 'exec "$@" --verbose <&- >&- 2>&-', "sh", *self.command]
        piped = [
            "bash",
            "-c",
            'exec "$@" --verbose 2> >(head -1 >/dev/null)',
            "bash",
            *self.command,
        ]
        for command in (closed, piped):
            self.check_starts_and_saves(command)

    @unittest.skipUnless(found("unshare") and os.getuid() == 0, "hides /proc from a process")
    def test_without_dev_fd(self) -> None:
        """As in some sandboxes."""
        script = 'mount -t tmpfs none /proc && exec "$@"'
        self.check_starts_and_saves(["unshare", "-m", "sh", "-c", script, "sh", *self.command])

    def check_starts_and_saves(self, command: list[str]) -> None:
        server = Program(command, self.directory, self.port)
        self.addCleanup(server.__exit__)
        server.wait_until_ready()
        self.assertEqual(server.request("PUT", "/kv/a", b"1").status, 200)
        self.assertEqual(server.stop(), 0)
        self.assertEqual(self.read_snapshot(), {"a": "1"})
        self.snapshot.unlink()

    def test_an_old_python_is_told(self) -> None:
        for python in interpreters(7, 8):
            with self.subTest(python):
                run = subprocess.run([python, HERE / "kv.py"], capture_output=True, text=True)
                self.assertEqual(run.returncode, 1)
                self.assertEqual(run.stderr, "kv.py: needs Python 3.9 or later\n")

    def test_run_sh_from_any_directory_with_the_interpreter_from_the_environment(self) -> None:
        """Through links, in a relative directory that also has the log, as the challenge does."""
        script = self.top / "directory with spaces" / "run.sh"
        script.parent.mkdir()
        for name in ("kv.py", "run.sh"):
            shutil.copy(HERE / name, script.parent)
        python = self.top / "python"
        python.write_text(f'#!/bin/sh\necho "this one" >&2\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        (self.top / "link").symlink_to("link-to-it")
        (self.top / "link-to-it").symlink_to(script)
        self.directory.mkdir()
        with open(self.directory / "node.log", "w+") as log:
            command = ["./link", f"--port={self.port}", "--working-dir=data"]
            environment = {**os.environ, "PYTHON": str(python)}
            with running(command, cwd=self.top, env=environment, stderr=log) as process:
                wait_until(lambda: listens(self.port), "the server listens", GRACE)
                process.terminate()
                self.assertEqual(process.wait(GRACE), 0)
        self.assertIn("this one", (self.directory / "node.log").read_text())
        self.assertEqual(set(os.listdir(self.directory)), {SNAPSHOT, "node.log"})


class DumpTest(KVTest):
    def test_prints_the_pairs_as_json_lines_beside_a_running_server(self) -> None:
        pairs = {"a": "1", "b": 'päivää 🌍\n"\\\0'}
        self.write_snapshot(pairs)
        self.start()
        environment = {**os.environ, "LC_ALL": "C"}
        run = kv_py("--dump", f"--working-dir={self.directory}", env=environment, encoding="utf-8")
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        lines = [json.loads(line) for line in run.stdout.splitlines()]
        self.assertEqual({line["key"]: line["value"] for line in lines}, pairs)
        self.assertIn("päivää 🌍", run.stdout)

    def test_what_cannot_be_dumped_is_an_error(self) -> None:
        directory = f"--working-dir={self.directory}"
        self.assertEqual(
            (kv_py("--dump", directory).returncode, self.directory.exists()), (1, False)
        )
        self.write_snapshot({f"key{number}": "value" for number in range(50_000)})
        dump = f'"{sys.executable}" "{HERE}/kv.py" --dump "{directory}"'
        for behind, lines, error in (
            ("| head -1", 1, r"^kv\.py: cannot dump .*Broken pipe\n$"),
            (">&-", 0, r"^kv\.py: cannot dump .*Bad file descriptor\n$"),
            (">/dev/full", 0, r"^kv\.py: cannot dump .*No space left on device\n$"),
        ):
            run = subprocess.run(["sh", "-c", f"{dump} {behind}"], capture_output=True, text=True)
            self.assertEqual(run.stdout.count("\n"), lines)
            self.assertRegex(run.stderr, error)
            self.assertEqual(run.returncode, 0 if lines else 1)
        self.snapshot.write_bytes(b"x" * 100)
        run = kv_py("--dump", directory)
        self.assertEqual((run.returncode, run.stdout), (1, ""))
        self.assertRegex(run.stderr, r"^kv\.py: cannot dump .*checksum.*\n$")


# ---- Clients that people use, and proxies ----


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
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        self.assertEqual(run.returncode, 0, run.stdout[-1000:] + run.stderr)
        return run.stdout

    def check_stored(self, server: ServerProcess) -> None:
        self.stop_at_once(server)
        self.assertEqual(self.read_snapshot(), self.PAIRS)

    def store_and_read(self, port: int) -> None:
        """One request at a time, and 50."""
        url = f"http://127.0.0.1:{port}/kv/key"
        puts = "next\n".join(
            f'url = "{url}{number}"\nrequest = PUT\nwrite-out = "PUT %{{http_code}}\\n"\n'
            f"data-binary = {json.dumps(value, ensure_ascii=False)}\n"
            for number, value in enumerate(self.PAIRS.values())
        )
        get = ["-o", "got#1", "-w", "GET %{http_code}\n", f"{url}[0-{len(self.PAIRS) - 1}]"]
        for curl in (["curl", "-sS"], ["curl", "-sS", "--parallel"]):
            lines = self.run_client(*curl, "--noproxy", "*", "-K", "-", text=puts)
            lines += self.run_client(*curl, "--noproxy", "*", *get)
            answers = collections.Counter(lines.splitlines())
            self.assertEqual(answers, self.ANSWERS, answers.most_common(5))
            for number, value in enumerate(self.PAIRS.values()):
                self.assertEqual((self.top / f"got{number}").read_text(), value)

    @unittest.skipUnless(found("curl"), "needs curl")
    def test_curl(self) -> None:
        """Also with fewer descriptors than it has connections."""
        for limit in (1024, 40):
            with self.start(preexec_fn=limited("NOFILE", limit)) as server:
                self.store_and_read(server.port)
                self.check_stored(server)

    @unittest.skipUnless(found("curl", "nginx", "haproxy"), "needs curl, nginx and HAProxy")
    def test_curl_through_the_proxies_of_the_readme(self) -> None:
        paths = "".join(
            f"{name}_temp_path {name}; "
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        for name, port_at, text, command in (
            (
                "nginx",
                "listen 127.0.0.1:8000",
                "daemon off; master_process off; pid nginx.pid; error_log stderr; events {}"
                f"http {{ access_log off; {paths} % }}",
                ["nginx", "-p", str(self.top), "-c"],
            ),
            ("haproxy", "bind 127.0.0.1:8000", "%", ["haproxy", "-db", "-f"]),
        ):
            with self.subTest(name), self.start() as server:
                port, readme = free_port(), (HERE / "README.md").read_text()
                (block,) = re.findall(rf"```{name}\n(.*?)```", readme, re.DOTALL)
                listen = f"{port_at.split()[0]} 127.0.0.1:{port}"
                for old, new in (("127.0.0.1:8080", f"127.0.0.1:{server.port}"), (port_at, listen)):
                    self.assertIn(old, block)
                    block = block.replace(old, new)
                configuration = self.top / f"{name}.conf"
                configuration.write_text(text.replace("%", block))
                with running([*command, str(configuration)], stderr=subprocess.DEVNULL):
                    wait_until(functools.partial(listens, port), "the proxy")
                    self.store_and_read(port)
                    with Client(port) as client:
                        large = b"x" * kv.MAX_VALUE
                        self.assertEqual(client.request("PUT", "/kv/large", large).status, 200)
                        client.request("DELETE", "/kv/large")
                self.check_stored(server)


# ---- README: its commands, as they stand there ----


class ReadmeTest(KVTest):
    """Each block does what it says when it is pasted whole; only ports and places are changed."""

    PAIRS: ClassVar = {"a": "päivää 🌍\n", "-b:c": "two words", "c": "'\"$\\"}
    README: ClassVar = (HERE / "README.md").read_text()

    def block(self, language: str, part: str, *changes: tuple[str, str]) -> str:
        """The block in that language that has this in it."""
        blocks = re.findall(rf"```{language}\n(.*?)```", self.README, re.DOTALL)
        (block,) = (block for block in blocks if part in block)
        for old, new in changes:
            self.assertIn(old, block)
            block = block.replace(old, new)
        return str(block)

    def run_block(self, block: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        """Paste it into a shell in a directory that has what a clone has."""
        self.directory.mkdir(exist_ok=True)
        for name in ("kv.py", "run.sh"):
            shutil.copy(HERE / name, self.directory)
        run = subprocess.run(
            ["bash", "-c", block],
            cwd=self.directory,
            env={**os.environ, "no_proxy": "*", "PYTHON": sys.executable, **env},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        self.assertEqual(run.returncode, code, run.stderr)
        return run

    def test_the_tests_that_it_names_exist(self) -> None:
        names = re.findall(r"\b(\w+Test)(?:\.(test_\w+))?\b", self.README)
        self.assertGreater(len(names), 10)
        for name, method in names:
            self.assertTrue(hasattr(globals()[name], method or "setUp"), f"{name} {method}")
        for name in tests_of(BeyondTest):
            self.assertIn(f".{name}", self.README)

    @unittest.skipUnless(found("curl"), "needs curl")
    def test_hello(self) -> None:
        port = str(self.port)
        changes = ("./run.sh", f"./run.sh --port={port}"), ("localhost:8080", f"localhost:{port}")
        printed = self.run_block(self.block("sh", "run.sh &", *changes))
        self.assertEqual(printed.stdout, "ok\nhello\n" * 2)
        self.assertEqual(printed.stderr.count("kv.py: saved 1 pair"), 2)

    def test_the_python_client(self) -> None:
        server = self.start()
        code = self.block("python", "urlopen", (":8080", f":{server.port}"))
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        self.assertEqual((run.stdout, run.stderr), ("päivää\n", ""))

    @unittest.skipUnless(found("pgrep"), "needs pgrep")
    def test_backup_and_restore(self) -> None:
        """The pattern finds servers of this test only. With none or several, nothing is changed."""
        first = self.start()
        backup, restore, both = (
            self.block("sh", part, ("kv[.]py( |$)'", f"kv[.]py .*{re.escape(str(place))}'"))
            for part, place in (
                ("kill -USR1", self.directory),
                ("cp kv-backup.pickle kv.pickle", self.directory),
                ("kill -USR1", self.top),
            )
        )
        with ServerProcess(self.top / "second"):
            self.run_block(both, code=1)
            self.assertFalse((self.directory / "kv-backup.pickle").exists())
        for value in ("1", "2"):
            first.request("PUT", "/kv/a", value.encode())
            self.run_block(backup)
            copied = kv.read_pairs(str(self.directory / "kv-backup.pickle"))
            self.assertEqual(copied, {"a": value})
        first.request("PUT", "/kv/a", b"3")
        restore = restore.replace("./run.sh", "./run.sh --version")
        # The block waits until this process, too, has been told of the server's end.
        threading.Thread(target=first.process.wait, daemon=True).start()
        self.run_block(restore)
        self.run_block(backup, code=1)
        with self.start() as second:
            self.assertEqual(second.get("a"), "2")

    def test_the_unit_and_the_dockerfile_start_it(self) -> None:
        unit = self.block("ini", "ExecStart")
        (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
        (entry,) = re.findall(r"^ENTRYPOINT (.*)$", self.block("dockerfile", "FROM"), re.MULTILINE)
        for command in (line.split(), json.loads(entry)):
            changes = {"/opt/kv/kv.py": str(HERE / "kv.py"), "/kv.py": str(HERE / "kv.py")}
            changes |= {"/var/lib/kv": str(self.directory), "/data": str(self.directory)}
            arguments = [changes.get(each, each) for each in command[1:]]
            program = Program([sys.executable, *arguments], self.directory, self.port)
            with program:
                program.wait_until_ready()
                self.assertEqual(program.request("PUT", "/kv/a", b"1").status, 200)
                self.assertEqual(program.stop(), 0)
            self.assertEqual(self.read_snapshot(), {"a": "1"})

    @unittest.skipUnless(found("redis-server", "redis-cli"), "needs Redis")
    def test_moving_to_redis(self) -> None:
        self.write_snapshot(self.PAIRS)
        port = str(free_port())
        block = self.block("bash", "redis-cli", ("redis-cli", f"redis-cli -p {port}"))
        redis = ["redis-server", "--port", port, "--save", "", "--bind", "127.0.0.1"]
        with running(redis, stdout=subprocess.DEVNULL, cwd=self.top):
            wait_until(functools.partial(listens, int(port)), "Redis")
            self.assertIn("errors: 0, replies: 3", self.run_block(block, LC_ALL="C").stdout)
            for key, value in self.PAIRS.items():
                get = ["redis-cli", "-p", port, "--raw", "get", key]
                self.assertEqual(subprocess.check_output(get).decode(), value + "\n")
            self.snapshot.unlink()
            self.run_block(block, code=1)

    @unittest.skipUnless(found("etcd", "etcdctl"), "needs etcd")
    def test_moving_to_etcd(self) -> None:
        self.write_snapshot({**self.PAIRS, "large": "x" * 2_000_000})
        port, peers = free_port(), f"http://127.0.0.1:{free_port()}"
        url = f"http://127.0.0.1:{port}"
        environment = {"ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": url}
        etcd = ["etcd", "--data-dir", str(self.top / "etcd"), "--listen-peer-urls", peers]
        etcd += ["--listen-client-urls", url, "--advertise-client-urls", url]
        with running(etcd, stderr=subprocess.DEVNULL):
            wait_until(functools.partial(listens, port), "etcd")
            printed = self.run_block(self.block("bash", "etcdctl"), code=1, **environment)
            self.assertIn("refused: large\n", printed.stderr)
            for key, value in self.PAIRS.items():
                get = ["etcdctl", "get", "--print-value-only", "--", key]
                answer = subprocess.check_output(get, env={**os.environ, **environment})
                self.assertEqual(answer.decode(), value + "\n")


# ---- Soak: for a long time ----


def soak(minutes: float) -> None:
    """Shutdowns under load and hostile bytes, in turns; whatever is wrong ends it."""
    with tempfile.TemporaryDirectory(prefix="kv-soak-") as top:
        end = time.monotonic() + minutes * 60
        seed = time.time_ns() % 1_000_000
        acknowledged = 0
        while time.monotonic() < end:
            with ServerProcess(Path(top) / "fuzz") as server:
                fuzz(server, 5_000, seed)
                assert server.stop() == 0
                assert "kv.py: error" not in server.log, server.log
            chance, expected, directory = random.Random(seed), dict[str, str](), Path(top) / "load"
            shutil.rmtree(directory, ignore_errors=True)
            for _ in range(25):
                with ServerProcess(directory, "--save-every=1") as server:
                    outcome = stop_under_load(server, 20, chance, chance.randrange(10))
                outcome.apply_to(expected)
                assert kv.read_pairs(str(directory / SNAPSHOT)) == expected, f"seed {seed}: lost"
                acknowledged += len(outcome.acknowledged)
            left, seed = (end - time.monotonic()) / 60, seed + 1
            print(f"{left:5.1f} minutes left, {acknowledged:,} acknowledged, none lost", flush=True)


# ---- Bench: kv.py beside the textbook and the least that a server can do ----


def textbook(port: int) -> None:
    """The first version, with a listen queue that is long enough to be measured at all."""
    sys.argv[1:] = [f"--port={port}", "--working-dir=nowhere"]
    with open(os.devnull, "w") as sys.stderr:  # it logs each request
        exec(FIRST_VERSION.replace("daemon_threads = False", "request_queue_size = 4096"), {})


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


def requests_per_second(port: int, clients: int, requests: list[bytes], seconds: float) -> float:
    """Have that many clients send one request after another; the next when one is answered."""
    with Client(port) as first:  # the answers differ in their dates only
        first.send(requests[0])
        first.socket.recv(1, socket.MSG_PEEK)
        time.sleep(0.2)  # the body may come behind the head
        size = len(first.socket.recv(65536))
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
    seconds = time.monotonic() - begin
    for client in missing:
        client.close()
    return count / seconds


def bench() -> None:
    """Print two tables. Figures differ from run to run; compare within one."""
    print(f"Python {sys.version.split()[0]}, {sys.platform}, {os.cpu_count()} cores\n")
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
    figures: dict[str, list[float]] = {load: [] for load in loads}
    with tempfile.TemporaryDirectory(prefix="kv-bench-") as top:
        for target in (None, textbook, bare_sockets):
            with contextlib.ExitStack() as stack:
                if target:
                    port = free_port()
                    context = multiprocessing.get_context("fork")
                    process = context.Process(target=target, args=[port], daemon=True)
                    process.start()
                    stack.callback(process.kill)
                    wait_until(functools.partial(listens, port), "it listens")
                else:
                    port = stack.enter_context(ServerProcess(Path(top) / "kv")).port
                for load, (clients, requests) in loads.items():
                    rounds = [requests_per_second(port, clients, requests, 1.0) for _ in range(3)]
                    figures[load].append(sorted(rounds)[1])
        print(f"{'requests per second':40}    kv.py   http.server   bare sockets")
        for load, (ours, *plain) in figures.items():
            ratios = "".join(f"{figure:9,.0f} ({ours / figure:4.2f})" for figure in plain)
            print(f"{load:40}{ours:9,.0f}{ratios}")
        print(f"\n{'beside the plain thing':40}    kv.py    plain   ratio")
        for what, ours, other, unit in measurements(Path(top)):
            beside = f"{other:9.3f}{ours / other:8.2f}" if other else " " * 17
            print(f"{what:40}{ours:9.3f}{beside} {unit}", flush=True)


def seconds_of(*actions: Callable[[], Any], rounds: int = 5) -> list[float]:
    """The median for each action; they take turns, so that each finds the machine alike."""
    durations: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds):
        for action, list_ in zip(actions, durations):
            begin = time.monotonic()
            action()
            list_.append(time.monotonic() - begin)
    return [sorted(list_)[len(list_) // 2] for list_ in durations]


def measurements(top: Path) -> Iterator[tuple[str, float, float, str]]:
    """What is measured, kv.py's figure, the plain thing's or 0, and the unit."""

    def start_and_kill() -> None:
        ServerProcess(top / "start").__exit__()

    imports = [sys.executable, "-c", "import http.server, argparse"]
    ours, plain = seconds_of(start_and_kill, lambda: subprocess.run(imports, check=True))
    yield "start, plain: importing http.server", ours, plain, "s"

    allow_descriptors(20_000)
    with ServerProcess(top / "burst") as server:
        requests = [put(f"key{number}", "value") for number in range(10_000)]
        (seconds,) = seconds_of(lambda: burst(server.port, requests), rounds=1)
        yield "10,000 clients PUT at the same instant", seconds, 0, "s"

    with ServerProcess(top / "idle") as server, contextlib.ExitStack() as stack:
        yield "memory of one of 15,000 idle connections", idle_bytes(server, stack) / 1024, 0, "KiB"
        (seconds,) = seconds_of(server.stop, rounds=1)
        yield "SIGTERM to exit with them", seconds, 0, "s"

    with ServerProcess(top / "busy") as server:
        loops = [Loop(put(f"{n}-{m}", "value") for m in range(3)) for n in range(9_000)]
        (seconds,) = seconds_of(lambda: keep_alive(server.port, loops), rounds=1)
        yield "9,000 clients PUT 3 times each", seconds, 0, "s"

    pairs = {f"key{number:013}": f"{number:0100}" for number in range(1_000_000)}

    def dump() -> None:
        with open(top / "plain", "wb") as file:
            pickle.dump(pairs, file)
            file.flush()
            os.fsync(file.fileno())

    def load() -> Any:
        with open(top / "plain", "rb") as file:
            return pickle.load(file)

    (top / "large").mkdir()
    snapshot = kv.Snapshot(str(top / "large"))
    ours, plain = seconds_of(lambda: snapshot.save(pairs), dump)
    yield "save 1,000,000 pairs, plain: pickle.dump", ours, plain, "s"
    ours, plain = seconds_of(snapshot.load, load)
    yield "load 1,000,000 pairs, plain: pickle.load", ours, plain, "s"
    with ServerProcess(top / "large") as server, server.connect() as client:
        slowest, end, before = [0.0, 0.0], time.monotonic() + 2, server.resident_bytes()
        highest = before
        while time.monotonic() < end or "saved" not in server.log:
            is_saving = time.monotonic() >= end
            if is_saving and not slowest[1]:
                server.send_signal(signal.SIGUSR1)
            (seconds,) = seconds_of(lambda: client.request("GET", "/health"), rounds=1)
            slowest[is_saving] = max(slowest[is_saving], seconds)
            highest = max(highest, server.resident_bytes())
        yield "slowest GET in a save, plain: without", slowest[1], slowest[0], "s"
        yield "memory during a save, plain: before", highest / 1e6, before / 1e6, "MB"


def run_all() -> bool:
    """Run each class in a process of its own, some at a time, as most of a test is waiting."""

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, __file__, "-v", name]
        pipe = subprocess.PIPE
        return subprocess.run(
            command, stdout=pipe, stderr=subprocess.STDOUT, text=True, timeout=20 * DEADLINE
        )

    begin = time.monotonic()
    names: list[str] = []
    for name in globals():
        if name in ("AskedForTest", "BeyondTest", "ShutdownTest"):  # each test, as they take long
            names += [f"{name}.{test}" for test in tests_of(globals()[name])]
        elif name.endswith("Test") and name not in ("KVTest", "ProgramTest"):
            names.append(name)
    bursts = list(filter(is_burst, names))
    others = [name for name in names if name not in bursts]
    others.sort(key=lambda name: name != "FirstVersionTest")  # which takes longest
    number = failed = 0
    skipped: collections.Counter[str] = collections.Counter()
    for at_once, group in ((1, bursts), (4, others)):
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            for name, result in zip(group, pool.map(run, group)):
                failed += result.returncode != 0
                ran = re.search(r"^Ran (\d+) tests? in .*$", result.stdout, re.MULTILINE)
                number += int(ran[1]) if ran else 0
                skips = re.findall(r"skipped ['\"](.*)['\"]$", result.stdout, re.MULTILINE)
                skipped.update(skips)
                if result.returncode or not ran:
                    print(result.stdout)
                print(f"{name}: {ran[0] if ran else 'did not run'}", flush=True)
    seconds = time.monotonic() - begin
    outcome = f"{failed} failed" if failed else "OK"
    reasons = ", ".join(f"{count}x {reason}" for reason, count in skipped.items())
    print(f"{number} tests in {seconds:.0f} s: {outcome}; skipped: {reasons or 'none'}")
    return failed == 0


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children of `&` would ignore it
    if sys.argv[1:2] == ["soak"]:
        soak(float(sys.argv[2]) if sys.argv[2:] else 10)
        return 0
    if sys.argv[1:] == ["bench"]:
        bench()
        return 0
    if sys.argv[1:2] == ["--check"]:
        _, _, program, class_name, name, seconds = sys.argv
        check(program, class_name, name, float(seconds))
        return 0
    if sys.argv[1:2] in (["-h"], ["--help"]) or sys.argv[1:] == ["--run"]:
        print(__doc__)
        return 2 if sys.argv[1] == "--run" else 0
    if sys.argv[1:2] == ["--run"]:
        program, words = os.path.abspath(sys.argv[2]), sys.argv[3:]
        if not does_start([program]):
            return 1
        outcomes = check_program(program, words)
        if not outcomes:
            print("no check has all of these words in its name:", *words)
            every = tests_of(AskedForTest) + tests_of(BeyondTest)
            print(*(name[len("test_") :] for name in every), sep="\n")
            return 2
        # What was named has to hold, or else what is asked for.
        names = outcomes if words else [name for name in outcomes if hasattr(AskedForTest, name)]
        return 0 if all(outcomes[name] for name in names) else 1
    if not sys.argv[1:]:
        return 0 if run_all() else 1
    unittest.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
