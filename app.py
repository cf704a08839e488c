"""Tunebooth: `uv run app.py` serves the page, the Gradio API and REST on one port."""

from __future__ import annotations

import logging

from trainer.settings import command_line
from trainer.web.guard import Guard
from trainer.web.listen import listen
from trainer.work.assembly import Studio, check_secrets, open_store


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    settings = command_line()
    listening = listen(settings.host, settings.port)
    settings = settings.model_copy(update={"port": listening.getsockname()[1]})
    check_secrets(settings)
    store = open_store(settings.outputs)
    import uvicorn  # after the port is taken: an early browser waits instead of being refused

    studio = Studio(settings, store)
    guard = Guard(settings, load=studio.load, begin=studio.begin, unload=studio.close)
    # An open page holds a connection; at the end the server does not wait for it.
    config = uvicorn.Config(guard, log_level="warning", ws="none", timeout_graceful_shutdown=2)
    print(f"Tunebooth is at {settings.base_url}", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
