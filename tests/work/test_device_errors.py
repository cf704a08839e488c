"""After a fatal error of the device the app restarts itself and resumes its work."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.app import App, post, running, wait_for
from tests.helpers.device_errors import ILLEGAL, SCRIPT, broken, plan
from tests.helpers.quick import cheap_previews
from tests.helpers.receiver import ReceiverServer, receiving
from tests.helpers.studio import Studio, same
from trainer.photos.decoder import Decoder
from trainer.settings import Settings, read_settings
from trainer.studio import tunes
from trainer.training import loop
from trainer.work.device_errors import device_error
from trainer.work.restart import restart_command
from trainer.work.worker import Worker

pytest_plugins = ("tests.helpers.web",)
WORDS = ILLEGAL.partition("\n")[0]
WARNING = f"{WORDS} -- the app restarted and resumed the job"
FAILED = f"{WORDS} -- the app ended 2 times at this point, so the job is not tried again"
PROMPT = {"prompts_attributes][][num_images": 1, "prompts_attributes][][text": "ohwx dog"}


@contextmanager
def breaking(folder: Path, *errors: dict[str, Any]) -> Iterator[App]:
    """An app whose device breaks."""
    (outputs := folder / "outputs").mkdir()
    plan(outputs, *errors)
    folders = "--models", str(folder / "models"), "--presets", str(cheap_previews(folder))
    with running(outputs, *folders, script=SCRIPT, TUNEBOOTH_PRIVATE_URLS="allow") as app:
        yield app.ready()


def wait_for_errors(app: App, count: int) -> None:
    """Wait until the device has broken so often, one restart at a time: each takes as long as a start."""
    for number in range(1, count + 1):
        wait_for(lambda number=number: len(broken(app.outputs)) >= number)


def events(app: App, tune_id: int) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in app.log(tune_id) if "event" in line]


def jobs(outputs: Path) -> int:
    with closing(sqlite3.connect(outputs / "tunebooth.db")) as db:
        return int(db.execute("SELECT COUNT(*) FROM jobs").fetchone()[0])


def posted(receiver: ReceiverServer) -> list[tuple[str, int, str]]:
    """What came: (webhook-id, tune, its status), as often as it came."""
    entities = [(headers["webhook-id"], json.loads(body)["tune"]) for _, headers, body in receiver.taken]
    return [(webhook_id, tune["id"], tune["status"]) for webhook_id, tune in entities]


@pytest.mark.long
def test_the_app_restarts_itself_and_the_tune_ends_with_the_same_weights(tmp_path: Path, photos: list[Path]) -> None:
    error = {"steps": 12, "step": 11, "times": 1}
    with receiving() as receiver, breaking(tmp_path, error) as app:
        for title in ("disturbed", "undisturbed"):
            fields = {"callback": receiver.url("hook"), "args": "save_every=5 batch=1"}
            post(app, title, photos, steps=12, **fields, **PROMPT).raise_for_status()
        ended = [app.finished(tune_id) for tune_id in (1, 2)]
        assert len(broken(app.outputs)) == 1 and app.process.poll() is None  # the same process, on the same port
        assert app.http.get("/health").json() == {"status": "ok", "ready": True}
        assert [tune["status"] for tune in ended] == ["trained", "trained"]
        assert [tune["prompts"][0]["status"] for tune in ended] == ["rendered", "rendered"]
        assert [events(app, tune_id) for tune_id in (1, 2)] == [[("started", 0), ("resumed", 10)], [("started", 0)]]
        assert (WARNING in ended[0]["warnings"], WARNING in ended[1]["warnings"]) == (True, False)
        wait_for(lambda: len(receiver.taken) == 2)
        app.stop()
    weights = [load_file(app.outputs / f"tunes/{tune_id}/model/lora.safetensors") for tune_id in (1, 2)]
    assert same(*weights)
    assert sorted((tune, status) for _, tune, status in posted(receiver)) == [(1, "trained"), (2, "trained")]
    assert jobs(app.outputs) == 0


@pytest.mark.long
def test_a_job_that_breaks_the_device_twice_at_one_point_fails_in_words_and_the_queue_goes_on(
    tmp_path: Path, photos: list[Path]
) -> None:
    always = {"steps": 13, "step": 6, "times": 1000}, {"text": "ohwx dog in the fire", "times": 1000}
    once = {"text": "ohwx dog once", "times": 1}
    with receiving() as receiver, breaking(tmp_path, *always, once) as app:
        hook = receiver.url("hook")
        post(app, "always", photos, steps=13, callback=hook, **PROMPT).raise_for_status()
        post(
            app,
            "next",
            photos,
            steps=12,
            callback=hook,
            **PROMPT | {"prompts_attributes][][text": "ohwx dog in the fire"},
        ).raise_for_status()
        for text in ("ohwx dog once", "ohwx dog"):
            app.http.post("/tunes/2/prompts", data={"prompt[text]": text, "prompt[num_images]": 1}).raise_for_status()
        wait_for_errors(app, 5)
        first, second = app.finished(1), app.finished(2)
        assert len(broken(app.outputs)) == 5 and app.process.poll() is None
        assert first["status"] == "failed" and first["error"].startswith(FAILED)
        assert first["prompts"][0]["error"].startswith("the tune was not trained: ")
        assert second["status"] == "trained"
        burnt, disturbed, undisturbed = sorted(second["prompts"], key=lambda prompt: prompt["id"])
        assert burnt["status"] == "failed" and burnt["error"].startswith(FAILED)
        assert disturbed["status"] == "rendered" and WARNING in disturbed["warnings"]
        assert undisturbed["status"] == "rendered" and WARNING not in undisturbed["warnings"]
        wait_for(lambda: len(receiver.taken) == 2)
        app.stop()
    assert sorted(what[1:] for what in posted(receiver)) == [(1, "failed"), (2, "trained")]
    assert len({what[0] for what in posted(receiver)}) == 2
    assert jobs(app.outputs) == 0


@pytest.fixture
def studio(tmp_path: Path, decoder: Decoder, photos: list[Path]) -> Iterator[Studio]:
    opened = Studio(tmp_path, decoder, photos)
    yield opened
    opened.close()


@pytest.fixture
def broken_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Before which steps (from 0) the device breaks, in their order."""
    steps: list[int] = []
    step_once = loop.step_once

    def checked(branch: Any, data: Any, config: Any, step: int, *more: Any) -> torch.Tensor:
        if steps[:1] == [step]:
            del steps[0]
            raise RuntimeError(ILLEGAL)
        return step_once(branch, data, config, step, *more)

    monkeypatch.setattr(loop, "step_once", checked)
    return steps


