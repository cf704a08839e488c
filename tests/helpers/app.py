"""The app as its own process, as a user starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds; only a hang is that slow


class App:
    """An `app.py` in a process of its own."""

    def __init__(self, outputs: Path, *options: str, script: str = "app.py", **environment: str) -> None:
        """script: what is started, from the repository's folder."""
        command = [sys.executable, script, "--port", "0", "--outputs", str(outputs), *options]
        self.outputs = outputs
        self.errors = outputs / "stderr.txt"  # a file, not a pipe: nobody reads it while the app runs
        with self.errors.open("a") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.findall(r"http://[^\s)]+", line)
        if not found:
            raise RuntimeError(f"the app ended: {self.errors.read_text()}")
        self.url = found[-1]  # of the port itself, behind a public address
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def ready(self) -> App:
        wait_for(lambda: self.http.get("/health").json()["ready"])
        return self

    def tune(self, tune_id: int) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get(f"/tunes/{tune_id}").raise_for_status().json()
        return answer

    def finished(self, tune_id: int) -> dict[str, Any]:
        """The tune, when it and its prompts have ended."""

        def ended() -> dict[str, Any] | None:
            tune = self.tune(tune_id)
            done = tune["status"] in ("trained", "failed", "canceled")
            return tune if done and all(p["status"] not in ("queued", "rendering") for p in tune["prompts"]) else None

        return wait_for(ended)

    def log(self, tune_id: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.outputs / f"tunes/{tune_id}/log.jsonl").read_text().splitlines()]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


def wait_for(answer: Callable[[], Any]) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if got := answer():
                return got
        except httpx.TransportError:  # it does not listen yet
            pass
        time.sleep(0.1)
    raise TimeoutError("nothing happened")


@contextmanager
def running(outputs: Path, *options: str, script: str = "app.py", **environment: str) -> Iterator[App]:
    app = App(outputs, *options, script=script, **environment)
    try:
        yield app
    finally:
        app.kill()


def post(app: App, title: str, photos: list[Path], **fields: Any) -> httpx.Response:
    """POST /tunes as a multipart form."""
    data = {"tune[title]": title, "tune[name]": "dog", "tune[branch]": "fast"}
    data |= {f"tune[{key}]": str(value) for key, value in fields.items() if value is not None}
    files = [("tune[images][]", (photo.name, photo.read_bytes(), "image/jpeg")) for photo in photos]
    return app.http.post("/tunes", data=data, files=files)
