"""Optimizers: AdamW for adapters, Adafactor for whole models. Independent of models and of the training loop."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.utils.weak import WeakTensorKeyDictionary

from trainer.methods.protocol import Group

FORGET = -0.8  # beta2 of step t is 1 - t^-0.8 (Shazeer & Stern 2018, §7.2)
LARGEST_UPDATE = 1.0  # largest root mean square of one weight's update (§6)
LEAST_SQUARE = 1e-30  # added to squared gradients against division by zero


def make(groups: list[Group], config_optimizer: str, weight_decay: float, seed: int) -> torch.optim.Optimizer:
    """The optimizer that a configuration names: `adamw` or `adafactor`.

    groups: of `Method.attach`. seed: of the rounding.
    """
    known = ("params", "lr", "weight_decay")
    plain = [{key: value for key, value in group.items() if key in known} for group in groups]
    if config_optimizer == "adafactor":
        return Adafactor(plain, weight_decay, seed)
    assert config_optimizer == "adamw", config_optimizer
    return torch.optim.AdamW(plain, weight_decay=weight_decay, fused=True)


def moment_shapes(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the optimizer keeps of a weight, once it had a gradient."""
    if isinstance(optimizer, Adafactor):
        return shapes_of(weight)
    return {"step": (), "exp_avg": tuple(weight.shape), "exp_avg_sq": tuple(weight.shape)}


class Adafactor(torch.optim.Optimizer):
    """Adam without a first moment, and with a second one that is n + m numbers for n x m weights.

    Shazeer & Stern 2018, arXiv 1804.04235, with the given learning rate: no relative steps and no parameter scaling, as
    kohya's sd-scripts advise for whole models. The weights of a convolution are reshaped to (out, rest). It computes in
    float32. bfloat16 weights are rounded at random, so steps far below their spacing are not lost; the random bits
    depend only on seed, step and the weight's place in `groups`, so a resumed run repeats them.

    State of each weight, in float32 on the weight's device: `step` (), and `row` (n,) and `col` (m,), the means of the
    squared gradients along rows and columns, or `sq` for vectors.
    """

    def __init__(self, groups: list[dict[str, object]], weight_decay: float, seed: int) -> None:
        super().__init__(groups, {"weight_decay": weight_decay})
        self._seed = seed
        held = [(at, weight) for at, group in enumerate(self.param_groups) for weight in group["params"]]
        self._places = {weight: (at, number) for number, (at, weight) in enumerate(held)}
        # The values of the `step` tensors: reading them waits for the device. After a resume they are read once.
        self._counts = WeakTensorKeyDictionary()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for weight in self._places:
            if weight.grad is not None:
                self.step_parameter(weight)

    @torch.no_grad()
    def step_parameter(self, weight: Tensor) -> None:
        """Update one weight by its gradient. It waits for the device only in the first step after a resume."""
        assert weight.grad is not None, "a weight without a gradient stays as it is"
        at, number = self._places[weight]
        lr, decay = self.param_groups[at]["lr"], self.param_groups[at]["weight_decay"]
        state = self.state[weight]
        if not state:
            state.update(beginning(weight))
            self._counts[state["step"]] = 0
        state["step"] += 1
        update = scaled(weight.grad, state)
        update /= (vector_norm(update) / (math.sqrt(update.numel()) * LARGEST_UPDATE)).clamp(min=1)
        if weight.dtype == torch.float32:
            weight.mul_(1 - lr * decay).sub_(update, alpha=lr)
            return
        assert weight.dtype == torch.bfloat16, weight.dtype
        update.mul_(-lr).add_(weight, alpha=1 - lr * decay)
        generator = torch.Generator(weight.device).manual_seed(self._bits_seed(state["step"], number))
        weight.copy_(round_at_random(update, generator))

    def _bits_seed(self, step: Tensor, number: int) -> int:
        """step (): counts the current step already."""
        count = self._counts[step] + 1 if step in self._counts else int(step)
        self._counts[step] = count
        digest = hashlib.sha256(f"{self._seed} {count} {number}".encode()).digest()
        return int.from_bytes(digest[:8], "big")


def beginning(weight: Tensor) -> dict[str, Tensor]:
    """The initial state of a weight; see Adafactor."""
    return {key: torch.zeros(shape, device=weight.device) for key, shape in shapes_of(weight).items()}


def shapes_of(weight: Tensor) -> dict[str, tuple[int, ...]]:
    """The shapes of a weight's state in Adafactor."""
    if weight.dim() < 2:
        return {"step": (), "sq": tuple(weight.shape)}
    return {"step": (), "row": tuple(weight.shape[:1]), "col": (weight.shape[1:].numel(),)}


def scaled(gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The gradient divided by the root of its second moment, in float32; updates the state first.

    state: its `step` counts this step already.
    """
    new = state["step"] ** FORGET  # share of this gradient in the moments: 1 in step 1
    if gradient.dim() < 2:
        squares = gradient.float().square() + LEAST_SQUARE
        return gradient * state["sq"].lerp_(squares, new).rsqrt()
    matrix = gradient.flatten(1)
    # By norms: the squares would be a float32 copy of the gradient.
    rows, cols = (vector_norm(matrix, dim=dim, dtype=torch.float32).square() / matrix.shape[dim] for dim in (1, 0))
    row, col = state["row"].lerp_(rows + LEAST_SQUARE, new), state["col"].lerp_(cols + LEAST_SQUARE, new)
    update = matrix * (row / row.mean()).rsqrt()[:, None]
    return update.mul_(col.rsqrt()).view(gradient.shape)


def round_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """Stochastic rounding: float32 -> one of the two neighbouring bfloat16 numbers, unbiased.

    Works in place, and returns float32 whose low 16 bits are zero. Values that are not finite stay so.
    """
    bits = values.view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << 16, generator=generator)
    # A GPU's NaN has all bits set: adding 1 would make it -0.
    bits.add_(noise.mul_(values.isfinite())).bitwise_and_(-1 << 16)
    return values


@contextmanager
def released(optimizer: Adafactor, weights: Iterable[Tensor]) -> Iterator[Tensor]:
    """Inside, a backward pass updates each weight as soon as its gradient is complete, and frees the gradient.

    Yields the sum of the squared gradients so far, () in float32 on the device: the square of their norm, not finite
    where one of them is not. Gradients cannot be clipped to a common norm, which is known too late. When gradients are
    accumulated over several passes, only the last pass runs inside; weights that it does not reach are updated at the
    end.
    """
    weights = list(weights)
    squared = torch.zeros((), device=weights[0].device)

    def use(weight: Tensor) -> None:
        assert weight.grad is not None
        squared.add_(vector_norm(weight.grad, dtype=torch.float32).square())
        optimizer.step_parameter(weight)
        weight.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(use) for weight in weights]  # type: ignore[no-untyped-call]
    try:
        yield squared
        for weight in weights:
            if weight.grad is not None:
                use(weight)
    finally:
        for hook in hooks:
            hook.remove()
