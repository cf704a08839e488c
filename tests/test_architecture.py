"""Who may import whom, read from the syntax trees; what is how large; and once for real, in a fresh process."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from trainer.names import BRANCHES, METHODS

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "torchvision", "diffusers", "peft", "transformers", "accelerate", "safetensors"}

# A module imports from its own room, or from a room of a lower rank; rooms of one rank do not know each other.
ORDER = [
    {"ground"}, {"contract"}, {"config"}, {"library"}, {"branches", "photos"}, {"methods", "studio"},
    {"training", "rendering", "web"}, {"work"}, {"app"},
]  # fmt: skip
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}

# What the process that serves the page loads: no torch in these rooms and files.
TORCH_FREE_ROOMS = {"contract", "config", "library", "studio", "web", "app"}
TORCH_FREE = {
    "trainer", "trainer.names", "trainer.settings", "trainer.files", "trainer.clock", "trainer.photos.intake",
    "trainer.photos.decode", "trainer.photos.urls", "trainer.photos.inputs", "trainer.photos.subprocess_worker",
    "trainer.photos.analysis", "trainer.photos.subject", "trainer.photos.found", "trainer.work.assembly",
    "trainer.work.worker",
}  # fmt: skip

# Where a library is at home, by room or file: a broken one then breaks one place.
HOMES = {
    "gradio": {"web"},
    "fastapi": {"web"},
    "mcp": {"web"},
    "jinja2": {"web"},
    "standardwebhooks": {"studio"},
    "starlette": {"web"},
    "uvicorn": {"app"},
    "sqlite3": {"studio"},
    "tomllib": {"config"},
    "tomlkit": {"studio"},
    "httpx": {"library", "photos"},
    "httpx2": {"library"},
    "huggingface_hub": {"library"},
    "psutil": {"library"},
    "ssrfguard": {"photos"},
    "pydantic_settings": {"ground"},
    "PIL": {"photos", "rendering", "studio", "training"},
    "pillow_heif": {"photos"},
    "torchvision": {"photos"},
    "facexlib": {"photos"},
    "gfpgan": {"photos"},
    "cv2": {"photos", "rendering"},
    "scipy": {"rendering"},
    "spandrel": {"rendering"},
    "pebble": {"photos"},
    "peft": {"methods"},
    "diffusers": {"branches", "rendering", "work"},
    "transformers": {"branches", "photos", "rendering", "work"},
}

MOST_MODULE_LINES = 350
MOST_FUNCTION_LINES = 60
MOST_ANY = 150
# Handlers of every exception stand at the edges of threads and processes. What each must survive:
BROAD_HANDLERS = {
    "trainer.clock.Loop._run": "one failure of what a looping thread does",
    "trainer.photos.subprocess_worker.SubprocessWorker._running": "the imports of a child process",
    "trainer.photos.decode.decode": "decoders of files from strangers, in the decoding child",
    "trainer.photos.analysis.naming": "what the child process raised",
    "trainer.studio.webhooks.WebhookSender._post": "one callback, in a thread of its own",
    "trainer.web.guard.Guard._run_inner": "an app that cannot be loaded or begun, in threads: /health says so",
    "trainer.web.mcp.tool.called": "a tool that fails: its client is not told what is in the log",
    "trainer.work.job_runner.JobRunner.run": "one job of the worker's thread",
    "trainer.work.worker.Worker._set_up": "libraries and devices that the worker's thread begins with",
}
# Where the name of a family or of a model type may stand in code.
NAMES_AT_HOME = ("trainer.names", "trainer.branches.", "trainer.methods.")


@dataclass(frozen=True)
class Import:
    """One imported name, and where it stands: `lazy` in a function, `typing` under TYPE_CHECKING."""

    name: str
    lazy: bool
    typing: bool


def sources() -> dict[str, str]:
    """Every module of the program, by its dotted name."""
    texts = {}
    for file in [ROOT / "app.py", *sorted((ROOT / "trainer").rglob("*.py"))]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        texts[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file.read_text("utf-8")
    return texts


SOURCES = sources()
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}
PACKAGES = {name.rpartition(".")[0] for name in TREES} - {""}


def room(module: str) -> str:
    """trainer.web.rest -> web, trainer.files -> ground, app -> app."""
    if module == "app":
        return "app"
    name = module.removeprefix("trainer").lstrip(".").partition(".")[0]
    return name if name in RANK else "ground"


def imports(node: ast.AST, lazy: bool = False, typing: bool = False) -> Iterator[Import]:
    """Everything imported below a node. `from trainer.web import page` is an import of trainer.web.page."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, lazy, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, "imports are absolute here"
            yield Import(child.module, lazy, typing)
            submodules = (f"{child.module}.{alias.name}" for alias in child.names)
            yield from (Import(name, lazy, typing) for name in submodules if name in TREES)
        else:
            in_function = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for_types = typing or (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING")
            yield from imports(child, in_function, for_types)


def ours(module: str) -> set[str]:
    """The modules of ours that a module imports, those in functions and for types included."""
    return {one.name for one in imports(TREES[module]) if one.name in TREES and one.name not in PACKAGES}


def loaded_with(module: str, seen: set[str]) -> set[str]:
    """Every library and module that comes along when a module is imported: what it names outside its functions."""
    for one in imports(TREES[module]):
        if not one.lazy and not one.typing and one.name not in seen:
            seen.add(one.name)
            if one.name in TREES:
                loaded_with(one.name, seen)
    return seen


def library(name: str) -> str:
    return name.partition(".")[0]


def test_every_room_has_a_rank() -> None:
    folders = {path.parent.name for path in (ROOT / "trainer").glob("*/__init__.py")}
    assert folders | {"ground", "app"} == RANK.keys()
    assert len(list((ROOT / "trainer").glob("*.py"))) == 6  # five and __init__


def test_imports_go_down() -> None:
    up = [
        f"{module} -> {name}"
        for module in TREES
        for name in ours(module)
        if room(name) != room(module) and RANK[room(name)] >= RANK[room(module)]
    ]
    assert up == []


def test_web_imports_the_services_and_what_is_below_them() -> None:
    known = {room(name) for module in TREES if room(module) == "web" for name in ours(module)}
    assert known <= {"web", "studio", "contract", "config", "ground"}


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    edges = {module: ours(module) for module in TREES}
    assert sum(len(names) for names in edges.values()) > 300
    order = list(graphlib.TopologicalSorter(edges).static_order())  # raises CycleError naming the circle
    assert order.index("trainer.contract.tunes") < order.index("trainer.studio.tunes") < order.index("trainer.web.rest")


def torch_free() -> set[str]:
    return TORCH_FREE | {module for module in TREES if room(module) in TORCH_FREE_ROOMS}


@pytest.mark.parametrize("module", sorted(torch_free()))
def test_the_web_side_never_imports_torch_and_its_kin(module: str) -> None:
    assert module in TREES
    at_import = {library(name) for name in loaded_with(module, set())}
    assert not at_import & HEAVY
    if room(module) != "work":  # its thread imports torch when it runs
        in_functions = {one.name for one in imports(TREES[module]) if one.lazy}
        assert not {library(name) for name in in_functions} & HEAVY


def test_the_worker_imports_torch_only_when_its_thread_runs() -> None:
    assert "trainer.work.job_runner" in {one.name for one in imports(TREES["trainer.work.worker"]) if one.lazy}
    assert "torch" in loaded_with("trainer.work.job_runner", set())  # what the check above would see


def test_each_library_has_its_home() -> None:
    for name, homes in HOMES.items():
        users = {room(m) for m in TREES for one in imports(TREES[m]) if library(one.name) == name and not one.typing}
        assert users == homes, name


def test_the_environment_is_read_in_one_place() -> None:
    readers = {module for module, tree in TREES.items() if environment_reads(tree)}
    assert readers == {"trainer.settings"}


def environment_reads(tree: ast.Module) -> int:
    """How often os.environ and its kin are named, but for setting a switch of a library's."""
    names = {"environ", "environb", "getenv"}
    nodes = list(ast.walk(tree))
    named = [n for n in nodes if (isinstance(n, ast.Attribute) and n.attr in names) or getattr(n, "name", "") in names]
    setters = ("os.environ.setdefault", "os.environ.update")
    writes = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) in setters]
    return len(named) - len(writes)


