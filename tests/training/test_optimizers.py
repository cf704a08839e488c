"""Adafactor against the paper's formulas, what it holds, how it rounds, and gradients that are freed as they come."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.training import optimizers
from trainer.training.optimizers import Adafactor, make, released, round_at_random

MATRIX, CONVOLUTION, VECTOR = (6, 4), (5, 3, 2, 2), (7,)
HALF_AN_ULP = 2**-9  # of bfloat16 just below 1


def weight_of(values: Tensor, gradient: Tensor | None = None) -> nn.Parameter:
    weight = nn.Parameter(values.clone())
    weight.grad = gradient
    return weight


def adafactor(*weights: nn.Parameter, lr: float = 1e-2, decay: float = 0.0, seed: int = 0) -> Adafactor:
    return Adafactor([{"params": list(weights), "lr": lr}], decay, seed)


def paper(weights: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float) -> tuple[np.ndarray, list[float]]:
    """Algorithms 4 and 5 of arXiv 1804.04235 in float64, with sums as there; also the size of each unclipped update."""
    sizes: list[float] = []
    r, c, v = 0.0, 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        beta2 = 1 - t**-0.8
        if g.ndim > 1:
            flat = g.reshape(len(g), -1)
            r = beta2 * r + (1 - beta2) * (flat**2 + 1e-30).sum(1)
            c = beta2 * c + (1 - beta2) * (flat**2 + 1e-30).sum(0)
            u = (flat / np.sqrt(np.outer(r, c) / r.sum())).reshape(g.shape)
        else:
            v = beta2 * v + (1 - beta2) * (g**2 + 1e-30)
            u = g / np.sqrt(v)
        sizes.append(float(np.sqrt((u**2).mean())))
        weights = weights - lr * decay * weights - lr * u / max(1.0, sizes[-1])
    return weights, sizes


@pytest.mark.parametrize("shape", [MATRIX, CONVOLUTION, VECTOR], ids=["matrix", "convolution", "vector"])
def test_it_does_what_the_paper_says(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    start = rng.normal(size=shape)
    gradients = [rng.normal(size=shape) * scale for scale in (1e-3, 3e-4, 1e-1, 1e-2, 2e-3)]
    wanted, sizes = paper(start, gradients, lr=3e-2, decay=0.1)
    assert max(sizes) > 1.2 and min(sizes) < 0.8  # some updates are clipped, and some are not

    weight = weight_of(torch.tensor(start, dtype=torch.float32))
    optimizer = adafactor(weight, lr=3e-2, decay=0.1)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    assert np.abs(wanted - start).max() > 0.02
    np.testing.assert_allclose(weight.detach().numpy(), wanted, rtol=0, atol=2e-6)


def test_a_convolution_in_channels_last_is_the_same() -> None:
    values, gradient = torch.randn(CONVOLUTION), torch.randn(CONVOLUTION)
    plain, last = weight_of(values, gradient), weight_of(values.to(memory_format=torch.channels_last))
    last.grad = gradient.to(memory_format=torch.channels_last)
    adafactor(plain).step()
    adafactor(last).step()
    assert not last.is_contiguous()
    torch.testing.assert_close(last, plain, rtol=0, atol=1e-7, check_stride=False)
    assert not torch.equal(plain, values)


def test_each_group_has_its_rate_and_its_decay() -> None:
    slow, fast, decayed = (weight_of(torch.ones(3), torch.zeros(3)) for _ in range(3))
    slow.grad, fast.grad = torch.ones(3), torch.ones(3)
    groups = [
        {"params": [slow], "lr": 0.01, "names": ["slow"]},
        {"params": [fast], "lr": 0.1, "names": ["fast"]},
        {"params": [decayed], "lr": 0.1, "weight_decay": 0.5, "names": ["decayed"]},
    ]
    optimizer = make(groups, "adafactor", 0.0, seed=0)
    optimizer.step()
    assert isinstance(optimizer, Adafactor)
    assert [round(float(weight.detach()[0]), 6) for weight in (slow, fast, decayed)] == [0.99, 0.9, 0.95]
    optimizer.param_groups[0]["lr"] = 0.1  # as the schedule sets it
    optimizer.step()
    assert round(float(slow.detach()[0]), 6) == 0.89


def test_adamw_is_torch_s_fused_one() -> None:
    weight = weight_of(torch.ones(3), torch.ones(3))
    optimizer = make([{"params": [weight], "lr": 0.1, "names": ["one"]}], "adamw", 0.5, seed=0)
    optimizer.step()
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    torch.testing.assert_close(weight.detach(), torch.full((3,), 1 - 0.1 * 0.5 - 0.1))


@pytest.mark.parametrize(
    ("shape", "numbers"), [((50, 30), 50 + 30 + 1), ((8, 4, 3, 3), 8 + 36 + 1), ((9,), 9 + 1), ((), 1 + 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_holds_of_a_weight(shape: tuple[int, ...], numbers: int, dtype: torch.dtype) -> None:
    weight = weight_of(torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=dtype))
    optimizer = adafactor(weight)
    optimizer.step()
    held = optimizer.state[weight]
    assert held.keys() == ({"step", "row", "col"} if len(shape) > 1 else {"step", "sq"})
    assert {value.dtype for value in held.values()} == {torch.float32} and held["step"].shape == ()
    assert sum(value.numel() for value in held.values()) == numbers


def test_a_weight_without_a_gradient_stays_as_it_is() -> None:
    idle, busy = weight_of(torch.ones(3)), weight_of(torch.ones(3), torch.ones(3))
    optimizer = adafactor(idle, busy, decay=0.5)
    optimizer.step()
    assert torch.equal(idle, torch.ones(3)) and idle not in optimizer.state
    assert not torch.equal(busy, torch.ones(3))


@pytest.mark.parametrize("shape", [(4000,), (80, 50)])
def test_steps_below_half_an_ulp_add_up_in_bfloat16(shape: tuple[int, ...]) -> None:
    lr, steps = 1e-4, 100
    ones = torch.ones(shape, dtype=torch.bfloat16)
    assert lr < HALF_AN_ULP and torch.equal(ones - lr, ones)  # plain rounding stands still
    weight = weight_of(ones)
    optimizer = adafactor(weight, lr=lr)
    for _ in range(steps):
        weight.grad = torch.ones_like(ones)
        optimizer.step()
    # A weight's deviation is some 0.006, that of the mean of 4000 some 0.0001.
    assert float(weight.detach().float().mean()) == pytest.approx(1 - lr * steps, abs=5e-4)
    assert weight.dtype == torch.bfloat16 and len(weight.unique()) > 2


def test_decay_below_half_an_ulp_adds_up_in_bfloat16() -> None:
    weight = weight_of(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = adafactor(weight, lr=1e-3, decay=0.5)
    for _ in range(50):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert float(weight.detach().float().mean()) == pytest.approx((1 - 1e-3 * 0.5) ** 50, abs=1e-3)  # 0.975


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("below", [1.0, -3.0, 2.0**-130])
def test_a_number_is_rounded_up_as_often_as_it_is_near(below: float, share: float) -> None:
    one = torch.tensor(below).view(torch.int32)  # of bfloat16: its low half is zero
    above = (one + (1 << 16)).view(torch.float32)
    between = (one + round(share * (1 << 16))).view(torch.float32)
    rounded = round_at_random(between.repeat(100_000), torch.Generator().manual_seed(3))
    assert set(rounded.tolist()) == {below, float(above)}
    assert float((rounded == above).double().mean()) == pytest.approx(share, abs=0.008)  # five deviations


def test_numbers_of_bfloat16_stay_and_so_does_what_is_not_finite() -> None:
    exact = torch.randn(1000).bfloat16().float()
    assert torch.equal(round_at_random(exact.clone(), torch.Generator().manual_seed(0)), exact)
    # NaN as a card computes it, as a processor does, and with the sign set.
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000, -0x800000], dtype=torch.int32).repeat(1000)
    rounded = round_at_random(bits.view(torch.float32).clone(), torch.Generator().manual_seed(0)).view(-1, 5)
    assert rounded[:, :3].isnan().all()
    assert torch.equal(rounded[:, 3:], torch.tensor([torch.inf, -torch.inf]).expand(1000, 2))


def bfloat16_weights() -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(5)
    return [weight_of(torch.randn(shape, generator=rng).bfloat16()) for shape in ((40, 30), (40, 30), VECTOR)]


def go_on(optimizer: Adafactor, weights: list[nn.Parameter], steps: range) -> list[Tensor]:
    for step in steps:
        rng = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=rng).bfloat16()
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_the_same_seed_gives_the_same_bits_and_another_one_others() -> None:
    ends = []
    for seed in (1, 1, 2):
        weights = bfloat16_weights()
        ends.append(go_on(adafactor(*weights, lr=1e-4, seed=seed), weights, range(4)))
    assert equal(ends[0], ends[1]) and not equal(ends[0], ends[2])


def test_weights_that_are_alike_and_steps_that_are_alike_get_bits_of_their_own() -> None:
    twins = [weight_of(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = adafactor(*twins, lr=HALF_AN_ULP)
    seen = []
    for _ in range(2):
        for twin in twins:
            twin.data.fill_(1)
            twin.grad = torch.ones_like(twin)
        optimizer.step()
        seen += [twin.detach() == 1 for twin in twins]
    for number, one in enumerate(seen):
        for other in seen[:number]:
            assert float((one == other).double().mean()) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("fresh", [True, False], ids=["a new process", "going back in this one"])
def test_a_run_that_resumes_gives_the_same_bits(fresh: bool) -> None:
    weights = bfloat16_weights()
    optimizer = adafactor(*weights, lr=1e-4)
    middle = go_on(optimizer, weights, range(3))
    kept = [copy.deepcopy(optimizer.state[weight]) for weight in weights]  # as the loop does it, by key and weight
    end = go_on(optimizer, weights, range(3, 6))

    if fresh:
        weights = bfloat16_weights()
        optimizer = adafactor(*weights, lr=1e-4)
    optimizer.state.clear()
    for weight, value, state in zip(weights, middle, kept, strict=True):
        weight.data.copy_(value)
        optimizer.state[weight] = copy.deepcopy(state)
    assert equal(go_on(optimizer, weights, range(3, 6)), end)

    optimizer.state.clear()  # from the same weights without the state: other numbers
    for weight, value in zip(weights, middle, strict=True):
        weight.data.copy_(value)
    assert not equal(go_on(optimizer, weights, range(3, 6)), end)


class Reads(TorchDispatchMode):
    """How often a number was read from a tensor, for which a card would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [MATRIX, CONVOLUTION, VECTOR])
