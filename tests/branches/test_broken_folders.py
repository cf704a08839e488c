"""A diffusers folder with a broken file beside its weights is refused in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.faults import CONTENTS
from trainer.branches.protocol import load_branch
from trainer.library.bases import Base

FAULTS = ("empty", "cut", "not UTF-8", "null", "a list of numbers", "brackets that open")
FILES = (
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_of_a_folder_is_refused_in_words(tiny_sd15: Path, tmp_path: Path, name: str) -> None:
    folder, problems = tmp_path / "base", []
    shutil.copytree(tiny_sd15, folder)
    if not (folder / name).exists():
        pytest.skip("this version of the library writes another file")
    good = (folder / name).read_bytes()
    for fault in FAULTS:
        (folder / name).write_bytes(CONTENTS[fault](good))
        try:
            load_branch(Base(1, "my base", "sd15", path=folder), torch.device("cpu"), tmp_path / "cache")
        except (OSError, ValueError) as problem:
            if "my base" not in str(problem) and Path(name).name not in str(problem):
                problems.append(f"{fault}: {problem}")
        except Exception as problem:  # noqa: BLE001  # whatever a library makes of it
            problems.append(f"{fault}: {type(problem).__name__}: {problem}")
    assert problems == []


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("unet/config.json", {"block_out_channels": 7}),
        ("unet/config.json", {"block_out_channels": None}),
        ("unet/config.json", {"down_block_types": {"a": 1}}),
        ("unet/config.json", {"layers_per_block": "x"}),
        ("unet/config.json", {"norm_num_groups": 0}),
        ("vae/config.json", {"latent_channels": [4]}),
        ("text_encoder/config.json", {"hidden_size": "x"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": None}),
    ],
)
def test_a_value_of_a_wrong_type_is_told_with_the_base_s_name(
    tiny_sd15: Path, tmp_path: Path, name: str, values: dict[str, object]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_sd15, folder)
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))
    with pytest.raises(ValueError, match=r"my base cannot be loaded: "):
        load_branch(Base(1, "my base", "sd15", path=folder), torch.device("cpu"), tmp_path / "cache")
