"""Expiry of tunes (setting `lifetime_days`): their files move to the trash and are deleted a week later."""

from __future__ import annotations

import logging
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from trainer.clock import Loop, now, stamp
from trainer.contract.rows import TuneRow
from trainer.files import move_folder
from trainer.settings import Settings
from trainer.studio.deletions import finish_deletions
from trainer.studio.folders import has_model
from trainer.studio.rows import tunes_of
from trainer.studio.store import Store

log = logging.getLogger(__name__)
POLL_SECONDS = 60.0
TRASH_SECONDS = 7 * 86_400.0


def expiry(settings: Settings, begin: datetime) -> str | None:
    """When a tune expires that was trained or renewed at `begin`; None: never."""
    return stamp(begin + timedelta(days=settings.lifetime_days)) if settings.lifetime_days else None


def expiry_loop(settings: Settings, store: Store) -> Loop:
    """The thread that expires tunes and empties the trash."""

    def run() -> None:
        expire_tunes(settings, store)
        empty_trash(store, trash_of(settings))
        finish_deletions(settings.outputs, store)

    return Loop("expiry", POLL_SECONDS, run)


def trash_of(settings: Settings) -> Path:
    return settings.outputs / "trash"


def expire_tunes(settings: Settings, store: Store) -> None:
    """Expire the tunes whose time is over, or renew them (`auto_extend`), if the setting `lifetime_days` is given."""
    for tune in store.find("tunes", status="expired"):  # the app was killed before it moved the files
        move_to_trash(settings, tune["id"])
    if not settings.lifetime_days:
        return
    for tune in store.find("tunes", status="trained"):
        if tune["expires_at"] is None or tune["expires_at"] > now():
            continue
        if tune["auto_extend"]:
            store.update("tunes", tune["id"], expires_at=expiry(settings, datetime.now(UTC)))
        else:
            expire(settings, store, tune)


def expire(settings: Settings, store: Store, tune: TuneRow) -> None:
    """Move a tune's files to the trash, unless the tune is in use or is the base of others."""
    trash = trash_of(settings)
    trash.mkdir(exist_ok=True)  # first: without a trash folder, nothing may expire
    with store.transaction():
        rendering = any(tune["id"] in tunes_of(prompt) for prompt in store.find("prompts", status="rendering"))
        if rendering or store.find("exports", tune_id=tune["id"], status="exporting") or store.dependents(tune["id"]):
            return
        store.end_prompts(tune["id"], "canceled", "it has expired")
        for prompt in store.find("prompts", tune_id=tune["id"]):
            store.update("prompts", prompt["id"], files=[])
        store.update("tunes", tune["id"], status="expired", files=[])
    move_to_trash(settings, tune["id"])


def move_to_trash(settings: Settings, tune_id: int) -> None:
    """Move the files of a tune that has expired, unless they are moved already."""
    folder, trash = settings.outputs / "tunes" / str(tune_id), trash_of(settings)
    if folder.exists():
        trash.mkdir(exist_ok=True)
        move_folder(folder, trash / f"{tune_id}-{int(time.time())}")
        log.info("tune %s has expired; its files are in %s for a week", tune_id, trash)


def empty_trash(store: Store, trash: Path) -> None:
    """Delete folders that are a week old. Their names are ID-SECONDS, with the time when they came.

    A folder with a model is kept if the database does not know its tune.
    """
    for folder in trash.glob("*-*") if trash.exists() else ():
        number, _, since = folder.name.rpartition("-")
        if not since.isdecimal() or int(since) + TRASH_SECONDS >= time.time():
            continue
        if has_model(folder) and not (number.isdecimal() and store.get("tunes", int(number))):
            continue
        shutil.rmtree(folder, ignore_errors=True)


def in_trash(settings: Settings, tune_id: int) -> list[Path]:
    """The folders of a tune that has expired."""
    return list(trash_of(settings).glob(f"{tune_id}-*"))
