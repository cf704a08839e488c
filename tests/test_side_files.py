"""The app as its own process, with every side file broken at once: all is answered, and a new tune is trained."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.app import ROOT, post, running
from tests.helpers.faults import safetensors

READS = ("/health", "/", "/tunes", "/tunes/1", "/tunes/2", "/gallery/tunes", "/packs", "/presets", "/prompts")


@pytest.mark.long
@pytest.mark.parametrize("before_start", [True, False])
def test_broken_files_do_not_stop_the_app(
    tmp_path: Path, dog_photos: Callable[[int], list[Path]], before_start: bool
) -> None:
    outputs, models, presets = (tmp_path / name for name in ("outputs", "models", "presets"))
    outputs.mkdir()
    models.mkdir()
    shutil.copytree(ROOT / "presets", presets)
    options = ("--models", str(models), "--presets", str(presets))

    def spoil() -> None:
        for number in (1, 2):
            folder = outputs / "tunes" / str(number)
            (folder / "dataset/seen/seen.json").write_bytes(b'[{"file": "000')
            (folder / "log.jsonl").write_bytes(b"\xff\x00")
            (folder / "samples" / os.fsdecode(b"step-\xff.png")).write_bytes(b"")
        (models / os.fsdecode(b"\xff.safetensors")).write_bytes(b"")
        (models / "lora.safetensors").write_bytes(safetensors({"__metadata__": [1], "a": None}))
        (models / "loop.safetensors").symlink_to(models / "loop.safetensors")
        (models / "base").mkdir()
        (models / "base/model_index.json").write_bytes(b"[" * 100_000)
        (presets / "flux1.toml").write_bytes(b"token = [")
        (presets / "mine.toml").mkdir()
        (presets / "looks/styles.toml").write_bytes(b"\xff")
        (presets / "packs/headshots.toml").write_bytes(b"title = 1")

    with running(outputs, *options) as app:
        app.ready()
        for title in ("one", "two"):
            assert post(app, title, dog_photos(4), steps=4).status_code == 201
        assert [app.finished(number)["status"] for number in (1, 2)] == ["trained", "trained"]
        if not before_start:
            spoil()
            assert {path: app.http.get(path).status_code for path in READS} == dict.fromkeys(READS, 200)
        app.stop()
    if before_start:
        spoil()
    with running(outputs, *options) as app:
        app.ready()
        assert {path: app.http.get(path).status_code for path in READS} == dict.fromkeys(READS, 200)
        assert post(app, "three", dog_photos(4), steps=4).status_code == 201
        assert app.finished(3)["status"] == "trained"
        errors = {row["title"]: row["error"] for row in app.http.get("/gallery/tunes").json() if row["error"]}
        assert {"flux1", "\ufffd.safetensors", "lora.safetensors", "loop.safetensors", "base"} <= errors.keys()
