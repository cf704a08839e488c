"""Latency of the API while a tune trains, and the cost of an open page for the training.

Starts the app, queues a long tune on branch fast, then measures over HTTP on loopback:
POST /tunes with four small PNGs, idle and training; POST /tunes with five photos of about 300 kB (decoded and checked);
GET /tunes/ID; and the training's steps per second with and without the page's own requests, in ten interleaved rounds.
Run: `uv run python -m benchmarks.api_latency`
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from trainer.studio import demo

ROOT = Path(__file__).parent.parent
PHOTO_BYTES = 300_000


def photo(number: int) -> bytes:
    """A JPEG of about 300 kB and one megapixel: the demo's robot, enlarged, with grain."""
    image = demo.draw_photo(number % len(demo.SCENES)).resize((1024, 1024))
    grain = random.Random(number)
    noise = Image.frombytes("L", (512, 512), bytes(grain.choices(range(256), k=512 * 512))).resize((1024, 1024))
    blend = Image.blend(image, Image.merge("RGB", (noise,) * 3), 0.12)
    for quality in range(95, 40, -1):
        buffer = io.BytesIO()
        blend.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= 1.1 * PHOTO_BYTES:
            break
    return buffer.getvalue()


def small_png(number: int) -> bytes:
    """The demo's robot at 256 px."""
    buffer = io.BytesIO()
    demo.draw_photo(number % len(demo.SCENES)).resize((256, 256)).save(buffer, "PNG")
    return buffer.getvalue()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def start(outputs: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start the app in a separate process with its own folder; returns process and URL."""
    port = free_port()
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--outputs", str(outputs)]
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    app = subprocess.Popen(command, cwd=ROOT, env=environment)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(f"{url}/health").json()["ready"]:
                return app, url
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError("the app did not come up within a minute")


def post(client: httpx.Client, title: str, photos: list[bytes], **fields: str) -> tuple[float, dict[str, Any]]:
    """Create a tune; seconds and answer."""
    files = [("tune[images][]", (f"{n}.jpg", data, "image/jpeg")) for n, data in enumerate(photos)]
    data = {"tune[title]": title, "tune[name]": "toy", "tune[branch]": "fast"}
    began = time.perf_counter()
    answer = client.post("/tunes", data=data | {f"tune[{k}]": v for k, v in fields.items()}, files=files)
    took = time.perf_counter() - began
    answer.raise_for_status()
    return took, answer.json()


def idle_posts(client: httpx.Client, count: int) -> list[float]:
    """Seconds of POST /tunes without other work: each tune fails at once, because its base is missing."""
    small, taken = [small_png(number) for number in range(4)], []
    for number in range(count + 1):
        seconds, tune = post(client, f"idle {number}", small, branch="sd15", model_type="lora")
        taken.append(seconds)
        while client.get(f"/tunes/{tune['id']}").json()["status"] != "failed":
            time.sleep(0.1)
        time.sleep(0.2)
    return taken[1:]  # the first one waits for torch to be imported


def steps_per_second(log: Path, seconds: float) -> float:
    """Speed of the training from now on, from the times in its log."""
    before = len(log.read_text().splitlines())
    time.sleep(seconds)
    lines = [json.loads(line) for line in log.read_text().splitlines()[before - 1 :]]
    timed = [line for line in lines if "seconds" in line]
    first, last = timed[0], timed[-1]
    return float((last["step"] - first["step"]) / (last["seconds"] - first["seconds"]))


class Watcher:
    """An open page: its timer's request once a second, as the browser sends it."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url)
        config = self._client.get("/config").json()
        tick = next(d for d in config["dependencies"] if any(event == "tick" for _, event in d["targets"]))
        self._body = {"data": [None], "fn_index": tick["id"], "session_hash": "benchmark", "event_data": None}
        self.watching = threading.Event()
        self.times: list[float] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self.watching.wait()
            began = time.perf_counter()
            self._client.post("/gradio_api/run/predict", json=self._body).raise_for_status()
            self.times.append(time.perf_counter() - began)
            time.sleep(max(0.0, 1.0 - self.times[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--window", type=float, default=6.0, help="seconds of training in each half of a round")
    parser.add_argument("--posts", type=int, default=20)
    options = parser.parse_args()
    photos = [photo(number) for number in range(5)]
    print(f"photos: {', '.join(f'{len(data) / 1000:.0f} kB' for data in photos)}")
    with tempfile.TemporaryDirectory() as name:
        app, url = start(Path(name))
        try:
            with httpx.Client(base_url=url, timeout=60) as client:
                idle = idle_posts(client, options.posts)
                _, tune = post(client, "long", photos, steps="10000")
                while client.get(f"/tunes/{tune['id']}").json()["progress"]["step"] < 20:
                    time.sleep(0.5)
                gets, posts = [], []
                for _ in range(200):
                    began = time.perf_counter()
                    client.get(f"/tunes/{tune['id']}").raise_for_status()
                    gets.append(time.perf_counter() - began)
                    time.sleep(0.02)
                small, smalls = [small_png(number) for number in range(4)], []
                for number in range(5 * options.posts):
                    smalls.append(post(client, f"small {number}", small)[0])
                    time.sleep(0.05)
                for number in range(options.posts):
                    posts.append(post(client, f"post {number}", photos)[0])
                    time.sleep(0.3)
                watcher, log = Watcher(url), Path(name) / "tunes" / str(tune["id"]) / "log.jsonl"
                alone, watched = [], []
                for _ in range(options.rounds):
                    alone.append(steps_per_second(log, options.window))
                    watcher.watching.set()
                    watched.append(steps_per_second(log, options.window))
                    watcher.watching.clear()
                assert client.get(f"/tunes/{tune['id']}").json()["status"] == "training"
        finally:
            app.terminate()
            app.wait(60)

    def print_times(label: str, times: list[float]) -> None:
        ranked = sorted(times)
        worst = ranked[int(0.99 * (len(ranked) - 1))]
        print(f"{label}: median {1000 * statistics.median(times):.1f} ms, 99th percentile {1000 * worst:.1f} ms")

    print_times("GET /tunes/ID while training", gets)
    print_times("POST /tunes with four small PNGs, idle", idle)
    print_times("POST /tunes with four small PNGs while training", smalls)
    print_times("POST /tunes with five photos while training", posts)
    print_times("one request of the page", watcher.times)
    pace, slower = statistics.median(alone), statistics.median(watched)
    print(f"training: {pace:.2f} steps/s alone, {slower:.2f} steps/s with an open page")
    print(f"lost to an open page: {100 * (1 - slower / pace):.1f} %")


if __name__ == "__main__":
    main()
