"""A studio for tests: one outputs folder with its store, the verbs and a worker, and what came of its tunes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.helpers.analyzer import SharedAnalyzer
from trainer.contract.photos import Upload
from trainer.contract.states import ENDED
from trainer.contract.tunes import Tune
from trainer.files import read_json_lines
from trainer.photos.decoder import Decoder
from trainer.settings import read_settings
from trainer.studio import rows, tunes
from trainer.studio.rows import Services
from trainer.studio.store import Store
from trainer.work.worker import Worker

PROMPT = {"text": "ohwx dog", "num_images": 1, "steps": 4, "seed": 7}
STEPS = 12
PATIENCE_S = 180.0  # until a test gives up on a job that hangs; nothing is measured by it


class Watched(Store):
    """A store that does something at an exact step of a tune: the loop asks it after each step whether to go on."""

    def __init__(self, outputs: Path) -> None:
        super().__init__(outputs)
        self.at_step: dict[tuple[int, int], Callable[[], object]] = {}  # (tune, step of its first run)
        self.at_photos: dict[int, Callable[[], object]] = {}  # by tune: while its photos are looked at
        self._asked: Counter[int] = Counter()

    def cancel_wanted(self, table: Any, row_id: int) -> bool:
        row = self.get(table, row_id) or {}
        if "photos" in row and row["progress"]["stage"].startswith(("photos", "faces")):
            self.at_photos.pop(row_id, lambda: None)()
        elif table == "tunes":
            if act := self.at_step.pop((row_id, self._asked[row_id]), None):
                act()
            self._asked[row_id] += 1
        return super().cancel_wanted(table, row_id)


class Studio:
    """One outputs folder with its store, the verbs and a worker."""

    def __init__(self, folder: Path, decoder: Decoder, photos: list[Path], **settings: Any) -> None:
        folders = {"outputs": folder / "outputs", "models": folder / "models"}
        self.settings = read_settings(**folders, device="cpu", **settings)
        self.store = Watched(self.settings.outputs)
        self.analyzer = SharedAnalyzer(self.settings)
        self.services = Services(self.settings, self.store, decoder, self.analyzer)
        self.worker = Worker(self.settings, self.store, self.analyzer)
        self.photos = photos

    def create(self, title: str, **more: Any) -> int:
        """Queue a tune of twelve steps with a prompt of one picture."""
        request = {"title": title, "name": "dog", "branch": "fast", "steps": STEPS, "prompts_attributes": [PROMPT]}
        uploads = [Upload(path.name, path) for path in self.photos]
        return tunes.create_tune(self.services, request | more, uploads)[0].id

    def ended(self, tune_id: int) -> Tune:
        """The tune, once it and its prompts have ended."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            tune = tunes.get_tune(self.services, tune_id)
            if tune.status in ENDED and all(prompt.status in ENDED for prompt in tune.prompts):
                return tune
            time.sleep(0.05)
        pytest.fail(f"tune {tune_id} did not end: {tune.status}, {tune.progress}")

    def close(self) -> None:
        self.worker.stop()
        self.analyzer.close()
        self.store.close()

    def events(self, tune_id: int) -> list[tuple[str, int]]:
        """(started or resumed, at which step), from the tune's log."""
        lines = read_json_lines(rows.tune_folder(self.services, tune_id) / "log.jsonl")
        return [(line["event"], line["step"]) for line in lines if "event" in line]

    def states(self, tune_id: int) -> list[str]:
        return sorted(path.name for path in (rows.tune_folder(self.services, tune_id) / "state").iterdir())

    def weights(self, tune_id: int, file: str = "lora.safetensors") -> dict[str, torch.Tensor]:
        return load_file(rows.tune_folder(self.services, tune_id) / "model" / file)

    def pictures(self, tune_id: int) -> list[Image.Image]:
        """All pictures of a tune's prompts, loaded."""
        folder, prompts = (
            rows.tune_folder(self.services, tune_id) / "prompts",
            self.store.find("prompts", tune_id=tune_id),
        )
        return [Image.open(folder / str(row["id"]) / file) for row in reversed(prompts) for file in row["files"]]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two models are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
