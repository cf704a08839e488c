"""Callbacks in the database: each attempt to post one is noted before it is made, and its answer afterwards.

A callback with attempts and without an answer is under way.
"""

from __future__ import annotations

from trainer.clock import now
from trainer.contract.rows import CallbackRow
from trainer.studio.store import Store

UNDER_WAY = "(attempts > 0 AND answer IS NULL)"


def begin_attempt(store: Store, callback: CallbackRow, due_at: str | None, delay: float) -> bool:
    """Note that a callback is posted now. False: it was deleted, or changed since it was read; do not post it.

    due_at, delay: when it is tried again if no answer comes, as a time and in seconds from now; due_at None: not any
    more.
    """
    with store.transaction() as db:
        begun = db.execute(
            "UPDATE callbacks SET attempts = attempts + 1, answer = NULL, arrived_at = NULL, due_at = ?, delay = ?"
            " WHERE id = ? AND attempts = ? AND due_at = ?",
            (due_at, delay, callback["id"], callback["attempts"], callback["due_at"]),
        )
        return begun.rowcount == 1


def end_attempt(
    store: Store, callback: CallbackRow, answer: str, *, arrived: bool, due_at: str | None, delay: float
) -> None:
    """Note what came of the attempt that was begun with this row. due_at, delay: as for `begin_attempt`."""
    with store.transaction() as db:
        db.execute(
            "UPDATE callbacks SET answer = ?, arrived_at = ?, due_at = ?, delay = ?"
            f" WHERE id = ? AND attempts = ? AND {UNDER_WAY}",
            (answer, now() if arrived else None, due_at, delay, callback["id"], callback["attempts"] + 1),
        )


def fail_attempt(store: Store, callback: CallbackRow, answer: str) -> None:
    """Note why the attempt that was begun with this row got no answer. It is tried again as `begin_attempt` said."""
    with store.transaction() as db:
        db.execute(
            f"UPDATE callbacks SET answer = ? WHERE id = ? AND attempts = ? AND {UNDER_WAY}",
            (answer, callback["id"], callback["attempts"] + 1),
        )


def end_lost_attempts(store: Store) -> None:
    """At start: what a stopped process was posting is under way no more."""
    with store.transaction() as db:
        db.execute(f"UPDATE callbacks SET answer = 'the app ended before the answer came' WHERE {UNDER_WAY}")


def send_again(store: Store, tune_id: int) -> int:
    """Start again with the callbacks of a tune and its prompts; returns how many there are.

    One that is under way is being sent, so it does not change.
    """
    with store.transaction() as db:
        db.execute(
            f"UPDATE callbacks SET attempts = 0, arrived_at = NULL, due_at = ?, delay = 0"
            f" WHERE tune_id = ? AND NOT {UNDER_WAY}",
            (now(), tune_id),
        )
        return int(db.execute("SELECT COUNT(*) FROM callbacks WHERE tune_id = ?", (tune_id,)).fetchone()[0])
