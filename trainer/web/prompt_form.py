"""The form of the page that renders more pictures of a tune."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from gradio.components import Component

from trainer.contract.disk import DiskProblem
from trainer.contract.errors import InvalidRequest, NotFound
from trainer.contract.photos import Upload
from trainer.contract.prompts import CONTROLS, PICTURES
from trainer.studio import models, prompts
from trainer.studio.rows import Services
from trainer.web import spool
from trainer.web.form import picture_fields
from trainer.web.html import note
from trainer.web.progress import progress_callback

START_FIELDS = (  # parameters of a prompt that starts from a picture
    "input_image", "mask_image", "denoising_strength", "controlnet", "controlnet_conditioning_scale",
    "controlnet_txt2img",
)  # fmt: skip


class PromptForm:
    """The form that renders a prompt with an existing tune."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.tune = gr.Dropdown(choices=[], label="Tune", elem_id="prompt-tune")
        text = gr.Textbox(label="Prompt", lines=3, placeholder="ohwx dog in the snow", elem_id="prompt-text")
        self.button = gr.Button("Render", variant="primary", size="lg", elem_id="render")
        self.note = gr.HTML(elem_id="prompt-note")
        shared = picture_fields(services)
        with gr.Accordion("Start from a picture", open=False):
            with gr.Row():
                pictures = [
                    gr.File(label=label, file_types=["image"], height=110, elem_id=f"prompt-{name}")
                    for name, label in (("input_image", "Picture"), ("mask_image", "Mask: white is redrawn"))
                ]
            strength = gr.Textbox(label="Denoising strength: 0 keeps the picture, 1 redraws it", placeholder="0.8")
            with gr.Row():
                kind = gr.Dropdown(choices=[("none", ""), *CONTROLS], value="", label="ControlNet")
                scale = gr.Textbox(label="Its strength", placeholder="1")
            control_only = gr.Checkbox(label="Take only its outline (controlnet_txt2img)")
        start = dict(zip(START_FIELDS, (*pictures, strength, kind, scale, control_only), strict=True))
        self._fields = {"text": text, **shared, **start}

        self.pictures = pictures
        for picture in pictures:
            spool.forget_removed(picture)

    @property
    def inputs(self) -> list[Component]:
        return [self.tune, *self._fields.values()]

    @property
    def outputs(self) -> list[Component]:
        return [self.note, *self.pictures]

    def choices(self) -> object:
        """The tunes that have a model now."""
        return gr.update(choices=models.rendering_tunes(self._services))

    def submit(self, tune_id: int | None, *values: object) -> list[object]:
        """Queue the prompt; returns the errors as HTML, and the updates of the fields of pictures."""
        data = {name: value for name, value in zip(self._fields, values, strict=True) if value not in (None, False)}
        paths = {name: Path(str(data[name])) for name in PICTURES if name in data}
        sent = {name: Upload(path.name, path) for name, path in paths.items()}
        try:
            if not tune_id:
                raise InvalidRequest({"tune": ["choose the tune that is to be drawn"]})
            for name, picture in sent.items():
                spool.check_uploads(name, [picture])
            prompt = prompts.create_prompt(
                self._services, int(tune_id), data | sent, progress_callback(gr.Progress()), always_new=True
            )
            spool.forget(paths.values())
            gr.Info(f"prompt {prompt.id} is queued", duration=4)
            return ["", *(None for _ in self.pictures)]
        except (NotFound, DiskProblem) as error:
            problems = [str(error)]
        except InvalidRequest as invalid:
            problems = [f"{field}: {'; '.join(messages)}" for field, messages in invalid.problems.items()]
        return [note(problems), *(gr.skip() for _ in self.pictures)]
