"""The training benchmark: that it measures a real step in every family, and needs nothing of what serves the page."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import train_speed
from tests.helpers.marks import long_but
from trainer.contract.errors import InvalidRequest
from trainer.names import BRANCHES

ROOT = Path(__file__).parents[2]
KEYS = {
    "branch", "model", "resolution", "batch", "micro_batch", "gradient_checkpointing", "rank", "targets", "preset",
    "args", "device", "dtype", "versions", "warm_up", "steps", "seconds", "seconds_unwatched", "peak_gib",
    "weights_gib", "forward_tflop", "attention_tflop", "step_tflop", "peak_tflops", "bandwidth_tb", "floor",
    "times_floor", "operators", "kernels", "host_sync", "host_sync_at", "loss",
}  # fmt: skip
SERVING = [
    "gradio", "fastapi", "starlette", "uvicorn", "httpx", "ssrfguard", "facexlib", "gfpgan", "pydantic_settings",
    "tensorboard", "torchvision", "multipart",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """run(branch, batch, args): what was measured, on three steps of a tiny model."""

    @cache
    def measured(branch: str, batch: int = 1, args: str = "") -> dict:
        file = tmp_path_factory.mktemp("speed") / "facts.json"
        words = ["--branch", branch, "--resolution", "64", "--batch", str(batch), "--args", f"rank=2 {args}"]
        options = ["--tiny", "--device", "cpu", "--steps", "3", "--warm-up", "1", "--json", str(file)]
        train_speed.main([*words, *options, "--peak-tflops", "1", "--bandwidth", "1"])  # told, and not measured
        return json.loads(file.read_text())

    return measured


@pytest.fixture(autouse=True)
def threads():
    """The benchmark leaves a core free; the tests after it want theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_knows_every_family() -> None:
    assert {"fast", *train_speed.CONFIGS} == set(BRANCHES)
    assert train_speed.CONFIGS.keys() == train_speed.TINY.keys()


@pytest.mark.parametrize("branch", long_but(["sd15"], list(train_speed.CONFIGS)))
def test_a_tiny_model_of_each_family_is_measured(run, branch: str) -> None:
    facts = run(branch)
    assert facts.keys() == KEYS
    assert (facts["branch"], facts["model"], facts["steps"]) == (branch, "tiny", 3)
    assert (facts["resolution"], facts["batch"], facts["micro_batch"], facts["rank"]) == (64, 1, 1, 2)
    seconds = facts["seconds"]
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"] < 60
    assert facts["times_floor"] == pytest.approx(seconds["median"] / facts["floor"]) and facts["times_floor"] > 1
    assert facts["floor"] >= facts["step_tflop"] / facts["peak_tflops"] > 0
    assert 0 < facts["attention_tflop"] < facts["forward_tflop"] < facts["step_tflop"] / 1.9
    assert 1000 < facts["kernels"] < facts["operators"] < 100_000
    assert 0 < facts["weights_gib"] < facts["peak_gib"] < 16
    assert 0 < facts["loss"] < 10 and math.isfinite(facts["loss"])
    assert facts["host_sync"] is None  # there is no card here
    assert f"{facts['operators']} a step" in train_speed.summary(facts)


def test_checkpointing_and_micro_batches_are_in_the_step_and_in_its_floor(run) -> None:
    plain, both = run("sd15"), run("sd15", 2, "micro_batch=1 gradient_checkpointing=true")
    assert both["forward_tflop"] == pytest.approx(2 * plain["forward_tflop"])
    assert both["step_tflop"] == pytest.approx(2 * (plain["step_tflop"] + plain["forward_tflop"]))
    assert both["kernels"] > 2.2 * plain["kernels"]  # twice, each with a second way forward


def test_class_pictures_and_masks_are_in_the_step(run) -> None:
    plain, asked = run("sd15"), run("sd15", 1, "prior_weight=1 mask=face mask_widen=0.5")
    assert asked["forward_tflop"] == pytest.approx(2 * plain["forward_tflop"])
    assert asked["kernels"] > 1.8 * plain["kernels"]


