"""Configuration is read once: counts of parsed TOMLs and of scans of the models folder, seen by spies."""

from __future__ import annotations

import json
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.helpers.web import photo
from trainer.config import toml_file
from trainer.library import bases, models_folder
from trainer.studio import tunes
from trainer.studio.rows import Services

pytest_plugins = ("tests.helpers.web",)

GOOD = {"tune[title]": "rex", "tune[name]": "dog"}


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, services: Services, tmp_path: Path) -> Iterator[Counter[str]]:
    """How often each TOML has been parsed since the cache was empty."""
    counts: Counter[str] = Counter()
    loads = toml_file.tomllib.loads
    texts = {file.read_text("utf-8"): file.name for file in services.settings.presets.rglob("*.toml")}

    def spy(text: str) -> dict[str, object]:
        counts[texts[text]] += 1
        return loads(text)

    monkeypatch.setattr(toml_file.tomllib, "loads", spy)
    monkeypatch.setattr(toml_file, "_parsed", {})
    yield counts


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch, services: Services) -> list[bool]:
    """One entry for each scan of the models folder: whether it was within a transaction."""
    found: list[bool] = []
    scan = models_folder.scan

    def spy(settings: object) -> list[models_folder.FoundModel]:
        found.append(services.store._db.in_transaction)
        return scan(settings)

    monkeypatch.setattr(bases, "scan", spy)
    return found


def post(client: TestClient, **fields: str) -> None:
    answer = client.post("/tunes", data=GOOD | fields, files=[("tune[images][]", ("0.png", photo()))])
    assert answer.status_code == 201, answer.text


@pytest.mark.parametrize("fields", [{"tune[branch]": "fast"}, {"tune[branch]": "sd15", "tune[base_tune_id]": "690204"}])
def test_a_request_parses_each_toml_once_and_the_next_one_none(
    client: TestClient, parsed: Counter[str], fields: dict[str, str]
) -> None:
    post(client, **fields)
    assert parsed and set(parsed.values()) == {1}
    before = parsed.total()
    post(client, **(fields | {"tune[title]": "another"}))
    assert parsed.total() == before


def test_a_toml_that_has_changed_is_parsed_again(tmp_path: Path) -> None:
    file = tmp_path / "preset.toml"
    file.write_text("rank = 4")
    content = toml_file.read_toml(file)
    content["rank"] = 5  # the caller's own copy
    assert toml_file.read_toml(file) == {"rank": 4}
    file.write_text("rank = 16")
    assert toml_file.read_toml(file) == {"rank": 16}


def test_a_request_scans_the_models_folder_once_and_within_no_transaction(
    client: TestClient, services: Services, scans: list[bool]
) -> None:
    fields = {"tune[branch]": "sd15", "tune[base_tune_id]": "690204", "tune[model_type]": "lora"}
    prompts = {f"tune[prompts_attributes][{number}][text]": "a dog" for number in range(3)}
    post(client, **fields, **prompts)
    assert scans == [False]


def test_three_loras_cost_one_scan(client: TestClient, services: Services, scans: list[bool]) -> None:
    text = "<lora:one:1> <lora:two:1> <lora:three:1> a dog"
    post(client, **{"tune[branch]": "fast"})
    scans.clear()
    answer = client.post("/tunes/1/prompts", json={"prompt": {"text": text}})
    assert answer.status_code == 422 and len(answer.json()["text"]) == 3  # none of them is there
    assert scans == [False]


@pytest.fixture
def loras(services: Services) -> str:
    """A text that names three LoRA files of the models folder."""
    key = "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"
    header = json.dumps({key: {"dtype": "F32", "shape": [0, 320], "data_offsets": [0, 0]}}).encode()
    for name in ("one", "two", "three"):
        file = services.settings.models / f"{name}.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header)
    return "<lora:one:1> <lora:two:1> <lora:three:1> a dog"


def test_three_loras_of_a_tune_s_prompts_are_resolved_before_the_transaction(
    client: TestClient, services: Services, scans: list[bool], loras: str
) -> None:
    post(client, **{"tune[branch]": "sd15", "tune[prompts_attributes][0][text]": loras})
    assert scans == [False]
    [prompt] = services.store.find("prompts", tune_id=1)
    assert [kind for kind, _, _ in prompt["named"] or []] == ["lora"] * 3


def test_a_lora_that_is_deleted_meanwhile_costs_no_scan_within_the_transaction(
    client: TestClient, services: Services, scans: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number is then looked up among the files of the models folder."""
    post(client, **{"tune[branch]": "fast", "tune[model_type]": "lora"})
    insert = tunes._insert

    def delete_first(*arguments: Any) -> object:
        services.store.delete("tunes", 1)
        return insert(*arguments)

    monkeypatch.setattr(tunes, "_insert", delete_first)
    fields = {"tune[title]": "on it", "tune[branch]": "fast", "tune[prompts_attributes][0][text]": "a dog <lora:1:1>"}
    answer = client.post("/tunes", data=GOOD | fields, files=[("tune[images][]", ("0.png", photo()))])
    assert answer.status_code == 422 and "no LoRA with this id" in answer.text
    assert scans == [False]


def test_all_prompts_of_a_pack_cost_one_scan(
    client: TestClient, services: Services, scans: list[bool], loras: str
) -> None:
    post(client, **{"tune[branch]": "sd15"})
    rows = "".join(f'[[prompts]]\ntext = "{loras} {number}"\n' for number in range(3))
    (services.settings.outputs / "packs").mkdir()
    head = 'title = "mine"\nbranch = "sd15"\nclasses = ["dog"]\n'
    (services.settings.outputs / "packs" / "mine.toml").write_text(head + rows)
    scans.clear()
    answer = client.post("/p/mine/tunes", json={"tune": {"tune_ids": [1]}})
    assert answer.status_code == 201 and len(answer.json()["prompts"]) == 3, answer.text
    assert scans == [False]


def test_the_header_of_a_model_is_read_once_for_each_version(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    header = models_folder.read_header

    def spy(file: Path) -> dict[str, object]:
        read.append(file)
        return header(file)

    monkeypatch.setattr(models_folder, "read_header", spy)
    file = services.settings.models / "mine.safetensors"
    services.settings.models.mkdir(exist_ok=True)
    file.write_bytes(b"not a model")
    for _ in range(3):
        [found] = models_folder.scan(services.settings)
    assert found.error and read == [file]
    file.write_bytes(b"another thing that is no model")
    models_folder.scan(services.settings)
    assert read == [file, file]
    shutil.rmtree(services.settings.models)
    assert models_folder.scan(services.settings) == []
