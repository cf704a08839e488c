"""A file that is broken is reported where it belongs; everything else is answered as before."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.helpers.faults import CONTENTS, as_json, instead_of, remove, safetensors, spoiled
from tests.helpers.web import photo, upload
from trainer.library import bases
from trainer.photos.analysis import PhotoAnalyzer
from trainer.photos.intake import Decoder
from trainer.settings import read_settings
from trainer.studio import tunes
from trainer.studio.rows import Services
from trainer.studio.store import Store
from trainer.web import page
from trainer.web.form import Form
from trainer.web.guard import Guard
from trainer.web.rest import create_app

pytest_plugins = ("tests.helpers.web",)

ROOT = Path(__file__).parents[2]
SEEN = [
    {
        "file": "000-64x64.jpg", "name": "rex.png", "kind": "photo", "caption": "A photo of ohwx dog", "width": 64,
        "height": 64, "mask": None,
    }
]  # fmt: skip
LOG = [
    {"step": 0, "event": "started", "at": "2026-11-23T12:34:56.789Z"},
    {"step": 10, "loss": 0.5, "lr": 0.001, "peak_gib": 1.5, "seconds": 2.0},
    {"step": 20, "loss": 0.4, "lr": 0.001, "peak_gib": 1.5, "seconds": 4.0},
]
LORA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
HEADER: dict[str, Any] = {
    "__metadata__": {"ss_sd_model_name": "Tunebooth fast"},
    LORA: {"dtype": "F32", "shape": [4, 768], "data_offsets": [0, 4 * 768 * 4]},
}


class House:
    """The whole web side over a store without a worker: a good tune, and one whose files are spoiled."""

    def __init__(self, folder: Path, decoder: Decoder) -> None:
        shutil.copytree(ROOT / "presets", folder / "presets")
        self.settings = read_settings(
            outputs=folder / "outputs", models=folder / "models", presets=folder / "presets", weights=folder / "weights"
        )
        self.store = Store(self.settings.outputs)
        self.analyzer = PhotoAnalyzer(self.settings)
        self.services = Services(self.settings, self.store, decoder, self.analyzer)
        (folder / "presets" / "mine.toml").write_text("[lora]\nrank = 6\n")
        shutil.copy(ROOT / "presets/packs/headshots.toml", self.packs / "own.toml")
        (self.settings.models / "lora.safetensors").write_bytes(safetensors(HEADER, bytes(4 * 768 * 4)))
        self.good, self.bad = (self.tune(folder, title) for title in ("good", "bad"))
        guard = Guard(
            self.settings,
            load=lambda: page.mount(create_app(self.services), self.services),
            begin=lambda: None,
            unload=lambda: None,
        )
        self.client = TestClient(guard, base_url=self.settings.base_url, raise_server_exceptions=False)

    @property
    def packs(self) -> Path:
        folder = self.settings.outputs / "packs"
        folder.mkdir(exist_ok=True)
        return folder

    def folder(self, tune_id: int) -> Path:
        return self.settings.outputs / "tunes" / str(tune_id)

    def tune(self, folder: Path, title: str) -> int:
        """A trained tune with everything that is read of one."""
        request = {"title": title, "name": "dog", "branch": "fast", "prompts_attributes": [{"text": "ohwx dog"}]}
        tune, _ = tunes.create_tune(self.services, request, [upload(folder / "photos", "rex.png", photo())])
        prompt = tune.prompts[0].id
        self.store.update("tunes", tune.id, status="trained", files=["lora.safetensors"])
        self.store.update("prompts", prompt, status="rendered", files=["0.png"])
        place = self.folder(tune.id)
        for file, content in {
            "dataset/seen/seen.json": as_json(SEEN),
            "log.jsonl": b"".join(as_json(line) + b"\n" for line in LOG),
            "samples/step-000010.png": photo(),
            "model/lora.safetensors": safetensors(HEADER, bytes(4 * 768 * 4)),
            f"prompts/{prompt}/0.png": photo(),
        }.items():
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            (place / file).write_bytes(content)
        return tune.id

    def problems(self, build: bool = False) -> list[str]:
        """The read paths that fail. build: build the page anew, as at a start."""
        found = []
        for path in (
            "/health", "/", "/tunes", f"/tunes/{self.good}", f"/tunes/{self.bad}", "/prompts", "/gallery/tunes",
            "/packs", "/presets",
        ):  # fmt: skip
            answer = self.client.get(path)
            if answer.status_code != 200:
                found.append(f"GET {path}: {answer.status_code}")
        steps: dict[str, Callable[[], object]] = {
            "list_bases": lambda: bases.list_bases(self.settings),
            "live_parts": lambda: page.live_parts(self.services, ("", "", "")),
            "pack_shelf": lambda: page.pack_shelf(self.services),
            "choices": lambda: Form.choices(self.form),
        }
        if build:
            steps["build"] = lambda: page.build(self.services)
        for name, step in steps.items():
            try:
                step()
            except Exception as problem:
                found.append(f"{name}: {type(problem).__name__} {problem!s:.60}")
        return found

    @property
    def form(self) -> Any:
        form = object.__new__(Form)
        form._services = self.services
        return form

    def get(self, path: str) -> Any:
        return self.client.get(path).raise_for_status().json()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, decoder: Decoder) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("house"), decoder)
    with house.client:
        house.client.get("/tunes")
        assert house.problems(build=True) == []
        yield house
    house.analyzer.close()
    house.store.close()


FILES: dict[str, Callable[[House], Path]] = {
    "seen.json": lambda house: house.folder(house.bad) / "dataset/seen/seen.json",
    "log.jsonl": lambda house: house.folder(house.bad) / "log.jsonl",
    "a LoRA": lambda house: house.settings.models / "lora.safetensors",
    "a branch": lambda house: house.settings.presets / "sd15.toml",
    "the default branch": lambda house: house.settings.presets / "flux1.toml",
    "branch fast": lambda house: house.settings.presets / "fast.toml",
    "a preset": lambda house: house.settings.presets / "mine.toml",
    "styles": lambda house: house.settings.presets / "looks/styles.toml",
    "film": lambda house: house.settings.presets / "looks/film.toml",
    "annotators": lambda house: house.settings.presets / "looks/annotators.toml",
    "a pack": lambda house: house.settings.presets / "packs/headshots.toml",
    "a pack of one's own": lambda house: house.packs / "own.toml",
}
INSTEAD = ("a folder", "a link to itself")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("fault", [*CONTENTS, *INSTEAD])
def test_a_broken_file_leaves_the_rest_as_it_is(house: House, kind: str, fault: str) -> None:
    file = FILES[kind](house)
    good = file.read_bytes()
    try:
        if fault in CONTENTS:
            file.write_bytes(CONTENTS[fault](good))
        else:
            instead_of(file)[fault]()
        problems = house.problems(build=file.suffix == ".toml")
    finally:
        remove(file)
        file.write_bytes(good)
    assert problems == []
