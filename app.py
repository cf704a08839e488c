"""Tunebooth: `uv run app.py` serves the page, the Gradio API and REST on one port."""

from __future__ import annotations

import logging
import sys

from trainer.settings import command_line
from trainer.web.guard import Guard
from trainer.web.listen import listen
from trainer.work.assembly import Studio, check_secrets, open_store
from trainer.work.restart import restart


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    rescues, settings = command_line()
    if rescues:
        from trainer.work.rescue import rescue

        sys.exit(rescue(settings))
    listening = listen(settings.host, settings.port)
    settings = settings.model_copy(update={"port": listening.getsockname()[1]})
    check_secrets(settings)
    store = open_store(settings.outputs)
    import uvicorn  # after the port is taken: an early browser waits instead of being refused

    lost: list[str] = []  # the device that had a fatal error

    def on_device_lost(device: str) -> None:
        lost.append(device)
        server.should_exit = True

    studio = Studio(settings, store, on_device_lost)
    guard = Guard(settings, studio.load, studio.begin, studio.close, missing=store.missing, hold=lambda: store.hold)
    # An open page holds a connection; at the end the server does not wait for it.
    config = uvicorn.Config(guard, log_level="warning", ws="none", timeout_graceful_shutdown=2)
    behind = f" (here: {settings.local_url})" if settings.local_url != settings.base_url else ""
    print(f"Tunebooth is at {settings.base_url}{behind}", flush=True)
    server = uvicorn.Server(config)
    server.run(sockets=[listening])
    if lost:
        restart(settings, lost[0])


if __name__ == "__main__":
    main()
