"""Time of a training step, compared with the time that its arithmetic alone would take.

It measures `loop.step_once` itself, with the family's own Branch, the adapters of `methods.lora` and the optimizer of
`loop.train`, on random latents and text conditions of the real shapes. Models have random weights on the device:

    --random-weights    the full-size model of the branch's CONFIG; VAE and text encoders are not needed for a step
    --tiny              the same layers with few channels (the default without a GPU)

The text encoders are not trained. On the same device, a step has as many operators in a tiny model as in the full-size
one. It needs only the libraries for training: torch, diffusers, transformers, peft, safetensors, numpy, pillow,
pydantic, psutil, huggingface_hub; not those of the page.
Run: `uv run python -m benchmarks.train_speed --branch flux1 --resolution 512 --batch 1 --random-weights`
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from trainer import device as device_memory
from trainer.branches import flux1, loading, sd15, sdxl1
from trainer.branches.flux1 import Flux1
from trainer.branches.protocol import Branch
from trainer.config import resolve
from trainer.config.train_config import TrainConfig
from trainer.contract.errors import InvalidRequest
from trainer.device import GIB, free_gib
from trainer.methods import lora
from trainer.training import loop
from trainer.training.dataset import Dataset
from trainer.training.views import Picture, Sample, View

PRESETS = Path(__file__).parent.parent / "presets"
CONFIGS = {"sd15": sd15.CONFIG, "sdxl1": sdxl1.CONFIG, "flux1": flux1.CONFIG}
EPOCH = 4  # steps in an epoch
CLIP_TOKENS = 77
T5_TOKENS = 512  # default of FluxPipeline.encode_prompt

# Widths of a tiny model. The numbers of layers and blocks stay the same, and so do the blocks that are as wide as the
# one before. Head sizes are multiples of 8, as FlashAttention requires.
TINY: dict[str, dict[str, Any]] = {
    "sd15": {
        "block_out_channels": [16, 32, 64, 64],
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
    },
    "sdxl1": {
        "block_out_channels": [16, 32, 64],
        "norm_num_groups": 4,
        "attention_head_dim": [1, 2, 4],
        "cross_attention_dim": 24,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    },
    "flux1": {
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 8,
        "axes_dims_rope": [2, 2, 4],
    },
}

# Part of the card's name -> TFLOP/s that dense bf16 matrix products reach, TB/s of its memory.
CARDS = {
    "H200": (790.0, 4.3),
    "H100 80GB HBM3": (790.0, 3.0),  # SXM; the PCIe version is slower
    "RTX 4090": (165.0, 1.0),
    "A100": (280.0, 1.6),
}

# Operators that start no kernel, in addition to views.
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}


@dataclass(frozen=True)
class Work:
    """FLOP of one sample's forward pass: of attention (QK and PV) and of everything else."""

    attention: float
    rest: float

    @property
    def forward(self) -> float:
        return self.attention + self.rest

    def step(self, checkpointing: bool) -> float:
        """FLOP of forward and backward pass through frozen weights, without the adapters themselves.

        Frozen weights need no gradient, so the backward pass costs as much as the forward pass; attention's costs 2.5
        times as much, because it computes QK again (FlashAttention-2, Dao 2023, arXiv 2307.08691).
        """
        again = self.forward if checkpointing else 0.0
        return self.forward + self.rest + 2.5 * self.attention + again


@dataclass(frozen=True)
class Peak:
    """Peak performance of a device."""

    flops: float  # per second
    bandwidth: float  # bytes per second


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that reach the dispatcher, also in the backward pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))

    @property
    def all(self) -> int:
        return self.calls.total()

    @property
    def kernels(self) -> int:
        """Operators without views and allocations, which compute nothing."""
        return sum(count for operator, count in self.calls.items() if computes(operator))


def computes(operator: Any) -> bool:
    views = any(one.alias_info is not None and not one.alias_info.is_write for one in operator._schema.returns)
    space, _, name = operator._schema.name.partition("::")
    return not views and name not in ALLOCATIONS and space != "profiler"


