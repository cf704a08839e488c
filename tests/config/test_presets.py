"""Hyper-parameters: defaults <- preset <- request <- the card's memory, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from trainer.config import branch_file, looks, train_config
from trainer.config import resolve as resolve_config
from trainer.config.kinds import KINDS, OTHER_KIND, STYLE_KIND, kind_of
from trainer.config.resolve import KEYS
from trainer.config.train_config import TrainConfig
from trainer.contract.errors import InvalidRequest
from trainer.contract.prompts import CONTROLS
from trainer.names import BRANCHES, METHODS, WORDS
from trainer.settings import Settings

NOTHING_ASKED: dict[str, Any] = {
    "branch": "sd15", "model_type": "lora", "preset": None, "name": "chair", "steps": None, "args": None,
}  # fmt: skip
NAMES = {"person": "woman", "animal": "dog", "style": "anime style", "object": "backpack"}  # one of each kind
PROJECT = [("flux1", "flux-lora-fast"), ("flux1", "flux-lora-focus"), ("flux1", "flux-lora-portrait")]
ALL = [*((branch, None) for branch in BRANCHES), *PROJECT]


@pytest.fixture
def folder(settings: Settings, tmp_path: Path) -> Path:
    """A copy of the presets folder, for a user's own files."""
    return Path(shutil.copytree(settings.presets, tmp_path / "presets"))


def resolve(folder: Path, photos: int = 8, **asked: Any) -> TrainConfig:
    return resolve_config.resolve(folder, photos=photos, **(NOTHING_ASKED | asked))


def problem_of(folder: Path, **asked: Any) -> dict[str, list[str]]:
    with pytest.raises(InvalidRequest) as refused:
        resolve(folder, **asked)
    return refused.value.problems


def difference(config: TrainConfig, other: TrainConfig) -> dict[str, Any]:
    """The words in which a configuration is not like another one, with its values."""
    theirs = dict(other)
    return {word: value for word, value in config if value != theirs[word]}


FITTED = {"gradient_checkpointing", "micro_batch", "resolution", "optimizer", "trained_dtype"}


# The numbers of the branches


DEFAULTS: dict[str, dict[str, Any]] = {
    "flux1": {
        "lr": 1e-4, "text_encoder_lr": 0, "rank": 64, "alpha": 64, "targets": "attention", "schedule": "constant",
        "warmup_steps": 10, "resolution": (512,), "batch": 4, "guidance": 1, "caption_dropout": 0.1, "min_snr": 0,
        "save_dtype": "bfloat16", "buckets": True,
    },
    "sdxl1": {
        "lr": 1e-4, "text_encoder_lr": 0, "rank": 32, "alpha": 32, "targets": "all", "schedule": "constant",
        "warmup_steps": 10, "resolution": (1024,), "batch": 1, "guidance": 1, "caption_dropout": 0.05, "min_snr": 5,
        "save_dtype": "float16", "buckets": True,
    },
    "sd15": {
        "lr": 1e-4, "text_encoder_lr": 5e-5, "rank": 32, "alpha": 32, "targets": "all", "schedule": "constant",
        "warmup_steps": 10, "resolution": (512,), "batch": 1, "guidance": 1, "caption_dropout": 0.05, "min_snr": 5,
        "save_dtype": "float16", "buckets": True,
    },
    "fast": {
        "lr": 8e-4, "text_encoder_lr": 1.1e-3, "rank": 4, "alpha": 4, "targets": "cross_attention",
        "schedule": "cosine", "warmup_steps": 10, "resolution": (64,), "batch": 4, "guidance": 1,
        "caption_dropout": 0, "min_snr": 0, "save_dtype": "float32", "buckets": False, "max_grad_norm": 0.1,
    },
}  # fmt: skip
SHARED = {
    "micro_batch": 0, "gradient_checkpointing": False, "crops": 1, "flip": False, "face_set": False, "mask": "none",
    "faceless": "keep", "restore_strength": 0.8,
    "mask_widen": 0, "mask_floor": 0.1, "prior_weight": 0, "seed": 42, "power": 1, "weight_decay": 0.01,
    "max_grad_norm": 1, "optimizer": "adamw", "trained_dtype": "float32", "on_top": "continue", "tokens": 0,
    "token_lr": 0, "token_share": 0,
}  # fmt: skip