def test_nothing_waits_for_the_device(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = weight_of(torch.ones(shape, dtype=dtype))
    optimizer = adafactor(weight, decay=0.1)
    with Reads() as reads:
        for _ in range(3):
            weight.grad = torch.ones(shape, dtype=dtype)
            with released(optimizer, [weight]):
                (weight * 2).sum().backward()
    assert reads.count == 0
    optimizer.state[weight] = copy.deepcopy(optimizer.state[weight])  # a resume: its count is read, once
    weight.grad = torch.ones(shape, dtype=dtype)
    with Reads() as reads:
        optimizer.step()
        optimizer.step()
    assert reads.count == (1 if dtype == torch.bfloat16 else 0)


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 2)]
    return nn.Sequential(*layers).to(dtype)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    pictures = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(step)).to(dtype)
    return (model(pictures).square().sum() + model[0].bias.sum()) * scale  # this bias is used twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_freed_as_they_come_give_the_weights_that_held_ones_give(dtype: torch.dtype) -> None:
    held, freed = network(dtype), network(dtype)
    before = [weight.detach().clone() for weight in held.parameters()]
    first, second = (adafactor(*model.parameters(), decay=0.1) for model in (held, freed))
    for step in range(4):
        loss_of(held, step, dtype).backward()
        norm = nn.utils.get_total_norm([weight.grad.float() for weight in held.parameters()])
        first.step()
        first.zero_grad()
        with released(second, freed.parameters()) as squared:
            loss_of(freed, step, dtype).backward()
            assert all(weight.grad is None for weight in freed.parameters())
        torch.testing.assert_close(squared.sqrt(), norm)
    ours, theirs = ([weight.detach() for weight in model.parameters()] for model in (held, freed))
    assert equal(ours, theirs)
    assert not any(torch.equal(one, start) for one, start in zip(ours, before, strict=True))


