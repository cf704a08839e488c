"""The queue and its rows: order, endings, crashes, and one process at a time."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.web import left_behind, photo, upload
from trainer.config import resolve, train_config
from trainer.config.train_config import TrainConfig
from trainer.contract.prompts import prompt_of
from trainer.settings import Settings
from trainer.studio import rows, tunes
from trainer.studio.migrations import MIGRATIONS
from trainer.studio.rows import Services
from trainer.studio.store import InUse, Job, Store

pytest_plugins = ("tests.helpers.web",)

TUNE: dict[str, Any] = {
    "title": "Rex", "name": "dog", "branch": "fast", "method": "lora", "base_id": 1, "training_face_correct": False,
    "auto_extend": False, "characteristics": {}, "photos": [], "warnings": [],
}  # fmt: skip
PROMPT: dict[str, Any] = {"text": "ohwx dog", "num_images": 1, "warnings": []}


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    opened = Store(settings.outputs)
    yield opened
    opened.close()


def add(store: Store, prompts: int = 0, **values: Any) -> int:
    """A queued tune with so many prompts."""
    with store.transaction():
        tune_id = store.add_tune(TUNE | values)
        for _ in range(prompts):
            store.add_prompt(PROMPT | {"tune_id": tune_id})
    return tune_id


def work(store: Store, status: str = "trained") -> list[tuple[int, int | None]]:
    """Do all jobs at once, every tune ending with this status; returns them as (tune, prompt) in their order."""
    done = []
    while job := store.claim():
        store.finish(job, status if job.prompt_id is None else "rendered")
        done.append((job.tune_id, job.prompt_id))
    return done


def statuses(store: Store, tune_id: int) -> list[str]:
    """The tune's status, then its prompts'."""
    prompts = store.find("prompts", tune_id=tune_id, oldest_first=True)
    return [status(store, tune_id), *(prompt["status"] for prompt in prompts)]


def status(store: Store, tune_id: int) -> str:
    row = store.get("tunes", tune_id)
    assert row is not None
    return str(row["status"])


def claimed(store: Store) -> Job:
    job = store.claim()
    assert job is not None
    return job


def reopened(store: Store, settings: Settings) -> Store:
    """The store as the next process finds it."""
    store.close()
    after = Store(settings.outputs)
    after.recover()
    return after


def test_the_oldest_tune_comes_first_and_its_prompts_before_the_next_tune(store: Store) -> None:
    assert (add(store, prompts=2), add(store), add(store, prompts=1)) == (1, 2, 3)
    assert work(store) == [(1, None), (1, 1), (1, 2), (2, None), (3, None), (3, 3)]
    assert store.claim() is None


def test_a_prompt_that_comes_later_waits_behind_what_is_queued(store: Store) -> None:
    add(store)
    add(store)
    store.add_prompt(PROMPT | {"tune_id": 1})
    assert work(store) == [(1, None), (2, None), (1, 1)]


def test_claiming_marks_the_row_as_running_and_keeps_the_first_start(store: Store, settings: Settings) -> None:
    tune_id = add(store, prompts=1)
    claimed(store)
    assert statuses(store, tune_id) == ["training", "queued"]
    first = store.find("tunes")[0]["started_training_at"]
    after = reopened(store, settings)
    store.finish(claimed(after), "trained")
    assert after.find("tunes")[0]["started_training_at"] == first
    claimed(after)
    assert statuses(after, tune_id) == ["trained", "rendering"]
    after.close()


def test_a_finished_job_and_its_row_change_together(store: Store) -> None:
    add(store)
    job = claimed(store)
    with pytest.raises(sqlite3.OperationalError, match="no_such_column"):
        store.finish(job, "trained", no_such_column=1)
    assert (status(store, 1), store.queue_length()) == ("training", 1)
    with pytest.raises(KeyboardInterrupt), store.transaction():
        store.finish(job, "trained")
        raise KeyboardInterrupt
    assert (status(store, 1), store.queue_length()) == ("training", 1)
    store.finish(job, "trained", files=["lora.safetensors"])
    assert (status(store, 1), store.queue_length()) == ("trained", 0)


@pytest.mark.parametrize("ending", ["failed", "canceled"])
def test_the_prompts_of_a_tune_that_is_not_trained_end_with_it(store: Store, ending: str) -> None:
    add(store, prompts=2)
    add(store, prompts=1)
    assert work(store, ending) == [(1, None), (2, None)]
    assert statuses(store, 1) == [ending] * 3
    assert all(str(prompt["error"]).startswith("the tune was not trained: ") for prompt in store.find("prompts"))


def test_a_waiting_tune_is_taken_off_the_queue_and_a_running_one_is_not(store: Store) -> None:
    add(store, prompts=1)
    add(store, prompts=1)
    claimed(store)
    assert not store.take_off_queue(1)
    assert store.take_off_queue(2)
    assert (statuses(store, 1), statuses(store, 2)) == (["training", "queued"], ["canceled", "canceled"])
    assert work(store) == [(1, None), (1, 1)]


def test_a_tune_that_is_queued_again_goes_to_the_end_with_its_prompts(store: Store) -> None:
    add(store, prompts=2)
    store.finish(claimed(store), "failed", error="the cat sat on the card")
    add(store)
    store.requeue_tune(1)
    assert statuses(store, 1) == ["queued"] * 3
    assert [row["error"] for table in ("tunes", "prompts") for row in store.find(table)] == [None] * 4
    assert work(store) == [(2, None), (1, None), (1, 1), (1, 2)]


def test_what_a_crash_left_behind_is_the_oldest_job_again(store: Store, settings: Settings) -> None:
    add(store)
    add(store, prompts=1)
    add(store)
    store.finish(claimed(store), "trained")
    assert claimed(store).tune_id == 2
    after = reopened(store, settings)
    assert [status(after, tune_id) for tune_id in (1, 2, 3)] == ["trained", "queued", "queued"]
    assert work(after) == [(2, None), (2, 1), (3, None)]
    after.close()


def test_a_job_counts_the_crashes_since_its_last_headway(store: Store) -> None:
    add(store)
    assert [claimed(store).attempts for _ in range(3)] == [0, 1, 2]
    store.made_headway(Job(1, 1, None, 2))
    assert [claimed(store).attempts for _ in range(2)] == [1, 2]


def test_a_job_that_was_put_back_has_not_crashed(store: Store) -> None:
    add(store, prompts=1)
    for _ in range(5):
        job = claimed(store)
        assert (job.attempts, status(store, 1)) == (0, "training")
        store.put_back(job)
        assert statuses(store, 1) == ["queued", "queued"]
    store.finish(claimed(store), "trained")
    store.put_back(claimed(store))
    assert statuses(store, 1) == ["trained", "queued"]


def test_a_request_to_cancel_is_seen_and_so_is_a_deleted_row(store: Store) -> None:
    add(store)
    assert not store.cancel_wanted("tunes", 1)
    store.update("tunes", 1, cancel=1)
    assert store.cancel_wanted("tunes", 1)
    store.delete("tunes", 1)
    assert store.cancel_wanted("tunes", 1)


def test_a_deleted_tune_takes_its_prompts_and_jobs_with_it(store: Store) -> None:
    add(store, prompts=1)
    add(store, prompts=3)
    store.delete("tunes", 2)
    assert [row["tune_id"] for row in store.find("prompts")] == [1]
    assert work(store) == [(1, None), (1, 1)]
    assert add(store) == 3  # a number is never given twice: an old link must not lead to another's pictures


def test_json_columns_come_back_as_they_were(store: Store) -> None:
    values = {
        "characteristics": {"eye_color": "blue ‘eyes’", "{{x}}": "'; DROP TABLE tunes; --"},
        "photos": [{"name": "ä\u2028.png", "file": "000.png", "width": 8, "height": 6, "format": "PNG", "notes": []}],
        "warnings": ["one", "\U0001f415"],
    }
    tune_id = add(store, **values)
    store.update("tunes", tune_id, progress={"step": 3, "loss": 0.1}, files=["a", "b"])
    row = store.get("tunes", tune_id)
    assert row is not None
    assert {name: row[name] for name in values} == values
    assert (row["progress"], row["files"]) == ({"step": 3, "loss": 0.1}, ["a", "b"])


def test_rows_are_found_newest_first_in_pages(store: Store) -> None:
    for number in range(5):
        add(store, title=f"tune {number % 2}")
    assert [row["id"] for row in store.find("tunes")] == [5, 4, 3, 2, 1]
    assert [row["id"] for row in store.find("tunes", limit=2, offset=1)] == [4, 3]
    assert [row["id"] for row in store.find("tunes", before_id=3)] == [2, 1]
    assert [row["id"] for row in store.find("tunes", title="tune 0", oldest_first=True)] == [1, 3, 5]
    assert [row["id"] for row in store.find("tunes", title="tune 0", branch=None, before_id=5, limit=1)] == [3]


def test_a_second_process_is_refused(store: Store, settings: Settings) -> None:
    script = "import sys, pathlib, trainer.studio.store as s; s.Store(pathlib.Path(sys.argv[1])).close(); print('open')"
    command = [sys.executable, "-c", script, str(settings.outputs)]
    root = Path(__file__).parents[2]
    refused = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert refused.returncode and "InUse" in refused.stderr and "is in use by process" in refused.stderr
    with pytest.raises(InUse):
        Store(settings.outputs)  # nor a second time in this process
    store.close()
    assert subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout == "open\n"


def test_sixteen_requests_with_one_title_make_one_tune(services: Services, tmp_path: Path) -> None:
    request = {"title": "Rex", "name": "dog", "branch": "fast", "prompts_attributes": [{"text": "ohwx dog"}]}
    photos = [upload(tmp_path / "photos", "rex.png", photo())]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: tunes.create_tune(services, request, photos), range(16)))
    assert {tune.id for tune, _ in answers} == {1}
    assert sorted(created for _, created in answers) == [False] * 15 + [True]
    assert left_behind(services) == ["tunes 1", "prompts 1", str(rows.tune_folder(services, 1)), "a job", "a job"]


def test_a_transaction_that_cannot_be_committed_is_undone(store: Store) -> None:
    with pytest.raises(sqlite3.IntegrityError), store.transaction() as db:
        db.execute("PRAGMA defer_foreign_keys=ON")  # so that only the commit fails, as it does on a full disk
        db.execute("INSERT INTO jobs (tune_id) VALUES (99)")
    assert store.claim() is None
    add(store)
    with ThreadPoolExecutor(1) as elsewhere:  # another connection sees what was really committed
        assert elsewhere.submit(store.find, "tunes").result()


def test_a_store_of_a_newer_version_is_refused(store: Store, settings: Settings) -> None:
    add(store)
    store.close()
    with sqlite3.connect(settings.outputs / "tunebooth.db") as db:
        db.execute(f"PRAGMA user_version={len(MIGRATIONS) + 1}")
    with pytest.raises(RuntimeError, match="made by a newer version of Tunebooth"):
        Store(settings.outputs)
    with sqlite3.connect(settings.outputs / "tunebooth.db") as db:
        db.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
    after = Store(settings.outputs)
    assert status(after, 1) == "queued"
    after.close()


@pytest.mark.parametrize("damage", ["overwritten", "a page of it", "cut"])
def test_a_damaged_file_is_refused_in_words(store: Store, settings: Settings, damage: str) -> None:
    with store.transaction():
        for _ in range(200):
            add(store, warnings=["x" * 500])
    store.close()
    file = settings.outputs / "tunebooth.db"
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = file.read_bytes()
    half = len(whole) // 2
    spoilt = {
        "overwritten": b"these are no tunes" * 1000,
        "a page of it": whole[:half] + b"\xff" * 4096 + whole[half + 4096 :],
        "cut": whole[:half],
    }
    file.write_bytes(spoilt[damage])
    with pytest.raises(RuntimeError, match=r"(?s)tunebooth\.db is damaged \(.+\); restore a copy, or move it away"):
        Store(settings.outputs)
    assert file.read_bytes() == spoilt[damage]  # it is the user's to mend
    file.write_bytes(whole)
    after = Store(settings.outputs)
    assert after.queue_length() == 200
    after.close()


def test_a_store_of_an_older_version_is_brought_up_and_its_tunes_can_still_be_trained(settings: Settings) -> None:
    """As version 2 left it: a LoRA that waits, with all the words that there were then."""
    config = resolve.resolve(
        settings.presets, branch="fast", model_type="lora", preset=None, name="dog", photos=4, steps=None, args=None
    )
    new = {"optimizer", "trained_dtype", "on_top", "tokens", "token_lr", "token_share"}
    args = " ".join(word for word in train_config.as_args(config).split() if word.partition("=")[0] not in new)
    with sqlite3.connect(settings.outputs / "tunebooth.db") as db:
        for number, script in enumerate(MIGRATIONS[:2], 1):
            db.executescript(f"BEGIN; {script} PRAGMA user_version={number}; COMMIT;")
        row = TUNE | {"args": args, "status": "queued", "created_at": "", "updated_at": ""}
        row = {key: json.dumps(value) if isinstance(value, dict | list) else value for key, value in row.items()}
        db.execute(f"INSERT INTO tunes ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", list(row.values()))
        db.execute("INSERT INTO jobs (tune_id) VALUES (1)")
    store = Store(settings.outputs)
    assert claimed(store).target == ("tunes", 1)
    tune = store.get("tunes", 1)
    assert tune is not None and TrainConfig(**train_config.parse_args(tune["args"])) == config
    store.add_export(1, "checkpoint")
    store.finish(Job(1, 1, None, 1), "trained", files=["lora.safetensors"])
    assert claimed(store).target == ("exports", 1)
    store.close()


def test_a_prompt_of_an_older_version_waits_without_its_parsed_text(settings: Settings) -> None:
    """As version 4 left it, before parsed texts were kept; the text is parsed when the prompt is used."""
    with sqlite3.connect(settings.outputs / "tunebooth.db") as db:
        for number, script in enumerate(MIGRATIONS[:4], 1):
            db.executescript(f"BEGIN; {script} PRAGMA user_version={number}; COMMIT;")
        moments = {"created_at": "", "updated_at": "", "status": "queued"}
        prompt = {"tune_id": 1, "text": "<lora:1:0.5> a dog --mask_blur 3", "num_images": 1, "warnings": []}
        for table, values in (("tunes", TUNE | moments), ("prompts", prompt | moments)):
            row = {key: json.dumps(value) if isinstance(value, dict | list) else value for key, value in values.items()}
            marks = ", ".join("?" * len(row))
            db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", list(row.values()))
        db.execute("INSERT INTO jobs (tune_id, prompt_id) VALUES (1, 1)")
    store = Store(settings.outputs)
    assert claimed(store).target == ("prompts", 1)
    waiting = store.get("prompts", 1)
    assert waiting is not None and waiting["parsed"] is None
    parsed = prompt_of(waiting).parsed
    assert (parsed.text, parsed.models, parsed.flags.mask_blur) == ("a dog", (("lora", "1", 0.5),), 3.0)
    store.close()
