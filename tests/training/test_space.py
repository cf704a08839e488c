"""What a run is said to write is what it writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.app import ROOT
from tests.helpers.small_disk import fill, small_disk
from tests.helpers.training import RecordedReport, TrainingSetup, config_of, same
from trainer.contract.disk import RESERVE_BYTES, DiskProblem
from trainer.training import space


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("lora", {"rank": 8}),
        ("lora", {"rank": 8, "text_encoder_lr": 1e-3, "save_dtype": "bfloat16"}),
        ("pti", {"rank": 8, "tokens": 2, "token_lr": 1e-3, "token_share": 0.5}),
        ("checkpoint", {}),
        ("checkpoint", {"optimizer": "adafactor", "trained_dtype": "bfloat16", "save_dtype": "float16"}),
    ],
)
def test_states_and_models_have_the_sizes_that_were_known_before(
    thin_sd15: Path, tmp_path: Path, photos: list[Path], model_type: str, changes: dict[str, object]
) -> None:
    config = config_of(model_type, steps=1, micro_batch=1, **changes)
    run = TrainingSetup(thin_sd15, tmp_path / "cache", photos, config, model_type=model_type).start()
    weights = [weight for group in run.groups for weight in group["params"]]
    state = sum(space.state_bytes(weight, config.optimizer) for weight in weights)
    model = space.model_bytes(run.branch, run.method, config)
    run.train(tmp_path / "states", RecordedReport())
    assert stored(tmp_path / "states" / "step-000001") == state
    folder = tmp_path / "model"
    folder.mkdir()
    run.method.save(run.branch, folder, run.config, {})
    assert stored(folder) == pytest.approx(model, rel=0.02)  # each adapter's alpha, and the new words


def stored(folder: Path) -> int:
    """The bytes of all tensors in a folder's files. Their names, which these tiny models have more of, are left out."""
    return sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


def test_a_state_that_does_not_fit_leaves_the_one_before_and_nothing_else(
    thin_sd15: Path, tmp_path: Path, photos: list[Path]
) -> None:
    config = config_of(rank=8, save_every=2)
    bench = TrainingSetup(thin_sd15, tmp_path / "cache", photos, config)
    whole = bench.start()
    whole.train(tmp_path / "whole", RecordedReport())
    with small_disk(tmp_path / "disk", 40) as disk:
        states, told = disk / "state", RecordedReport()
        told.on_saved = lambda: fill(disk, RESERVE_BYTES) and None
        with pytest.raises(DiskProblem, match="the state of step 4") as problem:
            bench.start().train(states, told)
        assert problem.value.full and problem.value.needed > 10_000
        assert sorted(path.name for path in states.iterdir()) == ["step-000000", "step-000002"]
        (disk / "filler").unlink()
        resumed, told = bench.start(adapters_seed=1), RecordedReport()
        assert resumed.train(states, told)
        assert told.resumed_at == [2] and same(resumed.weights(), whole.weights())


def test_a_write_that_fails_is_told_as_a_problem_of_the_disk(tmp_path: Path) -> None:
    """In a process that may write no large files, which every machine can do."""
    script = f"""
import resource, pathlib, torch
from safetensors.torch import save_file
from trainer.contract.disk import problem_of
from tests.helpers.training import config_of
from trainer.training.states import save
folder = pathlib.Path({str(tmp_path)!r})
weight = torch.nn.Parameter(torch.ones(100))
large = torch.nn.Parameter(torch.ones(100_000))
save(folder, 1, torch.optim.AdamW([weight]), {{"a": weight}}, config_of())
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    save(folder, 2, torch.optim.AdamW([large]), {{"a": large}}, config_of())
except Exception as error:
    print(type(error).__name__, "|", problem_of(error, folder), "|", sorted(path.name for path in folder.iterdir()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    name, problem, left = done.stdout.split(" | ")
    assert (name, left.strip()) == ("SafetensorError", "['step-000001']")
    assert problem == f"the disk of {tmp_path} takes no file of that size"