@pytest.mark.parametrize("branch", BRANCHES)
def test_each_branch_has_the_numbers_that_are_written_here(folder: Path, branch: str) -> None:
    config = dict(resolve(folder, branch=branch))
    expected = SHARED | DEFAULTS[branch]
    assert {word: config.pop(word) for word in expected} == expected
    assert config.keys() == {"steps", "save_every", "prior_images"}


def test_mirroring_and_crops_depend_on_the_kind_of_subject(folder: Path) -> None:
    for branch in ("sd15", "sdxl1", "flux1"):
        asked = {kind: resolve(folder, branch=branch, name=name) for kind, name in NAMES.items()}
        changes = {kind: difference(config, asked["object"]) for kind, config in asked.items()}
        assert changes == {"person": {}, "object": {}, "animal": {"flip": True}, "style": {"flip": True, "crops": 4}}
    assert len({resolve(folder, branch="fast", name=name) for name in NAMES.values()}) == 1


STEPS = [
    # branch, preset, name, {photos: steps}
    ("flux1", None, "woman", {1: 300, 3: 300, 4: 400, 20: 2000, 100: 10_000}),
    ("flux1", "flux-lora-fast", "woman", {1: 300, 11: 300, 12: 324, 20: 540, 100: 2700}),
    ("flux1", "flux-lora-portrait", "woman", {1: 300, 11: 300, 12: 324, 20: 540, 100: 2700}),
    ("flux1", "flux-lora-focus", "woman", {1: 300, 11: 300, 12: 324, 20: 540, 100: 2700}),
    ("flux1", "flux-lora-focus", "backpack", {1: 400, 8: 400, 9: 450, 20: 1000, 100: 5000}),
    ("flux1", "flux-lora-focus", "dog", {1: 400, 8: 400, 9: 450, 20: 1000, 100: 5000}),
    ("flux1", "flux-lora-focus", "anime style", {1: 300, 3: 300, 4: 400, 20: 2000, 100: 10_000}),
    ("sdxl1", None, "woman", {1: 500, 5: 500, 6: 600, 15: 1500, 100: 1500}),
    ("sd15", None, "woman", {1: 500, 5: 500, 6: 600, 25: 2500, 100: 2500}),
    ("fast", None, "woman", {1: 128, 4: 128, 5: 160, 6: 192, 100: 192}),
]


@pytest.mark.parametrize(("branch", "preset", "name", "steps"), STEPS)
def test_steps_follow_the_number_of_photos_within_limits(
    folder: Path, branch: str, preset: str | None, name: str, steps: dict[int, int]
) -> None:
    counted = {photos: resolve(folder, photos, branch=branch, preset=preset, name=name).steps for photos in steps}
    assert counted == steps
    assert resolve(folder, 100, branch=branch, preset=preset, name=name, steps=7).steps == 7


def test_where_the_limits_of_a_preset_and_its_branch_cross_the_upper_one_holds(folder: Path) -> None:
    (folder / "mine.toml").write_text("[lora]\nmin_steps = 2000\n")
    assert resolve(folder, 1, preset="mine").steps == 2000
    assert resolve(folder, 1, preset="mine", branch="sdxl1").steps == 1500


@pytest.mark.parametrize("branch", ["flux1", "fast"])
def test_a_batch_is_no_larger_than_the_number_of_photos_unless_asked_for(folder: Path, branch: str) -> None:
    batches = {photos: resolve(folder, photos, branch=branch).batch for photos in (1, 2, 4, 30)}
    assert batches == {1: 1, 2: 2, 4: 4, 30: 4}
    assert resolve(folder, 2, branch=branch, args="batch=3").batch == 3


@pytest.mark.parametrize(
    ("branch", "token", "model_type", "negative_prompt"),
    [("flux1", "ohwx", "lora", False), ("sdxl1", "ohwx", "pti", True), ("sd15", "sks", "checkpoint", True)],
)
def test_each_branch_has_the_hosted_service_s_token_and_model_type(
    folder: Path, branch: str, token: str, model_type: str, negative_prompt: bool
) -> None:
    assert branch_file.default_token(folder, branch) == token
    assert branch_file.default_model_type(folder, branch) == model_type
    assert branch_file.render_config(folder, branch).negative_prompt is negative_prompt


