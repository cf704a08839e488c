"""Run as a script: `app.py` whose device breaks as the file `device_errors.json` in the outputs folder says.

Once it has broken, everything fails that this process does on it, as after a real CUDA error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = "tests/helpers/device_errors.py"
PLAN, RECORD = "device_errors.json", "device_errors.txt"
ILLEGAL = (
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported at some"
    " other API call, so the stacktrace below might be incorrect."
)


def plan(outputs: Path, *errors: dict[str, Any]) -> None:
    """Say when the device breaks, each time up to so many `times`.

    An error is of a training: {"steps": of the run, "step": before which}; or of a rendering: {"text": of the prompt}.
    """
    (outputs / PLAN).write_text(json.dumps(errors))


def broken(outputs: Path) -> list[str]:
    """What the device broke at, once for each process."""
    record = outputs / RECORD
    return record.read_text().splitlines() if record.exists() else []


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import app
    from trainer.settings import command_line
    from trainer.work.worker import Worker

    outputs, set_up = command_line()[1].outputs, Worker._set_up

    def break_after(worker: Worker) -> None:
        set_up(worker)  # the slow imports
        break_device(outputs)

    Worker._set_up = break_after
    app.main()


def break_device(outputs: Path) -> None:
    """Check at each step of a training, and at each prompt, whether the device breaks there."""
    import torch

    from trainer.rendering import renderer
    from trainer.training import loop

    errors, lost = json.loads((outputs / PLAN).read_text()), False

    def check(**place: Any) -> None:
        nonlocal lost
        for error in errors:
            here = all(place.get(key) == value for key, value in error.items() if key != "times")
            if here and not lost and broken(outputs).count(str(error)) < error["times"]:
                lost = True
                with (outputs / RECORD).open("a") as record:
                    print(error, file=record)
        if lost:
            raise torch.AcceleratorError(ILLEGAL)

    step_once, draw_pictures = loop.step_once, renderer.draw_pictures

    def step(branch: Any, data: Any, config: Any, step: int, *more: Any) -> Any:
        check(steps=config.steps, step=step)
        return step_once(branch, data, config, step, *more)

    def draw(job: Any) -> Any:
        check(text=job.plan.request.text)
        return draw_pictures(job)

    loop.step_once, renderer.draw_pictures = step, draw


if __name__ == "__main__":
    main()
