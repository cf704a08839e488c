"""The queue of prompts over a SIGKILL: all are rendered, in their order, and none twice but the one cut off."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.app import App, post, running, wait_for
from trainer.files import PARTIAL
from trainer.rendering.pictures import read_facts

COUNT = 100
LONG_STEPS = 50  # of sampling: some seconds, so that the kill comes in the middle of it
# Each time that the worker takes a prompt up, and each time that one ends, in the very transaction that says so.
WITNESS = """
    CREATE TABLE witness (id INTEGER PRIMARY KEY, prompt_id INTEGER, event TEXT);
    CREATE TRIGGER begun AFTER UPDATE OF attempts ON jobs
    WHEN NEW.prompt_id IS NOT NULL AND NEW.attempts > OLD.attempts
    BEGIN INSERT INTO witness (prompt_id, event) VALUES (NEW.prompt_id, 'begun'); END;
    CREATE TRIGGER ended AFTER UPDATE OF status ON prompts
    WHEN NEW.status NOT IN ('queued', 'rendering')
    BEGIN INSERT INTO witness (prompt_id, event) VALUES (NEW.id, NEW.status); END;
"""


@contextmanager
def database(outputs: Path) -> Iterator[sqlite3.Connection]:
    """The app's own, opened beside it for a moment."""
    with closing(sqlite3.connect(outputs / "tunebooth.db", timeout=30)) as db, db:
        yield db


def ask(app: App, number: int, steps: int = 1) -> dict[str, Any]:
    """Queue a prompt that no other is like; every fifth asks for two pictures."""
    asked = {"text": f"ohwx dog {number}", "seed": number, "steps": steps, "num_images": 1 + (number % 5 == 0)}
    answer = app.http.post("/tunes/1/prompts", json={"prompt": asked})
    prompt: dict[str, Any] = answer.raise_for_status().json()
    return asked | {"id": prompt["id"]}


def prompts(app: App) -> dict[int, dict[str, Any]]:
    """All prompts of the tune by their ids."""
    answer = app.http.get("/tunes/1/prompts", params={"limit": 120}).raise_for_status()
    return {prompt["id"]: prompt for prompt in answer.json()}


def written(outputs: Path) -> dict[str, int]:
    """Every file and folder of rendered prompts -> when it was written last, in ns."""
    folder = outputs / "tunes/1/prompts"
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}


def expected(asked: dict[str, Any]) -> set[str]:
    """The files and the folder of a rendered prompt."""
    names = [f"{n}.{kind}" for n in range(asked["num_images"]) for kind in ("png", "thumb.jpg")]
    names += ["sheet.jpg"] if asked["num_images"] > 1 else []
    return {str(asked["id"]), *(f"{asked['id']}/{name}" for name in names)}


@pytest.mark.long
def test_every_prompt_is_rendered_once_over_a_kill(tmp_path: Path, photos: list[Path]) -> None:
    middle = COUNT // 2
    with running(tmp_path) as app:
        app.ready()
        post(app, "queue", photos, steps=2).raise_for_status()
        with database(tmp_path) as db:
            db.executescript(WITNESS)
        asked = [ask(app, number, LONG_STEPS if number == middle else 1) for number in range(COUNT)]
        long = asked[middle]["id"]
        wait_for(lambda: app.http.get(f"/prompts/{long}").json()["progress"].get("stage") == "rendering")
        app.kill()
    before = written(tmp_path)
    done = set().union(*(expected(one) for one in asked[:middle]))
    assert {name for name in before if PARTIAL not in name} == done

    with running(tmp_path) as app:
        app.ready()
        wait_for(lambda: all(p["status"] not in ("queued", "rendering") for p in prompts(app).values()))
        ended = prompts(app)
    assert {prompt["status"] for prompt in ended.values()} == {"rendered"}
    assert [len(ended[one["id"]]["images"]) for one in asked] == [one["num_images"] for one in asked]

    with database(tmp_path) as db:
        assert db.execute("SELECT COUNT(*) FROM jobs").fetchone() == (0,)
        events = db.execute("SELECT prompt_id, event FROM witness ORDER BY id").fetchall()
    ids = [one["id"] for one in asked]
    begun = [prompt_id for prompt_id, event in events if event == "begun"]
    assert begun == [*ids[: middle + 1], *ids[middle:]]  # in their order; the one that was cut off once more
    assert Counter(events) - Counter((prompt_id, "begun") for prompt_id in begun) == Counter(
        (prompt_id, "rendered") for prompt_id in ids
    )

    after = written(tmp_path)
    assert set(after) == set().union(*(expected(one) for one in asked))  # nothing is left of what was cut off
    assert {name: after[name] for name in done} == {name: before[name] for name in done}
    for one in asked:
        for number in range(one["num_images"]):
            facts = read_facts(tmp_path / f"tunes/1/prompts/{one['id']}/{number}.png")
            assert (facts["prompt"], facts["seed"]) == (one["text"], one["seed"] + number)
