"""Who may import whom (design §3), read from the syntax trees; and once for real, in a fresh process."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "torchvision", "diffusers", "peft", "transformers", "accelerate", "safetensors"}

# The two sides; the files of the families and of the model types belong to the second.
WEB = {
    "app", "trainer", "trainer.ui", "trainer.api", "trainer.jobs", "trainer.presets", "trainer.bases", "trainer.images",
    "trainer.urls", "trainer.links", "trainer.store", "trainer.schema", "trainer.settings", "trainer.guard",
    "trainer.page", "trainer.files", "trainer.decode", "trainer.child", "trainer.looking", "trainer.weights",
    "trainer.demo", "trainer.webhooks", "trainer.tools", "trainer.expiry", "trainer.branches", "trainer.methods",
    "trainer.flags", "trainer.references", "trainer.inputs", "trainer.packs", "trainer.loops",
}  # fmt: skip
WORK = {
    "trainer.worker", "trainer.train", "trainer.render", "trainer.dataset", "trainer.loop", "trainer.objectives",
    "trainer.loading", "trainer.memory", "trainer.hub", "trainer.faces", "trainer.words", "trainer.export",
    "trainer.original", "trainer.optimizers", "trainer.plan", "trainer.pipelines", "trainer.weighted",
    "trainer.control", "trainer.finish", "trainer.pictures",
}  # fmt: skip
DOORS = {"app", "trainer.ui", "trainer.api", "trainer.guard", "trainer.page", "trainer.jobs", "trainer.images"}

# Where a library is at home: a broken one then breaks one place. `methods.` are all files of that folder.
HOMES = {
    "gradio": {"ui"},
    "fastapi": {"api", "tools", "ui"},
    "mcp": {"tools"},
    "standardwebhooks": {"webhooks"},
    "starlette": {"api"},
    "uvicorn": {"app"},
    "sqlite3": {"store"},
    "tomllib": {"presets"},
    "tomlkit": {"packs"},
    "httpx": {"urls", "weights"},
    "httpx2": {"hub"},
    "huggingface_hub": {"hub", "weights"},
    "psutil": {"hub"},
    "ssrfguard": {"urls"},
    "pydantic_settings": {"settings"},
    "PIL": {"control", "dataset", "decode", "demo", "faces", "finish", "pictures", "plan", "render"},
    "pillow_heif": {"decode"},
    "torchvision": {"faces"},
    "facexlib": {"faces"},
    "gfpgan": {"faces"},
    "cv2": {"control", "faces"},
    "scipy": {"finish"},
    "spandrel": {"finish"},
    "pebble": {"child"},
    "peft": {"methods."},
    "diffusers": {"branches.", "control", "loading", "pipelines", "worker"},
    "transformers": {"branches.", "control", "faces", "worker"},
}


@dataclass(frozen=True)
class Import:
    """One imported name, and where it stands: `lazy` in a function, `typing` under TYPE_CHECKING."""

    name: str
    lazy: bool
    typing: bool


def modules() -> dict[str, ast.Module]:
    """Every module of the program, by its dotted name."""
    trees = {}
    for file in [ROOT / "app.py", *(ROOT / "trainer").rglob("*.py")]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text("utf-8"))
    return trees


TREES = modules()


def imports(node: ast.AST, lazy: bool = False, typing: bool = False) -> Iterator[Import]:
    """Everything imported below a node. `from trainer import page` is an import of trainer.page."""
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


def at_run_time(module: str) -> list[Import]:
    return [one for one in imports(TREES[module]) if not one.typing]


def loaded_with(module: str, seen: set[str]) -> set[str]:
    """Every library and module that comes along when a module is imported: what it names outside its functions."""
    for one in at_run_time(module):
        if not one.lazy and one.name not in seen:
            seen.add(one.name)
            if one.name in TREES:
                loaded_with(one.name, seen)
    return seen


def library(name: str) -> str:
    return name.partition(".")[0]


def test_every_module_is_on_one_side() -> None:
    families = {name for name in TREES if name.startswith(("trainer.branches.", "trainer.methods."))}
    assert len(families) >= 3
    assert WEB | WORK | families == TREES.keys()
    assert not WEB & (WORK | families)


@pytest.mark.parametrize("module", sorted(WEB))
def test_the_web_side_never_imports_torch_and_its_kin(module: str) -> None:
    for one in at_run_time(module):  # those in functions too: they would run in a request
        assert library(one.name) not in HEAVY
        if one.name in TREES:
            assert not {library(name) for name in loaded_with(one.name, set())} & HEAVY, one.name


def test_the_worker_imports_torch_only_when_its_thread_runs() -> None:
    assert not {library(name) for name in loaded_with("trainer.worker", set())} & HEAVY
    assert "trainer.train" in {one.name for one in at_run_time("trainer.worker") if one.lazy}
    assert "torch" in loaded_with("trainer.train", set())  # what the check above would see


@pytest.mark.parametrize("module", sorted(TREES.keys() - WEB))
def test_the_working_side_knows_no_door(module: str) -> None:
    assert not {one.name for one in at_run_time(module)} & DOORS


def home(module: str) -> str:
    """trainer.api -> api, trainer.branches.fast -> branches."""
    package, dot, name = module.removeprefix("trainer.").rpartition(".")
    return package + dot or name


def test_each_library_has_its_home() -> None:
    for name, homes in HOMES.items():
        users = {home(module) for module in TREES for one in at_run_time(module) if library(one.name) == name}
        assert users == homes, name


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    edges = {
        module: {one.name for one in at_run_time(module) if one.name in TREES and not one.lazy} for module in TREES
    }
    assert sum(len(names) for names in edges.values()) > 50
    order = list(graphlib.TopologicalSorter(edges).static_order())  # raises CycleError naming the circle
    assert order.index("trainer.schema") < order.index("trainer.jobs") < order.index("trainer.api")


def test_the_environment_is_read_in_one_place() -> None:
    readers = {module for module, tree in TREES.items() if environment_reads(tree)}
    assert readers == {"trainer.settings"}


def environment_reads(tree: ast.Module) -> int:
    """How often os.environ and its kin are named, but for `setdefault`, which sets a switch of a library's."""
    names = {"environ", "environb", "getenv"}
    nodes = list(ast.walk(tree))
    named = [n for n in nodes if (isinstance(n, ast.Attribute) and n.attr in names) or getattr(n, "name", "") in names]
    writes = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "os.environ.setdefault"]
    return len(named) - len(writes)


def test_a_process_that_serves_the_page_has_not_loaded_torch() -> None:
    script = f"import sys, app, trainer.ui, trainer.api, trainer.jobs; print(sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
