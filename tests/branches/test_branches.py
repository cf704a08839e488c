"""Every family, each preset, resumed and whole, through REST and the worker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open

from tests.helpers.studio import Studio, same
from tests.helpers.web import client_of, multipart
from trainer.branches import loading
from trainer.contract.tunes import Tune
from trainer.names import FORMATS
from trainer.photos.decoder import Decoder
from trainer.studio import answers, models, rows, tunes

pytest_plugins = ("tests.helpers.web",)

ROOT = Path(__file__).parents[2]
STEPS = 4


@dataclass(frozen=True)
class Case:
    """One way through the program. kind: of the base, `folder` or `file`; name: the class name."""

    branch: str
    kind: str
    preset: str | None = None
    name: str = "dog"
    args: str = ""
    model_type: str = "lora"

    @property
    def method(self) -> str:
        """What is trained: sdxl1 takes lora for pti."""
        return "pti" if (self.branch, self.model_type) == ("sdxl1", "lora") else self.model_type

    def __str__(self) -> str:
        return f"{self.branch} {self.model_type} {self.kind} {self.preset or 'null'} {self.name} {self.args}".strip()


CASES = [  # in the default run
    Case("flux1", "folder", "flux-lora-portrait", "woman"),
]
MORE_CASES = [
    Case("sd15", "folder", args="prior_images=2", model_type="checkpoint"),
    Case("sdxl1", "folder"),
    Case("sd15", "file", args="prior_weight=1 prior_images=2"),
    Case("sd15", "folder"),
    Case("sd15", "folder", "mine"),
    Case("sdxl1", "file", args="batch=3 micro_batch=2 crops=2"),
    Case("sdxl1", "folder", "mine"),
    Case("flux1", "folder"),
    Case("flux1", "file"),
    Case("flux1", "folder", "flux-lora-fast"),
    Case("flux1", "folder", "flux-lora-focus", "woman"),
    Case("flux1", "folder", "flux-lora-focus", "dog", "resolution=64,128"),
    Case("flux1", "folder", "flux-lora-focus", "style"),
    Case("flux1", "folder", "mine", args="gradient_checkpointing=true"),
    Case("sd15", "file", args="optimizer=adafactor trained_dtype=bfloat16 prior_images=2", model_type="checkpoint"),
    Case("sd15", "folder", model_type="pti"),
    Case("sd15", "file", "mine", args="text_encoder_lr=1e-3", model_type="pti"),
    Case("sdxl1", "file", args="prior_images=2 gradient_checkpointing=true", model_type="checkpoint"),
    Case("flux1", "folder", model_type="pti"),
    Case("flux1", "file", model_type="checkpoint"),
]


@pytest.fixture(scope="module")
def studio(
    tmp_path_factory: pytest.TempPathFactory,
    decoder: Decoder,
    dog_photos: Callable[[int], list[Path]],
    request: pytest.FixtureRequest,
) -> Iterator[Studio]:
    """A studio with a tiny base of each family in its models folder, as folder and as file, and a preset of its own."""
    folder = tmp_path_factory.mktemp("families")
    presets = Path(shutil.copytree(ROOT / "presets", folder / "presets"))
    (presets / "mine.toml").write_text('[lora]\nrank = 3\nalpha = 6.0\nschedule = "linear"\n')
    for branch in ("sd15", "sdxl1", "flux1"):
        base: Path = request.getfixturevalue(f"tiny_{branch}")
        file: Path = request.getfixturevalue(f"tiny_{branch}_file")
        shutil.copytree(base, folder / "models" / f"{branch}-folder")
        shutil.copy(file, folder / "models" / f"{branch}-file.safetensors")
        shutil.copytree(file.with_suffix(""), folder / "models" / f"{branch}-file")
    opened = Studio(folder, decoder, dog_photos(3), presets=presets)
    opened.worker.start()
    yield opened
    opened.close()


def post(studio: Studio, case: Case, title: str) -> dict[str, Any]:
    """Create a tune of four steps through REST, with real photos, one of them captioned."""
    title_of_base = f"{case.branch}-{case.kind}" + (".safetensors" if case.kind == "file" else "")
    bases = {base["title"]: base["id"] for base in models.list_base_tunes(studio.services)}
    size = "" if "resolution=" in case.args else "resolution=64"
    fields: list[tuple[str, Any]] = [
        ("tune[title]", title),
        ("tune[name]", case.name),
        ("tune[base_tune_id]", str(bases[title_of_base])),
        ("tune[model_type]", case.model_type),
        ("tune[steps]", str(STEPS)),
        ("tune[args]", f"lr=1e-2 save_every=100 {size} {case.args}"),
        *([("tune[preset]", case.preset)] if case.preset else []),
        ("tune[prompts_attributes][][text]", f"ohwx {case.name} in the snow"),
        ("tune[prompts_attributes][][num_images]", "1"),
        ("tune[prompts_attributes][][steps]", "2"),
        ("tune[prompts_attributes][][w]", "64"),
        ("tune[prompts_attributes][][h]", "64"),
        ("tune[images][]", ("one.txt", b"ohwx dog on a sofa")),
    ]
    fields += [
        ("tune[images][]", (f"{name}.jpg", photo.read_bytes()))
        for name, photo in zip(("one", "two", "three"), studio.photos, strict=True)
    ]
    content, headers = multipart(fields)
    answer = client_of(studio.services).post("/tunes", content=content, headers=headers)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in MORE_CASES)], ids=str
)
def test_a_family_and_a_preset_train_and_a_resumed_run_ends_the_same(studio: Studio, case: Case) -> None:
    whole = studio.ended(post(studio, case, f"whole, {case}")["id"])
    assert_trained(studio, case, whole)
    kept = FORMATS["checkpoint" if case.model_type == "checkpoint" else "kohya"]
    stopped = whole.id + 1
    studio.store.at_step[stopped, 2] = lambda: tunes.cancel_tune(studio.services, stopped)
    assert post(studio, case, f"stopped, {case}")["id"] == stopped
    assert studio.ended(stopped).status == "canceled"
    assert studio.states(stopped) == ["step-000000", "step-000002"]
    tunes.resume_tune(studio.services, stopped)
    assert studio.ended(stopped).status == "trained"
    assert studio.events(stopped) == [("started", 0), ("resumed", 2)]
    assert same(studio.weights(stopped, kept), studio.weights(whole.id, kept))


def assert_trained(studio: Studio, case: Case, tune: Tune) -> None:
    """A tune that says trained has a model that works elsewhere, pictures, and says what it did not do."""
    assert (tune.status, tune.error, tune.branch) == ("trained", None, case.branch)
    assert [(prompt.status, prompt.error) for prompt in tune.prompts] == [("rendered", None)]
    folder = rows.tune_folder(studio.services, tune.id)
    expected = {"ohwx dog on a sofa", "ohwx style" if case.name == "style" else f"A photo of {tune.token} {case.name}"}
    assert {one["caption"] for one in answers.trained_pictures(studio.services, tune.id)} == expected
    resolutions = 2 if "resolution=64,128" in case.args else 1
    assert len(answers.trained_pictures(studio.services, tune.id)) == 3 * resolutions
    assert [moment["step"] for moment in answers.saved_snapshots(studio.services, tune.id)] == [1, 2, 3, 4]
    assert len(studio.pictures(tune.id)) == 1
    row = studio.store.get("tunes", tune.id)
    assert row is not None and row["method"] == case.method
    with safe_open(folder / "model" / row["files"][0], "pt") as file:
        told = file.metadata()
    assert told["modelspec.trigger_phrase"] == f"{tune.token} {case.name}"
    assert (told["ss_steps"], told["ss_seed"]) == (str(STEPS), "42")
    masked = case.preset in ("flux-lora-portrait", "flux-lora-focus") and case.name != "style"
    assert any(warning.startswith("no mask of the") for warning in tune.warnings) == masked  # no weights lie here
    assert any("trains pti where lora is asked" in told for told in tune.warnings) == (case.method != case.model_type)
    assert "micro_batch=0" not in str(tune.args)  # what was made of it stands there
    if case.method == "checkpoint":
        assert not (folder / "state").exists() and not (folder / "checkpoints").exists()  # each as large as the model
        return
    options = {"safety_checker": None} if case.branch == "sd15" else {}
    base = DiffusionPipeline.from_pretrained(
        studio.settings.models / f"{case.branch}-folder", local_files_only=True, **options
    )
    base.load_lora_weights(folder / "model", weight_name="lora_diffusers.safetensors")
    assert base.get_active_adapters()
    assert (folder / "model" / "lora_emb.safetensors").exists() == (case.method == "pti")


def test_a_preview_is_the_first_prompt_and_changes_as_it_learns(studio: Studio) -> None:
    tune = studio.ended(post(studio, Case("sdxl1", "folder"), "previews")["id"])
    samples = sorted((rows.tune_folder(studio.services, tune.id) / "samples").glob("*.png"))
    pictures = [Image.open(sample).convert("RGB") for sample in samples]
    assert [picture.size for picture in pictures] == [(64, 64)] * 4
    assert len({picture.tobytes() for picture in pictures}) == 4


@pytest.mark.long
@pytest.mark.parametrize("branch", ["sd15", "sdxl1", "flux1"])
def test_weights_in_half_precision_train_and_render(
    studio: Studio, branch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a card computes in: frozen weights in bfloat16, adapters and VAE in float32. Here by the CPU, slowly."""
    monkeypatch.setattr(loading, "compute_dtype", lambda device: torch.bfloat16)
    tune = studio.ended(post(studio, Case(branch, "folder", args="warmup_steps=0 targets=all"), f"half {branch}")["id"])
    assert (tune.status, tune.error) == ("trained", None)
    assert [(prompt.status, prompt.error) for prompt in tune.prompts] == [("rendered", None)]
    assert len(studio.pictures(tune.id)) == 1


