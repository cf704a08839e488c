"""Callbacks: an ended tune or prompt is posted to the address in its request, at least once, also after a restart.

The store creates the callback in the transaction that ends the tune or prompt. It is tried until it arrives or a day
has passed. If the receiver's answer is lost, it is posted again with the same `webhook-id`.
"""

from __future__ import annotations

import json
import logging
import random
import threading
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from standardwebhooks import Webhook

from trainer import __version__
from trainer.clock import Loop, now, stamp
from trainer.contract.errors import NotFound
from trainer.contract.rows import CallbackRow
from trainer.photos.urls import Unreachable, post
from trainer.settings import webhook_key
from trainer.studio import prompts, tunes
from trainer.studio.rows import Services

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0
AT_ONCE = 4  # callbacks sent in parallel: a slow receiver must not delay the others
# Seconds between attempts: a day and some hours in all, as in Standard Webhooks.
DELAYS = (5, 30, 120, 600, 1800, 3600, 7200, 14_400, 21_600, 39_600)
JITTER = 0.1  # share of a delay, so that a receiver that is up again does not get all callbacks at once
MOST_SECONDS = 86_400.0
GONE = 410  # the HTTP status by which a receiver refuses all further callbacks (Standard Webhooks)


class WebhookSender:
    """A thread that finds due callbacks, and a few threads that post them."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._under_way: set[int] = set()
        self._loop = Loop("webhooks", POLL_SECONDS, self._post_due)

    def start(self) -> None:
        self._loop.start()

    def close(self) -> None:
        """Stop. A callback that is being posted may arrive and is then posted again at the next start."""
        self._loop.close()

    def _post_due(self) -> None:
        for callback in self._services.store.due_callbacks(now()):
            if len(self._under_way) >= AT_ONCE:
                return
            if callback["id"] not in self._under_way:
                self._under_way.add(callback["id"])
                threading.Thread(target=self._post, args=(callback,), daemon=True).start()

    def _post(self, callback: CallbackRow) -> None:
        try:
            attempt(self._services, callback)
        except Exception:  # the edge of a thread: the callback is due again later
            log.exception("callback %s was not posted", callback["id"])
        finally:
            self._under_way.discard(callback["id"])


def attempt(services: Services, callback: CallbackRow) -> None:
    """Post a callback once, and record the result."""
    try:
        body = json.dumps(entity(services, callback)).encode()
    except NotFound:
        return  # the tune or prompt was deleted, with its callbacks
    retry_after: str | None = None
    try:
        status, retry_after = post(services.settings, callback["url"], body, headers(services, callback["id"], body))
        answer, arrived, over = f"answered {status}", 200 <= status < 300, status == GONE
    except Unreachable as problem:
        answer, arrived, over = str(problem), False, False
    delay = None if arrived or over else next_delay(callback["attempts"], retry_after)
    due_at = None if delay is None else stamp(datetime.now(UTC) + timedelta(seconds=delay))
    services.store.note_attempt(callback["id"], answer, arrived=arrived, due_at=due_at)


def entity(services: Services, callback: CallbackRow) -> dict[str, object]:
    """The body: the current answer of `GET`, so that its links are new. Raises NotFound."""
    if (prompt_id := callback["prompt_id"]) is not None:
        return {"prompt": prompts.get_prompt(services, prompt_id).model_dump()}
    assert callback["tune_id"] is not None, "only a prompt can be without a tune"
    tune = tunes.get_tune(services, callback["tune_id"])
    if callback["kind"] == "tune":
        return {"tune": tune.model_dump()}
    return {"prompts": [prompt.model_dump() for prompt in tune.prompts if prompt.tune_id == tune.id]}


def headers(services: Services, callback_id: int, body: bytes) -> dict[str, str]:
    """The headers of Standard Webhooks (standardwebhooks.com), with a signature if there is a secret."""
    name, sent_at = f"tunebooth-{callback_id}", datetime.now(UTC)
    made = {
        "Content-Type": "application/json",
        "User-Agent": f"Tunebooth/{__version__}",
        "webhook-id": name,
        "webhook-timestamp": str(int(sent_at.timestamp())),
    }
    if secret := services.settings.webhook_secret:
        made["webhook-signature"] = Webhook(webhook_key(secret)).sign(name, sent_at, body.decode())
    return made


def next_delay(attempts: int, retry_after: str | None) -> float | None:
    """Seconds until the next attempt; None: there is none. attempts: how many came before the current one.

    A receiver may ask for a longer wait (`Retry-After`, RFC 9110 10.2.3), up to a day.
    """
    if attempts >= len(DELAYS):
        return None
    delay = DELAYS[attempts] * (1 + JITTER * random.random())  # noqa: S311  # not a secret
    return max(delay, min(asked_seconds(retry_after), MOST_SECONDS))


def asked_seconds(retry_after: str | None) -> float:
    """`Retry-After` (a number or a date) in seconds from now; 0 if it cannot be parsed."""
    if not retry_after:
        return 0.0
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