def test_what_a_branch_renders_at(folder: Path) -> None:
    rendered = {branch: branch_file.render_config(folder, branch) for branch in BRANCHES}
    numbers = {branch: (each.steps, each.cfg_scale, each.w, each.h) for branch, each in rendered.items()}
    assert numbers == {
        "flux1": (28, 3.5, 1024, 1024),
        "sdxl1": (30, 6.0, 1024, 1024),
        "sd15": (30, 7.5, 512, 512),
        "fast": (6, 3.0, 64, 64),
    }
    assert {branch: each.fixed_size for branch, each in rendered.items() if each.fixed_size} == {"fast": 64}


def test_what_is_trained_where_and_why_not(folder: Path) -> None:
    trained = {branch: branch_file.model_types(folder, branch) for branch in BRANCHES}
    whole = ["lora", "pti", "checkpoint"]
    assert trained == {"sd15": [*METHODS], "sdxl1": [*METHODS], "flux1": whole, "fast": [*METHODS]}
    reasons = {branch: branch_file.why_not(folder, branch).get("faceid", "") for branch in BRANCHES}
    assert "PuLID" in reasons.pop("flux1")
    assert set(reasons.values()) == {""}
    meant = {branch: branch_file.method_of(folder, branch, "lora") for branch in BRANCHES}
    assert meant == {"sd15": "lora", "sdxl1": "pti", "flux1": "lora", "fast": "lora"}


# The numbers of the presets, each as its difference from FLUX.1's defaults (preset null, or High)


QUICK = {"lr": 5e-4, "rank": 16, "alpha": 16, "warmup_steps": 0, "steps": 540}
PORTRAIT = QUICK | {"schedule": "polynomial", "targets": "all", "mask": "face", "faceless": "drop"}
FACES = PORTRAIT | {"face_set": True}
THING = {
    "lr": 3e-4, "rank": 32, "alpha": 32, "schedule": "cosine", "targets": "all", "mask": "subject",
    "resolution": (512, 768), "steps": 1000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "name", "changes"),
    [
        ("flux-lora-fast", "woman", QUICK | {"buckets": False}),
        ("flux-lora-fast", "backpack", QUICK | {"buckets": False}),
        ("flux-lora-portrait", "woman", FACES),
        ("flux-lora-portrait", "backpack", PORTRAIT),
        ("flux-lora-focus", "woman", FACES | {"mask_widen": 0.5}),
        ("flux-lora-focus", "backpack", THING),
        ("flux-lora-focus", "dog", THING),
        ("flux-lora-focus", "anime style", {}),
        # No face is symmetric, and those who ask for these have one in mind whatever they call it.
        ("flux-lora-fast", "dog", QUICK | {"buckets": False, "flip": False}),
        ("flux-lora-portrait", "anime style", PORTRAIT | {"flip": False, "crops": 1}),
    ],
)
def test_a_preset_changes_these_numbers_and_no_others(
    folder: Path, preset: str, name: str, changes: dict[str, Any]
) -> None:
    high = resolve(folder, photos=20, branch="flux1", name=name)
    config = resolve(folder, photos=20, branch="flux1", name=name, preset=preset)
    assert difference(config, high) == changes


