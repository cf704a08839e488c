"""Callbacks: an ended tune or prompt is posted to the address in its request, at least once, also after a restart.

The store creates the callback in the transaction that ends the tune or prompt. It is tried until it arrives or a day
has passed. If the receiver's answer is lost, it is posted again with the same `webhook-id`. This process waits by the
monotonic clock; the time in the database is for the next process, which never waits longer than was planned.
"""

from __future__ import annotations

import json
import logging
import random
import re
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from standardwebhooks import Webhook

from trainer import __version__
from trainer.clock import Loop, stamp
from trainer.contract.errors import NotFound
from trainer.contract.rows import CallbackRow
from trainer.photos.urls import Unreachable, post
from trainer.settings import webhook_key
from trainer.studio import callbacks, prompts, tunes
from trainer.studio.rows import Services

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0
CLOSE_SECONDS = 3.0  # for callbacks that are being posted when the app stops
AT_ONCE = 4  # callbacks sent in parallel: a slow receiver must not delay the others
# Seconds between attempts: a day and some hours in all, as in Standard Webhooks.
DELAYS = (5, 30, 120, 600, 1800, 3600, 7200, 14_400, 21_600, 39_600)
JITTER = 0.1  # share of a delay, so that a receiver that is up again does not get all callbacks at once
MOST_SECONDS = 86_400.0
GONE = 410  # the HTTP status by which a receiver refuses all further callbacks (Standard Webhooks)


class Planned(NamedTuple):
    """When a callback is tried again: after so many seconds, and as a time. due_at None: not any more."""

    delay: float
    due_at: str | None


class Schedule:
    """When each callback is due, by a clock that only goes forward: a system clock that is set moves nothing."""

    def __init__(self) -> None:
        self._due: dict[tuple[int, int, str | None], float] = {}  # (id, attempts, due_at) of a row -> monotonic seconds
        self._lock = threading.Lock()

    def due(self, waiting: Sequence[CallbackRow]) -> list[CallbackRow]:
        """Those that are to be posted now. waiting: all that are to be posted now or later."""
        moment = time.monotonic()
        with self._lock:
            known = self._due
            self._due = {key_of(row): known.get(key_of(row), moment + seconds_left(row)) for row in waiting}
            return [row for row in waiting if self._due[key_of(row)] <= moment]

    def plan(self, callback: CallbackRow, planned: Planned) -> None:
        """Note when a callback is due again, after an attempt. callback: its row before the attempt."""
        with self._lock:
            key = callback["id"], callback["attempts"] + 1, planned.due_at
            self._due[key] = time.monotonic() + planned.delay


def key_of(row: CallbackRow) -> tuple[int, int, str | None]:
    return row["id"], row["attempts"], row["due_at"]


def seconds_left(row: CallbackRow) -> float:
    """How long a callback still waits, by the stored time: 0 to the planned delay, for any system clock."""
    try:
        left = (datetime.fromisoformat(row["due_at"] or "") - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):  # no time, or one without a zone
        left = row["delay"]
    return min(max(left, 0.0), row["delay"])


class WebhookSender:
    """A thread that finds due callbacks, and a few threads that post them."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._schedule = Schedule()
        self._under_way: set[int] = set()
        self._loop = Loop("webhooks", POLL_SECONDS, self._post_due)

    def start(self) -> None:
        callbacks.end_lost_attempts(self._services.store)
        self._loop.start()

    def close(self) -> None:
        """Stop. Callbacks that are being posted get some seconds; one that gets no answer is posted again later."""
        self._loop.close()
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._under_way and time.monotonic() < deadline:
            time.sleep(0.05)

    def _post_due(self) -> None:
        for callback in self._schedule.due(self._services.store.waiting_callbacks()):
            if len(self._under_way) >= AT_ONCE:
                return
            if callback["id"] not in self._under_way:
                self._under_way.add(callback["id"])
                threading.Thread(target=self._post, args=(callback,), daemon=True).start()

    def _post(self, callback: CallbackRow) -> None:
        try:
            if planned := attempt(self._services, callback):
                self._schedule.plan(callback, planned)
        except Exception:  # the edge of a thread: the callback is due again later
            log.exception("callback %s was not posted", callback["id"])
            callbacks.fail_attempt(self._services.store, callback, "could not be posted; the log says why")
        finally:
            self._under_way.discard(callback["id"])


def attempt(services: Services, callback: CallbackRow) -> Planned | None:
    """Post a callback once, and record the result. Returns when it is tried again; None: it was deleted or changed.

    The attempt is recorded before it is made, so that one that is cut short by a kill counts too.
    """
    store, tries = services.store, callback["attempts"]
    unanswered = plan(next_delay(tries, None))
    if not callbacks.begin_attempt(store, callback, unanswered.due_at, unanswered.delay):
        return None
    try:
        body = json.dumps(entity(services, callback)).encode()
    except NotFound:
        return None  # the tune or prompt was deleted, with its callbacks
    retry_after: str | None = None
    try:
        status, retry_after = post(services.settings, callback["url"], body, headers(services, callback["id"], body))
        answer, arrived, over = f"answered {status}", 200 <= status < 300, status == GONE
    except Unreachable as problem:
        answer, arrived, over = str(problem), False, False
    planned = plan(None if arrived or over else next_delay(tries, retry_after))
    callbacks.end_attempt(store, callback, answer, arrived=arrived, due_at=planned.due_at, delay=planned.delay)
    return planned


def plan(delay: float | None) -> Planned:
    """delay: seconds from now; None: it is not tried again."""
    if delay is None:
        return Planned(0.0, None)
    return Planned(delay, stamp(datetime.now(UTC) + timedelta(seconds=delay)))


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
    return max(delay, asked_seconds(retry_after))


def asked_seconds(retry_after: str | None) -> float:
    """`Retry-After` (a number or a date) in seconds from now, 0 to MOST_SECONDS; 0 if it cannot be parsed."""
    text = (retry_after or "").strip()
    if re.fullmatch("[0-9]+", text):  # `isdecimal` knows more digits
        return min(float(text), MOST_SECONDS)  # a number with very many digits is infinite
    try:
        moment = parsedate_to_datetime(text)
        aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return min(max((aware - datetime.now(UTC)).total_seconds(), 0.0), MOST_SECONDS)
    except (ValueError, TypeError, OverflowError):
        return 0.0
