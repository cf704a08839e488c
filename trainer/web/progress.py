"""The progress of a Gradio call, shown in the browser."""

from __future__ import annotations

import gradio as gr

from trainer.contract.photos import ProgressCallback
from trainer.contract.states import ENDED
from trainer.contract.tunes import Tune

WATCH_SECONDS = 1.0


def busy(tune: Tune) -> bool:
    return tune.status not in ENDED or any(prompt.status not in ENDED for prompt in tune.prompts)


def progress_callback(progress: gr.Progress) -> ProgressCallback:
    """A callback that shows the progress of a request in a Gradio progress bar."""
    return lambda what, done, of: progress((done, of), what)
