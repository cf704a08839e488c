"""Training of one tune, top to bottom: photos -> captions -> load -> encode -> attach -> loop -> save -> check."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.branches.loading import autocast
from trainer.branches.protocol import Branch, downloaded, load_branch
from trainer.config import branch_file
from trainer.config.branch_file import RenderConfig
from trainer.config.train_config import TrainConfig
from trainer.contract.disk import check_room
from trainer.contract.report import Report
from trainer.contract.rows import TuneRow
from trainer.contract.run_files import read_log
from trainer.device import placed
from trainer.files import read_for_show, reason, steps_in, whole_folder, write_whole
from trainer.library.bases import Base
from trainer.methods.protocol import Group, Method, get_method
from trainer.settings import Settings
from trainer.training import dataset, loop, run_inputs, seeds, space
from trainer.training.check import CHECK_STEPS, check_effect, check_file
from trainer.training.class_pictures import class_pictures
from trainer.training.dataset import Dataset
from trainer.training.metadata import describe
from trainer.training.states import STATES_KEPT
from trainer.training.views import Picture, write_picture

PREVIEW_STEPS = 20  # most steps of the sampler: enough to see what the model has learned
PREVIEW_SEED = 42
MODELS_KEPT_FROM = 0.5  # of the run; earlier models are not useful


@dataclass
class Run:
    """A tune in training: its loaded modules, and the data of its previews."""

    tune: TuneRow
    base: Base
    config: TrainConfig
    device: torch.device
    report: Report
    folder: Path  # outputs/tunes/ID
    branch: Branch
    method: Method
    defaults: RenderConfig
    readers: Mapping[str, str]  # the programs that read each format of a LoRA
    preview: str
    pictures: list[Picture]
    encoded: Sequence[dict[str, Tensor]] = ()  # the preview's prompt and an empty one, encoded before training


def train_tune(
    tune: TuneRow,
    base: Base,
    config: TrainConfig,
    settings: Settings,
    device: torch.device,
    report: Report,
    preview: str,
) -> list[str] | None:
    """Train a tune whose photos are in `outputs/tunes/ID/images`, and write `model/`.

    tune: its row in the store. preview: the prompt that is rendered at every quarter of the run. Returns the names of
    the model files, the most widely supported format first; None when the report asked to stop: then a state to resume
    from is on disk. Starting and resuming are the same call.
    """
    folder = settings.outputs / "tunes" / str(tune["id"])
    write_whole(folder / "config.json", json.dumps({"base": base.title, **config.model_dump(mode="json")}, indent=1))
    pictures = find_pictures(tune, folder, config, report)
    report.stage("loading")
    base = downloaded(base)
    branch = load_branch(base, device, settings.outputs / "cache")
    digest = run_inputs.weights_digest(branch)  # before anything is put on the base
    method = prepare(tune, base, config, branch, report)
    defaults = branch_file.render_config(settings.presets, base.branch)
    readers = branch_file.readers(settings.presets, base.branch)
    run = Run(tune, base, config, device, report, folder, branch, method, defaults, readers, preview, pictures)
    if config.prior_weight:
        report.stage("class pictures")
        drawn = class_pictures(run.branch, base, tune["name"], config, run.defaults, settings.outputs / "cache", report)
        if drawn is None:
            return None
        run.pictures += drawn
    report.stage("encoding")
    data = encode(run)
    before: Tensor = render(run, CHECK_STEPS, "latent")
    groups = attach(run)
    check_room(run.folder, room_needed(run, groups), "the states and models of this tune")

    report.stage("training")
    if not train_steps(run, groups, data, digest):
        return None

    report.stage("saving")
    with whole_folder(run.folder / "model") as model:
        files = save_model(run, model, config.steps)
        check_effect(run.branch, run.method, model, partial(render, run), before)
    return files


def train_steps(run: Run, groups: list[Group], data: Dataset, digest: str) -> bool:
    """Run the training loop. digest: of the base's weights. Returns False when the report asked to stop."""
    inputs = run_inputs.inputs_of(
        run.tune["id"], digest, run.base.model, run.branch, run.pictures, run.folder / "dataset"
    )
    return loop.train(
        run.branch,
        groups,
        data,
        run.config,
        run.report,
        run.folder / "state",
        partial(save_quarter, run),
        quarters(run.config.steps),
        partial(run.method.after_step, run.branch),
        inputs,
        has_trained(run.folder),
    )


def find_pictures(tune: TuneRow, folder: Path, config: TrainConfig, report: Report) -> list[Picture]:
    """The training pictures with their captions. folder: of the tune."""
    names = {photo["file"]: photo["name"] for photo in tune["photos"] if not photo.get("dropped")}
    pictures = dataset.find_pictures(folder, names, token_of(tune), tune["name"], config)
    for warning in dataset.without_mask(pictures, folder / "dataset", config):
        report.warn(warning)
    return pictures


