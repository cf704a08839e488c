"""The thread that works, on real jobs of branch fast: to the end, stopped in the middle, gone wrong, started again."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import ImageChops

from tests.helpers.studio import PATIENCE_S, PROMPT, STEPS, Studio, same
from trainer.contract.errors import NotFound
from trainer.contract.tunes import Tune
from trainer.files import read_json_lines
from trainer.photos.decoder import Decoder
from trainer.studio import answers, prompts, rows, tunes
from trainer.work.worker import Worker

pytest_plugins = ("tests.helpers.web",)


@pytest.fixture(scope="module")
def studio(
    tmp_path_factory: pytest.TempPathFactory, decoder: Decoder, dog_photos: Callable[[int], list[Path]]
) -> Iterator[Studio]:
    """A studio whose worker runs through all tests of this file."""
    opened = Studio(tmp_path_factory.mktemp("studio"), decoder, dog_photos(5))
    opened.worker.start()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def whole(studio: Studio) -> Tune:
    """A tune that was trained in one go."""
    return studio.ended(studio.create("whole"))


def test_a_tune_goes_from_the_queue_to_a_model_and_pictures(studio: Studio) -> None:
    wide = PROMPT | {"num_images": 3, "w": 128, "h": 64}
    seen: list[Tune] = []
    with studio.store.transaction():  # so that the worker cannot have it yet
        tune_id = studio.create("Rex", prompts_attributes=[PROMPT, wide])
        seen.append(tunes.get_tune(studio.services, tune_id))
        studio.store.at_step[tune_id, 3] = lambda: seen.append(tunes.get_tune(studio.services, tune_id))
    tune = studio.ended(tune_id)
    assert [one.status for one in [*seen, tune]] == ["queued", "training", "trained"]
    assert tune.created_at <= str(tune.started_training_at) <= str(tune.trained_at)
    assert (tune.progress.step, tune.progress.steps, tune.progress.stage) == (STEPS, STEPS, "trained")
    assert tune.error is None and len(tune.ckpt_urls) == 4  # two of the end, one each of the middle and three quarters

    lines = read_json_lines(rows.tune_folder(studio.services, tune_id) / "log.jsonl")
    assert studio.events(tune_id) == [("started", 0)]
    assert [line["step"] for line in lines if "loss" in line] == [10, 12]
    assert answers.readings(studio.services, tune_id) == [line for line in lines if "loss" in line]
    assert all(line["lr"] > 0 and line["peak_gib"] > 0 for line in lines if "loss" in line)
    assert [moment["step"] for moment in answers.saved_snapshots(studio.services, tune_id)] == [3, 6, 9, 12]
    assert [bool(moment["model"]) for moment in answers.saved_snapshots(studio.services, tune_id)] == [
        False,
        True,
        True,
        False,
    ]
    assert {one["caption"] for one in answers.trained_pictures(studio.services, tune_id)} == {"A photo of ohwx dog"}
    assert tune.progress.loss == pytest.approx(lines[-1]["loss"], abs=1e-6)

    weights = studio.weights(tune_id)
    assert any(value.any() for name, value in weights.items() if name.endswith("lora_up.weight"))  # they begin at zero
    assert [prompt.status for prompt in tune.prompts] == ["rendered", "rendered"]
    assert [len(prompt.images) for prompt in tune.prompts] == [1, 3]
    pictures = studio.pictures(tune_id)
    assert [picture.size for picture in pictures] == [(64, 64), (64, 32), (64, 32), (64, 32)]
    assert all(len(picture.getcolors(64 * 64) or []) > 50 for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 4
    assert tune.prompts[1].warnings == ["fast renders 64 x 32 pixels; w and h have no effect"]
    assert not list(studio.settings.outputs.rglob("*.partial-*"))


def test_a_canceled_tune_stops_after_the_step_and_resumes_from_there(studio: Studio, whole: Tune) -> None:
    with studio.store.transaction():
        tune_id = studio.create("stop and go")
        studio.store.at_step[tune_id, 5] = lambda: tunes.cancel_tune(studio.services, tune_id)
    canceled = studio.ended(tune_id)
    assert (canceled.status, canceled.prompts[0].status) == ("canceled", "canceled")
    assert studio.states(tune_id) == ["step-000000", "step-000005"]
    assert canceled.progress.step == 5
    assert canceled.error is None and canceled.ckpt_url is None
    assert studio.store.queue_length() == 0

    tunes.resume_tune(studio.services, tune_id)
    resumed = studio.ended(tune_id)
    assert (resumed.status, resumed.prompts[0].status) == ("trained", "rendered")
    assert studio.events(tune_id) == [("started", 0), ("resumed", 5)]
    assert same(studio.weights(tune_id), studio.weights(whole.id))  # as if nobody had stopped it


def test_a_tune_that_fails_says_why_and_the_next_one_is_trained(studio: Studio) -> None:
    with studio.store.transaction():
        broken = studio.create("broken")
        after = studio.create("after", steps=1)
        shutil.rmtree(rows.tune_folder(studio.services, broken) / "images")
    failed, trained = studio.ended(broken), studio.ended(after)
    assert (failed.status, trained.status) == ("failed", "trained")
    assert "no photo of this tune is left" in str(failed.error) and "images/000.jpg" in str(failed.error)
    (prompt,) = failed.prompts
    assert prompt.status == "failed" and str(prompt.error).startswith("the tune was not trained: ")
    assert failed.updated_at <= str(trained.started_training_at)


def test_a_prompt_that_fails_leaves_its_tune_trained(studio: Studio, whole: Tune) -> None:
    model = rows.tune_folder(studio.services, whole.id) / "model"
    with studio.store.transaction():
        prompt = prompts.create_prompt(studio.services, whole.id, PROMPT)
        model.rename(model.with_name("elsewhere"))
    tune = studio.ended(whole.id)
    model.with_name("elsewhere").rename(model)
    assert tune.status == "trained"
    failed = next(one for one in tune.prompts if one.id == prompt.id)
    assert failed.status == "failed" and failed.error and failed.images == []
    again = prompts.create_prompt(studio.services, whole.id, PROMPT)
    assert next(one for one in studio.ended(whole.id).prompts if one.id == again.id).status == "rendered"


def test_prompts_come_before_the_next_tune(studio: Studio) -> None:
    with studio.store.transaction():
        first, second = studio.create("first", steps=1), studio.create("second", steps=1)
    rendered, trained = studio.ended(first).prompts[0], studio.ended(second)
    assert str(rendered.trained_at) <= str(trained.started_training_at)


def test_a_running_tune_is_stopped_before_it_is_deleted(studio: Studio) -> None:
    running = threading.Event()
    with studio.store.transaction():
        tune_id = studio.create("unwanted", steps=10_000)
        studio.store.at_step[tune_id, 3] = running.set
    assert running.wait(PATIENCE_S)
    tunes.delete_tune(studio.services, tune_id)
    with pytest.raises(NotFound):
        tunes.get_tune(studio.services, tune_id)
    assert not rows.tune_folder(studio.services, tune_id).exists()
    assert studio.ended(studio.create("wanted", steps=1)).status == "trained"


@pytest.mark.parametrize(("crashes", "status"), [(2, "trained"), (3, "failed")])
def test_a_job_that_takes_the_app_down_three_times_is_not_tried_again(
    studio: Studio, crashes: int, status: str
) -> None:
    with studio.store.transaction():
        tune_id = studio.create(f"crash {crashes}", steps=1)
        for _ in range(crashes):  # each is a process that has claimed the job and then was gone
            job = studio.store.claim()
            assert job is not None and job.tune_id == tune_id
        studio.store.recover()
    tune = studio.ended(tune_id)
    assert tune.status == status
    assert status == "trained" or tune.error == "the app ended 3 times at this point; it is not tried again"


def test_a_stopped_worker_requeues_its_tune_and_the_next_one_finishes_it(
    studio: Studio, whole: Tune, tmp_path: Path, decoder: Decoder, dog_photos: Callable[[int], list[Path]]
) -> None:
    before = Studio(tmp_path, decoder, dog_photos(5))
    tune_id = before.create("Rex")
    ending, begun = threading.Thread(target=before.worker.stop), threading.Event()

    def end_the_app() -> None:
        before.store.changed.clear()
        ending.start()
        before.store.changed.wait()  # the worker knows by now
        begun.set()

    before.store.at_step[tune_id, 6] = end_the_app
    before.worker.start()
    assert begun.wait(PATIENCE_S)
    ending.join()
    tune = tunes.get_tune(before.services, tune_id)
    assert (tune.status, tune.prompts[0].status, tune.ckpt_url) == ("queued", "queued", None)
    assert before.states(tune_id) == [
        "step-000000",
        "step-000007",
    ]  # it heard after step 6 was settled: the next one is its last
    before.store.close()

    after = Studio(tmp_path, decoder, [])
    after.worker.start()
    assert after.ended(tune_id).status == "trained"
    assert after.events(tune_id) == [("started", 0), ("resumed", 7)]
    assert same(after.weights(tune_id), studio.weights(whole.id))
    (picture,) = after.pictures(tune_id)
    difference = ImageChops.difference(picture, studio.pictures(whole.id)[0])
    # One level: kernels sum in an order that depends on where in memory the weights were loaded.
    assert max(most for _, most in difference.getextrema()) <= 1
    after.close()


def test_a_run_that_crashed_before_its_first_state_leaves_no_trace_in_the_log(studio: Studio) -> None:
    with studio.store.transaction():
        tune_id = studio.create("again")
        log = rows.tune_folder(studio.services, tune_id) / "log.jsonl"
        log.write_text('{"step": 0, "event": "started"}\n{"step": 10, "loss": 9.0}\n{"step": 20, "lo')
    assert studio.ended(tune_id).status == "trained"
    assert studio.events(tune_id) == [("started", 0), ("started", 0)]
    assert [reading["step"] for reading in answers.readings(studio.services, tune_id)] == [10, 12]


def test_without_the_asked_device_a_tune_fails_in_words_and_does_not_wait_for_ever(
    tmp_path: Path, decoder: Decoder, dog_photos: Callable[[int], list[Path]]
) -> None:
    studio = Studio(tmp_path, decoder, dog_photos(1))
    settings = studio.settings.model_copy(update={"device": "cuda:99"})
    studio.worker = Worker(settings, studio.store, studio.analyzer)
    studio.worker.start()
    tune = studio.ended(studio.create("no such card"))
    studio.close()
    assert tune.status == "failed"
    assert tune.error is not None and tune.error.startswith("no usable device")
    assert [prompt.status for prompt in tune.prompts] == ["failed"]
