"""The port that the server listens on."""

from __future__ import annotations

import os
import socket
import sys


def listen(host: str, port: int) -> socket.socket:
    """Open the port (0: a free one) before the slow imports.

    If the port is not available, the process ends with a message and exit code 1.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small answers at once (TCP_NODELAY) only if the protocol is named; this saves 40 ms an answer.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()
    except OSError as problem:
        listening.close()
        sys.exit(f"Tunebooth cannot listen on {host}:{port}: {problem.strerror}. Try --port.")
    return listening