def prepare(tune: TuneRow, base: Base, config: TrainConfig, branch: Branch, report: Report) -> Method:
    """The tune's model type, prepared on the branch."""
    method = get_method(tune["method"])
    for warning in method.prepare(branch, config, token_of(tune), tune["name"], base.model):
        report.warn(warning)
    return method


def token_of(tune: TuneRow) -> str:
    assert tune["token"] is not None, "a tune that is trained has a token"
    return tune["token"]


def encode(run: Run) -> Dataset:
    """Encode pictures and captions; then only modules that are trained or still needed are on the device."""
    kept = run.method.needed_text_encoders(run.branch, run.config)
    data, run.encoded = dataset.build(
        run.branch, run.pictures, [run.preview, ""], run.config, run.folder / "dataset", kept
    )
    run.branch.denoiser.to(run.device)
    if run.config.text_steps:
        for encoder in run.branch.text_encoders.values():
            encoder.to(run.device)
    return data


def attach(run: Run) -> list[Group]:
    """Make the branch trainable; returns the optimizer's parameter groups (see `Method.attach`)."""
    with torch.random.fork_rng():
        torch.manual_seed(seeds.derive(run.config.seed, 0, "adapters"))
        groups = run.method.attach(run.branch, run.config)
    run.branch.denoiser.to(run.device)  # also the attached adapters
    if run.config.gradient_checkpointing:
        run.branch.pipeline.components[run.branch.denoiser_name].enable_gradient_checkpointing()
    return groups


def render(run: Run, steps: int, output_type: str) -> Any:
    """The preview of the current model: a picture (`pil`), or its latents (`latent`)."""
    branch, side = run.branch, run.config.resolution[0]
    with torch.no_grad(), placed(run.device, branch.vae), autocast(run.device, branch.dtype):
        trained_texts = run.config.text_steps > 0
        prompt, empty = (branch.encode_prompts([text]) for text in (run.preview, "")) if trained_texts else run.encoded
        return branch.pipeline(
            **branch.prompt_inputs(prompt, empty),
            width=side,
            height=side,
            num_inference_steps=steps,
            guidance_scale=run.defaults.cfg_scale,
            generator=torch.Generator().manual_seed(PREVIEW_SEED),
            output_type=output_type,
        ).images


def save_quarter(run: Run, step: int) -> None:
    """At every quarter: write a preview, and from the middle on also the current model."""
    file = run.folder / "samples" / f"step-{step:06d}.png"
    try:
        write_picture(render(run, min(PREVIEW_STEPS, run.defaults.steps), "pil")[0], file)
    except torch.OutOfMemoryError:
        run.report.warn(f"the preview at step {step} was left out: the card has no room for it")
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as problem:
        run.report.warn(f"the preview at step {step} was left out: samples cannot be written ({reason(problem)})")
    if MODELS_KEPT_FROM <= quarters(run.config.steps)[step] < 1 and not run.method.LARGE:
        with whole_folder(run.folder / "checkpoints" / f"step-{step:06d}") as folder:
            save_model(run, folder, step)


def save_model(run: Run, folder: Path, step: int) -> list[str]:
    """Write the model of this step into a folder, and check each file. Returns the files' names."""
    check_room(folder, space.model_bytes(run.branch, run.method, run.config), "the model")
    facts = describe(run.tune, run.base, run.branch, run.config, run.pictures, step, run.readers)
    files = run.method.save(run.branch, folder, run.config, facts)
    for file in files:
        check_file(folder / file)
    return files


def room_needed(run: Run, groups: list[Group]) -> int:
    """The most bytes that a run adds to its folder at any time."""
    kept = [step for step, share in quarters(run.config.steps).items() if MODELS_KEPT_FROM <= share < 1]
    missing = [step for step in kept if not (run.folder / "checkpoints" / f"step-{step:06d}").exists()]
    state = sum(space.state_bytes(weight, run.config.optimizer) for group in groups for weight in group["params"])
    model = space.model_bytes(run.branch, run.method, run.config)
    there = len(list((run.folder / "state").glob("step-??????")))
    # The newest two states stay; the next one, and then the model, is written beside them.
    states = max(0, STATES_KEPT - there) * state + max(state, model)
    return states + (0 if run.method.LARGE else len(missing) * model)


def quarters(steps: int) -> dict[int, float]:
    """Step -> share of the run that is done after it: a quarter, a half, ..."""
    return {max(1, round(steps * quarter / 4)): quarter / 4 for quarter in (1, 2, 3, 4)}


def has_trained(folder: Path) -> bool:
    """Whether a tune has had a state: then its log has an event, or there are previews. folder: of the tune."""
    log = read_for_show(folder / "log.jsonl", read_log) or []
    return any("event" in line for line in log) or bool(steps_in(folder / "samples", ".png"))
