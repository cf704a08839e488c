"""docs/api.md says what is there: its calls and parameters are those of the API, and its programs run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.app import ROOT, App, running
from tests.helpers.quick import fewer_steps
from tests.helpers.web import client_of
from trainer.contract.prompts import PromptRequest
from trainer.contract.tunes import TuneRequest
from trainer.studio.rows import Services

pytest_plugins = ("tests.helpers.web",)

PAGE = (ROOT / "docs" / "api.md").read_text("utf-8")
PROGRAMS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
URL = "http://localhost:7860"


def table(heading: str) -> list[str]:
    """The first column of a table: what stands in backticks there."""
    section = PAGE[PAGE.index(heading) :]
    rows = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert rows is not None
    return re.findall(r"^\| `([^`]+)`", rows[0], re.MULTILINE)


def test_every_call_is_documented(services: Services) -> None:
    paths = client_of(services).get("/openapi.json").json()["paths"]
    assert sorted(table("## Calls")) == sorted(
        f"{method.upper()} {path}" for path, methods in paths.items() for method in methods
    )


def test_every_parameter_is_documented() -> None:
    assert table("Of a tune;") == TuneRequest.parameters()
    assert table("Of a prompt;") == PromptRequest.parameters()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    folder = tmp_path_factory.mktemp("docs")
    (outputs := folder / "outputs").mkdir()
    options = ["--presets", str(fewer_steps(folder)), "--models", str(folder / "models")]
    with running(outputs, *options) as app:
        yield app.ready()


@pytest.mark.long
@pytest.mark.parametrize("number", [pytest.param(n, id=f"{n} {kind}") for n, (kind, _) in enumerate(PROGRAMS)])
def test_a_program_runs(number: int, app: App, dog_photos: Callable[[int], list[Path]], tmp_path: Path) -> None:
    kind, program = PROGRAMS[number]
    for place, photo in enumerate(dog_photos(4), 1):
        shutil.copy(photo, tmp_path / f"{place}.jpg")
    assert URL in program
    file = tmp_path / {"sh": "a.sh", "python": "a.py", "js": "a.mjs", "mjs": "b.mjs"}[kind]
    file.write_text(program.replace(URL, app.url))
    command = {"sh": ["bash"], "python": [sys.executable], "js": ["node"], "mjs": ["node", "--check"]}[kind]
    ended = subprocess.run([*command, file], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    if kind != "mjs":
        newest = app.finished(app.http.get("/tunes").json()[0]["id"])
        assert newest["status"] == "trained" and newest["title"] in program
        assert kind == "sh" or "trained" in ended.stdout or (tmp_path / "rex.png").stat().st_size > 1000


def test_the_programs_are_of_all_kinds() -> None:
    assert [kind for kind, _ in PROGRAMS] == ["sh", "python", "python", "js", "mjs"]
