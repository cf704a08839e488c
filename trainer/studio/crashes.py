"""How often a job has crashed."""

from __future__ import annotations

from trainer.studio.store import Job, Store


def attempts_here(store: Store, job: Job) -> int:
    """Attempts since the last progress of a job, including the current one; 0 if the job was deleted."""
    with store.transaction() as db:
        row = db.execute("SELECT attempts FROM jobs WHERE id = ?", (job.id,)).fetchone()
    return row["attempts"] if row else 0