def worked(studio: Studio) -> list[str]:
    """The devices that were lost while a worker worked on the queue, which ends it."""
    lost: list[str] = []
    studio.worker = Worker(studio.settings, studio.store, studio.analyzer, lost.append)
    studio.worker.start()
    wait_for(lambda: lost)
    studio.worker.stop()
    return lost


def test_a_state_between_two_errors_begins_the_count_again(studio: Studio, broken_steps: list[int]) -> None:
    broken_steps += [7, 11, 11]
    tune_id = studio.create("Rex", args="save_every=5")
    assert [worked(studio), worked(studio)] == [["cpu"], ["cpu"]]
    assert tunes.get_tune(studio.services, tune_id).status == "training"
    assert worked(studio) == ["cpu"]
    assert studio.events(tune_id) == [("started", 0), ("resumed", 5), ("resumed", 10)]
    tune = tunes.get_tune(studio.services, tune_id)
    assert tune.status == "failed" and str(tune.error).startswith(FAILED)
    assert str(tune.prompts[0].error).startswith("the tune was not trained: ") and studio.store.queue_length() == 0


def test_after_an_error_of_the_device_nothing_more_is_claimed(studio: Studio, broken_steps: list[int]) -> None:
    broken_steps.append(1)
    ids = [studio.create(title) for title in ("first", "second")]
    assert worked(studio) == ["cpu"]
    rows = [tunes.get_tune(studio.services, tune_id) for tune_id in ids]
    assert [(row.status, row.error) for row in rows] == [("training", None), ("queued", None)]


FATAL = [
    torch.AcceleratorError(ILLEGAL),
    torch.AcceleratorError("CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert'"),
    torch.AcceleratorError("CUDA error: unknown error"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA error: hardware stack error"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("HIP error: an illegal memory access was encountered"),
]
NOT_FATAL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: invalid argument"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("the tune's text says CUDA error: an illegal memory access was encountered"),
    ValueError(ILLEGAL),
]


@pytest.mark.parametrize("error", FATAL, ids=str)
def test_a_fatal_error_of_the_device_is_known(error: Exception) -> None:
    assert device_error(error) == str(error).partition("\n")[0]
    try:
        try:
            raise error
        except RuntimeError as problem:
            raise ValueError("the base cannot be loaded") from problem
    except ValueError as wrapped:
        assert device_error(wrapped) == str(error).partition("\n")[0]


@pytest.mark.parametrize("error", NOT_FATAL, ids=str)
def test_other_errors_are_not_fatal(error: Exception) -> None:
    assert device_error(error) is None


def test_the_command_of_a_restart_keeps_its_options_and_does_not_grow(settings: Settings) -> None:
    given = [
        "/bin/python3",
        "-X",
        "dev",
        "app.py",
        "--port",
        "0",
        "--demo",
        "--open",
        "--outputs",
        str(settings.outputs),
    ]
    now = settings.model_copy(update={"port": 7861})
    again = restart_command(given, now, "cuda:0")
    assert again[:4] == [sys.executable, "-X", "dev", "app.py"]
    assert restart_command(again, now, "cuda:0") == again
    found = read_settings(again[4:], models=settings.models)
    assert (found.port, found.device, found.demo, found.open) == (7861, "cuda:0", False, False)
    assert found.outputs == settings.outputs