def make_branch(name: str, tiny: bool, place: torch.device, device: torch.device, dtype: torch.dtype) -> Branch:
    """The family's own Branch with only a denoiser, which has random weights at `place`.

    place: the device, or `meta`, whose tensors have only shapes.
    """
    configs, kind = CONFIGS[name], "transformer" if name == "flux1" else "unet"
    settings = configs[f"{kind}/config.json"] | (TINY[name] if tiny else {})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), torch.device(place):
            torch.manual_seed(0)
            denoiser: nn.Module = getattr(diffusers, settings["_class_name"]).from_config(settings)
    finally:
        torch.set_default_dtype(before)
    denoiser.requires_grad_(False).eval()
    scheduling = configs["scheduler/scheduler_config.json"]
    parts: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None}
    parts["scheduler"] = getattr(diffusers, scheduling["_class_name"]).from_config(scheduling)
    if name == "sd15":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        built: Any = sd15.SD15(diffusers.StableDiffusionPipeline(**parts, unet=denoiser), device, dtype)
    elif name == "sdxl1":
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
        built = sdxl1.SDXL1(diffusers.StableDiffusionXLPipeline(**parts, unet=denoiser), device, dtype)
    else:
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
        built = Flux1(diffusers.FluxPipeline(**parts, transformer=None), lambda: denoiser, device, dtype)
    branch: Branch = built
    branch.keep_text_encoders(())
    return branch


