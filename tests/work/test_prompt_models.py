"""LoRA files that were replaced or removed while a prompt waited."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest

from trainer.contract.errors import JobRefused
from trainer.contract.rows import PromptRow
from trainer.library.bases import Base
from trainer.settings import Settings
from trainer.work.prompt_models import _lora, changed_since

CHANGED = "film was changed after the prompt was sent, and cannot be used"


class NoTunes:
    """A store without tunes."""

    def get(self, _table: str, _row_id: int) -> None:
        return None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"branch": "sdxl1"},
            "film was changed after the prompt was sent, and cannot be used: it is of branch sdxl1 now",
        ),
        ({"error": "it is broken"}, "film was changed after the prompt was sent, and cannot be used: it is broken"),
        ({"id": 8}, "<lora:7>: that tune, or file of the models folder, was deleted"),
    ],
)
def test_a_lora_file_that_no_longer_fits_is_refused(settings: Settings, changes: dict[str, Any], words: str) -> None:
    there = {"id": 7, "title": "film", "branch": "sd15", "model": Path("film.safetensors")}
    with pytest.raises(JobRefused) as refused:
        _lora(settings, cast(Any, NoTunes()), 7, "sd15", lambda: [Base(**there | changes)])
    assert str(refused.value).startswith(words)


def test_a_file_that_is_newer_than_its_prompt_was_changed(tmp_path: Path) -> None:
    file = tmp_path / "film.safetensors"
    file.write_bytes(b"")
    prompt = cast(PromptRow, {"created_at": "2026-01-01T00:00:10.000Z"})
    sent = 1767225610
    for seconds, expected in ((-60, False), (0, False), (60, True)):
        os.utime(file, (sent + seconds, sent + seconds))
        assert changed_since(file, prompt) == expected
    assert not changed_since(tmp_path, prompt)  # the model of a tune
