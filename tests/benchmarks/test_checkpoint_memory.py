"""The computed memory of training whole models, against what the real optimizers hold of a tiny one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from benchmarks import checkpoint_memory
from benchmarks.checkpoint_memory import BFLOAT16, FLOAT32, GIB, Case, held, numbers, span_gib, split, state_bytes
from trainer.training import optimizers


def tiny() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8))


@pytest.mark.parametrize(
    ("optimizer", "dtype"), [("adamw", torch.float32), ("adafactor", torch.float32), ("adafactor", torch.bfloat16)]
)
def test_the_state_is_as_large_as_computed(optimizer: str, dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    real = optimizers.make([{"params": list(model.parameters()), "lr": 1e-3}], optimizer, 0.01, seed=0)
    model(torch.ones(1, 3, 4, 4, dtype=dtype)).sum().backward()
    real.step()
    bytes_held = sum(value.nbytes for state in real.state.values() for value in state.values())
    assert bytes_held == state_bytes(model.to("meta").parameters(), optimizer) > 0


def test_weights_and_gradients_are_as_large_as_computed() -> None:
    model = tiny()
    model(torch.ones(1, 3, 4, 4)).sum().backward()
    weights = list(model.parameters())
    whole = held(weights, [torch.ones(5)], Case("sd15", "adamw", FLOAT32))
    assert whole.weights == sum(weight.nbytes for weight in weights) == 2 * whole.casts
    assert whole.all_gradients == sum(weight.grad.nbytes for weight in weights) and whole.update == 0
    assert whole.frozen == torch.ones(5).bfloat16().nbytes
    half = held(weights, [], Case("sd15", "adafactor", BFLOAT16))
    assert half.largest_gradient == max(weight.grad.bfloat16().nbytes for weight in weights) and half.casts == 0


def test_full_size_models_have_as_many_weights_as_published() -> None:
    counts = [
        sum(numbers(weights) for weights in split(Case(branch, "adamw", FLOAT32, encoders=True)))
        for branch in ("sd15", "sdxl1", "flux1")
    ]
    # UNet 859.5 M and CLIP-L 123.1 M; UNet 2567.5 M, CLIP-L and bigG's text tower 694.7 M; FLUX.1-dev 11.9 B.
    assert counts == [859_520_964 + 123_060_480, 2_567_463_684 + 123_060_480 + 694_659_840, 11_901_408_320]
    assert numbers(split(Case("sd15", "adamw", FLOAT32, encoders=True))[1]) == 49408 * 768  # words stay as they are


def test_each_economy_saves_memory() -> None:
    steps = [
        (Case("sd15", "adamw", FLOAT32, encoders=True), False, True),
        (Case("sd15", "adamw", FLOAT32), False, True),
        (Case("sd15", "adamw", FLOAT32), True, True),
        (Case("sd15", "adafactor", FLOAT32), True, True),
        (Case("sd15", "adafactor", FLOAT32), True, False),
        (Case("sd15", "adafactor", BFLOAT16), True, False),
    ]
    spans = [span_gib(*step) for step in steps]
    for before, after in pairwise(spans):
        assert after[1] < before[1] and after[0] < before[0]
    assert all(low < high for low, high in spans)
    # 860 M weights of float32 with a gradient and two moments of float32: 16 bytes each, and half a GiB.
    assert span_gib(Case("sd15", "adamw", FLOAT32), True)[0] == pytest.approx(859_520_964 * 16 / GIB + 0.5, abs=0.01)


def test_the_table_has_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_memory.main()
    printed = capsys.readouterr().out
    assert all(f"| {case.title} |" in printed for case in checkpoint_memory.cases())
    assert "| FLUX.1, bfloat16, Adafactor | 11,901 | 22.17 | 0.00 | 0.03 |" in printed
