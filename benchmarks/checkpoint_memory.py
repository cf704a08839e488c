"""GPU memory of a training step of a whole model, computed from the shapes of the full-size models.

Nothing is measured: weights, gradients and the optimizer's state are counted on the meta device, activations are
constants below. Text encoders that are not trained have been freed, and the VAE is in the CPU's memory.
Prints a table in GiB. Run: `uv run python -m benchmarks.checkpoint_memory`
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from trainer.branches import flux1, sd15, sdxl1
from trainer.device import GIB

CONFIGS: dict[str, dict[str, Any]] = {"sd15": sd15.CONFIG, "sdxl1": sdxl1.CONFIG, "flux1": flux1.CONFIG}
TITLES = {"sd15": "SD 1.5", "sdxl1": "SDXL", "flux1": "FLUX.1"}
SIDES = {"sd15": 512, "sdxl1": 1024, "flux1": 512}  # of the sample, in pixels
TRAINED_ENCODERS = {"sd15": ["text_encoder"], "sdxl1": ["text_encoder", "text_encoder_2"], "flux1": []}
FROZEN = "token_embedding"  # in the name of a weight that is not trained
FLOAT32, BFLOAT16 = 4, 2  # bytes of a number
WORKSPACE_GIB = 0.5  # of cuDNN and cuBLAS, and the GPU's context

# GiB of one sample of SIDES: (at least, at most), with gradient checkpointing and without.
# At least: performance.md §1.4, counted there for adapters in bfloat16 on attention (and FLUX's feed-forward).
# At most: tensors that a forward pass on the meta device saves when every weight is trained and norms compute in
# float32, as with autocast on a GPU; attention saves queries, keys, values and result. Checkpointed: what that pass
# saves, plus twice the block of §1.4.
ACTIVATIONS_GIB = {
    "sd15": {True: (0.13, 0.3), False: (0.79, 1.2)},
    "sdxl1": {True: (0.81, 1.9), False: (5.6, 8.1)},
    "flux1": {True: (0.69, 0.9), False: (8.2, 15.8)},
}


@dataclass(frozen=True)
class Case:
    """One way to train a family's whole model."""

    branch: str
    optimizer: str
    number_bytes: int  # of a trained weight: FLOAT32 or BFLOAT16
    encoders: bool = False  # whether text encoders are trained too

    @property
    def title(self) -> str:
        encoders = " and text encoders" if self.encoders else ""
        number = "float32" if self.number_bytes == FLOAT32 else "bfloat16"
        return f"{TITLES[self.branch]}{encoders}, {number}, {'AdamW' if self.optimizer == 'adamw' else 'Adafactor'}"


@dataclass(frozen=True)
class Held:
    """Bytes that a step holds in addition to activations and workspace."""

    weights: int  # trained
    frozen: int  # frozen weights
    state: int  # of the optimizer
    casts: int  # autocast's copies of float32 weights in bfloat16, from the forward pass on
    all_gradients: int
    largest_gradient: int  # the only one in memory where each is freed as soon as it is complete
    update: int  # Adafactor's buffers for one weight's update
    releases: bool  # whether the last pass frees gradients

    def span(self, activations: tuple[float, float], several: bool) -> tuple[float, float]:
        """Bytes (at least, at most) with these activations.

        several: a step has more than one forward and backward pass, as with class pictures in a separate micro-batch;
        gradients of one pass are held during the next. At least: the larger of two points in time, the end of the
        last forward pass and of the last backward pass. At most: everything at once, which does not happen.
        """
        least, most = activations
        gradients = self.largest_gradient if self.releases and not several else self.all_gradients
        left = self.all_gradients if several else 0
        always = self.weights + self.frozen + self.state + WORKSPACE_GIB * GIB
        fuller = max(left + self.casts + least, gradients + self.update)
        return always + fuller, always + self.casts + gradients + self.update + most


def cases() -> Iterator[Case]:
    for branch in CONFIGS:
        for optimizer, number_bytes in (("adamw", FLOAT32), ("adafactor", FLOAT32), ("adafactor", BFLOAT16)):
            yield Case(branch, optimizer, number_bytes)
            if TRAINED_ENCODERS[branch]:
                yield Case(branch, optimizer, number_bytes, encoders=True)


