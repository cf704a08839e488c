"""Likes of prompts. There is one user, so a prompt is liked or not."""

from __future__ import annotations

from trainer.clock import now
from trainer.studio.rows import Services, row_of


def like(services: Services, prompt_id: int) -> None:
    """Like a prompt; nothing changes if it is liked already. Raises NotFound."""
    with services.store.transaction() as db:
        row_of(services, "prompts", prompt_id)
        db.execute("UPDATE prompts SET liked_at = COALESCE(liked_at, ?) WHERE id = ?", (now(), prompt_id))


def unlike(services: Services, prompt_id: int) -> None:
    """Take the like of a prompt back; nothing changes if there is none. Raises NotFound."""
    with services.store.transaction() as db:
        row_of(services, "prompts", prompt_id)
        db.execute("UPDATE prompts SET liked_at = NULL WHERE id = ?", (prompt_id,))