# Memory

GROWTH = """
import gc, shutil, sys
from pathlib import Path
import psutil, torch
from trainer.config import resolve
from trainer.library.bases import Base
from trainer.settings import read_settings
from trainer.training.train import train_tune

class Report:
    def stage(self, stage): pass
    def step(self, *facts): return True
    def saved(self, step): pass
    def resumed(self, step): pass
    def warn(self, message): pass

folder, photo, bases = Path(sys.argv[1]), sys.argv[2], [argument.split("=") for argument in sys.argv[3:]]
settings = read_settings(outputs=folder / "outputs", models=folder / "models")
sizes = []
for number in range(1, 14):
    branch, base = bases[number % len(bases)] if number > len(bases) else bases[number - 1]
    images = settings.outputs / "tunes" / str(number) / "images"
    images.mkdir(parents=True)
    shutil.copy(photo, images / "000.png")
    config = resolve.resolve(settings.presets, branch=branch, model_type="lora", preset=None, name="dog", photos=1,
                             steps=4, args="resolution=64 micro_batch=1 lr=1e-2")
    tune = {"id": number, "title": "t", "token": "ohwx", "name": "dog", "method": "lora",
            "photos": [{"file": "000.png", "name": "a"}]}
    train_tune(tune, Base(1, "b", branch, path=Path(base)), config, settings, torch.device("cpu"), Report(), "ohwx dog")
    gc.collect()
    sizes.append(psutil.Process().memory_info().rss)
print(*sizes)
"""


@pytest.mark.long
def test_memory_does_not_grow_over_ten_tunes_in_one_process(
    tmp_path: Path, photos: list[Path], tiny_sd15: Path, tiny_sdxl1: Path, tiny_flux1: Path
) -> None:
    (tmp_path / "grow.py").write_text(GROWTH)
    bases = [f"sd15={tiny_sd15}", f"sdxl1={tiny_sdxl1}", f"flux1={tiny_flux1}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "grow.py", str(tmp_path), str(photos[0]), *bases],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sizes = [int(size) for size in done.stdout.split()]
    warm = sizes[2]  # each family once: what libraries keep for good is there
    assert len(sizes) == 13 and sizes[-1] <= 1.05 * warm, sizes
