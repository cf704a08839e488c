"""The training loop: resuming, states, cancelling, divergence and the schedule. Most of it on a tiny SD 1.5."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.marks import long_but
from tests.helpers.tiny import make_tiny_sdxl1
from tests.helpers.training import STEPS, RecordedReport, Run, TrainingSetup, config_of, same
from trainer.training import loop
from trainer.training.state_check import ADDED_LATER
from trainer.training.states import Diverged, save
from trainer.training.views import Picture

STATE_TENSORS = ("weight", "exp_avg", "exp_avg_sq", "step")


@pytest.fixture
def bench(thin_sd15: Path, tmp_path: Path, photos: list[Path]) -> TrainingSetup:
    return TrainingSetup(thin_sd15, tmp_path / "cache", photos, config_of())


@pytest.fixture(scope="module")
def thin_sdxl1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL 1.0 of two blocks with a layer each. Read only."""
    return make_tiny_sdxl1(tmp_path_factory.mktemp("tiny") / "thin", blocks=2, layers=1)


@pytest.fixture
def bench_of(tmp_path: Path, photos: list[Path], request: pytest.FixtureRequest) -> Callable[[str], TrainingSetup]:
    """bench_of(family): a bench for the thinnest base of a family."""
    thin = {"sd15": "thin_sd15", "sdxl1": "thin_sdxl1", "flux1": "tiny_flux1"}

    def make(family: str) -> TrainingSetup:
        return TrainingSetup(request.getfixturevalue(thin[family]), tmp_path / "cache", photos, config_of(), family)

    return make


