"""The port that the server listens on."""

from __future__ import annotations

import os
import socket
import sys


def listen(host: str, port: int) -> socket.socket:
    """Take the port (0: a free one) before anything slow happens.

    A port that is not available ends the process with a message and exit code 1.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sends small answers at once (TCP_NODELAY) only where it is; 40 ms each.
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
