"""Configuration is read once: counts of parsed TOMLs and of scans of the models folder, seen by spies."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests.helpers.web import photo
from trainer.config import toml_file
from trainer.library import bases, models_folder
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


def test_the_header_of_a_model_is_read_once_for_each_version(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    header = models_folder.safetensors_header

    def spy(file: Path) -> dict[str, object]:
        read.append(file)
        return header(file)

    monkeypatch.setattr(models_folder, "safetensors_header", spy)
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