def condition_shapes(name: str, denoiser: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of what the family's `encode_prompts` returns for one caption."""
    config = denoiser.config
    if name == "sd15":
        return {"encoder_hidden_states": (1, CLIP_TOKENS, config.cross_attention_dim)}
    if name == "sdxl1":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {"encoder_hidden_states": (1, CLIP_TOKENS, config.cross_attention_dim), "text_embeds": (1, pooled)}
    return {
        "encoder_hidden_states": (1, T5_TOKENS, config.joint_attention_dim),
        "pooled_projections": (1, config.pooled_projection_dim),
    }


def random_data(name: str, branch: Branch, config: TrainConfig, place: torch.device) -> Dataset:
    """A dataset of random latents at `place`, with a caption for each picture, and the configured masks."""
    side, denoiser = config.resolution[0], branch.denoiser
    if side % branch.size_multiple:
        raise InvalidRequest({"resolution": [f"{name} trains multiples of {branch.size_multiple} pixels, not {side}"]})
    height = side // branch.latent_scale
    settings: Any = denoiser.config
    channels = settings.in_channels // 4 if name == "flux1" else settings.in_channels  # FLUX packs two by two latents
    shape = (1, channels, height, height)

    def picture(number: int, kind: Any) -> Sample:
        size = branch.encode_size((side, side), (0, 0), (side, side))
        size = {key: value.to(place) for key, value in size.items()}
        wanted = {config.mask, *(["subject"] if config.mask_widen else [])} - {"none"}
        masks = {mask: torch.ones(1, 1, height, height, device=place) for mask in wanted}
        mean, std = torch.randn(shape, device=place), torch.rand(shape, device=place) / 10
        name = f"{kind} {number}"
        return Sample(Picture(Path(name), name, name, kind), [View(mean, std, size, masks)])

    count = EPOCH * config.batch
    samples = [picture(number, "photo") for number in range(count)]
    if config.prior_weight:
        samples += [picture(number, "class") for number in range(count)]
    captions = [*(sample.picture.caption for sample in samples), ""]
    shapes = condition_shapes(name, denoiser)
    cond = [{key: torch.randn(shape, device=place).to(branch.dtype) for key, shape in shapes.items()} for _ in captions]
    return Dataset(samples, captions, cond, config)


def count_work(name: str, resolution: int, tiny: bool = False) -> Work:
    """The FLOP of one sample's forward pass, counted from shapes."""
    meta, cpu = torch.device("meta"), torch.device("cpu")
    branch = make_branch(name, tiny, meta, cpu, torch.float32)
    config = configure(name, resolution, 1, None, "", cpu)
    view = (data := random_data(name, branch, config, meta)).samples[0].views[0]
    assert data.cond is not None
    noise, times = torch.empty_like(view.mean), torch.zeros(1, dtype=torch.float32, device=meta)
    if name != "flux1":
        times = times.long()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        branch.loss(view.mean, data.cond[0] | view.size, noise, times, config, None)
    flops = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    # On meta, attention is two batched products; no layer of these models uses them.
    attention = sum(count for operator, count in flops.items() if "bmm" in operator or "attention" in operator)
    return Work(attention, sum(flops.values()) - attention)


def configure(
    name: str, resolution: int, batch: int, preset: str | None, args: str, device: torch.device
) -> TrainConfig:
    """The configuration that the app would use on this device. Raises InvalidRequest."""
    given = f"resolution={resolution} batch={batch} text_encoder_lr=0 {args}"
    config = resolve.resolve(
        PRESETS, branch=name, model_type="lora", preset=preset, name="person", photos=EPOCH * batch, steps=None,
        args=given,
    )  # fmt: skip
    free = free_gib(device)
    return resolve.fit(PRESETS, config, branch=name, model_type="lora", asked=given, free_gib=free)


def peak_of(device: torch.device, tflops: float | None, bandwidth: float | None) -> Peak:
    """The given values; else the GPU's row in the table, or a measurement on the CPU. Raises InvalidRequest."""
    if tflops and bandwidth:
        return Peak(tflops * 1e12, bandwidth * 1e12)
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        known = next((numbers for part, numbers in CARDS.items() if part in card), None)
        if known is None:
            raise InvalidRequest({"card": [f"{card} is not in the table; give --peak-tflops and --bandwidth"]})
        return Peak((tflops or known[0]) * 1e12, (bandwidth or known[1]) * 1e12)
    side = 1024
    left, right, out = (torch.randn(side, side, device=device) for _ in range(3))
    product = min(timed(lambda: torch.mm(left, right, out=out), device) for _ in range(5))
    source, target = (torch.zeros(2**24, device=device) for _ in range(2))
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(5))
    reached = Peak(2 * side**3 / product, 2 * source.nbytes / copy)
    return Peak(tflops * 1e12 if tflops else reached.flops, bandwidth * 1e12 if bandwidth else reached.bandwidth)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds until all started work on the device is done."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_sync(step: Callable[[], Any]) -> str | None:
    """The line where a step waits for the GPU; None: it does not."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as problem:
        frame = traceback.extract_tb(problem.__traceback__)[-1]
        return f"{frame.filename}:{frame.lineno}: {str(problem).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All measurements. Raises InvalidRequest."""
    name, tiny = options.branch, not options.random_weights
    peak = peak_of(device, options.peak_tflops, options.bandwidth)
    config = configure(name, options.resolution, options.batch, options.preset, options.args, device)
    work = count_work(name, config.resolution[0], tiny)

    dtype = loading.compute_dtype(device)
    branch = make_branch(name, tiny, device, device, dtype)
    weights = sum(weight.nbytes for weight in branch.denoiser.parameters())
    torch.manual_seed(0)
    data = random_data(name, branch, config, device)
    # As in train.py and loop.train.
    groups = lora.attach(branch, config)
    branch.denoiser.to(device)
    if config.gradient_checkpointing:
        branch.pipeline.components[branch.denoiser_name].enable_gradient_checkpointing()
    params = [param for group in groups for param in group["params"]]
    optimizer = torch.optim.AdamW(
        [{"params": group["params"], "lr": group["lr"]} for group in groups],
        weight_decay=config.weight_decay,
        fused=True,
    )
    done = 0
    losses: list[Tensor] = []

    def step() -> None:
        nonlocal done
        losses.append(loop.step_once(branch, data, config, done, optimizer, params))
        done += 1

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(options.warm_up):
        step()
    seconds = [timed(step, device) for _ in range(options.steps)]
    peak_gib = device_memory.peak_gib(device)

    def run() -> None:
        for _ in range(options.steps):
            step()

    on_card = device.type == "cuda"
    running = timed(run, device) / options.steps if on_card else None
    if done % EPOCH == 0:
        step()  # the first step of an epoch shuffles
    with Operators() as operators:
        step()
    if not torch.isfinite(values := torch.stack(losses).cpu()).all():
        raise ArithmeticError("a loss or a gradient was not a finite number: the measured steps are not valid training")
    waits = host_sync(step) if on_card else None

    samples = [len(one.latents) for one in data.batches(branch, 0)]
    flop = work.step(config.gradient_checkpointing) * sum(samples)
    read = weights * len(samples) * (3 if config.gradient_checkpointing else 2)
    floor, median = max(flop / peak.flops, read / peak.bandwidth), statistics.median(seconds)
    return {
        "branch": name,
        "model": "tiny" if tiny else "full size",
        "resolution": config.resolution[0],
        "batch": config.batch,
        "micro_batch": config.micro_batch,
        "gradient_checkpointing": config.gradient_checkpointing,
        "rank": config.rank,
        "targets": config.targets,
        "preset": options.preset,
        "args": options.args,
        "device": torch.cuda.get_device_name(device) if on_card else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "peft": peft.__version__,
        },
        "warm_up": options.warm_up,
        "steps": options.steps,
        "seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "seconds_unwatched": running,
        "peak_gib": peak_gib,
        "weights_gib": weights / GIB,
        "forward_tflop": work.forward * sum(samples) / 1e12,
        "attention_tflop": work.attention * sum(samples) / 1e12,
        "step_tflop": flop / 1e12,
        "peak_tflops": peak.flops / 1e12,
        "bandwidth_tb": peak.bandwidth / 1e12,
        "floor": floor,
        "times_floor": median / floor,
        "operators": operators.all,
        "kernels": operators.kernels,
        "host_sync": None if not on_card else waits is not None,
        "host_sync_at": waits,
        "loss": float(values[:, 0].mean()),
    }


