"""How often a job has been begun at the point where it is."""

from __future__ import annotations

from trainer.studio.store import Job, Store


def attempts_here(store: Store, job: Job) -> int:
    """How often a job was begun since it last got on, this time included; 0 where it was deleted meanwhile."""
    with store.transaction() as db:
        row = db.execute("SELECT attempts FROM jobs WHERE id = ?", (job.id,)).fetchone()
    return row["attempts"] if row else 0
