"""The story of one prompt: its base, the models that it names -> pictures, enlarged, mended and developed -> files."""

from __future__ import annotations

import inspect
import io
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

from trainer import device as device_memory
from trainer.branches.loading import autocast
from trainer.branches.protocol import Branch, load_branch
from trainer.config import branch_file, looks
from trainer.config.branch_file import ControlRow, RenderConfig
from trainer.contract.errors import CannotLook
from trainer.contract.prompts import CONTROLS
from trainer.contract.report import Report
from trainer.contract.rows import PromptToRender, TuneToRender
from trainer.device import place_for_rendering
from trainer.files import whole_folder
from trainer.library import hub, weights
from trainer.library.bases import Base
from trainer.library.weights import Unavailable
from trainer.methods import faceid, lora
from trainer.photos.found import Found
from trainer.photos.looker import Looker
from trainer.rendering import control, film, outlines, paste, pictures, upscale, weighted
from trainer.rendering.job import RESAMPLING, FaceID, Job, Lora, Picture
from trainer.rendering.pictures import Facts
from trainer.rendering.pipelines import Task, derive
from trainer.rendering.plan import BLOCK_PX, Plan, make_plan
from trainer.rendering.preview import Preview, load_tiny_decoder
from trainer.rendering.schedulers import DISTILLED_STEPS, make_scheduler, sampler_of
from trainer.rendering.upscale import Upscaler
from trainer.settings import Settings

MOST_TO_ENLARGE = 16_000_000  # pixels; the network's own answer has sixteen times as many
MOST_ENLARGED = 64_000_000  # pixels
LEAST_STRENGTH = 0.001  # one of the 1000 steps that models are trained with
TEXTS_KEPT = 16  # encoded, while the models on the base stay the same
RESTORE_STRENGTH = 0.8  # of face_correct, as of training_face_correct: a fifth of the face keeps its grain
LARGEST_GAIN = 1.5  # of the base's size: a face's square that is larger would be drawn smaller than it is


