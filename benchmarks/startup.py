"""Startup time of the app: seconds to `/health` and to the page, compared with `import gradio`.

Measured alternately in one run, because disk cache and other load change. Minima over the rounds.
Run: `uv run python -m benchmarks.startup`
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.api_latency import ROOT, free_port

IMPORT_GRADIO = "import time; t = time.perf_counter(); import gradio; print(time.perf_counter() - t)"


def import_gradio() -> float:
    """Seconds that `import gradio` takes in a fresh interpreter."""
    return float(
        subprocess.run([sys.executable, "-c", IMPORT_GRADIO], capture_output=True, text=True, check=True).stdout
    )


def start_app() -> tuple[float, float]:
    """Seconds from the start of the process to the first `/health`, and to the real page."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as name, httpx.Client(base_url=url) as client:
        began = time.perf_counter()
        command = [sys.executable, "app.py", "--port", str(port), "--outputs", str(Path(name))]
        app = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        health = page = None
        while page is None:
            try:
                ready = client.get("/health").json()["ready"]
                health = health or time.perf_counter() - began
                if ready and "gradio" in client.get("/").text:
                    page = time.perf_counter() - began
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        app.kill()
        app.wait()
    assert health is not None
    return health, page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = []
    for number in range(1, parser.parse_args().rounds + 1):
        imported, (health, page) = import_gradio(), start_app()
        rounds.append((health, imported, page))
        print(f"round {number}: /health {health:.2f} s, import gradio {imported:.2f} s, page {page:.2f} s")
    health, imported, page = (min(column) for column in zip(*rounds, strict=True))
    print(f"/health after {health:.2f} s; page / import gradio: {page:.2f} / {imported:.2f} = {page / imported:.2f}")


if __name__ == "__main__":
    main()
