"""Random verbs from eight threads: after each round the database and the folders agree with each other.

The seed is printed; TUNEBOOTH_TEST_SEED replays it. Some of the verbs take a job, as the worker does, and end it at
once: the verbs and the schema are tested here, not training.
"""

from __future__ import annotations

import contextlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.web import photo, upload
from trainer.contract.errors import Conflict, InvalidRequest, NotFound
from trainer.contract.photos import Upload
from trainer.studio import models, pack_verbs, prompts, tunes
from trainer.studio.rows import Services
from trainer.studio.store import RUNNING

pytest_plugins = ("tests.helpers.web",)

ROUNDS, THREADS, VERBS = 3, 8, 8
CALLBACK = "https://example.com/hook"
OPEN = {"tunes": ("queued", "training"), "prompts": ("queued", "rendering"), "exports": ("queued", "exporting")}


class Actor:
    """One thread's verbs. Refusals are part of the game; any other error fails the test."""

    def __init__(self, services: Services, seed: str, photos: list[Upload], base: int) -> None:
        self.services = services
        self.random = random.Random(seed)  # not for secrets
        self.photos = photos
        self.base = base

    def run(self) -> None:
        for _ in range(VERBS):
            act = self.random.choice(
                [self.create, self.create, self.prompt, self.copy, self.cancel, self.resume, self.resume, self.delete,
                 self.delete_prompt, self.export, self.send_again, self.rename, self.pack, self.work, self.work]
            )  # fmt: skip
            with contextlib.suppress(InvalidRequest, NotFound, Conflict):  # another thread was faster
                act()

    def tune(self) -> int:
        rows = self.services.store.find("tunes")
        return self.random.choice(rows)["id"] if rows else 1

    def any_prompt(self) -> int:
        rows = self.services.store.find("prompts")
        return self.random.choice(rows)["id"] if rows else 1

    def create(self) -> None:
        title = self.random.choice(["one", "two", "three"])
        data: dict[str, Any] = {"title": title, "name": "dog", "branch": "fast", "steps": 1}
        if self.random.random() < 0.5:
            data |= {"callback": CALLBACK, "prompts_callback": CALLBACK}
        if self.random.random() < 0.5:
            data["prompts_attributes"] = [{"text": "ohwx dog", "callback": CALLBACK}]
        tunes.create_tune(self.services, data, [self.random.choice(self.photos)])

    def prompt(self) -> None:
        tune = self.tune()
        place, text = self.random.choice(
            [(tune, "ohwx dog"), (self.base, f"<lora:{tune}:1> dog"), (self.base, "a dog")]
        )
        prompts.create_prompt(self.services, place, {"text": text, "callback": CALLBACK})

    def copy(self) -> None:
        prompts.duplicate_prompt(self.services, self.any_prompt(), {})

    def cancel(self) -> None:
        tunes.cancel_tune(self.services, self.tune())

    def resume(self) -> None:
        tunes.resume_tune(self.services, self.tune())

    def delete(self) -> None:
        if self.random.random() < 0.5:  # or there would soon be none
            tunes.delete_tune(self.services, self.tune())

    def delete_prompt(self) -> None:
        prompts.delete_prompt(self.services, self.any_prompt())

    def export(self) -> None:
        models.model_link(self.services, self.tune(), "kohya")

    def send_again(self) -> None:
        tunes.send_callbacks_again(self.services, self.tune())

    def rename(self) -> None:
        tunes.change_tune(self.services, self.tune(), {"title": self.random.choice(["one", "four"])})

    def pack(self) -> None:
        pack_verbs.save_pack(self.services, self.tune(), "saved")

    def work(self) -> None:
        """What the worker does with a job, without the work. A claimed job that is stopped ends as canceled."""
        store = self.services.store
        with store.transaction():  # one worker
            job = store.claim()
            if job is None:
                return
            wanted = store.cancel_wanted(*job.target)
            status = {"tunes": "trained", "prompts": "rendered", "exports": "exported"}[job.target[0]]
            failed = self.random.random() < 0.3
            store.finish(job, "canceled" if wanted else "failed" if failed else status)


def check(services: Services) -> None:
    """What must be true whenever nobody is in the middle of a verb."""
    store = services.store
    with store.transaction() as db:
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        jobs = [dict(row) for row in db.execute("SELECT tune_id, prompt_id, export_id FROM jobs")]
    kinds = {"tunes": [], "prompts": [], "exports": []}  # type: dict[str, list[int]]
    for job in jobs:
        kind = "exports" if job["export_id"] else "prompts" if job["prompt_id"] else "tunes"
        kinds[kind].append(job[{"exports": "export_id", "prompts": "prompt_id", "tunes": "tune_id"}[kind]])
    for table in RUNNING:
        open_rows = [row["id"] for row in store.find(table) if row["status"] in OPEN[table]]
        assert sorted(kinds[table]) == sorted(open_rows), f"{table}: one job for each row that is not at its end"
    folders = sorted(int(path.name) for path in (services.settings.outputs / "tunes").iterdir())
    rows = sorted(row["id"] for row in store.find("tunes"))
    assert folders == rows, "a folder for each row"
    for row in store.find("tunes"):
        called = [one["kind"] for one in store.callbacks(row["id"])]
        ended = row["status"] in ("trained", "failed", "canceled")
        assert not (row["callback"] and ended and "tune" not in called), f"tune {row['id']} ended without a word"
        assert not (row["callback"] is None and "tune" in called)
    for prompt in store.find("prompts"):
        assert prompt["tune_id"] in rows or prompt["base_id"], f"prompt {prompt['id']} is lost"


@pytest.mark.filterwarnings("error")
def test_random_verbs_from_eight_threads_leave_a_whole_studio(services: Services, tmp_path: Path) -> None:
    seed = os.environ.get("TUNEBOOTH_TEST_SEED") or str(random.SystemRandom().randrange(10**6))
    print(f"TUNEBOOTH_TEST_SEED={seed}")
    photos = [upload(tmp_path / "photos", f"{colour}.png", photo(colour)) for colour in ("red", "teal", "gold")]
    base = next(int(str(row["id"])) for row in models.list_base_tunes(services, "fast"))
    tunes.create_tune(services, {"title": "first", "name": "dog", "branch": "fast"}, photos)
    for round_ in range(ROUNDS):
        actors = [Actor(services, f"{seed}/{round_}/{number}", photos, base) for number in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(actor.run) for actor in actors]:
                done.result()
        check(services)
