"""A room to render in: a renderer with tiny bases, and its pictures.

A pytest plugin: a module that wants the fixtures says `pytest_plugins = ("tests.helpers.web",
"tests.helpers.rendering")`. Its asserts are plain ones (PYTEST_DONT_REWRITE), so it may be imported for its functions
before pytest takes it in.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

from tests.helpers import tiny, training  # training: it spares the garbage collector the libraries' objects
from tests.helpers.fast import FAST_ID
from tests.helpers.pictures import apart, esrgan, pixels
from trainer.branches import protocol
from trainer.contract.errors import AnalysisUnavailable
from trainer.contract.photos import Photo, Upload
from trainer.contract.prompts import Prompt
from trainer.library import weights
from trainer.library.bases import hashed_id
from trainer.methods import checkpoint, lora
from trainer.names import FORMATS
from trainer.photos.decoder import Decoder
from trainer.photos.found import Found
from trainer.rendering.pictures import read_facts
from trainer.settings import read_settings
from trainer.studio import prompts, rows
from trainer.studio.rows import Services
from trainer.studio.store import Job, Store
from trainer.studio.tunes import create_tune, get_tune
from trainer.work.job_runner import JobRunner

CPU = torch.device("cpu")
FAMILIES = ["sd15", "sdxl1", "flux1"]
SMALL = {"steps": 2, "w": 64, "h": 64}  # what the presets say here
# Of 255. Where a matrix was loaded decides in which order a kernel sums, and LoRAs are loaded again between prompts.
ROUNDING = 1
CLOSE = 2  # of 255: the same numbers in another batch are rounded otherwise


# A studio without a thread: a prompt is rendered when the test says so


@dataclass
class Eyes:
    """Stands in for the child that looks at pictures, and finds what a test puts there."""

    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)  # of faces
    things: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)  # boxes by their names
    why_not: str = ""
    seen: list[Image.Image] = field(default_factory=list)

    def faces(self, picture: Path, progress: Any = None) -> list[Found]:
        self._look(picture)
        return [Found(box, 1.0, ((0.0, 0.0),) * 5, 0.0) for box in self.boxes]

    def restore(self, picture: Path, faces: list[Found], strength: float, progress: Any = None) -> None:
        """A restored face is one turned into its negative."""
        image = self._look(picture)
        for face in faces:
            box = tuple(map(int, face.box))
            image.paste(ImageOps.invert(image.crop(box)), box)
        image.save(picture)

    def mask(self, picture: Path, words: str, progress: Any = None) -> bytes | None:
        size = self._look(picture).size
        if words not in self.things:
            return None
        mask = Image.new("L", size)
        mask.paste(255, self.things[words])
        mask.save(file := picture.with_name("mask.png"))
        content = file.read_bytes()
        file.unlink()
        return content

    def identify(
        self, folder: Path, photos: list[Photo], name: str, progress: Any = None
    ) -> tuple[list[Photo], list[str]]:
        (folder / "model").mkdir()
        identity = torch.nn.functional.normalize(torch.randn(128), dim=0)
        save_file({"identity": identity}, folder / "model" / FORMATS["faceid"])
        return photos, []

    def _look(self, picture: Path) -> Image.Image:
        if self.why_not:
            raise AnalysisUnavailable(self.why_not)
        with Image.open(picture) as opened:
            self.seen.append(opened.convert("RGB"))
        return self.seen[-1].copy()


@dataclass
class Done:
    """A prompt that has ended, with its files."""

    prompt: Prompt
    folder: Path

    @property
    def pictures(self) -> list[Image.Image]:
        files = sorted(file for file in self.folder.glob("[0-9]*.*") if ".thumb" not in file.name)
        return [Image.open(file).convert("RGB") for file in files]

    @property
    def picture(self) -> Image.Image:
        (only,) = self.pictures
        return only

    @property
    def facts(self) -> dict[str, Any]:
        return read_facts(next(self.folder.glob("0.[pj]*")))

    @property
    def warnings(self) -> list[str]:
        return self.prompt.warnings


class Room:
    """One outputs folder with its store and verbs; benches, each of which keeps a base loaded; tunes made by hand."""

    def __init__(self, folder: Path, decoder: Decoder, photo: Path, bases: Mapping[str, Path]) -> None:
        shutil.copytree(training.PRESETS, folder / "presets")
        for branch in bases:
            file = folder / "presets" / f"{branch}.toml"
            before, table, after = file.read_text().partition("[render]\n")
            lines = after.split("\n")
            small = [next((f"{key} = {SMALL[key]}" for key in SMALL if line.startswith(f"{key} = ")), line)
                     for line in lines]  # fmt: skip
            file.write_text(before + table + "\n".join(small))
            shutil.copytree(bases[branch], folder / "models" / branch)
        for name in ("outputs", "weights"):
            (folder / name).mkdir()
        self.settings = read_settings(
            device="cpu", **{name: folder / name for name in ("outputs", "models", "presets", "weights")}
        )
        self.store = Store(self.settings.outputs)
        self.store._db.execute("PRAGMA synchronous=OFF")  # nothing here outlives a power cut
        self.eyes = Eyes()
        self.services = Services(self.settings, self.store, decoder, self.eyes)  # type: ignore[arg-type]
        self.stopping = threading.Event()
        self._photo = Upload(photo.name, photo)
        self._benches: dict[str, JobRunner] = {}
        self._tunes = 0

    def new_bench(self) -> JobRunner:
        return JobRunner(self.settings, self.store, self.eyes, CPU, self.stopping)  # type: ignore[arg-type]

    def bench(self, branch: str) -> JobRunner:
        if branch not in self._benches:
            self._benches[branch] = self.new_bench()
        return self._benches[branch]

    def renderer(self, branch: str) -> Any:
        return self.bench(branch)._renderer

    def pipeline(self, branch: str) -> Any:
        """The loaded one; there is one once something was rendered."""
        return self.renderer(branch)._loaded.branch.pipeline

    def base(self, branch: str) -> Path:
        return self.settings.models / branch

    def tune(
        self, branch: str = "sd15", kind: str = "lora", seed: int = 1, words: str | None = None, **more: Any
    ) -> int:
        """A tune that is trained, its LoRA random; kind `whole`: a checkpoint of the base's own weights."""
        self._tunes += 1
        asked: dict[str, Any] = {"title": f"tune {self._tunes}", "name": "dog", "token": "ohwx"}
        if kind == "faceid":
            asked = {"title": f"tune {self._tunes}", "name": "man"}
        base = FAST_ID if branch == "fast" else hashed_id(branch)
        asked |= {"base_tune_id": base, "model_type": "checkpoint" if kind == "whole" else kind}
        tune_id = create_tune(self.services, asked | more, [self._photo])[0].id
        if kind == "faceid":
            return tune_id
        job = self._claim()
        model = rows.tune_folder(self.services, tune_id) / "model"
        model.mkdir()
        if kind == "whole":
            loaded = protocol.load_branch(self.base_of(branch), CPU, self.settings.outputs / "cache")
            checkpoint.write(loaded, model / FORMATS["checkpoint"], torch.float32, {})
        else:
            self.write_lora(model / lora.DIFFUSERS_FILE, branch, seed, words)
        self.store.finish(job, "trained", files=[file.name for file in model.iterdir()])
        return tune_id

    def write_lora(self, file: Path, branch: str, seed: int, words: str | None = None) -> Path:
        return tiny.make_tiny_lora(file, self.base_of(branch).path or Path(), seed, words=words)

    def base_of(self, branch: str) -> Any:
        from trainer.library.bases import list_bases

        number = FAST_ID if branch == "fast" else hashed_id(branch)
        return next(base for base in list_bases(self.settings) if base.id == number)

    def _claim(self) -> Job:
        job = self.store.claim()
        assert job is not None and self.store.queue_length() == 1, "every test takes its own jobs off the queue"
        return job

    def run(self, at: int, text: str = "ohwx dog", bench: JobRunner | None = None, **asked: Any) -> Done:
        """A prompt of a tune, or of a base with models in its text, whatever becomes of it."""
        prompt = prompts.create_prompt(self.services, at, {"text": text, "num_images": 1, "seed": 7, **asked})
        return self.go(prompt, bench)

    def go(self, prompt: Prompt, bench: JobRunner | None = None) -> Done:
        job = self._claim()
        assert job.prompt_id == prompt.id
        branch = get_tune(self.services, prompt.tune_id).branch
        (bench or self.bench(branch)).run(job)
        now = prompts.get_prompt(self.services, prompt.id)
        home = self.settings.outputs / rows.prompt_home(rows.row_of(self.services, "prompts", now.id))
        return Done(now, home / "prompts" / str(now.id))

    def render(self, at: int, text: str = "ohwx dog", bench: JobRunner | None = None, **asked: Any) -> Done:
        done = self.run(at, text, bench, **asked)
        assert (done.prompt.status, done.prompt.error) == ("rendered", None), done.prompt.error
        return done

    def leftovers(self) -> list[str]:
        return [
            path.name for path in self.settings.outputs.rglob("*") if ".part" in path.name or "previews/" in str(path)
        ]


