"""Postprocessing in the hosted service's order: upscaling, hires fix, faces, film look."""

from __future__ import annotations

import math

import torch
from PIL import Image

from trainer.contract.errors import AnalysisUnavailable
from trainer.contract.report import Report
from trainer.library import weights
from trainer.library.weights import Unavailable
from trainer.photos.found import Found
from trainer.rendering import film, paste, upscale
from trainer.rendering.draw import sample
from trainer.rendering.job import RESAMPLING, Job, Loaded, Picture
from trainer.rendering.plan import BLOCK_PX
from trainer.settings import Settings

MOST_TO_ENLARGE = 16_000_000  # pixels; the network's output has sixteen times as many
MOST_ENLARGED = 64_000_000  # pixels
RESTORE_STRENGTH = 0.8  # for face_correct, as for training_face_correct: a fifth of the original keeps its grain
LARGEST_GAIN = 1.5  # of the base's size: a larger face would be drawn smaller than it is


def postprocess(job: Job, picture: Picture, seed: int) -> Picture:
    """All postprocessing of one picture."""
    request = job.plan.request
    job.report_progress()
    if job.plan.enlarges and job.loaded.upscaler is not None:
        picture = enlarge(job, picture)
        if request.hires_fix:
            picture = hires_fix(job, picture, seed)
    if request.inpaint_faces:
        picture = inpaint_faces(job, picture, seed)
    if request.face_correct:
        picture = correct_faces(job, picture)
    if job.plan.film:
        picture = film.grade(picture, job.plan.film)
    if request.film_grain:
        picture = film.grain(picture, seed)
    return picture


def load_upscaler(loaded: Loaded, settings: Settings, report: Report) -> list[str]:
    """Load the upscaler. Returns warnings, because pictures can be rendered without it."""
    if loaded.upscaler is None:
        try:
            file = weights.obtain(settings, weights.UPSCALER, progress=lambda what, *_: report.stage(what))
        except Unavailable as problem:
            return [f"super_resolution: pictures are not enlarged: {problem}"]
        loaded.upscaler = upscale.upscaler(file, loaded.branch.device)
    return []


def enlarge(job: Job, picture: Picture) -> Picture:
    """Super-resolution: four times below 512 x 512 pixels, else twice, as the hosted service does.

    An input picture that is not redrawn is enlarged once for all seeds.
    """
    if job.enlarged and job.enlarged[0] is picture:
        return job.enlarged[1]
    assert job.loaded.upscaler is not None, "pictures are enlarged only with it"
    job.report.stage("super-resolution")
    factor = job.plan.flags.upscale_factor or upscale.sr_factor(*picture.size)
    source = picture
    if picture.width * picture.height > MOST_TO_ENLARGE:
        source = picture.copy()
        scale = math.sqrt(MOST_TO_ENLARGE / (picture.width * picture.height))
        source.thumbnail((round(picture.width * scale), round(picture.height * scale)), RESAMPLING)
        message = f"{picture.width} x {picture.height} pixels were made {source.width} x {source.height} first"
        job.warnings.append(f"the picture is too large to be enlarged as it is: its {message}")
    factor = min(factor, math.sqrt(MOST_ENLARGED / (source.width * source.height)))
    with torch.no_grad(), torch.autocast(job.branch.device.type, enabled=False):
        larger = upscale.upscale(source, job.loaded.upscaler, factor, watch=lambda _done, _of: job.report_progress())
    job.enlarged = picture, larger
    return larger


def hires_fix(job: Job, picture: Picture, seed: int) -> Picture:
    """Draw the enlarged picture again with a little noise, which adds detail."""
    if not job.plan.defaults.hires_strength:
        job.warnings.append(f"hires_fix has no effect: the base of {job.family} knows one size only")
        return picture
    job.report.stage("hires fix")
    plan, whole = job.plan, picture.size
    width, height = (max(BLOCK_PX, side // BLOCK_PX * BLOCK_PX) for side in whole)
    drawn = redraw(
        job,
        picture.resize((width, height), RESAMPLING),
        seed,
        plan.flags.hires_denoising_strength or job.plan.defaults.hires_strength,
        plan.cfg_scale if plan.flags.hires_cfg_scale is None else plan.flags.hires_cfg_scale,
    )
    return drawn if drawn.size == whole else drawn.resize(whole, RESAMPLING)


def redraw(job: Job, picture: Picture, seed: int, strength: float, cfg_scale: float) -> Picture:
    """Draw one picture again (image-to-image)."""
    return sample(job, "image", [seed], picture.size, cfg_scale, strength, image=picture)[0]


def inpaint_faces(job: Job, picture: Picture, seed: int) -> Picture:
    """Draw each face again, enlarged, and paste it back with a soft edge."""
    if not job.models.people:
        job.warnings.append("inpaint_faces has no effect: none of the models is of people")
        return picture
    strength = job.plan.flags.face_inpaint_denoising
    strength = job.plan.defaults.face_strength if strength is None else strength
    if not strength:
        return picture
    native = min(job.plan.defaults.w, job.plan.defaults.h)
    for number, found in enumerate(find_faces(job, picture, "inpaint_faces"), 1):
        square = paste.face_square(found.box, picture.size)
        side = square[2] - square[0]
        why = paste.worth_it(found.box, picture.size)
        if why is None and side > LARGEST_GAIN * native and not job.plan.defaults.fixed_size:
            why = f"at {side} px the face is drawn large already"
        if why:
            job.warnings.append(f"inpaint_faces: {why}")
            continue
        job.report.stage(f"drawing face {number} again")
        large = picture.crop(square).resize((native, native), RESAMPLING)
        picture = paste.paste(picture, redraw(job, large, seed, strength, job.plan.cfg_scale), square)
    return picture


def find_faces(job: Job, picture: Picture, what: str) -> list[Found]:
    """The faces of a picture; empty, with a warning, where there are none or face detection is not available."""
    try:
        with job.kept(picture) as file:
            found = job.analyzer.faces(file, progress=job.progress)
    except AnalysisUnavailable as problem:
        job.warnings.append(f"{what}: {problem}")
        return []
    if not found:
        job.warnings.append(f"{what}: no face was found in a picture")
    return found


def correct_faces(job: Job, picture: Picture) -> Picture:
    """Restore the faces (GFPGAN)."""
    found = find_faces(job, picture, "face_correct")
    if not found:
        return picture
    job.report.stage("restoring faces")
    try:
        with job.kept(picture) as file:
            job.analyzer.restore(file, found, RESTORE_STRENGTH, progress=job.progress)
            with Image.open(file) as opened:
                return opened.convert("RGB")
    except AnalysisUnavailable as problem:
        job.warnings.append(f"face_correct: {problem}")
        return picture
