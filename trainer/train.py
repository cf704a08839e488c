"""The story of one tune, top to bottom: photos -> captions -> load -> encode -> attach -> loop -> save -> check."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from trainer import dataset, loop, presets
from trainer.bases import Base
from trainer.branches import Branch, load_branch
from trainer.dataset import Picture
from trainer.files import whole_folder
from trainer.loading import autocast
from trainer.loop import Report
from trainer.memory import placed
from trainer.methods import Method, get_method
from trainer.presets import RenderConfig, TrainConfig
from trainer.settings import Settings
from trainer.store import now

PREVIEW_STEPS = 20  # of the sampler: enough to see what has been learned
PREVIEW_SEED = 42
CHECK_STEPS = 2  # enough to see that a model changes something
ROUNDING = 4  # units in the last place of the largest value: what summing in another order changes as well
WHAT = {"lora": "a LoRA", "pti": "a LoRA with new words", "checkpoint": "a DreamBooth checkpoint"}
MODELS_KEPT_FROM = 0.5  # of the run; earlier ones are not worth a download

if TYPE_CHECKING:
    from PIL import Image

Render = Callable[..., Any]


class BadArtefact(Exception):
    """What was saved is not what a trained model looks like."""


def train_tune(
    tune: dict[str, Any],
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
    folder = settings.outputs / "tunes" / str(tune["id"])
    (folder / "config.json").write_text(json.dumps({"base": base.title, **config.model_dump(mode="json")}, indent=1))
    names = {photo["file"]: photo["name"] for photo in tune["photos"] if not photo.get("dropped")}
    pictures = dataset.find_pictures(folder, names, tune["token"], tune["name"], config)
    for lacking in dataset.without_mask(pictures, folder / "dataset", config):
        report.warn(lacking)

    report.stage("loading")
    branch = load_branch(base, device, settings.outputs / "cache")
    method = get_method(tune["method"])
    for said in method.begin(branch, config, tune["token"], tune["name"], base.model):
        report.warn(said)
    defaults = presets.render_config(settings.presets, base.branch)

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
        torch.manual_seed(dataset.derive(config.seed, 0, "adapters"))
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


def describe(
    tune: dict[str, Any], base: Base, branch: Branch, config: TrainConfig, pictures: list[Picture], step: int
) -> dict[str, str]:
    """What a model file says of itself: modelspec.* (Stability-AI/ModelSpec 1.0.0), kohya's ss_*, and our own words."""
    side, tags = config.resolution[0], Counter(picture.caption for picture in pictures if picture.kind != "class")
    facts: dict[str, Any] = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": tune["title"],
        "modelspec.date": now(),
        "modelspec.description": f"{WHAT[tune['method']]} of {tune['token']} {tune['name']} on {base.title}, made with"
        " Tunebooth",
        "modelspec.trigger_phrase": f"{tune['token']} {tune['name']}",
        "modelspec.resolution": f"{side}x{side}",
        "ss_output_name": tune["title"],
        "ss_sd_model_name": base.title,
        "ss_network_dim": config.rank,
        "ss_network_alpha": config.alpha,
        "ss_learning_rate": config.lr,
        "ss_unet_lr": config.lr,
        "ss_text_encoder_lr": config.text_encoder_lr,
        "ss_optimizer": {"adamw": "torch.optim.adamw.AdamW", "adafactor": "Adafactor"}[config.optimizer],
        "ss_lr_scheduler": config.schedule,
        "ss_lr_warmup_steps": config.warmup_steps,
        "ss_steps": step,
        "ss_max_train_steps": config.steps,
        "ss_total_batch_size": config.batch,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_seed": config.seed,
        "ss_resolution": f"({side}, {side})",
        "ss_enable_bucket": config.buckets,
        "ss_min_snr_gamma": config.min_snr or None,
        "ss_caption_dropout_rate": config.caption_dropout,
        "ss_prior_loss_weight": config.prior_weight,
        "ss_num_train_images": sum(tags.values()),
        "ss_tag_frequency": json.dumps({"dataset": tags}),
        "tunebooth.base": base.title,
        "tunebooth.root": base.root or base.title,
        "tunebooth.stands_on": json.dumps(base.chain),
        "tunebooth.token": tune["token"],
        "tunebooth.class": tune["name"],
        "tunebooth.args": presets.as_args(config),
    }
    facts |= branch.metadata
    if tune["method"] == "checkpoint":
        facts = {key: value for key, value in facts.items() if not key.startswith("ss_network_")}
    else:
        facts["modelspec.architecture"] += "/lora"
    return {key: str(value) for key, value in facts.items()}


def check_file(file: Path) -> None:
    """Raises BadArtefact unless every tensor of a saved file is finite and some are not zero."""
    with safe_open(file, "pt") as tensors:
        names, some = list(tensors.keys()), False
        for name in names:  # one at a time: a whole model is large
            value = tensors.get_tensor(name)
            if not torch.isfinite(value).all():
                raise BadArtefact(f"{file.name} holds values that are not finite numbers")
            some = some or (value.dim() > 1 and bool(value.any()))
    if not names:
        raise BadArtefact(f"{file.name} holds no values, and so none that are not finite")
    if not some:
        raise BadArtefact(f"{file.name} holds nothing but zeros")


def check_effect(branch: Branch, method: Method, model: Path, render: Render, before: Tensor) -> None:
    """Raises BadArtefact unless each file loads into the stock pipeline and changes a picture by more than rounding.

    before: the latents of that picture before anything was trained.
    """
    least = ROUNDING * torch.finfo(branch.dtype).eps * float(before.abs().max())
    for file in method.readable(branch):
        method.apply(branch, model, 1.0, file)
        changed: Tensor = render(CHECK_STEPS, "latent")
        difference = float((changed - before).abs().max())
        if not difference > least:  # also where it is not a number
            raise BadArtefact(
                f"{file} changes nothing: a picture of a fixed seed differs by {difference:.2g} from the base's, which"
                " is rounding. More steps or a higher lr would help"
            )


def pick_device(wanted: str) -> torch.device:
    """`auto`: the first CUDA card, else Apple's GPU, else the CPU. Raises RuntimeError for one that is not there."""
    if wanted != "auto":
        device = torch.device(wanted)
        torch.empty(1, device=device)  # fails now and in words, not in the middle of the first tune
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def leave_a_core_free() -> None:
    """Torch's threads take all cores but one, which is the page's and the API's.

    They spin while they wait for each other: with another busy process (a browser) beside as many threads as cores, a
    step of branch fast took 600 ms instead of 80 ms on two cores; with one thread it takes 80 ms either way.
    """
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
