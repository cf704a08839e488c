"""The worker notes checksums of what it makes, and does not use a model that has changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.app import wait_for
from tests.helpers.studio import Studio
from tests.helpers.web import client_of
from trainer.photos.decoder import Decoder
from trainer.studio import checksums, models, prompts, rows, tunes

pytest_plugins = ("tests.helpers.web",)

OLD = Path(__file__).parents[1] / "fixtures" / "studio_0_1"
TRAINED, CANCELED, WAITING = 1, 5, 6
CHANGED = "model/lora_diffusers.safetensors of tune 1 (trained) is damaged or was replaced"


@pytest.fixture
def studio(tmp_path: Path, decoder: Decoder) -> Iterator[Studio]:
    """A studio with a trained tune, on which others stand; its worker is not started."""
    shutil.copytree(OLD / "outputs", tmp_path / "outputs")
    opened = Studio(tmp_path, decoder, [], weights=tmp_path / "weights")
    yield opened
    opened.close()


def known(studio: Studio, tune_id: int) -> dict[str, str]:
    with studio.store.transaction() as db:
        found = db.execute("SELECT path, sha256 FROM checksums WHERE tune_id = ?", (tune_id,))
        return {row[0]: row[1] for row in found}


def test_what_is_made_has_a_checksum_and_what_is_used_gets_one(studio: Studio) -> None:
    folder = rows.tune_folder(studio.services, WAITING)
    studio.worker.start()
    studio.ended(WAITING)
    studio.ended(TRAINED)
    made = {f"model/{name}" for name in ("lora.safetensors", "lora_diffusers.safetensors")}
    assert known(studio, WAITING) == checksums.of_folder(folder, "model")
    assert known(studio, WAITING).keys() == known(studio, TRAINED).keys() == made
    models.model_link(studio.services, WAITING, "checkpoint")
    wait_for(lambda: models.model_link(studio.services, WAITING, "checkpoint"))
    export = "exports/checkpoint/checkpoint.safetensors"
    assert known(studio, WAITING)[export] == checksums.of_folder(folder, "exports/checkpoint")[export]


def test_a_changed_model_is_neither_rendered_nor_trained_on_nor_exported(studio: Studio) -> None:
    """The old tune has got its checksums by being used once; then a bit of it turns over."""
    outputs = studio.settings.outputs
    file = rows.tune_folder(studio.services, TRAINED) / "model" / "lora_diffusers.safetensors"
    checksums.verify(studio.store, outputs, file.parent)
    content = bytearray(file.read_bytes())
    whole = bytes(content)
    content[-1] ^= 1
    file.write_bytes(content)
    models.model_link(studio.services, TRAINED, "checkpoint")
    tunes.resume_tune(studio.services, CANCELED)  # it stands on tune 1
    studio.worker.start()
    own, resumed, naming = (studio.ended(tune_id) for tune_id in (TRAINED, CANCELED, WAITING))
    assert own.status == "trained" and own.prompts[-1].status == "failed"
    assert (resumed.status, naming.status) == ("failed", "trained")
    assert [prompt.status for prompt in naming.prompts] == ["rendered", "failed"]  # the second one names tune 1
    for error in (own.prompts[-1].error, resumed.error, naming.prompts[1].error):
        assert str(error).startswith(CHANGED) and "Put a copy of that file in its place, or delete the tune" in str(
            error
        )
    refused = client_of(studio.services).get(f"/tunes/{TRAINED}/model", params={"format": "checkpoint"})
    assert refused.status_code == 409 and CHANGED in refused.json()["error"]
    assert file.read_bytes() == content  # nothing is mended behind the user's back

    file.write_bytes(whole)
    again = prompts.create_prompt(studio.services, TRAINED, {"text": "ohwx dog", "num_images": 1, "steps": 2})
    assert next(one for one in studio.ended(TRAINED).prompts if one.id == again.id).status == "rendered"
