"""A server that receives callbacks."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATIENCE = 60.0  # seconds; only a hang is that slow


class Receiver(BaseHTTPRequestHandler):
    """What stands behind a callback: the first times it fails as the path says, then it takes what comes."""

    server: ReceiverServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.path.split("/")[1].partition("?")[0]
        self.server.tries[self.path] += 1
        if self.server.tries[self.path] <= self.server.failures and kind in FAULTS:
            FAULTS[kind](self)
            return
        self.server.taken.append((self.path, {name.lower(): text for name, text in self.headers.items()}, body))
        self.server.before_answer(self.path)
        self.send_response(200)
        self.end_headers()

    def fail(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def slow(self) -> None:
        """A byte now and then, which no timeout between two bytes ends."""
        for _ in range(200):
            try:
                self.wfile.write(b"H")
                self.wfile.flush()
            except OSError:
                return
            time.sleep(0.05)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


FAULTS: dict[str, Callable[[Receiver], None]] = {
    "500": lambda one: one.fail(500),
    "429": lambda one: one.fail(429, Retry_After="0"),
    "301": lambda one: one.fail(301, Location="/elsewhere"),
    "reset": Receiver.reset,
    "hang": lambda one: one.server.closing.wait(PATIENCE) and None,
    "slow": Receiver.slow,
}


class ReceiverServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, failures: int = 2) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.failures = failures
        self.tries: Counter[str] = Counter()
        self.taken: list[tuple[str, dict[str, str], bytes]] = []
        self.closing = threading.Event()
        self.before_answer: Callable[[str], None] = lambda path: None

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


@contextmanager
def receiving(failures: int = 2) -> Iterator[ReceiverServer]:
    """A receiver that runs. failures: how often each path fails at first, where it says how."""
    server = ReceiverServer(failures)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