@pytest.mark.parametrize(("branch", "preset"), ALL)
@pytest.mark.parametrize("name", NAMES.values())
@pytest.mark.parametrize(
    "asked", [None, "lr=1.23456789e-05 alpha=0.1 weight_decay=0.30000000000000004 resolution=96,64"]
)
def test_args_read_back_as_the_very_same_configuration(
    folder: Path, branch: str, preset: str | None, name: str, asked: str | None
) -> None:
    config = resolve(folder, branch=branch, preset=preset, name=name, args=asked)
    args = train_config.as_args(config)
    assert TrainConfig(**train_config.parse_args(args)) == config
    assert resolve(folder, branch=branch, args=args) == config  # whatever preset and name it came from


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_branch_s_own_toml_has_no_unused_key(folder: Path, branch: str) -> None:
    table = branch_file.branch_table(folder, branch)
    plain = {"token", "model_type", "instead", "without", "warnings", "why_not", "render", "base", "control"}
    plain |= {"detect", "face_adapter", "placeholder", "readers", "caption_tokens"}
    assert table.keys() <= plain | set(METHODS)
    kinds = {*KINDS, STYLE_KIND, OTHER_KIND}
    for method in METHODS:
        assert table.get(method, {}).keys() - KEYS <= kinds | {"memory", "least_gib"}
        for row in table.get(method, {}).get("memory", []):
            assert row.keys() - {"below_gib"} <= FITTED
    words = {word for word, having in WORDS.items() if "lora" not in having}
    assert table["lora"].keys() | words >= KEYS  # every word has a default
    assert table["pti"].keys() >= words
    assert set(table.get("why_not", {})) == set(METHODS) - table.keys()
    assert table.get("faceid", {}) == {}


@pytest.mark.parametrize("branch", ["sd15", "sdxl1", "flux1"])
def test_a_branch_has_a_control_model_of_each_kind(folder: Path, branch: str) -> None:
    assert branch_file.branch_table(folder, branch)["control"].keys() == set(CONTROLS)
    for kind in CONTROLS:
        row = branch_file.control_row(folder, branch, kind)
        assert row is not None and row.repository.count("/") == 1
    assert branch_file.control_row(folder, "fast", "canny") is None
    assert all(looks.annotator_row(folder, name).repository for name in ("depth", "people", "pose"))


def test_a_folder_without_looks_says_what_lacks(tmp_path: Path) -> None:
    assert looks.styles(tmp_path) == looks.film_looks(tmp_path) == {}
    with pytest.raises(ValueError, match=r"no \[depth\]; copy the one of the program"):
        looks.annotator_row(tmp_path, "depth")


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("model_type", ["lora", "pti", "checkpoint"])
def test_each_model_type_has_its_words_and_no_others(folder: Path, branch: str, model_type: str) -> None:
    config = resolve(folder, branch=branch, model_type=model_type)
    for word, having in WORDS.items():
        assert bool(getattr(config, word)) == (model_type in having), word
        value = "0" if model_type in having else "1"
        told = f"{word} must not be 0" if model_type in having else f"{word} has no meaning for {model_type}"
        problems = problem_of(folder, branch=branch, model_type=model_type, args=f"{word}={value}")
        assert problems.keys() == {"args"} and problems["args"][0].startswith(told)
    assert resolve(folder, branch=branch, model_type=model_type, args=train_config.as_args(config)) == config


def test_a_preset_s_lora_is_for_pti_as_well_and_not_for_a_checkpoint(folder: Path) -> None:
    (folder / "mine.toml").write_text("[lora]\nrank = 6\nflip = true\n[pti]\ntokens = 3\n")
    asked = {method: resolve(folder, preset="mine", model_type=method) for method in ("lora", "pti", "checkpoint")}
    assert {method: (c.rank, c.flip, c.tokens) for method, c in asked.items()} == {
        "lora": (6, True, 0), "pti": (6, True, 3), "checkpoint": (0, False, 0),
    }  # fmt: skip


def test_bfloat16_weights_are_refused_where_nothing_rounds_at_random(folder: Path) -> None:
    problems = problem_of(folder, args="trained_dtype=bfloat16")
    assert problems == {"args": ["trained_dtype=bfloat16 needs optimizer=adafactor, which rounds at random"]}
    assert resolve(folder, args="trained_dtype=bfloat16 optimizer=adafactor").trained_dtype == "bfloat16"


def test_the_project_s_presets_are_listed_and_the_branches_are_not(folder: Path) -> None:
    assert branch_file.list_presets(folder) == [preset for _, preset in PROJECT]