class Renderer:
    """Keeps the base of the last prompt loaded, with what lies on it: the next prompt is likely to want it too."""

    def __init__(self, settings: Settings, device: torch.device, looker: Looker) -> None:
        self._settings = settings
        self._device = device
        self._looker = looker
        self.release()

    def release(self) -> None:
        """Give the memory back, before something else is trained."""
        self._loaded: tuple[Base, Branch] | None = None
        self._scheduler: Any = None  # the base's own
        self._loras: tuple[tuple[Path, int], ...] | None = ()  # those on the base; None: not known
        self._weights: tuple[float, ...] = ()
        self._texts: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        self._control: tuple[ControlRow, Any] | None = None
        self._upscaler: Upscaler | None = None
        self._decoder: tuple[str, Any] | None = None
        device_memory.release(self._device)

    def render_prompt(
        self,
        prompt: PromptToRender,
        tune: TuneToRender,
        base: Base,
        loras: Sequence[Lora],
        face: FaceID | None,
        people: bool,
        report: Report,
    ) -> tuple[list[str], list[str]]:
        """Render a prompt with its models into `outputs/tunes/ID/prompts/PID`.

        prompt, tune: their rows in the store. base: whose weights are used; `loras` lie on it. people: whether one of
        the models is of people. Returns the file names and what to warn of. Raises Stopped.
        """
        settings = self._settings
        folder = settings.outputs / "tunes" / str(tune["id"])
        defaults = branch_file.render_config(settings.presets, base.branch)
        plan, warnings = make_plan(prompt, tune, base.branch, folder / "inputs" / str(prompt["id"]), settings)

        report.stage("loading")
        branch = self._load(base)
        warnings += self._put_on(branch, loras)
        branch.pipeline.scheduler = self._scheduler
        if plan.scheduler:
            branch.pipeline.scheduler = make_scheduler(self._scheduler, plan.scheduler)
        if plan.request.controlnet is None:
            self._control = None
        if face is not None:
            faceid.apply(branch, face.folder, face.strength, face.adapter)
        if plan.enlarges:
            warnings += self._load_upscaler(report)

        target = folder / "prompts" / str(prompt["id"])
        target.parent.mkdir(exist_ok=True)
        decoder = self._tiny_decoder(base.branch, defaults)
        preview = Preview(folder / "previews" / f"{prompt['id']}.jpg", branch.pipeline, decoder)
        with preview, whole_folder(target) as made, autocast(self._device, branch.dtype):
            said = self._say(branch, plan, warnings)
            job = Job(plan, defaults, base.branch, branch, said, face, people, made, report, preview, warnings)
            done = [self._finish(job, one, seed) for one, seed in zip(self._draw(job), plan.seeds, strict=True)]
            report.stage("saving")
            sampler = sampler_of(branch.pipeline.scheduler, plan.scheduler)
            facts = [
                describe(plan, seed, one, sampler, tune, base, loras)
                for seed, one in zip(plan.seeds, done, strict=True)
            ]
            files = pictures.write(made, done, facts, settings.picture_format)
        return files, list(dict.fromkeys(warnings))

    # What lies on the base

    def _load(self, base: Base) -> Branch:
        """The base, bare or with the LoRAs of the last prompt."""
        if self._loaded is None or self._loaded[0].weights != base.weights:
            self.release()
            branch = load_branch(base, self._device, self._settings.outputs / "cache")
            # It is in float32 anyway; SDXL's img2img would leave it in half precision.
            branch.pipeline.vae.register_to_config(force_upcast=False)
            place_for_rendering(branch.pipeline, self._device)
            self._loaded, self._scheduler = (base, branch), branch.pipeline.scheduler
        branch = self._loaded[1]
        faceid.remove(branch.pipeline)
        branch.pipeline.vae.disable_tiling()
        return branch

    def _put_on(self, branch: Branch, loras: Sequence[Lora]) -> list[str]:
        """Put LoRAs on the base, in place of those that are there; one of weight 0 is none. Returns what to warn of."""
        wanted = [one for one in loras if one.weight]
        names = [f"lora{number}" for number in range(len(wanted))]
        there = tuple((one.model, changed(one.model)) for one in wanted)
        warnings = []
        if there != self._loras:
            self._texts.clear()
            self._loras = None  # not known, until all are there
            lora.remove(branch.pipeline)
            for name, one in zip(names, wanted, strict=True):
                warnings += lora.load(branch.pipeline, one.model, name)[1]
            self._loras = None if warnings else there  # what there is to warn of is told each time
        if wanted:
            branch.pipeline.set_adapters(names, [one.weight for one in wanted])
        self._weights = tuple(one.weight for one in wanted)
        return warnings

    def _say(self, branch: Branch, plan: Plan, warnings: list[str]) -> dict[str, Tensor]:
        """The prompt, encoded; what was said already, with the same models, is not encoded again."""
        key = plan.text, plan.negative, bool(plan.request.use_lpw), self._weights
        if key in self._texts:
            return self._texts[key]
        if len(self._texts) >= TEXTS_KEPT:
            del self._texts[next(iter(self._texts))]
        with torch.no_grad():
            if plan.request.use_lpw:
                try:
                    self._texts[key] = weighted.encode(branch.pipeline, plan.text, plan.negative)
                    return self._texts[key]
                except ValueError as problem:  # not with these text encoders
                    warnings.append(str(problem))
            said = branch.say(plan.text, plan.negative)
        if not plan.request.use_lpw:  # else the warning is due again
            self._texts[key] = said
        return said

    def _tiny_decoder(self, branch: str, defaults: RenderConfig) -> Any:
        """The decoder of previews, where the branch has one and it can be had."""
        if self._decoder is None or self._decoder[0] != branch:
            self._decoder = branch, load_tiny_decoder(defaults.preview, self._device) if defaults.preview else None
        return self._decoder[1]

    # Drawing

    def _draw(self, job: Job) -> list[Picture]:
        """What diffusion makes of the text, and of the picture that it starts from."""
        plan, size = job.plan, (job.plan.width, job.plan.height)
        if plan.picture is None:
            job.report.stage("rendering")
            return self._sample(job, "text", plan.seeds, size, plan.cfg_scale)
        if not plan.draws:
            same = plan.picture if plan.flags.only_upscale else ImageOps.fit(plan.picture, size, RESAMPLING)
            return [same] * len(plan.seeds)
        start = ImageOps.fit(plan.picture, size, RESAMPLING)
        mask = self._mask(job, start)
        more: dict[str, Any] = {"image": start}
        task: Task = "image"
        if mask:
            task, more["mask_image"] = "inpaint", mask
        kind = plan.request.controlnet
        model = self._control_model(job, kind) if kind in CONTROLS else None
        if kind and model is not None:
            if plan.request.controlnet_txt2img and not mask:
                task, more = "text", {}
            more |= self._outline(job, kind, model, start, task)
        job.report.stage("rendering")
        drawn = self._sample(job, task, plan.seeds, size, plan.cfg_scale, plan.strength, model, **more)
        return [paste.paste_mask(one, start, mask) for one in drawn] if mask else drawn

    def _mask(self, job: Job, start: Picture) -> Picture | None:
        """Where the picture is drawn anew, white on black, of its size; None: everywhere."""
        plan, asked = job.plan, job.plan.flags
        if plan.mask:
            mask = ImageOps.fit(plan.mask, start.size, RESAMPLING)
        elif asked.mask_prompt:
            found = self._found(job, start, asked.mask_prompt)
            if found is None:  # without it all of the picture would be drawn anew, which nobody asked for
                raise CannotLook(f"--mask_prompt: {asked.mask_prompt!r} was not found in the picture")
            mask = found
            if asked.mask_negative and (less := self._found(job, start, asked.mask_negative)):
                mask = ImageChops.subtract(mask, less)
        else:
            return None
        if asked.mask_invert:
            mask = ImageOps.invert(mask)
        if asked.mask_dilate:
            mask = paste.grow(mask, asked.mask_dilate)
        return paste.soften(mask, asked.mask_blur) if asked.mask_blur else mask

    def _found(self, job: Job, picture: Picture, words: str) -> Picture | None:
        """Where the thing of these words is in the picture; None: nowhere. Raises CannotLook."""
        with job.kept(picture) as file:
            png = self._looker.mask(file, words, tell=job.tell)
        if png is None:
            return None
        return Image.open(io.BytesIO(png)).convert("L")

    def _control_model(self, job: Job, kind: str) -> Any:
        """The base's control model of this kind; None, with a warning, where it has none."""
        row = branch_file.control_row(self._settings.presets, job.family, kind)
        if row is None:
            job.warnings.append(f"controlnet {kind}: there is no control model for {job.family}; it was left out")
            return None
        if self._control is None or self._control[0] != row:
            self._control = None
            device_memory.release(self._device)
            job.report.stage(f"loading {row.repository}")
            self._control = (
                row,
                control.load_control(job.branch, hub.fetch_model(row.repository, row.revision, row.variant)),
            )
        return self._control[1]

    def _outline(self, job: Job, kind: str, model: Any, start: Picture, task: Task) -> dict[str, Any]:
        """What a control model is told: what it sees of the picture, and how strongly it works."""
        plan = job.plan

        def find(name: str) -> Path:
            row = looks.annotator_row(self._settings.presets, name)
            job.report.stage(f"loading {row.repository}")
            return hub.fetch_model(row.repository, row.revision, row.variant)

        with torch.autocast(self._device.type, enabled=False):
            seen = outlines.outline(kind, start, find, self._device)
        scale = plan.request.controlnet_conditioning_scale
        told = control.arguments(job.family, model, kind, seen, 1.0 if scale is None else scale, task != "text")
        for name in ("control_guidance_start", "control_guidance_end"):
            if (value := getattr(plan.flags, name)) is not None:
                told[name] = value
        return told

    def _sample(
        self,
        job: Job,
        task: Task,
        seeds: list[int],
        size: tuple[int, int],
        cfg_scale: float,
        strength: float = 1.0,
        model: Any = None,
        **more: Any,
    ) -> list[Picture]:
        """A picture for each seed, as many at once as there is room for. Raises Stopped.

        strength: of the noise on a picture that it starts from. model: a control model. more: what the stock pipeline
        takes besides. A picture's noise comes from its own seed, drawn on the CPU: it does not depend on its
        neighbours, nor on the card.
        """
        stock, steps = job.branch.pipeline, job.plan.steps
        pipeline = derive(stock, task) if model is None else control.pipeline(stock, model, task)
        each = steps
        if task != "text":
            strength = max(strength, LEAST_STRENGTH)
            steps = max(steps, math.ceil(1 / strength))  # one step at least, else nothing would be drawn
            while int(steps * strength) < 1:  # where the division was rounded
                steps += 1
            each, more["strength"] = int(steps * strength), strength
        if "original_inference_steps" in pipeline.scheduler.config:  # LCM and TCD take theirs among so many
            pipeline.scheduler.register_to_config(original_inference_steps=max(DISTILLED_STEPS, steps))
        if "width" in inspect.signature(pipeline.__call__).parameters:  # others take the picture's
            more["width"], more["height"] = size
        job.steps += each * len(seeds)
        if job.face:
            more |= faceid.inputs(job.branch, job.face.folder, cfg_scale)
        drawn: list[Picture] = []
        at_once = len(seeds)
        while len(drawn) < len(seeds):
            now = seeds[len(drawn) : len(drawn) + at_once]
            try:
                drawn += pipeline(
                    **job.said,
                    **more,
                    num_inference_steps=steps,
                    guidance_scale=cfg_scale,
                    num_images_per_prompt=len(now),
                    generator=[torch.Generator().manual_seed(seed) for seed in now],
                    callback_on_step_end=partial(job.watch, len(now), each, size),
                ).images
                job.done += each * len(now)
                continue
            except torch.OutOfMemoryError:
                if at_once == 1 and stock.vae.use_tiling:
                    raise
            device_memory.release(self._device)  # only here: the traceback of the error kept its tensors alive
            if at_once > 1:
                at_once = (at_once + 1) // 2
            else:
                stock.vae.enable_tiling()  # the picture is decoded in parts from now on, which takes less room
        return drawn

    # Afterwards, in the hosted service's order

    def _finish(self, job: Job, picture: Picture, seed: int) -> Picture:
        """What is done to each picture after it was drawn."""
        request = job.plan.request
        job.go_on()
        if job.plan.enlarges and self._upscaler is not None:
            picture = self._enlarge(job, picture)
            if request.hires_fix:
                picture = self._hires(job, picture, seed)
        if request.inpaint_faces:
            picture = self._faces(job, picture, seed)
        if request.face_correct:
            picture = self._correct(job, picture)
        if request.color_grading:
            picture = film.grade(picture, looks.film_looks(self._settings.presets)[request.color_grading])
        if request.film_grain:
            picture = film.grain(picture, seed)
        return picture

    def _load_upscaler(self, report: Report) -> list[str]:
        """Returns what to warn of: a picture that is not enlarged is still the picture that was asked for."""
        if self._upscaler is None:
            try:
                file = weights.obtain(self._settings, weights.UPSCALER, tell=lambda what, *_: report.stage(what))
            except Unavailable as problem:
                return [f"super_resolution: pictures are not enlarged: {problem}"]
            self._upscaler = upscale.upscaler(file, self._device)
        return []

    def _enlarge(self, job: Job, picture: Picture) -> Picture:
        """Super-resolution: four times below 512 x 512 pixels, else twice, as the hosted service does.

        The same picture, where nothing was drawn, is enlarged once.
        """
        if job.enlarged and job.enlarged[0] is picture:
            return job.enlarged[1]
        assert self._upscaler is not None, "pictures are enlarged only with it"
        job.report.stage("super-resolution")
        factor = job.plan.flags.upscale_factor or upscale.sr_factor(*picture.size)
        source = picture
        if picture.width * picture.height > MOST_TO_ENLARGE:
            source = picture.copy()
            scale = math.sqrt(MOST_TO_ENLARGE / (picture.width * picture.height))
            source.thumbnail((round(picture.width * scale), round(picture.height * scale)), RESAMPLING)
            told = f"{picture.width} x {picture.height} pixels were made {source.width} x {source.height} first"
            job.warnings.append(f"the picture is too large to be enlarged as it is: its {told}")
        factor = min(factor, math.sqrt(MOST_ENLARGED / (source.width * source.height)))
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            larger = upscale.upscale(source, self._upscaler, factor, watch=lambda _done, _of: job.go_on())
        job.enlarged = picture, larger
        return larger

    def _hires(self, job: Job, picture: Picture, seed: int) -> Picture:
        """Draw the enlarged picture once more, with a little noise: detail that enlarging cannot know."""
        if not job.defaults.hires_strength:
            job.warnings.append(f"hires_fix has no effect: the base of {job.family} knows one size only")
            return picture
        job.report.stage("hires fix")
        plan, whole = job.plan, picture.size
        width, height = (max(BLOCK_PX, side // BLOCK_PX * BLOCK_PX) for side in whole)
        drawn = self._again(
            job,
            picture.resize((width, height), RESAMPLING),
            seed,
            plan.flags.hires_denoising_strength or job.defaults.hires_strength,
            plan.cfg_scale if plan.flags.hires_cfg_scale is None else plan.flags.hires_cfg_scale,
        )
        return drawn if drawn.size == whole else drawn.resize(whole, RESAMPLING)

    def _again(self, job: Job, picture: Picture, seed: int, strength: float, cfg_scale: float) -> Picture:
        """One picture drawn again over itself."""
        return self._sample(job, "image", [seed], picture.size, cfg_scale, strength, image=picture)[0]

    def _faces(self, job: Job, picture: Picture, seed: int) -> Picture:
        """Each face drawn again, large, and put back with a soft edge."""
        if not job.people:
            job.warnings.append("inpaint_faces has no effect: none of the models is of people")
            return picture
        strength = job.plan.flags.face_inpaint_denoising
        strength = job.defaults.face_strength if strength is None else strength
        if not strength:
            return picture
        native = min(job.defaults.w, job.defaults.h)
        for number, found in enumerate(self._look(job, picture, "inpaint_faces"), 1):
            square = paste.face_square(found.box, picture.size)
            side = square[2] - square[0]
            why = paste.worth_it(found.box, picture.size)
            if why is None and side > LARGEST_GAIN * native and not job.defaults.fixed_size:
                why = f"at {side} px the face is drawn large already"
            if why:
                job.warnings.append(f"inpaint_faces: {why}")
                continue
            job.report.stage(f"drawing face {number} again")
            large = picture.crop(square).resize((native, native), RESAMPLING)
            picture = paste.paste(picture, self._again(job, large, seed, strength, job.plan.cfg_scale), square)
        return picture

    def _look(self, job: Job, picture: Picture, what: str) -> list[Found]:
        """The faces of a picture; none, and a warning, where nobody can look."""
        try:
            with job.kept(picture) as file:
                found = self._looker.faces(file, tell=job.tell)
        except CannotLook as problem:
            job.warnings.append(f"{what}: {problem}")
            return []
        if not found:
            job.warnings.append(f"{what}: no face was found in a picture")
        return found

    def _correct(self, job: Job, picture: Picture) -> Picture:
        """Restore the faces (GFPGAN)."""
        found = self._look(job, picture, "face_correct")
        if not found:
            return picture
        job.report.stage("restoring faces")
        try:
            with job.kept(picture) as file:
                self._looker.restore(file, found, RESTORE_STRENGTH, tell=job.tell)
                with Image.open(file) as opened:
                    return opened.convert("RGB")
        except CannotLook as problem:
            job.warnings.append(f"face_correct: {problem}")
            return picture


def describe(
    plan: Plan, seed: int, drawn: Picture, sampler: str, tune: TuneToRender, base: Base, loras: Sequence[Lora]
) -> Facts:
    """What is written into a picture of how it was made."""
    request = plan.request.model_dump(exclude_none=True, exclude_defaults=True)
    told = {"text", "negative_prompt", "num_images", "seed", "steps", "cfg_scale", "w", "h", "callback", "scheduler"}
    return Facts(
        prompt=plan.text,
        negative_prompt=plan.negative,
        seed=seed,
        steps=plan.steps,
        sampler=sampler,
        cfg_scale=plan.cfg_scale,
        width=drawn.width,
        height=drawn.height,
        model=tune["title"],
        base=base.root or base.title,
        loras=[(one.title, one.weight) for one in loras],
        more={name: value for name, value in request.items() if name not in told and not name.endswith("_url")},
    )


def changed(model: Path) -> int:
    """When a model was last written: a file of the models folder may be another one by now."""
    return (model / lora.DIFFUSERS_FILE if model.is_dir() else model).stat().st_mtime_ns