@cache
def shapes_of(branch: str, part: str) -> nn.Module:
    """A part of the full-size model on the meta device."""
    settings = CONFIGS[branch][f"{part}/config.json"]
    with torch.device("meta"):
        if "_class_name" in settings:
            denoiser: nn.Module = getattr(diffusers, settings["_class_name"]).from_config(settings)
            return denoiser
        kind: Any = getattr(transformers, settings["architectures"][0])
        encoder: nn.Module = kind(kind.config_class(**settings))
        return encoder


def split(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """The trained and the frozen weights, on the meta device; see `methods.checkpoint`."""
    denoiser = "transformer" if case.branch == "flux1" else "unet"
    parts = [denoiser, *(TRAINED_ENCODERS[case.branch] if case.encoders else [])]
    named = [one for part in parts for one in shapes_of(case.branch, part).named_parameters()]
    trained: list[Tensor] = [weight for name, weight in named if FROZEN not in name]
    return trained, [weight for name, weight in named if FROZEN in name]


def state_bytes(weights: Iterable[Tensor], optimizer: str) -> int:
    """Bytes of the optimizer's state: AdamW for float32 weights, Adafactor for any."""
    kept = 0
    for weight in weights:
        if optimizer == "adamw":
            moments = 2 * weight.numel()
        elif weight.dim() > 1:
            moments = weight.shape[0] + weight.shape[1:].numel()
        else:
            moments = weight.numel()
        kept += moments + 1  # and the step
    return kept * FLOAT32


def held(trained: list[Tensor], frozen: list[Tensor], case: Case) -> Held:
    count, largest = numbers(trained), max(weight.numel() for weight in trained)
    # The update itself; with rounding also 32 random bits and a byte for isfinite.
    update = largest * (FLOAT32 if case.number_bytes == FLOAT32 else FLOAT32 + 4 + 1)
    return Held(
        weights=count * case.number_bytes,
        frozen=numbers(frozen) * BFLOAT16,
        state=state_bytes(trained, case.optimizer),
        casts=count * BFLOAT16 if case.number_bytes == FLOAT32 else 0,
        all_gradients=count * case.number_bytes,
        largest_gradient=largest * case.number_bytes,
        update=update if case.optimizer == "adafactor" else 0,
        releases=case.optimizer == "adafactor",
    )


def numbers(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def span_gib(case: Case, checkpointing: bool, several: bool = False) -> tuple[float, float]:
    """GiB of a step with one sample in each pass, at least and at most."""
    least, most = ACTIVATIONS_GIB[case.branch][checkpointing]
    low, high = held(*split(case), case).span((least * GIB, most * GIB), several)
    return low / GIB, high / GIB


def table() -> str:
    """All cases in GiB, as Markdown."""
    parts = ("trained", "M weights", "weights", "frozen", "state", "casts", "gradients: all", "largest", "one update")
    heads = (*parts, "one pass, checkpointed", "not", "several passes, checkpointed", "not")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case in cases():
        trained, frozen = split(case)
        part = held(trained, frozen, case)
        sizes = (part.weights, part.frozen, part.state, part.casts, part.all_gradients, part.largest_gradient)
        cells = [case.title, f"{numbers(trained) / 1e6:,.0f}", *(f"{size / GIB:.2f}" for size in (*sizes, part.update))]
        for several in (False, True):
            for checkpointing in (True, False):
                low, high = span_gib(case, checkpointing, several)
                cells.append(f"{low:.1f} to {high:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    sides = ", ".join(f"{TITLES[branch]} at {side} px" for branch, side in SIDES.items())
    print(f"GiB of a step with one sample in each pass: {sides}.")
    print("The last four columns are the whole step, at least to at most, with activations and the workspace, which is")
    print(f"{WORKSPACE_GIB} GiB. With one forward and backward pass in a step, Adafactor holds the largest gradient")
    print("alone; with several, as with class pictures, it holds them all.\n")
    print(table())
    print("\n| activations, GiB | checkpointed | not |\n|---|---|---|")
    for branch, figures in ACTIVATIONS_GIB.items():
        spans = (f"{low} to {high}" for low, high in (figures[True], figures[False]))
        print(f"| {TITLES[branch]}, {SIDES[branch]} px | {' | '.join(spans)} |")
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    print(f"\nPython {platform.python_version()}, {versions}.")


if __name__ == "__main__":
    main()