# What a class name is about


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("woman", "person"), ("Man", "person"), ("old man", "person"), ("couple", "person"), ("children", "person"),
        ("dog", "animal"), ("golden retriever puppy", "animal"), ("Pet", "animal"),
        ("anime style", "style"), ("Style", "style"),
        ("backpack", "object"), ("", "object"), ("house", "object"),
        # only whole words count
        ("mandolin", "object"), ("hotdog", "object"), ("catamaran", "object"), ("stylet", "style"),
        ("woman style", "style"), ("cat style", "style"),
    ],
)  # fmt: skip
def test_a_class_name_says_what_it_is_about(name: str, kind: str) -> None:
    assert kind_of(name) == kind


# Layers


@pytest.mark.parametrize(
    ("toml", "args", "crops"),
    [
        ("", None, {"chair": 1, "anime style": 4}),  # [lora] and [lora.style] of the branch
        ("[lora]\ncrops = 5", None, {"chair": 5, "anime style": 5}),
        ("[lora.style]\ncrops = 6", None, {"chair": 1, "anime style": 6}),
        ("[lora]\ncrops = 5\n[lora.style]\ncrops = 6", None, {"chair": 5, "anime style": 6}),
        ("[lora.object]\ncrops = 2", None, {"chair": 2, "anime style": 4}),
        ("[lora]\ncrops = 5\n[lora.style]\ncrops = 6", "crops=7", {"chair": 7, "anime style": 7}),
    ],
)
def test_each_layer_wins_over_those_before_it(folder: Path, toml: str, args: str | None, crops: dict[str, int]) -> None:
    (folder / "mine.toml").write_text(toml)
    asked = {name: resolve(folder, preset="mine", name=name, args=args) for name in crops}
    assert {name: config.crops for name, config in asked.items()} == crops
    for name, config in asked.items():
        assert difference(config, resolve(folder, name=name)).keys() <= {"crops"}  # and the rest stays


def test_what_is_asked_for_wins(folder: Path) -> None:
    config = resolve(folder, args="rank=4 lr=2e-4 targets=attention resolution=256,512 flip=true", steps=7)
    assert difference(config, resolve(folder)) == {
        "rank": 4, "lr": 2e-4, "targets": "attention", "resolution": (256, 512), "flip": True, "steps": 7,
    }  # fmt: skip


def test_a_preset_of_the_user_s_own_is_listed_and_applied(folder: Path) -> None:
    assert "mine" not in branch_file.list_presets(folder)
    (folder / "mine.toml").write_text("[lora]\nrank = 6\nsteps_per_photo = 200\nresolution = [512, 768]\n")
    assert "mine" in branch_file.list_presets(folder)
    config = resolve(folder, preset="mine", photos=5)
    expected = {"rank": 6, "steps": 1000, "resolution": (512, 768)}
    assert difference(config, resolve(folder, photos=5)) == expected
    assert resolve(folder, preset="mine", args="rank=3").rank == 3  # the request wins over the preset
    assert resolve(folder, preset="mine", branch="sdxl1").rank == 6  # it names no branch, so it is for all


def test_a_section_for_another_model_type_is_checked_and_changes_nothing(folder: Path) -> None:
    (folder / "mine.toml").write_text("[checkpoint]\nlr = 5e-6\n")
    assert resolve(folder, preset="mine") == resolve(folder)
    (folder / "mine.toml").write_text("[checkpoint]\nrnak = 5\n")
    assert "mean 'rank'" in problem_of(folder, preset="mine")["preset"][0]


# What is refused


def test_a_preset_of_another_branch_is_refused(folder: Path) -> None:
    for branch, preset in PROJECT:
        for other in BRANCHES:
            if other != branch:
                problems = problem_of(folder, branch=other, preset=preset)
                assert problems == {"preset": [f"{preset} is a preset for flux1, not for {other}"]}
    (folder / "mine.toml").write_text('branches = ["sd15", "sdxl1"]\n[lora]\nrank = 6')
    assert resolve(folder, branch="sdxl1", preset="mine").rank == resolve(folder, preset="mine").rank == 6
    assert problem_of(folder, branch="fast", preset="mine").keys() == {"preset"}