# TFLOP of one sample: shared/reference/performance.md, §1.1, which counted other models of these shapes.
@pytest.mark.parametrize(
    ("branch", "resolution", "forward", "attention", "step", "checkpointed"),
    [
        ("sd15", 512, 0.81, 0.13, 1.8, 2.6),
        ("sdxl1", 1024, 6.80, 0.78, 14.6, 21.4),
        ("flux1", 512, 21.6, 1.65, 45.6, 67.2),
        ("flux1", 1024, 74.6, 14.9, 172, 246),
    ],
)
def test_the_arithmetic_of_the_full_size_models(
    branch: str, resolution: int, forward: float, attention: float, step: float, checkpointed: float
) -> None:
    work = train_speed.count_work(branch, resolution)
    counted = [work.forward, work.attention, work.step(False), work.step(True)]
    assert [flop / 1e12 for flop in counted] == pytest.approx([forward, attention, step, checkpointed], rel=0.05)


def test_the_attention_of_flux_is_counted_to_the_last_operation() -> None:
    tokens, width, layers = (512 // 16) ** 2 + 512, 24 * 128, 19 + 38
    assert train_speed.count_work("flux1", 512).attention == 4 * tokens**2 * width * layers


@pytest.mark.parametrize("branch", train_speed.CONFIGS)
def test_a_tiny_model_has_the_layers_of_the_full_size_one(branch: str) -> None:
    def layers(tiny: bool) -> list[tuple[str, str]]:
        meta = torch.device("meta")
        denoiser = train_speed.make_branch(branch, tiny, meta, torch.device("cpu"), torch.float32).denoiser
        return [(name, type(layer).__name__) for name, layer in denoiser.named_modules()]

    assert layers(True) == layers(False)


def test_weights_are_made_in_the_number_format_that_is_trained() -> None:
    cpu, before = torch.device("cpu"), torch.get_default_dtype()
    denoiser: nn.Module = train_speed.make_branch("flux1", True, cpu, cpu, torch.bfloat16).denoiser
    assert {weight.dtype for weight in denoiser.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == before


def test_views_and_allocations_are_no_kernels() -> None:
    with train_speed.Operators() as operators:
        table = torch.ones(2, 3)
        (table.T[0].contiguous() + 1).add_(torch.empty(2))
    assert sorted(call._schema.name for call in operators.calls if train_speed.computes(call)) == [
        "aten::add",
        "aten::add_",
        "aten::clone",
        "aten::ones",
    ]
    assert operators.all == operators.kernels + 3  # the transposed, its row, and the empty one


def test_a_step_that_waits_for_the_card_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    assert train_speed.host_sync(lambda: None) is None
    told = train_speed.host_sync(waits)
    assert told and "test_train_speed.py" in told and told.endswith("called a synchronizing CUDA operation")
    assert modes == ["error", "default"] * 2


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA H200", 790),
        ("NVIDIA H100 80GB HBM3", 790),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_a_card_is_known_by_its_name(card: str, tflops: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    device = SimpleNamespace(type="cuda")
    if tflops is None:
        with pytest.raises(InvalidRequest, match="H100 PCIe is not in the table"):
            train_speed.peak_of(device, None, None)
    else:
        assert train_speed.peak_of(device, None, None).flops == tflops * 1e12
    assert train_speed.peak_of(device, 5, 2) == train_speed.Peak(5e12, 2e12)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--resolution", "72"], "multiples of 64"),
        (["--resolution", "64", "--args", "ranks=4"], "ranks"),
        (["--resolution", "64", "--preset", "flux-lora-fast"], "flux-lora-fast is a preset for flux1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(words: list[str], problem: str) -> None:
    with pytest.raises(SystemExit, match=problem):
        train_speed.main(["--branch", "sd15", "--batch", "1", "--device", "cpu", *words])


@pytest.mark.long
def test_it_runs_where_nothing_is_installed_that_serves_the_page() -> None:
    # None in sys.modules: importing it fails, and a library that looks whether it is there does not find it.
    script = f"""
import sys
sys.modules |= dict.fromkeys({SERVING!r})
from benchmarks import train_speed
train_speed.main("--branch sd15 --resolution 64 --batch 1 --tiny --steps 1 --warm-up 0 --device cpu".split())
print(sorted({{"trainer.settings", "trainer.studio.store", "trainer.training.train"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[]"
