"""The endpoints of the Gradio API, one function each."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi.concurrency import run_in_threadpool
from gradio.utils import get_upload_folder

from trainer.contract.disk import DiskProblem
from trainer.contract.errors import AnalysisUnavailable, Conflict, InvalidRequest, NotFound
from trainer.contract.photos import Upload
from trainer.contract.prompts import PICTURES, PromptRequest
from trainer.contract.tunes import CheckRequest, Tune, TuneRequest
from trainer.studio import models, settle
from trainer.studio import prompts as prompt_verbs
from trainer.studio import tunes as tune_verbs
from trainer.studio.rows import Services
from trainer.studio.store import Query
from trainer.web import spool
from trainer.web.progress import WATCH_SECONDS, busy, progress_callback

Answer = dict[str, Any]  # Gradio shows this type to clients
Endpoint = Callable[..., Awaitable[Any]]


def endpoints(services: Services) -> list[Endpoint]:
    """The functions that gradio_client calls. Gradio does not enforce their types; the contract does."""
    submit_tune = submit_endpoint(services)
    return [
        waiting_endpoint(services, submit_tune),
        submit_tune,
        *tune_endpoints(services),
        *prompt_endpoints(services),
        *list_endpoints(services),
        check_endpoint(services),
    ]


def submit_endpoint(services: Services) -> Endpoint:
    @as_gradio_errors
    async def submit_tune(
        name: str = "",
        title: str = "",
        images: list[gr.FileData] | None = None,
        image_urls: list[str] | None = None,
        callback: str | None = None,
        branch: str | None = None,
        steps: int | None = None,
        token: str | None = None,
        face_crop: bool | None = None,
        training_face_correct: bool | None = None,
        base_tune_id: int | None = None,
        model_type: str | None = None,
        auto_extend: bool | None = None,
        preset: str | None = None,
        characteristics: dict[str, str] | None = None,
        prompts_attributes: list[Answer] | None = None,
        args: str | None = None,
        prompts_callback: str | None = None,
    ) -> Answer:
        """Create a tune and answer at once."""
        given = locals()
        values = {key: given[key] for key in TuneRequest.parameters() if given[key] is not None}
        uploads = [_upload(image) for image in values.pop("images", [])]
        tune, _ = await run_in_threadpool(
            tune_verbs.create_tune, services, values, uploads, progress_callback(gr.Progress())
        )
        spool.forget(upload.path for upload in uploads)
        return tune.model_dump()

    return submit_tune


def waiting_endpoint(services: Services, submit_tune: Endpoint) -> Endpoint:
    """The endpoint `create_tune`, with the parameters of `submit_tune`."""

    async def submit_and_wait(*positional: object, **named: object) -> Answer:
        tune = Tune(**await submit_tune(*positional, **named))
        progress = gr.Progress()
        while busy(tune):
            where = tune.progress
            loss = "" if where.loss is None else f", loss {where.loss:.4f}"
            share = where.step / where.steps if where.steps else 0.0
            steps = f": step {where.step} of {where.steps}" if where.steps else ""
            progress(share, f"{where.stage}{steps}{loss}")
            await asyncio.sleep(WATCH_SECONDS)
            tune = await run_in_threadpool(tune_verbs.get_tune, services, tune.id)
        if tune.status == "failed":
            raise gr.Error(tune.error or "the tune failed", print_exception=False)
        return tune.model_dump()

    create_tune = functools.wraps(submit_tune)(as_gradio_errors(submit_and_wait))
    create_tune.__name__ = "create_tune"
    create_tune.__doc__ = "Create a tune and wait for it and its prompts; it continues if the caller disconnects."
    return create_tune


def check_endpoint(services: Services) -> Endpoint:
    @as_gradio_errors
    async def check_photos(
        images: list[gr.FileData] | None = None,
        image_urls: list[str] | None = None,
        name: str | None = None,
        branch: str | None = None,
        preset: str | None = None,
        face_crop: bool | None = None,
        training_face_correct: bool | None = None,
        base_tune_id: int | None = None,
        model_type: str | None = None,
        args: str | None = None,
        token: str | None = None,
    ) -> Answer:
        """Check photos for a tune with these parameters: a verdict for each photo; nothing is kept."""
        given = locals()
        values = {key: given[key] for key in CheckRequest.parameters() if given[key] is not None}
        uploads = [_upload(image) for image in values.pop("images", [])]
        return (
            await run_in_threadpool(
                tune_verbs.check_photos, services, values, uploads, progress_callback(gr.Progress())
            )
        ).model_dump()

    return check_photos


def tune_endpoints(services: Services) -> list[Endpoint]:
    @as_gradio_errors
    async def get_tune(tune_id: int) -> Answer:
        """One tune with its prompts."""
        return (await run_in_threadpool(tune_verbs.get_tune, services, tune_id)).model_dump()

    @as_gradio_errors
    async def list_tunes(
        limit: int = 20,
        offset: int = 0,
        title: str | None = None,
        branch: str | None = None,
        model_type: str | None = None,
        before_id: int | None = None,
        name: str | None = None,
    ) -> list[Answer]:
        """Tunes, newest first; before_id: only those with smaller ids."""
        wanted: Query = {"limit": limit, "offset": offset, "before_id": before_id, "title": title, "name": name}
        wanted |= {"branch": branch, "model_type": model_type}
        tunes = await run_in_threadpool(functools.partial(tune_verbs.list_tunes, services, **wanted))
        return [tune.model_dump() for tune in tunes]

    @as_gradio_errors
    async def cancel_tune(tune_id: int) -> Answer:
        """Stop a tune within one step; its state is kept for resume_tune."""
        return (await run_in_threadpool(tune_verbs.cancel_tune, services, tune_id)).model_dump()

    @as_gradio_errors
    async def resume_tune(tune_id: int) -> Answer:
        """Queue a canceled or failed tune again; it resumes from its last state."""
        return (await run_in_threadpool(tune_verbs.resume_tune, services, tune_id)).model_dump()

    @as_gradio_errors
    async def delete_tune(tune_id: int) -> dict[str, str]:
        """Remove a tune, its prompts and its files."""
        await run_in_threadpool(tune_verbs.delete_tune, services, tune_id)
        return {"message": "Tune successfully deleted"}

    return [get_tune, list_tunes, cancel_tune, resume_tune, delete_tune]


def prompt_endpoints(services: Services) -> list[Endpoint]:
    @as_gradio_errors
    async def get_prompt(prompt_id: int) -> Answer:
        """One prompt with its pictures."""
        return (await run_in_threadpool(prompt_verbs.get_prompt, services, prompt_id)).model_dump()

    @as_gradio_errors
    async def list_prompts(
        tune_id: int | None = None,
        limit: int = 20,
        offset: int = 0,
        before_id: int | None = None,
        text: str | None = None,
    ) -> list[Answer]:
        """Prompts, newest first; before_id: only those with smaller ids; text: only those that contain it."""
        prompts = await run_in_threadpool(prompt_verbs.list_prompts, services, tune_id, limit, offset, before_id, text)
        return [prompt.model_dump() for prompt in prompts]

    @as_gradio_errors
    async def delete_prompt(prompt_id: int) -> dict[str, str]:
        """Remove a prompt and its pictures."""
        await run_in_threadpool(prompt_verbs.delete_prompt, services, prompt_id)
        return {"message": "Prompt successfully deleted"}

    return [create_prompt_endpoint(services), get_prompt, list_prompts, delete_prompt]


def create_prompt_endpoint(services: Services) -> Endpoint:
    @as_gradio_errors
    async def create_prompt(
        tune_id: int,
        text: str,
        negative_prompt: str | None = None,
        num_images: int | None = None,
        seed: int | None = None,
        steps: int | None = None,
        cfg_scale: float | None = None,
        w: int | None = None,
        h: int | None = None,
        callback: str | None = None,
        aspect_ratio: str | None = None,
        ar: str | None = None,
        scheduler: str | None = None,
        use_lpw: bool | None = None,
        lora_scale: float | None = None,
        style: str | None = None,
        color_grading: str | None = None,
        film_grain: bool | None = None,
        super_resolution: bool | None = None,
        hires_fix: bool | None = None,
        inpaint_faces: bool | None = None,
        face_correct: bool | None = None,
        face_swap: bool | None = None,
        input_image: gr.FileData | None = None,
        input_image_url: str | None = None,
        mask_image: gr.FileData | None = None,
        mask_image_url: str | None = None,
        denoising_strength: float | None = None,
        controlnet: str | None = None,
        controlnet_conditioning_scale: float | None = None,
        controlnet_txt2img: bool | None = None,
    ) -> Answer:
        """Render a prompt with a tune."""
        given = locals()
        values = {key: given[key] for key in PromptRequest.parameters() if given[key] is not None}
        values |= {name: _upload(values[name], name) for name in PICTURES if name in values}
        progress = progress_callback(gr.Progress())
        prompt = await run_in_threadpool(prompt_verbs.create_prompt, services, tune_id, values, progress)
        spool.forget(values[name].path for name in PICTURES if name in values)
        return prompt.model_dump()

    return create_prompt


def list_endpoints(services: Services) -> list[Endpoint]:
    @as_gradio_errors
    async def list_base_tunes(branch: str | None = None) -> list[Answer]:
        """Base models that a tune can start from."""
        return await run_in_threadpool(models.list_base_tunes, services, branch)

    @as_gradio_errors
    async def list_presets() -> list[str]:
        """Names for the parameter preset."""
        return await run_in_threadpool(settle.list_presets, services)

    return [list_base_tunes, list_presets]


def as_gradio_errors(endpoint: Endpoint) -> Endpoint:
    """The client gets our own errors as `gr.Error` with their text; other errors are hidden."""

    @functools.wraps(endpoint)
    async def wrapped(*positional: object, **named: object) -> object:
        try:
            return await endpoint(*positional, **named)
        except (InvalidRequest, NotFound, Conflict, AnalysisUnavailable) as problem:
            raise gr.Error(str(problem), print_exception=False) from None
        except DiskProblem as problem:
            raise gr.Error(problem.as_refusal(), print_exception=False) from None

    return wrapped


def _upload(image: object, name: str = "images") -> Upload:
    if not isinstance(image, dict) or not image.get("path"):
        raise InvalidRequest({name: ["must be files: handle_file('photo.jpg') of gradio_client makes one"]})
    path = Path(str(image["path"])).resolve()
    # Gradio checks only values marked as its files; without this check, a client could name any file of this machine.
    if not path.is_relative_to(Path(get_upload_folder()).resolve()) or not path.is_file():
        raise InvalidRequest({name: ["must be files that were uploaded: handle_file('photo.jpg') does that"]})
    return Upload(Path(str(image.get("orig_name") or path)).name, path)
