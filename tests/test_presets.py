"""Hyper-parameters: defaults <- preset <- request, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from trainer import presets
from trainer.presets import TrainConfig
from trainer.schema import InvalidRequest
from trainer.settings import Settings

NOTHING_ASKED: dict[str, Any] = {"branch": "sd15", "model_type": "lora", "preset": None, "steps": None, "args": None}


@pytest.fixture
def folder(settings: Settings, tmp_path: Path) -> Path:
    """A copy of the presets folder, for a user's own files."""
    return Path(shutil.copytree(settings.presets, tmp_path / "presets"))


def resolve(folder: Path, photos: int = 8, **asked: Any) -> TrainConfig:
    return presets.resolve(folder, photos=photos, **(NOTHING_ASKED | asked))


def problem_of(folder: Path, **asked: Any) -> dict[str, list[str]]:
    with pytest.raises(InvalidRequest) as refused:
        resolve(folder, **asked)
    return refused.value.problems


@pytest.mark.parametrize("branch", ["sd15", "fast"])
def test_the_defaults_of_each_branch_resolve(folder: Path, branch: str) -> None:
    table = presets.branch_table(folder, branch)["lora"]
    config = resolve(folder, branch=branch)
    own = {key: value for key, value in config if key != "steps"}
    assert own == {key: value for key, value in table.items() if key not in presets.STEP_RULE}
    assert table["min_steps"] <= config.steps <= table["max_steps"]
    assert presets.render_config(folder, branch).steps > 0
    assert presets.default_token(folder, branch)


def test_steps_follow_the_number_of_photos_within_limits(folder: Path) -> None:
    table = presets.branch_table(folder, "sd15")["lora"]
    counted = {photos: resolve(folder, photos=photos).steps for photos in (1, 12, 100)}
    assert counted == {1: table["min_steps"], 12: 12 * table["steps_per_photo"], 100: table["max_steps"]}


def test_what_is_asked_for_wins(folder: Path) -> None:
    config = resolve(folder, args="rank=4 lr=2e-4 targets=attention", steps=7)
    assert (config.rank, config.lr, config.targets, config.steps) == (4, 2e-4, "attention", 7)
    assert config.alpha == resolve(folder).alpha  # and the rest stays


def test_a_batch_is_no_larger_than_the_number_of_photos_unless_asked_for(folder: Path) -> None:
    assert resolve(folder, branch="fast", photos=2).batch == 2
    assert resolve(folder, branch="fast", photos=2, args="batch=3").batch == 3


def test_an_unknown_word_is_refused_with_the_nearest(folder: Path) -> None:
    first = problem_of(folder, args="rnak=4")["args"][0]
    assert "'rnak'" in first and "mean 'rank'" in first


@pytest.mark.parametrize(
    "args", ["rank=0", "rank=x", "rank=", "rank", "rank=4 rank=8", "lr=nan", "max_grad_norm=inf", "resolution=500"]
)
def test_a_bad_value_is_refused(folder: Path, args: str) -> None:
    problems = problem_of(folder, args=args)
    assert problems.keys() == {"args"}
    assert args.partition("=")[0] in problems["args"][0]


def test_steps_given_twice_are_refused(folder: Path) -> None:
    assert problem_of(folder, args="steps=5", steps=5).keys() == {"args"}
    assert resolve(folder, args="steps=5").steps == resolve(folder, steps=5).steps == 5


def test_steps_out_of_range_are_blamed_on_steps(folder: Path) -> None:
    assert problem_of(folder, steps=10_001).keys() == {"steps"}
    assert problem_of(folder, steps=10_001, args="rank=4").keys() == {"steps"}


@pytest.mark.parametrize("branch", ["sd15", "fast"])
@pytest.mark.parametrize("asked", [None, "lr=1.23456789e-05 alpha=0.1 weight_decay=0.30000000000000004"])
def test_args_read_back_as_the_very_same_configuration(folder: Path, branch: str, asked: str | None) -> None:
    config = resolve(folder, branch=branch, args=asked)
    args = presets.as_args(config)
    assert TrainConfig(**presets.parse_args(args)) == config
    assert resolve(folder, branch=branch, args=args) == config


def test_a_preset_of_the_user_s_own_is_listed_and_applied(folder: Path) -> None:
    assert "mine" not in presets.list_presets(folder)
    (folder / "mine.toml").write_text("[lora]\nrank = 6\nsteps_per_photo = 200\n")
    assert "mine" in presets.list_presets(folder)
    assert not {"sd15", "fast"} & set(presets.list_presets(folder))
    config = resolve(folder, preset="mine", photos=5)
    assert (config.rank, config.steps) == (6, 1000)
    assert resolve(folder, preset="mine", args="rank=3").rank == 3  # the request wins over the preset


@pytest.mark.parametrize(
    ("toml", "reasons"),
    [
        ("[lora]\nrnak = 6", ("mine.toml", "'rnak'", "mean 'rank'")),
        ("[lora]\nsteps = 6", ("mine.toml", "unknown key 'steps'")),
        ("[lora]\nsteps_per_photo = 'many'", ("mine.toml", "steps_per_photo must be a whole number")),
        ("[lora]\nrank = 0", ("rank", "greater than or equal to 1")),
        ("[lora]\nmin_steps = 20000\nmax_steps = 20000", ("steps", "less than or equal to 10000")),
        ("lora = 3", ("mine.toml", "[lora]")),
        ("[lora", ("mine.toml", "cannot be read")),
    ],
)
@pytest.mark.parametrize("args", [None, "lr=1e-5"])
def test_a_broken_preset_is_refused_with_the_reason(
    folder: Path, toml: str, reasons: tuple[str, ...], args: str | None
) -> None:
    (folder / "mine.toml").write_text(toml)
    problems = problem_of(folder, preset="mine", args=args)
    assert problems.keys() == {"preset"}
    assert all(reason in problems["preset"][0] for reason in reasons)
