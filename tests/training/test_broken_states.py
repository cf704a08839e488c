"""A state whose manifest or folder is broken is not resumed from; the one before it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.helpers.faults import CONTENTS, INSTEAD, as_json, instead_of, remove, spoiled
from tests.helpers.training import config_of
from trainer.training import states


def test_the_newest_state_that_is_whole_is_resumed_from(tmp_path: Path) -> None:
    settings = config_of(steps=9)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([weight])
    for step in (3, 6):
        states.save(tmp_path, step, optimizer, {"w": weight}, settings)
    (tmp_path / os.fsdecode(b"step-00000\xff")).mkdir()
    (tmp_path / "step-newest").mkdir()
    (tmp_path / "step-notes!").write_bytes(b"")

    def resumed_at() -> int | None:
        found, _ = states.newest(tmp_path, optimizer, {"w": weight}, settings, states.UNKNOWN)
        return found and found[1].step

    assert resumed_at() == 6
    file, problems = tmp_path / "step-000006/manifest.json", []
    good = file.read_bytes()
    contents = [(fault, spoil(good)) for fault, spoil in CONTENTS.items()]
    facts = json.loads(good)
    del facts["torch"], facts["inputs"]  # only told
    for name, value in spoiled(facts):
        if not name.startswith(("halvings", "no halvings", "config.", "no config.")) and "=True" not in name:
            contents.append((name, as_json(value)))
    for fault, content in contents:
        file.write_bytes(content)
        if resumed_at() != 3:
            problems.append(fault)
    for fault in INSTEAD:
        instead_of(file, fault)
        assert resumed_at() == 3
        remove(file)
    assert problems == []
    file.write_bytes(good)
    assert resumed_at() == 6
    weights = file.with_name("state.safetensors")
    for fault in INSTEAD:
        instead_of(weights, fault)
        assert resumed_at() == 3


@pytest.mark.parametrize("place", ["file", "nothing"])
def test_where_no_folder_of_states_is_there_is_none(tmp_path: Path, place: str) -> None:
    if place == "file":
        (tmp_path / "state").write_bytes(b"")
    optimizer = torch.optim.AdamW([torch.ones(1)])
    found = states.newest(tmp_path / "state", optimizer, {}, config_of(steps=3), states.UNKNOWN)
    assert found == (None, {})
