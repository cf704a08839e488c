"""The story of a tune: what is saved is described and checked, what goes wrong is told, class pictures are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.helpers.studio import STEPS, Studio
from trainer.branches import sd15
from trainer.config import resolve, train_config
from trainer.config.train_config import TrainConfig
from trainer.methods import lora
from trainer.photos.decoder import Decoder
from trainer.studio import answers, rows
from trainer.training import train
from trainer.training.check import BadArtefact, check_file
from trainer.training.train import quarters

pytest_plugins = ("tests.helpers.web",)


@pytest.fixture
def studio(tmp_path: Path, decoder: Decoder, dog_photos: Callable[[int], list[Path]]) -> Iterator[Studio]:
    """A studio for each test: what goes wrong in one does not show in the next."""
    opened = Studio(tmp_path, decoder, dog_photos(3))
    opened.worker.start()
    yield opened
    opened.close()


# What is saved


def test_a_model_says_what_it_is(studio: Studio) -> None:
    tune = studio.ended(studio.create("my dog", args="rank=5 lr=3e-3"))
    with safe_open(rows.tune_folder(studio.services, tune.id) / "model" / "lora.safetensors", "pt") as file:
        told = file.metadata()
    assert told["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (told["modelspec.title"], told["modelspec.trigger_phrase"]) == ("my dog", "ohwx dog")
    assert (told["ss_network_dim"], told["ss_learning_rate"], told["ss_steps"]) == ("5", "0.003", str(STEPS))
    assert json.loads(told["ss_tag_frequency"]) == {"dataset": {"A photo of ohwx dog": 3}}
    config = TrainConfig(**train_config.parse_args(told["tunebooth.args"]))
    assert (config.rank, config.steps) == (5, STEPS)
    read_by = json.loads(told["tunebooth.read_by"])
    assert read_by.keys() == {"lora.safetensors", "lora_diffusers.safetensors"}
    assert "ComfyUI" in read_by["lora.safetensors"] and "only a part" in read_by["lora_diffusers.safetensors"]
    kept = json.loads((rows.tune_folder(studio.services, tune.id) / "config.json").read_text())
    assert kept == {"base": "Tunebooth fast", **config.model_dump(mode="json")}


def test_a_model_of_mid_run_says_its_step(studio: Studio) -> None:
    tune = studio.ended(studio.create("moments"))
    for step in (6, 9):
        file = rows.tune_folder(studio.services, tune.id) / "checkpoints" / f"step-{step:06d}" / "lora.safetensors"
        with safe_open(file, "pt") as tensors:
            assert tensors.metadata()["ss_steps"] == str(step)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a.alpha": torch.tensor(1.0), "a": torch.zeros(2, 2)}, "nothing but zeros"),
        ({"a": torch.tensor([[1.0, math.nan]])}, "not finite"),
        ({"a": torch.tensor([[1.0, math.inf]])}, "not finite"),
        ({}, "not finite"),
    ],
)
def test_a_file_that_no_training_gives_is_refused(tmp_path: Path, tensors: dict[str, Any], reason: str) -> None:
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(BadArtefact, match=reason):
        check_file(tmp_path / "lora.safetensors")


def test_a_model_that_changes_no_picture_is_not_called_trained(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    before = lora.adapters_of

    def weak(*arguments: Any) -> Any:  # a training that hardly moved
        return {name: (down, torch.full_like(up, 1e-12)) for name, (down, up) in before(*arguments).items()}

    monkeypatch.setattr(lora, "adapters_of", weak)
    tune = studio.ended(studio.create("weak"))
    assert tune.status == "failed" and "changes nothing" in str(tune.error)
    assert not (rows.tune_folder(studio.services, tune.id) / "model").exists()
    assert tune.ckpt_url is None and tune.ckpt_urls == []


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(100, {25: 0.25, 50: 0.5, 75: 0.75, 100: 1.0}), (4, {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}), (1, {1: 1.0})],
)
def test_a_run_has_four_quarters(steps: int, expected: dict[int, float]) -> None:
    assert quarters(steps) == expected


# What goes wrong


class Once:
    """`sd15.SD15.loss` that goes wrong at some calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[int, Any], Any]) -> None:
        plain, self.calls = sd15.SD15.loss, 0

        def loss(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            return wrong(self.calls, plain(*arguments, **named))

        monkeypatch.setattr(sd15.SD15, "loss", loss)


def test_a_full_card_ends_the_tune_in_words_and_the_next_one_runs(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(call: int, loss: Any) -> Any:
        if call == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    Once(monkeypatch, full)
    first, second = studio.create("too large"), studio.create("after it")
    failed = studio.ended(first)
    assert failed.status == "failed"
    assert "micro_batch=1 gradient_checkpointing=true" in str(failed.error)
    assert studio.ended(second).status == "trained"


def test_a_loss_that_is_once_not_finite_gives_a_warning(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    Once(monkeypatch, lambda call, loss: loss * math.nan if call == 5 else loss)
    tune = studio.ended(studio.create("a bump", args="save_every=4 micro_batch=4"))
    assert tune.status == "trained"
    (told,) = [warning for warning in tune.warnings if "not a finite number" in warning]
    assert "went back to step 4" in told and "learning rate 0.0004" in told and ".jpg" in told


def test_a_loss_that_stays_no_number_fails_and_names_the_photos(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    Once(monkeypatch, lambda call, loss: loss * math.nan if call > 5 else loss)
    tune = studio.ended(studio.create("hopeless", args="save_every=4"))
    assert tune.status == "failed"
    assert "not a finite number" in str(tune.error) and ".jpg" in str(tune.error)
    assert not (rows.tune_folder(studio.services, tune.id) / "model").exists()
    assert studio.states(tune.id) == ["step-000000", "step-000004"]


def test_a_preview_that_finds_no_room_costs_only_itself(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "write_picture", full)
    tune = studio.ended(studio.create("no previews"))
    assert tune.status == "trained" and answers.saved_snapshots(studio.services, tune.id) == []


# The card


def test_a_card_with_little_memory_changes_how_and_not_what(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.work.job_runner.free_gib", lambda device: 30.0)
    row = {"id": 1, "branch": "flux1", "method": "lora", "args": flux_args(studio)}
    (rows.tune_folder(studio.services, 1)).mkdir(parents=True)
    (rows.tune_folder(studio.services, 1) / "request.json").write_text('{"args": null}')
    bench = train_bench(studio)
    config = bench._fitted(row)
    assert (config.micro_batch, config.gradient_checkpointing, config.batch) == (1, True, 4)
    (rows.tune_folder(studio.services, 1) / "config.json").write_text(
        "{}"
    )  # begun: it goes on as it began, on whatever card
    monkeypatch.setattr("trainer.work.job_runner.free_gib", lambda device: 200.0)
    assert bench._fitted(row | {"args": train_config.as_args(config)}) == config


def test_a_card_that_is_too_small_is_reported_before_loading(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.work.job_runner.free_gib", lambda device: 22.1)
    row = {"id": 1, "branch": "flux1", "method": "lora", "args": flux_args(studio)}
    with pytest.raises(RuntimeError, match=r"flux1 needs a card with 26 GiB of free memory; there are 22\.1 GiB"):
        train_bench(studio)._fitted(row)


def flux_args(studio: Studio) -> str:
    asked = {"branch": "flux1", "model_type": "lora", "preset": None, "name": "dog", "steps": None, "args": None}
    return train_config.as_args(resolve.resolve(studio.settings.presets, photos=8, **asked))


def train_bench(studio: Studio) -> Any:
    import threading

    from trainer.work.job_runner import JobRunner

    return JobRunner(studio.settings, studio.store, studio.analyzer, torch.device("cpu"), threading.Event())


# Class pictures


@pytest.mark.long
def test_class_pictures_are_made_once_and_their_loss_counts(studio: Studio) -> None:
    args = "prior_weight=1 prior_images=3"
    first = studio.ended(studio.create("with prior", args=args))
    folder = next((studio.settings.outputs / "cache" / "class").iterdir())
    assert folder.name.endswith("-dog-64")
    made = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(made) == 3
    second = studio.ended(studio.create("with prior again", args=args))
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == made
    without = studio.ended(studio.create("without prior"))
    weights = [studio.weights(tune.id) for tune in (first, second, without)]
    key = next(name for name in weights[0] if name.endswith("lora_up.weight"))
    again, other = (float((one[key] - weights[0][key]).abs().max()) for one in weights[1:])
    assert again < 0.01 * other  # the base is loaded anew for each tune, so that rounding may differ
    assert all(one["kind"] == "photo" for one in answers.trained_pictures(studio.services, first.id))


# TensorBoard


@pytest.mark.long
def test_tensorboard_files_are_written_only_where_they_are_asked_for(
    tmp_path: Path, decoder: Decoder, dog_photos: Callable[[int], list[Path]]
) -> None:
    for asked in (False, True):
        studio = Studio(tmp_path / str(asked), decoder, dog_photos(1), tensorboard=asked)
        studio.worker.start()
        tune = studio.ended(studio.create("board"))
        studio.close()
        files = list((rows.tune_folder(studio.services, tune.id) / "tensorboard").glob("events.*"))
        assert tune.status == "trained" and len(files) == asked
        assert all(file.stat().st_size > 100 for file in files)
