"""A soak of the running app: many verbs, in an order that a seed decides, and kills at any moment between them."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.helpers.app import App, wait_for
from tests.helpers.receiver import ReceiverServer

STEPS = 20
MOST_WAITING = 5  # tunes or prompts in the queue; more, and nearly every verb would meet one that waits
KILL_SECONDS = 4.0  # a kill comes at any moment of so many
PATIENCE_S = 900.0  # until all is done that was asked for; nothing is measured by it
ENDED = ("trained", "rendered", "failed", "canceled")
WAITING = ("queued", "training", "rendering")


class Size(NamedTuple):
    """How many there are of each act."""

    tune: int
    prompt: int
    kill: int
    cancel: int
    resume: int
    delete: int
    delete_prompt: int


class Act(NamedTuple):
    """What is done, and to which tune or prompt: a number of those that were asked for before, from 0."""

    verb: str
    target: int = 0
    seconds: float = 0.0  # until a kill comes


@dataclass
class Plan:
    """The acts of a soak, drawn one after the other; only the seed decides them."""

    draw: random.Random
    acts: list[Act] = field(default_factory=list)
    tunes: list[int] = field(default_factory=list)  # that are not to be deleted so far
    canceled: list[int] = field(default_factory=list)
    prompts: dict[int, int] = field(default_factory=dict)  # likewise; number -> its tune
    asked: Counter[str] = field(default_factory=Counter)

    def add(self, verb: str) -> bool:
        """The next act; False where there is nothing yet for it to act on."""
        number = self.asked[verb]
        if verb == "tune":
            self.acts.append(Act(verb, number))
            self.tunes.append(number)
        elif verb == "kill":
            self.acts.append(Act(verb, seconds=self.draw.uniform(0.0, KILL_SECONDS)))
        elif verb == "prompt" and self.tunes:
            self.prompts[number] = self._recent(self.tunes)
            self.acts.append(Act(verb, self.prompts[number]))
        elif verb == "cancel" and self.tunes:
            self.canceled.append(self._recent(self.tunes))
            self.acts.append(Act(verb, self.canceled[-1]))
        elif verb == "resume" and self.canceled:
            self.acts.append(Act(verb, self._recent(self.canceled)))
        elif verb == "delete" and len(self.tunes) > 1:
            self._delete(self._recent(self.tunes))
        elif verb == "delete_prompt" and self.prompts:
            number = self._recent(list(self.prompts))
            del self.prompts[number]
            self.acts.append(Act(verb, number))
        else:
            return False
        self.asked[verb] += 1
        return True

    def _recent(self, numbers: list[int]) -> int:
        """One of the last few: those that are not yet done."""
        return self.draw.choice(numbers[-MOST_WAITING:])

    def _delete(self, tune: int) -> None:
        self.acts.append(Act("delete", tune))
        self.tunes.remove(tune)
        self.canceled = [one for one in self.canceled if one != tune]
        self.prompts = {number: of for number, of in self.prompts.items() if of != tune}


def plan(seed: int, size: Size) -> Plan:
    """The acts of a soak."""
    draw = random.Random(seed)  # no secret
    others = [verb for verb, count in size._asdict().items() if verb != "tune" for _ in range(count)]
    draw.shuffle(others)
    verbs = [(draw.random(), verb) for verb in others]
    verbs += [(number / size.tune, "tune") for number in range(size.tune)]  # all along
    planned, too_early = Plan(draw), []
    for _, verb in sorted(verbs):
        too_early = [early for early in [*too_early, verb] if not planned.add(early)]
    return planned


@dataclass
class Soak:
    """The acts done to a running app, and what came of them. A request that a kill cuts off is sent again."""

    outputs: Path
    options: list[str]
    receiver: ReceiverServer
    photos: list[Path]
    ids: dict[str, list[int]] = field(default_factory=lambda: {"tune": [], "prompt": []})  # 0: it was refused
    canceled: set[int] = field(default_factory=set)  # tunes, by their ids
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    kills: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.killer: threading.Timer | None = None
        self.app = self.start()

    def start(self) -> App:
        return App(self.outputs, *self.options, TUNEBOOTH_PRIVATE_URLS="allow").ready()

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """An answer, if need be of the app's next run."""
        while True:
            with self.lock:
                app = self.app
            try:
                return app.http.request(method, path, **more)
            except httpx.TransportError:
                wait_for(lambda app=app: app.process.poll() is not None)  # only a kill is an excuse
                with self.lock:
                    self.kills += 1
                    self.app = self.start()

    def do(self, act: Act) -> None:
        """One act, when the queue is not too long for it."""
        if act.verb == "kill":
            self.join_killer()
            self.killer = threading.Timer(act.seconds, self.kill)
            self.killer.start()
        else:
            self.wait_until(lambda: max(self.waiting()) < MOST_WAITING)
            getattr(self, act.verb)(act.target)

    def kill(self) -> None:
        with self.lock:  # not while it starts: that would only make the soak longer
            self.app.kill()

    def join_killer(self) -> None:
        """Wait for the kill that is to come, and for the app's next run: each kill is to meet a living app."""
        if self.killer is not None:
            self.killer.join()
            self.ask("GET", "/health")

    def tune(self, number: int) -> None:
        data = {"title": f"soak {number}", "name": "dog", "branch": "fast", "steps": str(STEPS)}
        data |= {"args": "save_every=5 batch=1", "callback": self.receiver.url(f"tune/{number}")}
        files = [("tune[images][]", (photo.name, photo.read_bytes(), "image/png")) for photo in self.photos]
        fields = {f"tune[{key}]": value for key, value in data.items()}
        headers = {"Idempotency-Key": f"tune-{number}"}
        answer = self.ask("POST", "/tunes", data=fields, files=files, headers=headers)
        self.note("tune", answer, 200, 201)
        self.ids["tune"].append(answer.json()["id"])

    def prompt(self, tune: int) -> None:
        number = len(self.ids["prompt"])
        data = {"text": f"ohwx dog {number}", "num_images": "1", "steps": "4", "seed": "7"}
        data["callback"] = self.receiver.url(f"prompt/{number}")
        fields = {f"prompt[{key}]": value for key, value in data.items()}
        headers = {"Idempotency-Key": f"prompt-{number}"}
        answer = self.ask("POST", f"/tunes/{self.ids['tune'][tune]}/prompts", data=fields, headers=headers)
        self.note("prompt", answer, 200, 201, 422)  # 422: its tune is canceled
        self.ids["prompt"].append(answer.json()["id"] if answer.is_success else 0)

    def cancel(self, tune: int) -> None:
        tune_id = self.ids["tune"][tune]
        self.canceled.add(tune_id)
        self.note("cancel", self.ask("POST", f"/tunes/{tune_id}/cancel"), 200, 409)

    def resume(self, tune: int) -> None:
        self.note("resume", self.ask("POST", f"/tunes/{self.ids['tune'][tune]}/resume"), 200, 409)

    def delete(self, tune: int) -> None:
        self.remove("delete", f"/tunes/{self.ids['tune'][tune]}")

    def delete_prompt(self, number: int) -> None:
        if prompt_id := self.ids["prompt"][number]:
            self.remove("delete_prompt", f"/prompts/{prompt_id}")

    def remove(self, verb: str, path: str) -> None:
        kills, answer = self.kills, self.ask("DELETE", path)
        while answer.status_code == 409:  # the worker is slow to stop
            answer = self.ask("DELETE", path)
        self.note(verb, answer, *((200, 404) if self.kills > kills else (200,)))

    def note(self, verb: str, answer: httpx.Response, *expected: int) -> None:
        assert answer.status_code in expected, (verb, answer.status_code, answer.text)
        self.statuses[verb, answer.status_code] += 1

    def rows(self, path: str) -> list[dict[str, Any]]:
        """All tunes, or all prompts."""
        found: list[dict[str, Any]] = []
        while page := self.ask("GET", path, params={"limit": 100, "offset": len(found)}).raise_for_status().json():
            found += page
        return found

    def waiting(self) -> tuple[int, int]:
        """How many tunes and prompts wait or run, of the newest."""
        rows = self.ask("GET", "/tunes", params={"limit": 2 * MOST_WAITING}).raise_for_status().json()
        prompts = [prompt for row in rows for prompt in row["prompts"]]
        return sum(row["status"] in WAITING for row in rows), sum(one["status"] in WAITING for one in prompts)

    def finish(self) -> None:
        """Wait until all is done that was asked for, and all callbacks have arrived."""
        self.join_killer()
        self.wait_until(lambda: self.waiting() == (0, 0))
        self.wait_until(
            lambda: all(one["status"] in ENDED for path in ("/tunes", "/prompts") for one in self.rows(path))
        )
        self.wait_until(
            lambda: all(one["arrived_at"] for row in self.rows("/tunes") for one in self.callbacks(row["id"]))
        )

    def callbacks(self, tune_id: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("GET", f"/tunes/{tune_id}/callbacks").raise_for_status().json()
        return found

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, self.rows("/tunes")
            time.sleep(0.5)  # answers take time from the worker