@pytest.mark.long
def test_a_process_that_serves_the_page_has_not_loaded_torch() -> None:
    script = (
        "import sys, app, trainer.web.page, trainer.web.rest, trainer.studio.tunes;"
        f"print(sorted({HEAVY!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Sizes


def test_no_module_is_long() -> None:
    long = {module: text.count("\n") for module, text in SOURCES.items() if text.count("\n") > MOST_MODULE_LINES}
    assert long == {}


def test_no_function_is_long() -> None:
    long = {
        f"{module}.{node.name}": node.end_lineno - node.lineno + 1
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno
        and node.end_lineno - node.lineno + 1 > MOST_FUNCTION_LINES
    }
    assert long == {}


def test_packages_hold_no_logic() -> None:
    for package in PACKAGES:
        allowed = (ast.Expr, ast.ImportFrom, ast.Assign)
        assert all(isinstance(node, allowed) for node in TREES[package].body), package


# Types and exceptions


def test_the_package_ships_its_types() -> None:
    named = [module for module, text in SOURCES.items() for _ in re.findall(r"\bAny\b", text)]
    assert 0 < len(named) < MOST_ANY, Counter(named).most_common(10)


def test_the_contract_has_no_type_that_is_ignored() -> None:
    assert [module for module, text in SOURCES.items() if room(module) == "contract" and "type: ignore" in text] == []
    assert any("type: ignore" in text for text in SOURCES.values())  # what the check above would see


def broad_handlers(node: ast.AST, inside: str) -> Iterator[str]:
    """The functions, by their dotted names, that handle every exception."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from broad_handlers(child, f"{inside}.{child.name}")
            continue
        caught: list[ast.expr] = []
        if isinstance(child, ast.ExceptHandler):
            caught = [child.type] if child.type else [ast.Name("Exception")]
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("suppress"):
            caught = child.args
        names = {ast.unparse(one) for some in caught for one in (some.elts if isinstance(some, ast.Tuple) else [some])}
        if names & {"Exception", "BaseException"}:
            yield inside
        yield from broad_handlers(child, inside)


def test_only_the_edges_of_threads_and_processes_handle_every_exception() -> None:
    assert {where for module, tree in TREES.items() for where in broad_handlers(tree, module)} == BROAD_HANDLERS.keys()
    for text in SOURCES.values():
        for line in text.splitlines():
            assert not re.search(r"except (Base)?Exception\b", line) or "# the edge " in line, line


@pytest.mark.parametrize(
    "code",
    [
        "try: 1\nexcept: 2",
        "try: 1\nexcept Exception: 2",
        "try: 1\nexcept (OSError, BaseException) as e: 2",
        "with contextlib.suppress(Exception): 1",
    ],
)
def test_a_handler_of_every_exception_is_found(code: str) -> None:
    assert list(broad_handlers(ast.parse(code), "a")) == ["a"]
    assert list(broad_handlers(ast.parse("try: 1\nexcept (OSError, ValueError): 2"), "a")) == []


# Names of families and model types


def literals(text: str) -> list[str]:
    """The string literals of a module, those in f-strings left out."""
    tree = ast.parse(text)
    within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in within)
    return [node.value for node in found if isinstance(node.value, str)]


def test_families_and_model_types_are_named_in_their_rooms_only() -> None:
    names = {*BRANCHES, *METHODS}
    found = {
        f"{module}: {name}"
        for module, text in SOURCES.items()
        if not module.startswith(NAMES_AT_HOME)
        for name in literals(text)
        if name in names
    }
    assert found == set()


# The tests


@pytest.mark.long
def test_the_web_tests_are_collected_without_torch() -> None:
    rooms = ["tests/web", "tests/studio", "tests/contract", "tests/config"]
    script = (
        "import sys, pytest;"
        f"code = pytest.main(['--collect-only', '-qq', '-n0', '-p', 'no:cacheprovider', '-m', '', *{rooms!r}]);"
        "print(int(code), sorted({'torch', 'diffusers', 'peft', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_no_test_file_imports_another() -> None:
    for file in (ROOT / "tests").rglob("test_*.py"):
        names = {one.name.rpartition(".")[2] for one in imports(ast.parse(file.read_text("utf-8")))}
        assert not any(name.startswith("test_") for name in names), file
