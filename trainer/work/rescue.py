"""`app.py rescue`: takes tunes and prompts in again whose files are there and whose rows are not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trainer.contract.errors import InvalidRequest
from trainer.contract.prompts import PromptRequest
from trainer.files import PARTIAL
from trainer.library import bases
from trainer.library.bases import Bases
from trainer.photos.analysis import PhotoAnalyzer
from trainer.photos.decoder import Decoder
from trainer.settings import Settings
from trainer.studio.folders import BASES, TRASH, TUNES, entries, find_orphans, has_model, keep_prompt_numbers, numbered
from trainer.studio.references import as_row, resolve
from trainer.studio.restore import restore
from trainer.studio.rows import Services, tune_row
from trainer.studio.store import Store
from trainer.work.assembly import open_store
from trainer.work.tune_folder import UNREADABLE, read_prompt, read_tune, waiting_prompt


@dataclass
class Report:
    """What became of each folder, a line each, and how many there were."""

    taken: dict[str, int] = field(default_factory=lambda: {"tune": 0, "prompt": 0})
    left: int = 0
    lines: list[str] = field(default_factory=list)

    def take(self, kind: str, name: str, what: str) -> None:
        self.taken[kind] += 1
        self.lines.append(f"{kind} {name}: {what}")

    def leave(self, name: str, why: object) -> None:
        self.left += 1
        self.lines.append(f"{name}: left as it is: {why}")

    def tell(self) -> None:
        """Print what has come since the last call: it is in the database by now."""
        for line in self.lines:
            print(line, flush=True)
        self.lines.clear()

    def end(self) -> None:
        parts = [plural(count, kind) for kind, count in self.taken.items()]
        self.lines.append(f"Taken in again: {' and '.join(parts)}. Left as they are: {plural(self.left, 'folder')}.")
        self.tell()


def rescue(settings: Settings) -> int:
    """Give every folder without a row its row again. Returns the exit code: 1 where a folder was left as it is."""
    store = open_store(settings.outputs)
    services = Services(settings, store, Decoder(settings), PhotoAnalyzer(settings))
    listed, report = bases.listed_once(settings), Report()
    keep_prompt_numbers(store, settings.outputs)
    orphans = find_orphans(store, settings.outputs)
    for folder in orphans.tunes:
        rescue_tune(services, folder, listed, report)
        report.tell()
    for folder in orphans.prompts:
        rescue_prompt(services, folder, [], listed, report)
        report.tell()
    for folder, why in set_aside(store, settings.outputs):
        report.leave(folder.relative_to(settings.outputs).as_posix(), why)
    report.end()
    store.close()
    return 1 if report.left else 0


def rescue_tune(services: Services, folder: Path, listed: Bases, report: Report) -> None:
    """A tune with its prompts: all of their rows, or none."""
    tune_id, store = int(folder.name), services.store
    try:
        found = read_tune(services, folder, listed)
    except UNREADABLE as problem:
        report.leave(f"{TUNES}/{tune_id}", why(problem))
        return
    title, photos = found.values["title"], len(entries(folder / "images"))
    state = "trained" if found.trained else "not trained yet; resume it to go on"
    with store.transaction():
        restore(store, "tunes", tune_id, found.values)
        report.take("tune", f"{tune_id} ({title})", f"{state}; {plural(photos, 'file')} in images/")
        asked = list(found.prompts)
        for prompt in numbered(folder / "prompts"):
            rescue_prompt(services, prompt, asked, listed, report)
        if found.trained or not asked:
            return
        if entries(folder / "inputs"):
            report.leave(f"{TUNES}/{tune_id}/inputs", "its prompts are not known by number; post them again")
            return
        for request in asked:
            values = {"tune_id": tune_id, **waiting_prompt(request), "named": named(services, tune_id, request, listed)}
            prompt_id = restore(store, "prompts", None, values)
            report.take("prompt", f"{prompt_id} of tune {tune_id}", "not rendered yet; it waits for its tune")


def rescue_prompt(services: Services, folder: Path, asked: list[PromptRequest], listed: Bases, report: Report) -> None:
    """A prompt with its pictures, in the folder of its tune or base; under a new number where it is another one's."""
    home, store = folder.parents[1], services.store
    name = f"{home.parent.name}/{home.name}/prompts/{folder.name}"
    try:
        found = read_prompt(folder, home / "inputs" / folder.name, asked)
    except UNREADABLE as problem:
        report.leave(name, why(problem))
        return
    if home.parent.name == BASES:
        place = of_base(store, int(home.name), found.loras)
    else:
        place = {"tune_id": int(home.name), "named": named(services, int(home.name), found.request, listed)}
    with store.transaction():
        prompt_id = None if store.get("prompts", int(folder.name)) else int(folder.name)
        new_id = restore(store, "prompts", prompt_id, found.values | place)
        if prompt_id is None:
            for at in (folder, home / "inputs" / folder.name):
                if at.exists():
                    at.rename(at.with_name(str(new_id)))
    note = "" if prompt_id else f"; its number {folder.name} belongs to another prompt now"
    what = f"{plural(len(found.files), 'picture')}{note}"
    report.take("prompt", f"{new_id} of {home.parent.name[:-1]} {home.name}", what)


def named(
    services: Services, tune_id: int, request: PromptRequest, listed: Bases
) -> list[tuple[str, int, float]] | None:
    """The models in a prompt's text; None where one is missing: they are looked up when the prompt is rendered."""
    tune = tune_row(services, tune_id)
    assert tune is not None, "it was taken in before its prompts"
    try:
        return as_row(resolve(services.store, listed, request.parsed, tune["branch"], tune))
    except InvalidRequest:
        return None


def of_base(store: Store, base_id: int, loras: list[str]) -> dict[str, object]:
    """Where a prompt on a base belongs: to the base, and under the first tune whose LoRA its pictures name."""
    tunes = [row for title in loras for row in store.find("tunes", title=title, status="trained")]
    return {"tune_id": None, "base_id": base_id, "lora_id": tunes[0]["id"] if tunes else None}


def set_aside(store: Store, outputs: Path) -> list[tuple[Path, str]]:
    """Folders with a model that are not where a tune's folder is, and what to do with each."""
    found = []
    for folder in entries(outputs / TUNES):
        number, waste, _ = folder.name.partition(PARTIAL)
        if waste and has_model(folder):
            found.append((folder, f"it was being removed; delete it, or rename it to {TUNES}/{number} and start again"))
    for folder in entries(outputs / TRASH):
        number = folder.name.partition("-")[0]
        if number.isdecimal() and has_model(folder) and store.get("tunes", int(number)) is None:
            found.append((folder, f"an expired tune; delete it, or move it to {TUNES}/{number} and start again"))
    return sorted(found)


def why(problem: Exception) -> str:
    """An error in one line."""
    return " ".join(str(problem).split()) or "it gave no reason"


def plural(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"