@pytest.fixture(scope="module")
def finished_states(thin_sd15: Path, photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The states of a finished run. Read only."""
    folder = tmp_path_factory.mktemp("finished")
    bench = TrainingSetup(thin_sd15, folder / "cache", photos, config_of())
    assert bench.start().train(folder / "states", RecordedReport())
    return folder / "states"


@pytest.fixture
def states(tmp_path: Path) -> Path:
    """Where the loop keeps its states; it makes the folder."""
    return tmp_path / "states"


# Resuming


@pytest.mark.parametrize("text_encoder_lr", [0, 5e-3])
@pytest.mark.parametrize("stops", long_but([[2, 3, 5]], [[3], [2, 3, 5]]))
def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(
    bench: TrainingSetup, states: Path, text_encoder_lr: float, stops: list[int]
) -> None:
    bench.config = config_of(text_encoder_lr=text_encoder_lr)
    whole = bench.start()
    assert whole.train(states / "whole", RecordedReport())

    for number, stop in enumerate([*stops, None]):
        # Other adapters to begin with, as a proof that all of them come from the state.
        run, told = bench.start(adapters_seed=number), RecordedReport(stop_at=stop)
        finished = run.train(states / "parts", told)
        assert finished == (stop is None)
        assert told.resumed_at == [([0, *stops])[number]]
        assert same(run.weights(), whole.weights()) == finished
    last = [states / name / f"step-{STEPS:06d}" / "state.safetensors" for name in ("whole", "parts")]
    assert same(load_file(last[0]), load_file(last[1]))  # the optimizer's moments, too


@pytest.mark.parametrize(
    ("family", "text_encoder_lr"), long_but([("flux1", 0)], [("sdxl1", 0), ("sdxl1", 5e-3), ("flux1", 0)])
)
def test_a_run_of_another_family_resumes_bit_for_bit_as_well(
    bench_of: Callable[[str], TrainingSetup], states: Path, family: str, text_encoder_lr: float
) -> None:
    bench = bench_of(family)
    bench.config = config_of(text_encoder_lr=text_encoder_lr)
    whole, stopped, resumed = bench.start(), bench.start(), bench.start(adapters_seed=1)
    whole.train(states / "whole", RecordedReport())
    stopped.train(states / "parts", RecordedReport(stop_at=3))
    assert not same(stopped.weights(), whole.weights())
    assert not same(resumed.weights(), whole.weights())
    resumed.train(states / "parts", RecordedReport())
    assert same(resumed.weights(), whole.weights())
    trained = {name.split(".")[0] for name in whole.weights()}
    assert trained == {"denoiser"} | ({"text_encoder", "text_encoder_2"} if text_encoder_lr else set())
    last = [states / name / f"step-{STEPS:06d}" / "state.safetensors" for name in ("whole", "parts")]
    assert same(load_file(last[0]), load_file(last[1]))


def test_a_finished_run_is_not_trained_further(bench: TrainingSetup, states: Path) -> None:
    first, again, told = bench.start(), bench.start(adapters_seed=1), RecordedReport()
    first.train(states, RecordedReport())
    assert again.train(states, told)
    assert told.steps == [STEPS]
    assert same(again.weights(), first.weights())


def test_another_seed_trains_other_weights(bench: TrainingSetup, states: Path) -> None:
    first, same_seed = bench.start(), bench.start()
    first.train(states / "1", RecordedReport())
    same_seed.train(states / "2", RecordedReport())
    bench.config = config_of(seed=43)
    other_seed = bench.start()
    other_seed.train(states / "3", RecordedReport())
    assert same(first.weights(), same_seed.weights())
    assert not same(first.weights(), other_seed.weights())


def flip_one_bit(state: Path) -> None:
    content = bytearray((state / "state.safetensors").read_bytes())
    content[-20] ^= 1
    (state / "state.safetensors").write_bytes(content)


def truncate(state: Path) -> None:
    (state / "state.safetensors").write_bytes((state / "state.safetensors").read_bytes()[:-1])


def remove_tensors(state: Path) -> None:
    (state / "state.safetensors").unlink()


def remove_manifest(state: Path) -> None:
    (state / "manifest.json").unlink()


def change_step(state: Path) -> None:
    manifest = state / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"step": {STEPS}', '"step": 5'))


def write_manifest(content: bytes) -> Callable[[Path], None]:
    def spoil(state: Path) -> None:
        (state / "manifest.json").write_bytes(content)

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        flip_one_bit,
        truncate,
        remove_tensors,
        remove_manifest,
        change_step,
        *(write_manifest(content) for content in (b"", b"{", b"[]", b"{}", b"\xff\xfe")),
    ],
)
def test_a_state_that_is_not_whole_gives_way_to_the_one_before(
    bench: TrainingSetup, states: Path, finished_states: Path, spoil: Callable[[Path], None]
) -> None:
    shutil.copytree(finished_states, states)
    assert sorted(state.name for state in states.glob("step-*")) == ["step-000004", "step-000006"]
    spoil(states / "step-000006")
    told = RecordedReport(stop_at=4)
    bench.start().train(states, told)
    assert told.resumed_at == [4]


def test_a_run_that_resumes_from_the_state_before_ends_the_same(bench: TrainingSetup, states: Path) -> None:
    first, again = bench.start(), bench.start(adapters_seed=1)
    first.train(states, RecordedReport())
    flip_one_bit(states / "step-000006")
    again.train(states, RecordedReport())
    assert same(again.weights(), first.weights())
    told = RecordedReport()
    bench.start().train(states, told)
    assert told.resumed_at == [STEPS]  # the broken state has been replaced


def test_a_folder_that_a_crash_left_half_written_is_no_state(bench: TrainingSetup, states: Path) -> None:
    bench.start().train(states, RecordedReport(stop_at=2))
    (states / "step-000004.partial-0123abcd").mkdir()
    (states / "step-000005").mkdir()
    told = RecordedReport()
    bench.start().train(states, told)
    assert told.resumed_at == [2]


def test_a_state_from_before_new_hyper_parameters_is_resumed(bench: TrainingSetup, states: Path) -> None:
    bench.start().train(states, RecordedReport(stop_at=3))
    for state in states.iterdir():
        facts = json.loads((state / "manifest.json").read_text())
        facts["config"] = {word: value for word, value in facts["config"].items() if word not in ADDED_LATER}
        (state / "manifest.json").write_text(json.dumps(facts))
    told = RecordedReport()
    assert bench.start().train(states, told)
    assert told.resumed_at == [3]


def test_a_state_of_another_configuration_is_not_used(bench: TrainingSetup, states: Path) -> None:
    bench.start().train(states, RecordedReport())
    bench.config = config_of(lr=1e-3)
    told = RecordedReport(stop_at=3)
    bench.start().train(states, told)
    assert told.resumed_at == [0]
    # Nor does it push out the states of this one, though it had come further.
    told = RecordedReport(stop_at=3)
    bench.start().train(states, told)
    assert told.resumed_at == [3]


# States


def test_at_most_two_states_are_kept_and_each_is_complete(bench: TrainingSetup, states: Path) -> None:
    bench.config = config_of(save_every=1)
    kept: list[list[str]] = []
    told = RecordedReport(on_saved=lambda: kept.append(sorted(state.name for state in states.iterdir())))
    run = bench.start()
    run.train(states, told)
    assert told.saved_at == list(range(1, STEPS + 1))
    assert kept == [[f"step-{n:06d}" for n in (step - 1, step)] for step in told.saved_at]  # the first: the beginning
    tensors = load_file(states / f"step-{STEPS:06d}" / "state.safetensors")
    assert tensors.keys() == {f"{kind}/{name}" for kind in STATE_TENSORS for name in run.weights()}
    assert same(run.weights(), {name: tensors[f"weight/{name}"] for name in run.weights()})


def test_a_run_is_stopped_within_one_step_with_its_state_saved(bench: TrainingSetup, states: Path) -> None:
    bench.config = config_of(save_every=100)
    told = RecordedReport(stop_at=3)
    assert bench.start().train(states, told) is False
    assert told.steps == [0, 1, 2, 3]
    assert told.saved_at == [3]
    assert sorted(state.name for state in states.iterdir()) == ["step-000000", "step-000003"]


def test_a_run_that_is_stopped_before_its_first_step_trains_nothing(bench: TrainingSetup, states: Path) -> None:
    run = bench.start()
    before = run.weights()
    assert run.train(states, RecordedReport(stop_at=0)) is False
    assert same(run.weights(), before)


# Learning


@pytest.mark.parametrize("text_encoder_lr", [0, 5e-3])
def test_only_the_adapters_move_and_all_of_them_do(bench: TrainingSetup, states: Path, text_encoder_lr: float) -> None:
    bench.config = config_of(text_encoder_lr=text_encoder_lr)
    run = bench.start()
    modules = {"denoiser": run.branch.denoiser, **run.branch.text_encoders, "vae": run.branch.pipeline.vae}

    def everything() -> dict[str, Tensor]:
        return {
            f"{part}.{name}": tensor.detach().clone()
            for part, module in modules.items()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }

    before = everything()
    run.train(states, RecordedReport())
    moved = {name for name, tensor in everything().items() if not torch.equal(tensor, before[name])}
    assert moved == run.weights().keys()
    assert {name.split(".")[0] for name in moved} == ({"denoiser", "text_encoder"} if text_encoder_lr else {"denoiser"})
    assert all(".lora_A." in name or ".lora_B." in name for name in moved)


def test_training_lowers_the_loss(bench: TrainingSetup, states: Path) -> None:
    bench.config = config_of(steps=40, min_snr=0, save_every=100)
    run = bench.start()

    def error() -> float:
        with torch.no_grad():
            batches = [batch for number in range(20) for batch in run.data.batches(run.branch, 1000 + number)]
            losses = [
                run.branch.loss(one.latents, one.cond, one.noise, one.timesteps, run.config, one.mask).mean()
                for one in batches
            ]
            return float(torch.stack(losses).mean())

    before = error()
    told = RecordedReport()
    run.train(states, told)
    assert error() < 0.9 * before
    assert len(told.losses) == 4 and all(math.isfinite(loss) for loss in told.losses)  # one reading in ten steps


# Divergence


def spoil(
    run: Run, wrong: Callable[[int], bool], of: Callable[[Tensor], Tensor] = lambda loss: loss * math.nan
) -> None:
    """From now on the losses of those calls that `wrong` names, counted from 1, are not what they should be."""
    plain, calls = run.branch.loss, 0

    def loss(*arguments: Any, **named: Any) -> Tensor:
        nonlocal calls
        calls += 1
        value = plain(*arguments, **named)
        return of(value) if wrong(calls) else value

    run.branch.loss = loss  # type: ignore[method-assign]


def finite(states: Path) -> bool:
    """Every value of every state; there is at least one."""
    kept = [load_file(state / "state.safetensors") for state in states.glob("step-*")]
    return bool(kept) and all(torch.isfinite(tensor).all() for state in kept for tensor in state.values())


def test_a_loss_that_is_not_finite_goes_back_and_on_at_half_the_rate(bench: TrainingSetup, states: Path) -> None:
    bench.config = config_of(schedule="constant", warmup_steps=0)
    run, told = bench.start(), RecordedReport()
    told.on_saved = lambda: all_finite.append(finite(states))
    all_finite: list[bool] = []
    spoil(run, lambda call: call == 4)  # the fourth step; states are saved after the second and the fourth
    assert run.train(states, told)
    assert told.resumed_at == [0, 2]
    assert told.saved_at == [2, 4, 6] and all_finite == [True] * 3
    assert told.steps == [0, 1, 2, 3, 3, 4, 5, 6]  # the step that went wrong is not told as done
    assert told.rates == pytest.approx([0.01, 0.01, 0.01, 0.005, 0.005, 0.005, 0.005])
    (warning,) = told.warnings
    assert "the loss was not a finite number in step 4" in warning and "back to step 2" in warning
    assert "learning rate 0.005" in warning
    named = {name for name in ("0.png", "1.png", "2.png") if name in warning}
    assert named == set(run.data.names(3))
    # The same as a run that was told to go on from that state at half the rate, without any harm.
    other, first = bench.start(adapters_seed=1), bench.start()
    first.train(states.parent / "again", RecordedReport(stop_at=2))
    manifest = states.parent / "again" / "step-000002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"halvings": 0', '"halvings": 1'))
    other.train(states.parent / "again", RecordedReport())
    assert same(other.weights(), run.weights())


@pytest.mark.parametrize("stop", [4, 5])
def test_a_run_that_is_stopped_after_it_went_back_resumes_bit_for_bit(
    bench: TrainingSetup, states: Path, stop: int
) -> None:
    whole, stopped, resumed, unharmed = bench.start(), bench.start(), bench.start(adapters_seed=1), bench.start()
    spoil(whole, lambda call: call == 4)
    spoil(stopped, lambda call: call == 4)
    assert whole.train(states / "whole", RecordedReport())
    told = RecordedReport()
    assert not stopped.train(states / "parts", RecordedReport(stop_at=stop))
    assert resumed.train(states / "parts", told)
    assert told.resumed_at == [stop] and told.warnings == []
    assert same(resumed.weights(), whole.weights())
    last = [states / name / f"step-{STEPS:06d}" / "state.safetensors" for name in ("whole", "parts")]
    assert same(load_file(last[0]), load_file(last[1]))
    unharmed.train(states / "unharmed", RecordedReport())
    assert not same(unharmed.weights(), whole.weights())  # the rate that was halved stays so


def test_the_rate_is_halved_twice_and_no_more(bench: TrainingSetup, states: Path) -> None:
    bench.config = config_of(schedule="constant", warmup_steps=0)
    run, told = bench.start(), RecordedReport()
    spoil(run, lambda call: call in (3, 7))  # steps 3 and 4 are calls 5 and 6 the second time, then 5 is call 7
    assert run.train(states, told)
    assert told.resumed_at == [0, 2, 4]
    assert told.rates[-1] == pytest.approx(0.0025) and sorted(set(told.rates)) == pytest.approx([0.0025, 0.005, 0.01])
    assert len(told.warnings) == 2 and finite(states)


def test_before_the_first_state_it_goes_back_to_the_beginning(bench: TrainingSetup, states: Path) -> None:
    bench.config = config_of(save_every=100)
    run, told = bench.start(), RecordedReport()
    spoil(run, lambda call: call == 3)
    assert run.train(states, told)
    assert told.resumed_at == [0, 0]
    assert "back to step 0" in told.warnings[0]
    assert finite(states)
    # The very beginning: as a run that starts at half the rate does. AdamW knows the rate only.
    bench.config = config_of(save_every=100, lr=5e-3)
    other = bench.start()
    other.train(states.parent / "other", RecordedReport())
    assert same(other.weights(), run.weights())


def test_a_run_that_diverges_three_times_fails_and_names_the_pictures(bench: TrainingSetup, states: Path) -> None:
    run, told = bench.start(), RecordedReport()
    spoil(run, lambda call: call > 2)
    with pytest.raises(Diverged, match=r"not a finite number in step 3, .*\.png") as failed:
        run.train(states, told)
    assert failed.value.step == 2
    assert told.resumed_at == [0, 2, 2]
    named = {word.strip(",") for word in str(failed.value).split() if ".png" in word}
    assert named == set(run.data.names(2))
    assert told.saved_at == [2] and finite(states)


def test_a_gradient_that_is_not_finite_is_found_though_the_loss_is(bench: TrainingSetup, states: Path) -> None:
    run, told = bench.start(), RecordedReport()
    # The root of 0 has an infinite slope and a finite value.
    spoil(run, lambda call: call == 3, lambda loss: loss.detach() + (loss - loss.detach()).sqrt())
    assert run.train(states, told)
    assert len(told.warnings) == 1 and "the gradient was not a finite number in step 3" in told.warnings[0]
    assert all(math.isfinite(loss) for loss in told.losses) and finite(states)


def test_a_weight_that_is_not_finite_though_loss_and_gradient_are_is_not_saved(
    bench: TrainingSetup, states: Path
) -> None:
    run, told = bench.start(), RecordedReport()
    weight = run.groups[0]["params"][0]

    def overflow(loss: Tensor) -> Tensor:
        weight.data[0, 0] = math.inf
        return loss

    spoil(run, lambda call: call == 4, overflow)
    assert run.train(states, told)
    assert told.resumed_at == [0, 2] and "a weight was not a finite number" in told.warnings[0]
    assert finite(states) and torch.isfinite(weight).all()


def test_previews_see_finite_weights_only(bench: TrainingSetup, states: Path) -> None:
    bench.config = config_of(save_every=100)
    run, seen = bench.start(), []

    def look(step: int) -> None:
        seen.append((step, all(torch.isfinite(weight).all() for weight in run.weights().values())))

    spoil(run, lambda call: call == 3)
    loop.train(run.branch, run.groups, run.data, run.config, RecordedReport(), states, look, preview_steps=(2, 3, 5))
    assert seen == [(2, True), (2, True), (3, True), (5, True)]  # after the step that went wrong nobody looked


# Micro-batches, memory and class pictures


@pytest.mark.parametrize("family", long_but(["sd15", "flux1"], ["sd15", "sdxl1", "flux1"]))
def test_smaller_micro_batches_take_the_same_steps(
    bench_of: Callable[[str], TrainingSetup], states: Path, family: str
) -> None:
    bench, ends = bench_of(family), []
    for micro_batch in (4, 2, 1):
        bench.config = config_of(batch=4, micro_batch=micro_batch, steps=4)
        run = bench.start()
        start = run.weights()
        assert len(list(run.data.batches(run.branch, 0))) == 4 // micro_batch
        run.train(states / str(micro_batch), RecordedReport())
        ends.append(run.weights())
    for name, weight in ends[0].items():
        assert float((weight - start[name]).abs().max()) > 0.01, name
        assert all(torch.allclose(end[name], weight, rtol=1e-4, atol=1e-5) for end in ends[1:]), name


@pytest.mark.parametrize("family", ["sd15", "sdxl1", "flux1"])
def test_checkpointing_changes_no_bit(bench_of: Callable[[str], TrainingSetup], states: Path, family: str) -> None:
    bench = bench_of(family)
    bench.config = config_of(steps=3)
    run, calls = bench.start(), list[int]()
    start = run.weights()
    name = next(name for name in start if ".to_q.lora_A." in name)
    layer = run.branch.denoiser.get_submodule(name.removeprefix("denoiser.").partition(".lora_A.")[0])
    layer.register_forward_hook(lambda *_: calls.append(1))
    run.train(states / "plain", RecordedReport())
    plain, computed = run.weights(), len(calls)
    # Again on the same memory: the same weights elsewhere might be summed in another order.
    for group in run.groups:
        for name, param in zip(group["names"], group["params"], strict=True):
            param.data.copy_(start[name])
    # As train.py has it.
    run.branch.pipeline.components[run.branch.denoiser_name].enable_gradient_checkpointing()
    run.train(states / "thrifty", RecordedReport())
    assert (computed, len(calls) - computed) == (3, 6)  # once in a step, and once more for its gradients
    assert same(run.weights(), plain) and not same(plain, start)


def test_class_pictures_add_their_share_to_the_loss(bench: TrainingSetup, photos: list[Path], states: Path) -> None:
    def first_step(prior_weight: float) -> tuple[float, Run]:
        """Its loss, and the run after it."""
        bench.config = config_of(steps=1, prior_weight=prior_weight, caption_dropout=0, flip=False)
        run, told = bench.start(), RecordedReport()
        run.train(states / f"{prior_weight} {len(bench.more)}", told)
        return told.losses[0], run

    alone, without = first_step(1)
    bench.more = [Picture(photo, "any dog", f"class {photo.stem}", "class") for photo in photos[:2]]
    (half, _), (once, run), (twice, _) = (first_step(weight) for weight in (0.5, 1, 2))
    share = once - alone
    assert share > 0.1 * alone
    assert [half, twice] == pytest.approx([alone + 0.5 * share, alone + 2 * share], rel=1e-5)
    assert not same(run.weights(), without.weights())
    assert set(run.data.names(0)) == {*without.data.names(0), "class 0", "class 1"}


@pytest.mark.parametrize("kind", ["weight", "exp_avg"])
def test_no_state_with_a_value_that_is_not_finite_is_written(bench: TrainingSetup, states: Path, kind: str) -> None:
    run = bench.start()
    params = dict(zip(run.groups[0]["names"], run.groups[0]["params"], strict=True))
    optimizer = torch.optim.AdamW(params.values())
    for param in params.values():
        param.grad = torch.ones_like(param)
    optimizer.step()
    save(states, 1, optimizer, params, run.config)
    last = list(params.values())[-1]
    (last.data if kind == "weight" else optimizer.state[last][kind]).view(-1)[-1] = math.nan
    with pytest.raises(Diverged, match="weight"):
        save(states, 2, optimizer, params, run.config)
    assert [state.name for state in states.iterdir()] == ["step-000001"]


# Schedule


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 2, [0.5, 1, 1, 1, 1, 1]),
        ("linear", 2, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", 2, [0.5, 1, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ("linear", 10, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        ("polynomial", 2, [0.5, 1, 1, 0.75**2, 0.25, 0.0625]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(
    schedule: str, warmup_steps: int, expected: list[float]
) -> None:
    config = config_of(schedule=schedule, warmup_steps=warmup_steps, power=2)
    assert [loop.lr_scale(step, config) for step in range(STEPS)] == pytest.approx(expected)


@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_each_group_is_trained_at_its_own_rate_and_on_schedule(
    bench: TrainingSetup, states: Path, warmup_steps: int
) -> None:
    # AdamW's first step moves each weight that has a gradient by the learning rate.
    config = config_of(steps=1, lr=3e-3, text_encoder_lr=1e-3, weight_decay=0)
    bench.config = config.model_copy(update={"warmup_steps": warmup_steps})
    run = bench.start()
    before = run.weights()
    run.train(states, RecordedReport())
    farthest = {"denoiser": 0.0, "text_encoder": 0.0}
    for name, weight in run.weights().items():
        part = name.split(".")[0]
        farthest[part] = max(farthest[part], float((weight - before[name]).abs().max()))
    share = 1 / 4 if warmup_steps else 1
    assert farthest == pytest.approx({"denoiser": 3e-3 * share, "text_encoder": 1e-3 * share}, rel=1e-2)