def summary(facts: dict[str, Any]) -> str:
    """A readable summary of the measurements."""
    seconds = {key: f"{1000 * value:.1f}" for key, value in facts["seconds"].items()}
    checkpointing = "with" if facts["gradient_checkpointing"] else "without"
    lines = [
        f"{facts['branch']} ({facts['model']}), {facts['resolution']} px, batch {facts['batch']} in micro-batches of "
        f"{facts['micro_batch']}, rank {facts['rank']} on {facts['targets']}, {checkpointing} checkpointing",
        f"on {facts['device']}, {facts['dtype']}; {facts['versions']}",
        f"step: median {seconds['median']} ms, min {seconds['min']}, max {seconds['max']}, of {facts['steps']} steps",
    ]
    if facts["seconds_unwatched"] is not None:
        lines.append(f"step, without waiting in between: mean {1000 * facts['seconds_unwatched']:.1f} ms")
    lines += [
        f"floor: {1000 * facts['floor']:.3f} ms, of which the step takes {facts['times_floor']:.2f} times as much "
        f"({facts['step_tflop']:.3g} TFLOP at {facts['peak_tflops']:.3g} TFLOP/s, {facts['bandwidth_tb']:.3g} TB/s)",
        f"memory: {facts['peak_gib']:.2f} GiB at most; weights {facts['weights_gib']:.2f}",
        f"operators: {facts['operators']} a step, {facts['kernels']} of them no views or allocations",
    ]
    if facts["host_sync"] is not None:
        lines.append(f"waits for the card: {facts['host_sync_at'] or 'no'}")
    return "\n".join([*lines, f"mean loss: {facts['loss']:.3g}"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--branch", choices=CONFIGS, required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--random-weights", action="store_true", help="the full-size model")
    model.add_argument("--tiny", action="store_true", help="a model with the same depth and few channels")
    parser.add_argument("--preset")
    parser.add_argument("--args", default="", help="words of `args`: rank=16 targets=attention ...")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warm-up", type=int, default=20)
    parser.add_argument("--device", help="cuda or cpu; by default the GPU, where there is one")
    parser.add_argument("--peak-tflops", type=float, help="TFLOP/s that matrix products reach on the device")
    parser.add_argument("--bandwidth", type=float, help="of the device's memory, TB/s")
    parser.add_argument("--json", type=Path, help="write everything to this file too")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not (options.random_weights or options.tiny):
        parser.error("say --random-weights or --tiny")
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # as the worker does
    try:
        facts = measure(options, device)
    except InvalidRequest as problem:
        sys.exit(str(problem))
    print(summary(facts))
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
