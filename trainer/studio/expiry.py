"""Tunes that expire, where the setting `lifetime_days` says so: into the trash, and out of it a week later."""

from __future__ import annotations

import logging
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from trainer.clock import Loop, now, stamp
from trainer.contract.rows import TuneRow
from trainer.files import remove
from trainer.settings import Settings
from trainer.studio.deletions import finish_deletions
from trainer.studio.rows import tunes_of
from trainer.studio.store import Store

log = logging.getLogger(__name__)
LOOK_SECONDS = 60.0
TRASH_SECONDS = 7 * 86_400.0


def expiry(settings: Settings, begin: datetime) -> str | None:
    """When a tune ends that was trained, or renewed, at `begin`; None: never."""
    return stamp(begin + timedelta(days=settings.lifetime_days)) if settings.lifetime_days else None


def expiry_loop(settings: Settings, store: Store) -> Loop:
    """A thread that lets tunes expire, and empties the trash."""

    def look() -> None:
        expire_tunes(settings, store)
        empty_trash(trash_of(settings.outputs))
        finish_deletions(settings.outputs, store)

    return Loop("expiry", LOOK_SECONDS, look)


def trash_of(outputs: Path) -> Path:
    return outputs / "trash"


def trashed(outputs: Path, tune: TuneRow) -> list[Path]:
    """The folders of a tune in the trash. One that is older than the tune is of another database."""
    made = int(datetime.fromisoformat(tune["created_at"]).timestamp())
    return [folder for folder in trash_of(outputs).glob(f"{tune['id']}-*") if since(folder) >= made]


def since(folder: Path) -> int:
    """When a folder was moved to the trash, in seconds since 1970: its name is ID-SECONDS. -1: it has another name."""
    seconds = folder.name.rpartition("-")[2]
    return int(seconds) if re.fullmatch("[0-9]{1,12}", seconds) else -1


def expire_tunes(settings: Settings, store: Store) -> None:
    """End the tunes whose time is over, or renew them (`auto_extend`). Nothing where tunes have no lifetime now."""
    for tune in store.find("tunes", status="expired"):  # a kill came between their end and the move
        move_to_trash(settings.outputs, tune["id"])
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
    """Move a tune's files to the trash; one that is in use, or is the base of others, stays for now."""
    with store.transaction():
        rendering = any(tune["id"] in tunes_of(prompt) for prompt in store.find("prompts", status="rendering"))
        if rendering or store.find("exports", tune_id=tune["id"], status="exporting") or store.dependents(tune["id"]):
            return
        store.end_prompts(tune["id"], "canceled")
        for prompt in store.find("prompts", tune_id=tune["id"]):
            store.update("prompts", prompt["id"], files=[])
        store.update("tunes", tune["id"], status="expired", files=[])
    move_to_trash(settings.outputs, tune["id"])


def move_to_trash(outputs: Path, tune_id: int) -> None:
    """Move the files of a tune that has expired, where that is not done yet."""
    folder, trash = outputs / "tunes" / str(tune_id), trash_of(outputs)
    if folder.exists():
        trash.mkdir(exist_ok=True)
        folder.rename(trash / f"{tune_id}-{int(time.time())}")
        log.info("tune %s has expired; its files are in %s for a week", tune_id, trash)


def empty_trash(trash: Path) -> None:
    """Remove what has lain there for a week."""
    for folder in trash.glob("*-*") if trash.exists() else ():
        if 0 <= since(folder) < time.time() - TRASH_SECONDS:
            remove(folder)
