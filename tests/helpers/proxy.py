"""A reverse proxy on a free port that serves an app under a prefix, as nginx's `location /tb/ { proxy_pass ...; }`."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP = ("transfer-encoding", "connection")  # headers of one connection only


class Proxy(ThreadingHTTPServer):
    """`upstream`, the app's `http://host:port`, is set before the first request."""

    daemon_threads = True
    upstream = ""
    prefix = "/tb"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{self.prefix}"


class Handler(BaseHTTPRequestHandler):
    server: Proxy

    def forward(self) -> None:
        prefix = self.server.prefix
        if not self.path.startswith(f"{prefix}/"):
            self.send_error(404, f"outside {prefix}")
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        headers |= {"X-Forwarded-Host": self.headers["Host"], "X-Forwarded-Proto": "http"}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection(urlsplit(self.server.upstream).netloc, timeout=300)
        connection.request(self.command, self.path.removeprefix(prefix), body or None, headers)
        response = connection.getresponse()
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in HOP:
                self.send_header(name, value)
        self.end_headers()
        while part := response.read1(2**16):  # at once: live progress is a stream
            self.wfile.write(part)
            self.wfile.flush()
        connection.close()

    do_GET = do_POST = do_HEAD = do_PATCH = do_DELETE = forward  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Write nothing."""


@contextmanager
def proxy() -> Iterator[Proxy]:
    with Proxy(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
