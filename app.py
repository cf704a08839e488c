"""Tunebooth: `uv run app.py` serves page, Gradio API and REST on one port."""

from __future__ import annotations

import logging
import os
import socket
import sys

from trainer.settings import Settings, command_line
from trainer.studio.store import InUse, Store
from trainer.web.guard import Guard
from trainer.work.assembly import Studio

IN_USE_EXIT_CODE = 75  # EX_TEMPFAIL: another process has this outputs folder


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    settings = command_line()
    listening = listen(settings)
    settings = settings.model_copy(update={"port": listening.getsockname()[1]})
    try:
        store = Store(settings.outputs)
    except InUse as problem:
        print(f"Tunebooth: {problem}. Stop it, or give this one another --outputs.", file=sys.stderr)
        sys.exit(IN_USE_EXIT_CODE)
    except RuntimeError as problem:
        print(f"Tunebooth: {problem}.", file=sys.stderr)
        sys.exit(1)
    import uvicorn  # after the port is taken: a browser that is early waits instead of being refused

    studio = Studio(settings, store)
    guard = Guard(settings, load=studio.load, begin=studio.begin, unload=studio.close)
    # An open page holds a connection for as long as it is open; it is not waited for.
    config = uvicorn.Config(guard, log_level="warning", ws="none", timeout_graceful_shutdown=2)
    print(f"Tunebooth is at {settings.base_url}", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


def listen(settings: Settings) -> socket.socket:
    """Take the port before anything slow happens; one that is taken ends the app with a message."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol is named because asyncio sends small answers at once (TCP_NODELAY) only where it is; 40 ms each.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
        listening.listen()
    except OSError as problem:
        print(
            f"Tunebooth cannot listen on {settings.host}:{settings.port}: {problem.strerror}. Try --port.",
            file=sys.stderr,
        )
        sys.exit(1)
    return listening


if __name__ == "__main__":
    main()
