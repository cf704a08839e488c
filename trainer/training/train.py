"""The story of one tune, top to bottom: photos -> captions -> load -> encode -> attach -> loop -> save -> check."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.branches.loading import autocast
from trainer.branches.protocol import Branch, load_branch
from trainer.config import branch_file
from trainer.config.branch_file import RenderConfig
from trainer.config.train_config import TrainConfig
from trainer.contract.report import Report
from trainer.contract.rows import TuneRow
from trainer.device import placed
from trainer.files import whole_folder
from trainer.library.bases import Base
from trainer.methods.protocol import get_method
from trainer.settings import Settings
from trainer.training import dataset, loop, seeds
from trainer.training.check import CHECK_STEPS, check_effect, check_file
from trainer.training.metadata import describe
from trainer.training.views import Picture

if TYPE_CHECKING:
    from PIL import Image

PREVIEW_STEPS = 20  # of the sampler: enough to see what has been learned
PREVIEW_SEED = 42
MODELS_KEPT_FROM = 0.5  # of the run; earlier ones are not worth a download


def train_tune(
    tune: TuneRow,
    base: Base,
    config: TrainConfig,
    settings: Settings,
    device: torch.device,
    report: Report,
    preview: str,
) -> list[str] | None:
    """Train a tune whose photos lie in `outputs/tunes/ID/images`, and write `model/`.

    tune: its row in the store. preview: the prompt that is rendered at every quarter of the run. Returns the names of
    the files to keep, the most widely read one first; None when the report said to stop: the state to go on from is on
    disk then. Starting and resuming are the same call.
    """
    folder, token = settings.outputs / "tunes" / str(tune["id"]), tune["token"]
    assert token is not None, "a tune that is trained has a token"
    (folder / "config.json").write_text(json.dumps({"base": base.title, **config.model_dump(mode="json")}, indent=1))
    names = {photo["file"]: photo["name"] for photo in tune["photos"] if not photo.get("dropped")}
    pictures = dataset.find_pictures(folder, names, token, tune["name"], config)
    for lacking in dataset.without_mask(pictures, folder / "dataset", config):
        report.warn(lacking)

    report.stage("loading")
    branch = load_branch(base, device, settings.outputs / "cache")
    method = get_method(tune["method"])
    for said in method.begin(branch, config, token, tune["name"], base.model):
        report.warn(said)
    defaults = branch_file.render_config(settings.presets, base.branch)

    if config.prior_weight:
        report.stage("class pictures")
        drawn = class_pictures(branch, base, tune["name"], config, defaults, settings.outputs / "cache", report)
        if drawn is None:
            return None
        pictures += drawn

    report.stage("encoding")
    kept = method.encoders(branch, config)
    data, told = dataset.build(branch, pictures, [preview, ""], config, folder / "dataset", kept)
    branch.denoiser.to(device)
    if config.text_steps:
        for encoder in branch.text_encoders.values():
            encoder.to(device)

    def render(steps: int, output_type: str) -> Any:
        """The preview of the model as it is now: a picture, or its latents."""
        with torch.no_grad(), placed(device, branch.vae), autocast(device, branch.dtype):
            spoken, silent = (branch.encode_prompts([text]) for text in (preview, "")) if config.text_steps else told
            return branch.pipeline(
                **branch.prompt_inputs(spoken, silent),
                width=config.resolution[0],
                height=config.resolution[0],
                num_inference_steps=steps,
                guidance_scale=defaults.cfg_scale,
                generator=torch.Generator().manual_seed(PREVIEW_SEED),
                output_type=output_type,
            ).images

    def look(step: int) -> None:
        """At every quarter: a preview, and from the middle on the model of that moment."""
        try:
            write_picture(render(PREVIEW_STEPS, "pil")[0], folder / "samples" / f"step-{step:06d}.png")
        except torch.OutOfMemoryError:
            report.warn(f"the preview at step {step} was left out: the card has no room for it")
        if MODELS_KEPT_FROM <= quarters(config.steps)[step] < 1 and not method.LARGE:
            with whole_folder(folder / "checkpoints" / f"step-{step:06d}") as kept:
                facts = describe(tune, base, branch, config, pictures, step)
                for file in method.save(branch, kept, config, facts):
                    check_file(kept / file)

    before: Tensor = render(CHECK_STEPS, "latent")
    with torch.random.fork_rng():
        torch.manual_seed(seeds.derive(config.seed, 0, "adapters"))
        groups = method.attach(branch, config)
    branch.denoiser.to(device)  # what was attached, too
    if config.gradient_checkpointing:
        branch.pipeline.components[branch.denoiser_name].enable_gradient_checkpointing()

    report.stage("training")
    moments, states, after_step = quarters(config.steps), folder / "state", partial(method.after_step, branch)
    if not loop.train(branch, groups, data, config, report, states, look, moments, after_step):
        return None

    report.stage("saving")
    with whole_folder(folder / "model") as model:
        files = method.save(branch, model, config, describe(tune, base, branch, config, pictures, config.steps))
        for file in files:
            check_file(model / file)
        check_effect(branch, method, model, render, before)
    return files


def quarters(steps: int) -> dict[int, float]:
    """The steps after which a quarter, a half, ... of a run is done."""
    return {max(1, round(steps * quarter / 4)): quarter / 4 for quarter in (1, 2, 3, 4)}


def write_picture(image: Image.Image, file: Path) -> None:
    """Whole, or not at all."""
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    image.save(partial, "PNG")
    partial.rename(file)


def class_pictures(
    branch: Branch,
    base: Base,
    name: str,
    config: TrainConfig,
    defaults: RenderConfig,
    cache: Path,
    report: Report,
) -> list[Picture] | None:
    """Pictures of the class as the base draws it, for prior preservation (Ruiz et al. 2022, arXiv 2208.12242).

    Rendered once and kept for the next tune of the same base, class and resolution. None: the report said to stop.
    """
    caption, side = f"a photo of {name}", config.resolution[0]
    folder = cache / "class" / f"{base.id}-{name.lower().replace(' ', '-')}-{side}"
    files = [folder / f"{number:04d}.png" for number in range(config.prior_images)]
    missing = [file for file in files if not file.exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        everything = [branch.denoiser, branch.vae, *branch.text_encoders.values()]
        with torch.no_grad(), placed(branch.device, *everything), autocast(branch.device, branch.dtype):
            inputs = branch.prompt_inputs(*(branch.encode_prompts([text]) for text in (caption, "")))
            for number, file in enumerate(missing):
                if not report.step(number, len(missing)):
                    return None
                image = branch.pipeline(
                    **inputs,
                    width=side,
                    height=side,
                    num_inference_steps=defaults.steps,
                    guidance_scale=defaults.cfg_scale,
                    generator=torch.Generator().manual_seed(int(file.stem)),
                ).images[0]
                write_picture(image, file)
    return [Picture(file, caption, f"class picture {file.stem}", "class") for file in files]
