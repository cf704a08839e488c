"""A soak of the running app: every tune and prompt is accounted for, whatever is killed, canceled or deleted when.

The seed is printed; `TUNEBOOTH_SOAK_SEED` takes one again.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.helpers.quick import cheap_previews
from tests.helpers.receiver import ReceiverServer, receiving
from tests.helpers.soak import Size, Soak, plan
from tests.helpers.studio import same
from trainer.files import PARTIAL

SHORT = Size(tune=2, prompt=3, kill=1, cancel=1, resume=1, delete=1, delete_prompt=1)
THIRD = Size(tune=20, prompt=34, kill=3, cancel=8, resume=4, delete=6, delete_prompt=4)
FULL = Size(tune=60, prompt=100, kill=6, cancel=24, resume=10, delete=18, delete_prompt=12)
LONG = FULL if os.environ.get("TUNEBOOTH_SOAK") == "full" else THIRD  # the full one takes six minutes
AT_HOME = {"tunebooth.db", ".lock", ".link-secret", "tunes", "incoming", "cache", "stderr.txt"}  # in outputs


@pytest.mark.parametrize("size", [SHORT, pytest.param(LONG, marks=pytest.mark.long)], ids=["short", "long"])
def test_every_tune_is_accounted_for(size: Size, tmp_path: Path, photos: list[Path]) -> None:
    seed = int(os.environ.get("TUNEBOOTH_SOAK_SEED") or random.randrange(1_000_000))  # no secret
    print(f"TUNEBOOTH_SOAK_SEED={seed}")
    planned = plan(seed, size)
    (outputs := tmp_path / "outputs").mkdir()
    with receiving() as receiver:
        folders = ["--models", str(tmp_path / "models"), "--presets", str(cheap_previews(tmp_path))]
        soak = Soak(outputs, folders, receiver, photos)
        try:
            for act in planned.acts:
                soak.do(act)
            soak.finish()
            tunes, prompts = soak.rows("/tunes"), soak.rows("/prompts")
            soak.app.stop()
        finally:
            soak.app.kill()
    print(dict(soak.statuses), f"{soak.kills} kills")
    assert soak.kills == size.kill
    assert sorted(row["id"] for row in tunes) == sorted(soak.ids["tune"][number] for number in planned.tunes)
    kept = {soak.ids["prompt"][number] for number in planned.prompts} - {0}
    assert {row["id"] for row in prompts} == kept
    check_ends(soak, tunes, prompts)
    check_files(outputs, tunes, prompts)
    check_database(outputs, tunes, prompts)
    check_callbacks(outputs, receiver, tunes, prompts, planned.tunes)


def check_ends(soak: Soak, tunes: list[dict[str, Any]], prompts: list[dict[str, Any]]) -> None:
    """A tune is trained, unless it was canceled; a prompt is rendered, unless its tune was not trained."""
    for row in tunes:
        allowed = {"trained", "canceled"} if row["id"] in soak.canceled else {"trained"}
        assert row["status"] in allowed and row["error"] is None, row
        assert bool(row["ckpt_url"]) == (row["status"] == "trained"), row
    ends = {row["id"]: row["status"] for row in tunes}
    for row in prompts:
        expected = {"trained": "rendered", "canceled": "canceled"}[ends[row["tune_id"]]]
        assert row["status"] == expected, (row, ends[row["tune_id"]])
        assert len(row["images"]) == (1 if expected == "rendered" else 0), row


def check_files(outputs: Path, tunes: list[dict[str, Any]], prompts: list[dict[str, Any]]) -> None:
    """Folders and rows belong to each other; models and pictures are whole, and no leftovers lie about."""
    assert {path.name for path in outputs.iterdir()} <= AT_HOME
    assert not [path for path in outputs.rglob("*") if PARTIAL in path.name or path.suffix in (".part", ".partial")]
    assert [path for path in (outputs / "incoming").rglob("*") if path.is_file()] == []
    assert names(outputs / "tunes") == {str(row["id"]) for row in tunes}
    models = []
    for row in tunes:
        folder = outputs / "tunes" / str(row["id"])
        own = {str(one["id"]): one["status"] for one in prompts if one["tune_id"] == row["id"]}
        rendered = {name for name, status in own.items() if status == "rendered"}
        assert names(folder / "prompts") == rendered
        assert names(folder / "inputs") <= own.keys()
        assert {Path(name).stem for name in names(folder / "previews")} <= own.keys()
        for name in rendered:
            with Image.open(folder / "prompts" / name / "0.png") as picture:
                picture.load()
        assert (folder / "model").exists() == (row["status"] == "trained")
        if row["status"] == "trained":
            models.append(load_file(folder / "model" / "lora.safetensors"))
    # They had the same photos and the same seed: what was cut off and taken up again has the weights of the others.
    assert models and all(same(models[0], model) for model in models[1:])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def check_database(outputs: Path, tunes: list[dict[str, Any]], prompts: list[dict[str, Any]]) -> None:
    """Nothing waits, and every row has what it belongs to."""
    with closing(sqlite3.connect(outputs / "tunebooth.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        for table, expected in {"tunes": len(tunes), "prompts": len(prompts), "jobs": 0, "deletions": 0}.items():
            assert db.execute(f"SELECT COUNT(*) FROM {table}").fetchone() == (expected,), table
        assert db.execute("SELECT COUNT(*) FROM tunes WHERE cancel").fetchone() == (0,)


def check_callbacks(
    outputs: Path,
    receiver: ReceiverServer,
    tunes: list[dict[str, Any]],
    prompts: list[dict[str, Any]],
    numbers: list[int],
) -> None:
    """Each callback that the database knows has arrived; each end was told, the last one last."""
    arrived: dict[str, set[str]] = {}
    told: dict[str, list[str]] = {}
    for path, headers, body in receiver.taken:
        kind, content = next(iter(json.loads(body).items()))
        arrived.setdefault(headers["webhook-id"], set()).add(path)
        told.setdefault(f"{kind} {content['id']}", []).append(content["status"])
    assert all(len(paths) == 1 for paths in arrived.values())
    with closing(sqlite3.connect(outputs / "tunebooth.db")) as db:
        rows = db.execute("SELECT id, arrived_at FROM callbacks").fetchall()
    assert rows and all(arrived_at for _, arrived_at in rows)
    assert {f"tunebooth-{number}" for number, _ in rows} <= arrived.keys()
    for kind, ended in (("tune", tunes), ("prompt", prompts)):
        for row in ended:
            assert row["status"] in told[f"{kind} {row['id']}"], row