@pytest.fixture(scope="module")
def open_room(
    tmp_path_factory: pytest.TempPathFactory, decoder: Decoder, photos: list[Path], request: pytest.FixtureRequest
) -> Iterator[Room]:
    """The room of all tests of a module: what is loaded for one stays for the next."""
    yield from opened(tmp_path_factory.mktemp("room"), decoder, photos[0], request)


@pytest.fixture
def room(open_room: Room, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    yield from tidied(open_room, monkeypatch)


@pytest.fixture(scope="module")
def tunes(open_room: Room) -> dict[str, int]:
    """A LoRA for each family."""
    return {branch: open_room.tune(branch) for branch in FAMILIES}


def opened(folder: Path, decoder: Decoder, photo: Path, request: pytest.FixtureRequest) -> Iterator[Room]:
    """A room with all families and an upscaler, closed at the end."""
    made = Room(folder, decoder, photo, {branch: request.getfixturevalue(f"tiny_{branch}") for branch in FAMILIES})
    torch.save({"params_ema": esrgan()}, made.settings.weights / weights.UPSCALER.name)
    yield made
    made.store.close()


def tidied(room: Room, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    """The room for one test, with nobody on the pictures; its weights are not the published files."""
    monkeypatch.setattr(weights, "UPSCALER", replace(weights.UPSCALER, sha256=None))
    published = weights.face_adapter
    monkeypatch.setattr(weights, "face_adapter", lambda *asked: replace(published(*asked), sha256=None))
    vars(room.eyes).update(vars(Eyes()))
    yield room
    room.stopping.clear()
    while job := room.store.claim():  # of a test that has failed
        room.store.finish(job, "canceled")


def unlike(one: Image.Image, other: Image.Image) -> bool:
    """Of another size, or apart by more than rounding."""
    return one.size != other.size or apart(one, other) > ROUNDING


def far(one: Image.Image, other: Image.Image) -> float:
    """Mean distance of two pictures, in levels of 255."""
    return float(abs(pixels(one) - pixels(other)).mean())


def outside(one: Image.Image, other: Image.Image, boxes: list[tuple[int, int, int, int]]) -> int:
    """How far apart two pictures are where no box lies."""
    levels = abs(pixels(one) - pixels(other))
    for left, top, right, bottom in boxes:
        levels[top:bottom, left:right] = 0
    return int(levels.max())
