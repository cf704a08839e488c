"""A job whose side files are broken fails in words that name the file, and the next one runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.helpers.faults import CONTENTS, INSTEAD, as_json, instead_of, remove, safetensors, spoiled
from tests.helpers.studio import PROMPT, Studio
from trainer.contract.rows import TuneRow
from trainer.files import Unreadable
from trainer.names import FORMATS
from trainer.photos.decoder import Decoder
from trainer.photos.unfinished import remove_unfinished
from trainer.studio import prompts, tunes
from trainer.studio.rows import tune_folder
from trainer.work.run_files import asked_args, prepared

pytest_plugins = ("tests.helpers.web",)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, decoder: Decoder, photos: list[Path]) -> Iterator[Studio]:
    """A studio whose worker works when `work` says so."""
    opened = Studio(tmp_path_factory.mktemp("studio"), decoder, photos)
    yield opened
    opened.close()


def work(studio: Studio) -> None:
    """Run all jobs there are, in this thread."""
    studio.worker._work()


def read_request(file: Path) -> object:
    return asked_args(file)


def read_prepared(file: Path) -> object:
    return prepared(file, cast(TuneRow, {"photos": [VERDICT]}))


def read_preparing(file: Path) -> object:
    return remove_unfinished(file.parent)


VERDICT = {"name": "rex.png", "file": "000.png", "width": 8, "height": 8, "format": "PNG"}
READERS: dict[str, tuple[Callable[[Path], object], object, tuple[str, ...]]] = {  # with what is no fault there
    "request.json": (read_request, {"args": "rank=4"}, ("args=None", "args='x'", "args='../../x'")),
    "prepared.json": (read_prepared, [VERDICT], ()),
    "preparing.json": (read_preparing, ["masks/face/000.png"], ("an empty list", "a link to itself")),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_decides_what_is_trained_is_never_guessed(tmp_path: Path, name: str) -> None:
    read, good, harmless = READERS[name]
    file, problems = tmp_path / "dataset" / name, []
    file.parent.mkdir()
    file.write_bytes(as_json(good))
    read(file)
    for fault in (*CONTENTS, *INSTEAD):
        remove(file)
        file.write_bytes(as_json(good))
        if fault in CONTENTS:
            file.write_bytes(CONTENTS[fault](file.read_bytes()))
        else:
            instead_of(file, fault)
        if fault not in harmless:
            problems += refused(fault, read, file)
    for fault, value in spoiled(good):
        if name == "request.json" and fault not in harmless:  # of the verdicts, some values may be others
            remove(file)
            file.write_bytes(as_json(value))
            problems += refused(fault, read, file)
    assert problems == []


def refused(fault: str, read: Callable[[Path], object], file: Path) -> list[str]:
    """What is wrong with how a broken file is refused."""
    try:
        read(file)
    except Unreadable as problem:
        return [] if file.name in str(problem) else [f"{fault}: {problem}"]
    except Exception as problem:  # noqa: BLE001  # whatever a broken file makes of it
        return [f"{fault}: {type(problem).__name__}"]
    return [f"{fault}: it was taken"]


def cut_request(folder: Path) -> None:
    file = folder / "request.json"
    file.write_bytes(file.read_bytes()[:30])


def no_request(folder: Path) -> None:
    (folder / "request.json").unlink()


def cut_verdicts(folder: Path) -> None:
    (folder / "dataset").mkdir()
    (folder / "dataset/prepared.json").write_bytes(as_json([VERDICT])[:30])


def cut_list_of_masks(folder: Path) -> None:
    (folder / "dataset").mkdir()
    (folder / "dataset/preparing.json").write_bytes(b'["masks/fa')


def not_utf8(folder: Path) -> None:
    (folder / "images/000.txt").write_bytes("ein Foto von ohwx Hündchen".encode("latin-1"))


def folder_for_caption(folder: Path) -> None:
    (folder / "images/000.txt").mkdir()


def file_for_dataset(folder: Path) -> None:
    shutil.rmtree(folder / "dataset", ignore_errors=True)
    (folder / "dataset").write_bytes(b"")


def folder_for_config(folder: Path) -> None:
    (folder / "config.json").mkdir()


def half_a_photo(folder: Path) -> None:
    photo = next((folder / "images").glob("000.*"))
    photo.write_bytes(photo.read_bytes()[:200])


def no_photo(folder: Path) -> None:
    next((folder / "images").glob("000.*")).write_bytes(b"")


SPOILERS: list[tuple[Callable[[Path], None], str]] = [
    (cut_request, "request.json cannot be read"),
    (no_request, "request.json is missing"),
    (cut_list_of_masks, "preparing.json cannot be read"),
    (not_utf8, "000.txt cannot be read: it is not text in UTF-8"),
    (folder_for_caption, "000.txt cannot be read: Is a directory"),
    (file_for_dataset, "dataset in the tune's folder is a file"),
    (folder_for_config, "config.json cannot be used: Is a directory"),
    (half_a_photo, "cannot be read: it is no picture, or a broken one"),
    (no_photo, "cannot be read: it is no picture, or a broken one"),
]


def test_jobs_with_broken_files_fail_in_words_and_the_next_one_is_trained(studio: Studio) -> None:
    failing = {}
    for spoiler, message in SPOILERS:
        tune_id = studio.create(spoiler.__name__, prompts_attributes=[])
        spoiler(tune_folder(studio.services, tune_id))
        failing[tune_id] = message
    damaged = studio.create("damaged row", prompts_attributes=[])
    with studio.store.transaction() as db:
        db.execute("UPDATE tunes SET photos = '{' WHERE id = ?", (damaged,))
    failing[damaged] = "the database is damaged: photos cannot be read"

    good = studio.create("good", prompts_attributes=[PROMPT, PROMPT | {"seed": 8}])
    folder = tune_folder(studio.services, good)
    cut_verdicts(folder)  # the photos are analyzed again
    (folder / "log.jsonl").mkdir()  # what is only shown does not stop a run
    (folder / "samples").write_bytes(b"")
    first = tunes.get_tune(studio.services, good).prompts[0].id
    with studio.store.transaction() as db:
        db.execute("""UPDATE prompts SET attributes = '{"style": 7' WHERE id = ?""", (first,))
    work(studio)

    for tune_id, message in failing.items():
        tune = tunes.get_tune(studio.services, tune_id)
        assert tune.status == "failed" and message in str(tune.error), tune.title
        assert str(studio.settings.outputs) not in str(tune.error)
    tune = tunes.get_tune(studio.services, good)
    assert tune.status == "trained"
    for words in ("samples cannot be written", "analyzed again, because dataset/prepared.json is damaged"):
        assert any(words in warning for warning in tune.warnings)
    assert [prompt.status for prompt in tune.prompts] == ["failed", "rendered"]
    assert tune.prompts[0].error == "the database is damaged: attributes cannot be read. Send the request again"

    file = folder / "model" / FORMATS["diffusers"]
    whole = file.read_bytes()
    for content in (b"", whole[:200], whole[:-100], safetensors([]), safetensors({"__metadata__": 7})):
        file.write_bytes(content)
        prompt = prompts.create_prompt(studio.services, good, PROMPT)
        work(studio)
        prompt = prompts.get_prompt(studio.services, prompt.id)
        assert prompt.status == "failed" and file.name in str(prompt.error)
    file.write_bytes(whole)
    prompt = prompts.create_prompt(studio.services, good, PROMPT)
    work(studio)
    assert prompts.get_prompt(studio.services, prompt.id).status == "rendered"
