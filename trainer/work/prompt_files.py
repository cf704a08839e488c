"""What a prompt needs in addition to its models, checked before it is rendered: it may have waited for days."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from trainer.config import looks
from trainer.contract.errors import JobRefused
from trainer.contract.prompts import DIGESTS, PICTURES
from trainer.contract.rows import PromptRow
from trainer.photos import inputs
from trainer.work.run_files import digest_of, is_whole

LOOKS: dict[str, Callable[[Path], Collection[str]]] = {"style": looks.styles, "color_grading": looks.film_looks}


def check_files(prompt: PromptRow, folder: Path, presets: Path) -> list[str]:
    """Check the input pictures of a prompt, its style and its film look. Returns warnings.

    folder: of its input pictures. Raises JobRefused for what is missing or broken: without it, another picture would be
    drawn.
    """
    asked = prompt["attributes"]
    for name, read in LOOKS.items():
        if asked.get(name) and asked[name] not in read(presets):
            raise JobRefused(
                f"the {name} {asked[name]!r} is no longer in the presets. Put it back, or send the prompt again with"
                " another one"
            )
    digests, warnings = asked.get(DIGESTS), []
    for name in (name for name in PICTURES if asked.get(name)):
        file = inputs.find(folder, name)
        if file is None:
            raise JobRefused(f"{asked[name]} of this prompt is missing. Send the prompt again with the picture")
        if isinstance(digests, dict) and digests.get(name) != digest_of(file):
            if not is_whole(file):
                raise JobRefused(f"{file.name} of this prompt is damaged. Send the prompt again with the picture")
            warnings.append(f"{name} was changed after the prompt was sent: the picture as it is now was used")
    return warnings
