"""The documents are true where a program can tell: paths, functions, links, tables; and they keep to plain words."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from trainer.config.train_config import TrainConfig
from trainer.contract.prompts import PromptRequest
from trainer.contract.tunes import TuneRequest
from trainer.names import BRANCHES, METHODS
from trainer.settings import Settings

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(document.relative_to(ROOT)) for document in DOCUMENTS]
TEXTS = dict(zip(NAMES, (document.read_text("utf-8") for document in DOCUMENTS), strict=True))
ARCHITECTURE = TEXTS["docs/architecture.md"]

README_WORDS = 900  # fewer than these
LINE = 120  # characters; README: fewer, tables too; elsewhere at most so many, tables left out

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FOLDERS = ("trainer", "tests", "presets", "docs", "benchmarks", ".ci")
KINDS = ("py", "toml", "md", "html", "css")  # what a file name without a folder ends in
PLACE = re.compile(r"\b(NAME|BRANCH)\b")  # stands for any name in a path
AT = re.compile(r"`([\w./-]+\.py)`: `([\w.]+)`")
ASKED = (
    "a photo's orientation applied", "the learning rate scheduled", "a webhook signed", "a new sampler",
    "a new LoRA format", "a new setting",
)  # fmt: skip

# Words that newcomers did not understand -> what we write instead. Code in backquotes may still have them.
OLD_WORDS = {
    r"nobody": "name what is not done",
    r"puts? aside|is aside": "paused, requeued",
    r"(can|cannot|could) be had": "is (not) available",
    r"st(and|ands|ood|anding) on": "is derived from; is the base of",
    r"in words": "leave it out",
    r"told|said|unsaid|untold|spoken": "answered, reported, a message, a warning",
    r"new words?": "learned tokens",
    r"look(s|ed|ing)? (at photos|for faces)": "face analysis, face detection",
    r"looker|postman|keeper|strangers?|bench": "face analysis, webhook sender, expiry thread, rate limiter, job runner",
    r"moment": "time; a checkpoint in mid-run",
    r"outlines?": "control image, preprocessor",
    r"dice|taken in|in turn": "random generator, fetched, epoch order",
    r"broke the decoder|the decoder broke": "the image decoder crashed on this file",
    r"redrawn|anew": "again",
    r"the verbs|doors?": "operations, interfaces",
}  # fmt: skip


def prose(text: str) -> str:
    """A document without code: fenced blocks, indented blocks, backquotes and the targets of links."""
    text = FENCE.sub("", re.sub(r"\A---\n.*?^---\n", "", text, flags=re.MULTILINE | re.DOTALL))
    text = re.sub(r"^ {4,}.*$", "", text, flags=re.MULTILINE)
    return LINK.sub("]", QUOTED.sub("``", text))


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    section = text[text.index(heading) :]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None, heading
    return [[cell.strip() for cell in row.strip("|\n").split(" | ")] for row in table[0].splitlines()[2:]]


def exists(path: str) -> bool:
    """Whether a path from the root is there; NAME and * stand for anything, but a folder must be one."""
    pattern = PLACE.sub("*", path)
    found = [*ROOT.glob(pattern.rstrip("/"))] if "*" in pattern else [ROOT / pattern]
    return any(one.is_dir() if path.endswith("/") else one.exists() for one in found)


def named_paths(text: str) -> list[str]:
    """Every path in backquotes, and every module that a command runs."""
    quoted = [one.split("#")[0] for one in QUOTED.findall(FENCE.sub("", text))]
    words = [word for one in quoted for word in one.split()]
    inside = [word for word in words if word.startswith(tuple(f"{folder}/" for folder in FOLDERS))]
    root = [word for word in words if re.fullmatch(rf"[\w.-]+\.({'|'.join(KINDS)})", word)]
    modules = re.findall(r"-m (benchmarks[\w.]*)", text) + [word for word in words if word.startswith("benchmarks.")]
    return [*inside, *root, *modules]


@pytest.mark.parametrize("name", NAMES)
def test_paths_exist(name: str) -> None:
    lacking = []
    for path in named_paths(TEXTS[name]):
        if path.startswith("benchmarks."):
            there = exists(f"{path.replace('.', '/')}.py") or exists(f"{path.replace('.', '/')}/__main__.py")
        else:
            there = exists(path)
        if not there:
            lacking.append(path)
    assert lacking == []


def test_the_check_of_paths_finds_what_is_not_there() -> None:
    text = "`trainer/no_such.py` `trainer/names.py` `gone.toml` `presets/*.toml` `trainer/studios/` -m benchmarks.gone"
    missing = [path for path in named_paths(text) if not exists(path)]
    assert missing == ["trainer/no_such.py", "trainer/studios/", "gone.toml", "benchmarks.gone"]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    broken = []
    for target in LINK.findall(FENCE.sub("", TEXTS[name])):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists() or (anchor and anchor not in anchors(file.read_text("utf-8"))):
            broken.append(target)
    assert broken == []


def anchors(text: str) -> set[str]:
    """The headings of a document, as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# docs/architecture.md