def test_only_the_backward_pass_within_frees_gradients() -> None:
    model = network(torch.float32)
    optimizer = adafactor(*model.parameters())
    with released(optimizer, model.parameters()):
        pass
    before = [weight.detach().clone() for weight in model.parameters()]
    loss_of(model, 0, torch.float32).backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert equal([weight.detach() for weight in model.parameters()], before)


def test_what_was_accumulated_before_counts() -> None:
    whole, parts = network(torch.float32), network(torch.float32)
    with released(adafactor(*whole.parameters()), whole.parameters()) as wanted:
        (loss_of(whole, 0, torch.float32) + loss_of(whole, 1, torch.float32)).backward()
    loss_of(parts, 0, torch.float32).backward()
    with released(adafactor(*parts.parameters()), parts.parameters()) as squared:
        loss_of(parts, 1, torch.float32).backward()
    torch.testing.assert_close(squared, wanted)
    assert all(weight.grad is None for weight in parts.parameters())


def test_what_the_last_backward_pass_does_not_reach_is_used_at_the_end() -> None:
    reached, missed = weight_of(torch.ones(3)), weight_of(torch.ones(3))
    optimizer = adafactor(reached, missed, lr=0.25)
    (reached.sum() + 2 * missed.sum()).backward()
    with released(optimizer, [reached, missed]) as squared:
        reached.sum().backward()
        assert reached.grad is None and missed.grad is not None
    assert missed.grad is None and float(squared) == pytest.approx(3 * 2**2 + 3 * 2**2)
    assert torch.equal(missed, torch.full((3,), 0.75)) and torch.equal(reached, missed)


def test_an_error_in_the_backward_pass_updates_nothing_more() -> None:
    weight = weight_of(torch.ones(3), torch.ones(3))
    with pytest.raises(RuntimeError, match="no room"), released(adafactor(weight), [weight]):
        raise RuntimeError("no room")
    assert torch.equal(weight, torch.ones(3)) and weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_shows(dtype: torch.dtype, scale: float) -> None:
    model = network(dtype)
    optimizer = adafactor(*model.parameters())
    with released(optimizer, model.parameters()) as squared:
        loss_of(model, 0, dtype).backward()
        assert bool(squared.isfinite())
        loss_of(model, 1, dtype, scale).backward()
    assert not bool(squared.isfinite())
    assert any(not weight.isfinite().all() for weight in model.parameters())  # the loop goes back to a saved state


def test_other_formats_are_refused() -> None:
    weight = weight_of(torch.ones(3, dtype=torch.float16), torch.ones(3, dtype=torch.float16))
    with pytest.raises(AssertionError, match="float16"):
        adafactor(weight).step()
    with pytest.raises(AssertionError, match="sgd"):
        optimizers.make([], "sgd", 0.0, 0)
