"""Choosing the pipeline for a task."""

from __future__ import annotations

import logging
from typing import Any

from trainer.branches.loading import arguments_of
from trainer.branches.protocol import Branch, Task
from trainer.rendering import control

log = logging.getLogger("tunebooth.render")


def pipeline_for(branch: Branch, task: Task, control_model: Any = None) -> tuple[Any, frozenset[str]]:
    """The stock pipeline for a task, with or without a control model, and the names of its call's arguments."""
    if control_model is None:
        return branch.task_pipeline(task)
    pipeline = control.pipeline(branch, control_model, task)
    return pipeline, arguments_of(pipeline)