def definitions(file: Path) -> set[str]:
    """What a module defines at its top level, and `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {node.name} | {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
        elif isinstance(node, ast.Assign):
            names |= {one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


QUESTIONS = rows(ARCHITECTURE, "## Where is it?")


@pytest.mark.parametrize("question, answer", QUESTIONS, ids=[question for question, _ in QUESTIONS])
def test_a_question_is_answered_by_a_file_and_a_name(question: str, answer: str) -> None:
    places = AT.findall(answer)
    assert question.endswith("?") and places
    for file, name in places:
        assert name in definitions(ROOT / file), f"{file} has no {name}"


@pytest.mark.parametrize("what", ASKED)
def test_what_newcomers_ask_is_answered(what: str) -> None:
    assert any(what in question for question, _ in QUESTIONS)


def test_the_picture_of_the_rooms_is_the_import_order() -> None:
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text("utf-8"))
    order = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER"
    )
    picture = re.search(r"^```\n(.*?)^```", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    assert picture is not None
    lines = [set(re.split(r"\s{2,}", line)[0].split(", ")) for line in picture[1].splitlines()]
    assert lines == order[::-1]


# README


def test_the_readme_is_short() -> None:
    text = TEXTS["README.md"]
    assert len(text.split()) < README_WORDS
    assert [line for line in text.splitlines() if len(line) >= LINE] == []


@pytest.mark.parametrize("name", NAMES)
def test_lines_are_not_long(name: str) -> None:
    lines = FENCE.sub("", TEXTS[name]).splitlines()
    assert [line for line in lines if len(line) > LINE and not line.startswith("|")] == []


def test_the_programs_use_parameters_that_exist() -> None:
    known = {"tune": set(TuneRequest.parameters()), "prompt": set(PromptRequest.parameters())}
    sent = [found for text in TEXTS.values() for found in re.findall(r"-F '(tune|prompt)\[(\w+)\]", text)]
    assert len(sent) > 10
    assert [(root, name) for root, name in sent if name not in known[root]] == []
    program = re.search(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)
    assert program is not None
    call = next(
        node
        for node in ast.walk(ast.parse(program[1]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "client.predict"
    )
    assert {keyword.arg for keyword in call.keywords} - {"api_name"} <= known["tune"]


def test_every_document_is_named_in_the_readme() -> None:
    linked = {target.partition("#")[0] for target in LINK.findall(TEXTS["README.md"])}
    assert set(NAMES) - {"README.md"} <= linked


# Tables


def test_every_setting_is_in_its_table() -> None:
    table = [QUOTED.findall(row[0])[0] for row in rows(TEXTS["docs/settings.md"], "# Settings")]
    assert table == [f"--{name.replace('_', '-')}" for name in Settings.model_fields]


def test_defaults_of_settings_are_the_codes() -> None:
    for (option, told, _), field in zip(
        rows(TEXTS["docs/settings.md"], "# Settings"), Settings.model_fields.values(), strict=True
    ):
        if isinstance(field.default, bool) or field.default is None:
            expected = {True: "on", False: "off", None: "none"}[field.default]
        else:
            expected = f"{field.default:g}" if isinstance(field.default, float | int) else str(field.default)
        assert told.strip("`") == expected or option == "`--presets`", option


def test_every_word_of_args_is_in_its_table() -> None:
    table = [QUOTED.findall(row[0])[0] for row in rows(TEXTS["docs/presets.md"], "## The words of `args`")]
    assert table == list(TrainConfig.model_fields)


def test_the_memory_of_model_types_is_that_of_the_presets() -> None:
    text = TEXTS["docs/models.md"]
    section = text[text.index("Least free memory") :]
    head = next(line for line in section.splitlines() if line.startswith("|"))
    branches = QUOTED.findall(head)
    assert set(branches) == set(BRANCHES) - {"fast"}
    table = {QUOTED.findall(row[0])[0]: row[1:] for row in rows(section, "Least free memory")[: len(METHODS)]}
    assert set(table) == set(METHODS)
    for branch, column in zip(branches, zip(*table.values(), strict=True), strict=True):
        preset = tomllib.loads((ROOT / "presets" / f"{branch}.toml").read_text("utf-8"))
        for method, cell in zip(table, column, strict=True):
            if cell.isdecimal():
                assert preset[method]["least_gib"] == int(cell), (branch, method)
            elif cell.startswith("trains"):
                assert preset["instead"][method] == cell.split()[1].strip("`")
            else:
                assert method not in preset or "least_gib" not in preset[method], (branch, method)


def test_the_small_models_are_those_of_the_code() -> None:
    sources = [ROOT / "trainer" / "library" / "weights.py", *sorted((ROOT / "presets").glob("*.toml"))]
    code = "".join(file.read_text("utf-8") for file in sources)
    table = [QUOTED.findall(row[0])[0].rstrip("/") for row in rows(TEXTS["docs/photos.md"], "## The small models")]
    files = set(re.findall(r'"([\w.-]+\.(?:pth|onnx|bin))"', code))
    assert files | {"clipseg-rd64-refined"} == set(table)
    assert "clipseg-rd64-refined" in code


# Words


@pytest.mark.parametrize("name", NAMES)
def test_old_words_are_not_used(name: str) -> None:
    text = prose(TEXTS[name])
    found = {
        match[0]: instead
        for old, instead in OLD_WORDS.items()
        for match in re.finditer(rf"\b(?:{old})\b", text, re.IGNORECASE)
    }
    assert found == {}


def test_the_check_of_words_finds_them() -> None:
    assert "nobody" in prose("Nobody knows `nobody`.\n```\nnobody\n```\n").lower().split()[0]
    assert prose("`said`\n```\ntold\n```\n    spoken\n").split() == ["``"]


def test_the_glossary_has_one_sentence_for_each_word() -> None:
    lines = [line for line in TEXTS["docs/glossary.md"].splitlines() if re.match(r"\| (?!word|meaning|-)", line)]
    assert len(lines) > 50
    for line in lines:
        word, meaning = (cell.strip() for cell in line.strip("|").split(" | "))
        assert meaning.endswith(".") and ". " not in meaning, word
    words = [line.split(" | ")[0] for line in lines]
    assert len(words) == len(set(words))


def test_the_changelog_has_a_release() -> None:
    headings = re.findall(r"^## (.+)$", TEXTS["CHANGELOG.md"], re.MULTILINE)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert headings[0] == "Unreleased"
    assert any(heading.startswith(f"{version} - ") for heading in headings)


def test_each_change_names_before_and_now() -> None:
    text = TEXTS["CHANGELOG.md"]
    unreleased = text[text.index("## Unreleased") : text.index("\n## 0.")]
    changed = re.search(r"### Changed\n(.*?)(?=\n### |\Z)", unreleased, re.DOTALL)
    assert changed is not None
    entries = re.split(r"^- ", changed[1], flags=re.MULTILINE)[1:]
    assert entries
    assert [entry for entry in entries if "Before: " not in entry or "Now: " not in entry] == []