@pytest.mark.parametrize(
    ("toml", "reasons"),
    [
        ("[loar]\nrank = 6", ("mine.toml", "'loar'", "mean 'lora'")),
        ("branch = ['sd15']", ("mine.toml", "'branch'", "mean 'branches'")),
        ("[lora]\nrnak = 6", ("mine.toml", "'rnak'", "mean 'rank'")),
        ("[lora]\nleast_gib = 6", ("mine.toml", "'least_gib'")),
        ("[lora.persn]\nrank = 6", ("mine.toml", "'persn'", "mean 'person'")),
        ("[lora.person]\nrnak = 6", ("mine.toml", "'rnak'", "mean 'rank'")),  # also where the subject is a chair
        ("[lora.person.style]\nrank = 6", ("mine.toml", "'style'")),
        ("[lora]\nperson = 6", ("mine.toml", "[lora.person]")),
        ("[lora]\nsteps = 6", ("mine.toml", "unknown key 'steps'")),
        ("[lora]\nsteps_per_photo = 'many'", ("mine.toml", "steps_per_photo must be a whole number")),
        ("[lora.style]\nmin_steps = 1.5", ("mine.toml", "min_steps must be a whole number")),
        ("[lora]\nrank = 0", ("rank must not be 0",)),
        ("[lora]\nresolution = [512, 500]", ("resolution", "multiple of 8")),
        ("[lora]\nresolution = []", ("resolution", "one to four numbers")),
        ("[lora]\nmask = 'hand'", ("mask", "'none', 'face' or 'subject'")),
        ("[lora]\nmin_steps = 20000\nmax_steps = 20000", ("steps", "at most 10000")),
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


@pytest.mark.parametrize("word", ["min_snr", "text_encoder_lr"])
def test_a_word_that_means_nothing_to_a_branch_is_refused(folder: Path, word: str) -> None:
    (folder / "mine.toml").write_text(f"[lora]\n{word} = 0.5")
    reason = f"{word} has no meaning on flux1; leave it out"
    assert problem_of(folder, branch="flux1", args=f"{word}=0.5") == {"args": [reason]}
    assert problem_of(folder, branch="flux1", preset="mine") == {"preset": [reason]}
    for branch in ("sd15", "sdxl1", "fast"):  # others know it
        assert getattr(resolve(folder, branch=branch, args=f"{word}=0.5"), word) == 0.5
        assert getattr(resolve(folder, branch=branch, preset="mine"), word) == 0.5
    for zero in ("0", "0.0", "0e0"):  # and to be without it is no request
        assert resolve(folder, branch="flux1", args=f"{word}={zero}") == resolve(folder, branch="flux1")
        assert resolve(folder, branch="flux1", preset="mine", args=f"{word}={zero}") == resolve(folder, branch="flux1")


def test_an_unknown_word_is_refused_with_the_nearest(folder: Path) -> None:
    first = problem_of(folder, args="rnak=4")["args"][0]
    assert "'rnak'" in first and "mean 'rank'" in first


@pytest.mark.parametrize(
    "args",
    [
        "rank=0", "rank=x", "rank=", "rank", "rank=4 rank=8", "lr=nan", "max_grad_norm=inf", "mask=hand", "crops=17",
        "resolution=500", "resolution=512,500", "resolution=,", "resolution=64,128,192,256,320", "resolution=16",
        "batch=65", "caption_dropout=1.1", "mask_widen=-0.1", "schedule=exponential", "flip=perhaps",
    ],
)  # fmt: skip
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


# The card's memory


def fit(folder: Path, free_gib: float, asked: str | None = None, **request: Any) -> tuple[TrainConfig, TrainConfig]:
    """What is asked for, and what becomes of it on a card with so much free memory."""
    config = resolve(folder, args=asked, **request)
    branch = request.get("branch", "sd15")
    return config, resolve_config.fit(folder, config, branch=branch, model_type="lora", asked=asked, free_gib=free_gib)


FITS = [
    # branch, free memory in GiB, micro-batch, checkpointing, resolution
    ("flux1", float("inf"), 4, False, (512,)),
    ("flux1", 78, 4, False, (512,)),
    ("flux1", 77.9, 4, True, (512,)),
    ("flux1", 34, 4, True, (512,)),
    ("flux1", 33.9, 1, True, (512,)),
    ("flux1", 26, 1, True, (512,)),
    ("sdxl1", float("inf"), 1, False, (1024,)),
    ("sdxl1", 15, 1, False, (1024,)),
    ("sdxl1", 14.9, 1, True, (1024,)),
    ("sdxl1", 9, 1, True, (1024,)),
    ("sdxl1", 8.9, 1, True, (768,)),
    ("sd15", float("inf"), 1, False, (512,)),
    ("sd15", 5, 1, False, (512,)),
    ("sd15", 4.9, 1, True, (512,)),
    ("fast", float("inf"), 4, False, (64,)),
    ("fast", 0.1, 4, False, (64,)),
]


@pytest.mark.parametrize(("branch", "free_gib", "micro_batch", "checkpointing", "resolution"), FITS)
def test_a_smaller_card_gets_smaller_pieces_of_the_same_work(
    folder: Path, branch: str, free_gib: float, micro_batch: int, checkpointing: bool, resolution: tuple[int, ...]
) -> None:
    config, fitted = fit(folder, free_gib, branch=branch)
    assert (fitted.micro_batch, fitted.gradient_checkpointing, fitted.resolution) == (
        micro_batch, checkpointing, resolution,
    )  # fmt: skip
    # What is learned stays: a step has as many pictures, and there are as many steps.
    assert difference(fitted, config).keys() <= {"micro_batch", "gradient_checkpointing", "resolution"}


def test_larger_batches_are_cut_on_a_small_card_and_whole_on_a_large_one(folder: Path) -> None:
    sizes = {free: fit(folder, free, branch="sdxl1", asked="batch=6")[1] for free in (24, 12)}
    assert {free: (fitted.batch, fitted.micro_batch) for free, fitted in sizes.items()} == {24: (6, 6), 12: (6, 1)}


def test_what_was_asked_for_is_not_changed_to_fit(folder: Path) -> None:
    for word in ("micro_batch=2", "gradient_checkpointing=false", "resolution=1024"):
        config, fitted = fit(folder, 8, branch="sdxl1", asked=f"batch=4 {word}")
        kept = word.partition("=")[0]
        assert getattr(fitted, kept) == getattr(config, kept)
        changed = {"micro_batch", "gradient_checkpointing", "resolution"} - {kept}
        assert difference(fitted, config).keys() == changed  # the others fit themselves


def test_a_micro_batch_is_never_larger_than_the_batch(folder: Path) -> None:
    assert fit(folder, 24, branch="sdxl1", asked="batch=2 micro_batch=8")[1].micro_batch == 2
    assert fit(folder, 24, branch="sdxl1", asked="batch=8 micro_batch=2")[1].micro_batch == 2


@pytest.mark.parametrize(
    ("asked", "small", "large"),
    [
        ("[512]", (512,), (512,)),
        ("[512, 1024]", (512, 768), (512, 1024)),
        ("[768, 1024]", (768,), (768, 1024)),
    ],
)
def test_a_small_card_never_gets_larger_pictures_than_its_preset_says(
    folder: Path, asked: str, small: tuple[int, ...], large: tuple[int, ...]
) -> None:
    (folder / "mine.toml").write_text(f"[lora]\nresolution = {asked}")
    sizes = [fit(folder, free, branch="sdxl1", preset="mine")[1].resolution for free in (8, 24)]
    assert sizes == [small, large]


def test_each_branch_says_how_much_memory_it_needs_at_least(folder: Path) -> None:
    least = {branch: branch_file.least_gib(folder, branch, "lora") for branch in BRANCHES}
    assert least == {"flux1": 26, "sdxl1": 7, "sd15": 3, "fast": 0}


def test_a_card_does_not_get_bfloat16_weights_with_an_optimizer_that_loses_their_steps(folder: Path) -> None:
    for asked, expected in ((None, ("adafactor", "bfloat16")), ("optimizer=adamw", ("adamw", "float32"))):
        config = resolve(folder, model_type="checkpoint", args=asked)
        fitted = resolve_config.fit(folder, config, branch="sd15", model_type="checkpoint", asked=asked, free_gib=8)
        assert (fitted.optimizer, fitted.trained_dtype) == expected
