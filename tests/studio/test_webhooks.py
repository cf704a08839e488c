"""Callbacks: each arrives at least once, whatever the receiver does and whenever the app dies, and says who sent it."""

from __future__ import annotations

import base64
import hmac
import json
import random
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr, ValidationError
from standardwebhooks.webhooks import Webhook

from tests.helpers.app import running
from tests.helpers.receiver import FAULTS, PATIENCE, Receiver, ReceiverServer, wait_for
from tests.helpers.web import client_of, photo
from trainer.clock import stamp
from trainer.photos import urls
from trainer.settings import read_settings
from trainer.studio import tunes, webhooks
from trainer.studio.rows import Services
from trainer.studio.webhooks import WebhookSender, next_delay

pytest_plugins = ("tests.helpers.web",)
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


@pytest.fixture
def receiver() -> Iterator[ReceiverServer]:
    server = ReceiverServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours are parts of a second."""
    monkeypatch.setattr(webhooks, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(webhooks, "DELAYS", (0.05,) * 10)
    monkeypatch.setattr(urls, "ANSWER_SECONDS", 0.5)


@pytest.fixture
def postman(services: Services, hurry: None) -> Iterator[WebhookSender]:
    postman = WebhookSender(services)
    postman.start()
    yield postman
    postman.close()


def create(client: TestClient, title: str = "Rex", **fields: str) -> dict[str, Any]:
    form = {f"tune[{key}]": value for key, value in {"title": title, "name": "dog", "branch": "fast", **fields}.items()}
    answer = client.post("/tunes", data=form, files={"tune[images][]": ("a.png", photo())})
    assert answer.status_code == 201, answer.text
    tune: dict[str, Any] = answer.json()
    return tune


def end_next(services: Services, status: str, **values: Any) -> None:
    """What the worker does when the oldest job has ended so."""
    job = services.store.claim()
    assert job is not None
    services.store.finish(job, status, **values)


def arrived(services: Services, tune_id: int) -> bool:
    return all(callback.arrived_at for callback in tunes.list_callbacks(services, tune_id))


# What is posted


@pytest.mark.parametrize("status", ["trained", "failed"])
def test_a_tune_that_ends_is_posted(
    status: str, services: Services, client: TestClient, postman: WebhookSender, receiver: ReceiverServer
) -> None:
    tune = create(client, callback=receiver.url("hook?user=1&x=%7B%7D"))
    end_next(services, status, error="out of memory" if status == "failed" else None)
    wait_for(lambda: receiver.taken)
    ((path, headers, body),) = receiver.taken
    assert path == "/hook?user=1&x=%7B%7D"  # as it was given
    assert headers["content-type"] == "application/json" and "webhook-signature" not in headers
    posted = json.loads(body)["tune"]
    told = client.get(f"/tunes/{tune['id']}").json()
    assert posted.keys() == told.keys() and posted["id"] == tune["id"]
    assert (posted["status"], posted["error"]) == (status, told["error"])
    wait_for(lambda: arrived(services, tune["id"]))


def test_a_tune_that_is_canceled_while_it_waits_is_posted(
    services: Services, client: TestClient, postman: WebhookSender, receiver: ReceiverServer
) -> None:
    tune = create(client, callback=receiver.url("hook"))
    client.post(f"/tunes/{tune['id']}/cancel")
    wait_for(lambda: receiver.taken)
    assert json.loads(receiver.taken[0][2])["tune"]["status"] == "canceled"


def test_prompts_are_posted_each_and_all_at_their_end(
    services: Services, client: TestClient, postman: WebhookSender, receiver: ReceiverServer
) -> None:
    prompts = {f"prompts_attributes][{n}][{key}": value for n in (0, 1) for key, value in {
        "text": f"ohwx dog {n}", "callback": receiver.url(f"prompt{n}")}.items()}  # fmt: skip
    tune = create(client, prompts_callback=receiver.url("prompts"), **prompts)
    end_next(services, "trained")
    end_next(services, "rendered", files=["0.png"])
    wait_for(lambda: len(receiver.taken) == 1)
    end_next(services, "failed", error="no memory")
    wait_for(lambda: len(receiver.taken) == 3)
    posted = {path: json.loads(body) for path, _, body in receiver.taken}
    assert len(posted["/prompt0"]["prompt"]["images"]) == 1
    assert posted["/prompt1"]["prompt"]["user_error"] == "no memory"
    assert [one["status"] for one in posted["/prompts"]["prompts"]] == ["rendered", "failed"]
    more = {"prompt": {"text": "ohwx dog later"}}
    assert client.post(f"/tunes/{tune['id']}/prompts", json=more).status_code == 201
    end_next(services, "rendered")
    time.sleep(0.3)
    assert len(receiver.taken) == 3  # all that came with the tune were told of already


def test_nothing_is_posted_where_nothing_was_asked(services: Services, client: TestClient) -> None:
    tune = create(client)
    end_next(services, "trained")
    assert tunes.list_callbacks(services, tune["id"]) == []
    assert client.post(f"/tunes/{tune['id']}/callbacks").status_code == 409
    assert client.get("/tunes/99/callbacks").status_code == 404


def test_a_callback_can_be_sent_again(
    services: Services, client: TestClient, postman: WebhookSender, receiver: ReceiverServer
) -> None:
    tune = create(client, callback=receiver.url("hook"))
    end_next(services, "trained")
    wait_for(lambda: tunes.list_callbacks(services, tune["id"]) and arrived(services, tune["id"]))
    assert client.post(f"/tunes/{tune['id']}/callbacks").status_code == 200
    wait_for(lambda: len(receiver.taken) == 2)
    first, second = (headers["webhook-id"] for _, headers, _ in receiver.taken)
    assert first == second


def test_a_deleted_tune_is_not_posted(services: Services, client: TestClient, receiver: ReceiverServer) -> None:
    tune = create(client, callback=receiver.url("hook"))
    end_next(services, "trained")
    (due,) = services.store.waiting_callbacks()
    client.delete(f"/tunes/{tune['id']}")
    webhooks.attempt(services, due)
    assert receiver.taken == [] and services.store.waiting_callbacks() == []


# Faults


@pytest.mark.parametrize("fault", FAULTS)
def test_a_receiver_that_fails_at_first_gets_it_in_the_end(
    fault: str, services: Services, client: TestClient, postman: WebhookSender, receiver: ReceiverServer
) -> None:
    tune = create(client, callback=receiver.url(fault))
    end_next(services, "trained")
    wait_for(lambda: tunes.list_callbacks(services, tune["id"])[0].arrived_at)
    (told,) = tunes.list_callbacks(services, tune["id"])
    assert told.attempts == 3 and told.answer == "answered 200" and told.due_at is None
    assert receiver.tries[f"/{fault}"] == 3 and len(receiver.taken) == 1
    assert not receiver.tries["/elsewhere"]


def test_a_receiver_that_is_not_there_yet_gets_it_when_it_is(
    services: Services, client: TestClient, postman: WebhookSender
) -> None:
    late = ReceiverServer()
    port = late.server_port
    late.server_close()
    tune = create(client, callback=f"http://127.0.0.1:{port}/hook")
    end_next(services, "trained")
    wait_for(lambda: tunes.list_callbacks(services, tune["id"])[0].answer == "cannot be reached")
    again = ThreadingHTTPServer(("127.0.0.1", port), Receiver, bind_and_activate=False)
    again.allow_reuse_address = True
    again.server_bind()
    again.server_activate()
    again.failures, again.tries, again.taken = 0, Counter(), []  # type: ignore[attr-defined]
    again.before_answer = lambda path: None  # type: ignore[attr-defined]
    threading.Thread(target=again.serve_forever, args=(0.01,), daemon=True).start()
    wait_for(lambda: tunes.list_callbacks(services, tune["id"])[0].arrived_at)
    again.shutdown()
    again.server_close()


def test_one_that_hangs_does_not_block_others(
    services: Services,
    client: TestClient,
    postman: WebhookSender,
    receiver: ReceiverServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(urls, "ANSWER_SECONDS", 30.0)
    receiver.failures = 100
    create(client, "first", callback=receiver.url("hang"))
    create(client, "second", callback=receiver.url("hook"))
    end_next(services, "trained")
    end_next(services, "trained")
    wait_for(lambda: receiver.taken)
    assert receiver.taken[0][0] == "/hook"
    receiver.closing.set()


def test_it_stops_after_a_day_and_where_the_receiver_wants_no_more(
    services: Services, client: TestClient, receiver: ReceiverServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 86_400 < sum(webhooks.DELAYS) < 1.2 * 86_400
    receiver.failures = 100
    monkeypatch.setitem(FAULTS, "410", lambda one: one.fail(410))
    gone = create(client, "gone", callback=receiver.url("410"))
    broken = create(client, "broken", callback=receiver.url("500"))
    end_next(services, "trained")
    end_next(services, "trained")
    for _ in range(len(webhooks.DELAYS) + 2):
        for due in services.store.waiting_callbacks():
            webhooks.attempt(services, due)
    told = {id_: tunes.list_callbacks(services, id_)[0] for id_ in (gone["id"], broken["id"])}
    assert (told[gone["id"]].attempts, told[gone["id"]].due_at) == (1, None)
    assert (told[broken["id"]].attempts, told[broken["id"]].due_at) == (len(webhooks.DELAYS) + 1, None)
    assert told[broken["id"]].answer == "answered 500" and told[broken["id"]].arrived_at is None


def test_a_receiver_may_ask_for_patience() -> None:
    assert 5 <= (next_delay(0, None) or 0) <= 5.5
    assert next_delay(0, "100") == 100
    assert next_delay(0, "999999") == 86_400
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=300))
    assert 295 < (next_delay(0, date) or 0) <= 300
    assert (next_delay(0, "soon") or 0) < 6
    assert next_delay(len(webhooks.DELAYS), "100") is None


@pytest.mark.parametrize(
    "retry_after", ["Fri, 31 Dec 99999999999999999999 23:59:59 GMT", "Fri, 31 Dec 9999 23:59:59 GMT", "9" * 5000]
)
def test_a_receiver_that_asks_for_centuries_gets_no_more_posts_than_any_other(
    retry_after: str,
    services: Services,
    client: TestClient,
    postman: WebhookSender,
    receiver: ReceiverServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(webhooks, "MOST_SECONDS", 0.05)
    monkeypatch.setitem(FAULTS, "far", lambda one: one.fail(503, Retry_After=retry_after))
    receiver.failures = 100
    tune = create(client, callback=receiver.url("far"))
    end_next(services, "trained")
    wait_for(lambda: tunes.list_callbacks(services, tune["id"])[0].due_at is None)
    wait_for(lambda: tunes.list_callbacks(services, tune["id"])[0].answer)
    (told,) = tunes.list_callbacks(services, tune["id"])
    assert told.attempts == receiver.tries["/far"] == len(webhooks.DELAYS) + 1
    assert told.answer == "answered 503"


def test_a_callback_that_cannot_be_made_is_not_tried_for_ever(
    services: Services,
    client: TestClient,
    postman: WebhookSender,
    receiver: ReceiverServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Counter[str]()

    def broken(*_: object) -> dict[str, object]:
        asked["entity"] += 1
        raise OSError("a side file is broken")

    monkeypatch.setattr(webhooks, "entity", broken)
    tune = create(client, callback=receiver.url("hook"))
    end_next(services, "trained")
    lost = "could not be posted; the log says why"
    wait_for(lambda: (one := tunes.list_callbacks(services, tune["id"])[0]).due_at is None and one.answer == lost)
    assert asked["entity"] == len(webhooks.DELAYS) + 1
    assert not receiver.tries


def test_what_was_under_way_when_the_app_ended_counts_and_comes_again(
    services: Services, client: TestClient, hurry: None, receiver: ReceiverServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> tuple[int, None]:
        raise KeyboardInterrupt

    tune = create(client, callback=receiver.url("hook"))
    end_next(services, "trained")
    (due,) = services.store.waiting_callbacks()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(webhooks, "post", killed)
        webhooks.attempt(services, due)
    (told,) = tunes.list_callbacks(services, tune["id"])
    assert (told.attempts, told.answer) == (1, None) and str(told.due_at) > str(due["due_at"])
    next_process = WebhookSender(services)
    next_process.start()
    wait_for(lambda: arrived(services, tune["id"]))
    next_process.close()
    assert tunes.list_callbacks(services, tune["id"])[0].attempts == 2 and len(receiver.taken) == 1


def test_a_post_that_is_under_way_is_not_doubled_when_it_is_to_be_sent_again(
    services: Services, client: TestClient, postman: WebhookSender, receiver: ReceiverServer
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hold(path: str) -> None:
        begun.set()
        go_on.wait(PATIENCE)

    receiver.before_answer = hold
    tune = create(client, callback=receiver.url("hook"))
    end_next(services, "trained")
    assert begun.wait(PATIENCE)
    for _ in range(2):
        assert client.post(f"/tunes/{tune['id']}/callbacks").status_code == 200
    go_on.set()
    wait_for(lambda: arrived(services, tune["id"]))
    time.sleep(5 * webhooks.POLL_SECONDS)
    assert len(receiver.taken) == 1 and services.store.waiting_callbacks() == []
    client.post(f"/tunes/{tune['id']}/callbacks")
    wait_for(lambda: len(receiver.taken) == 2)


def test_one_row_is_posted_once_whoever_reads_it(
    services: Services, client: TestClient, hurry: None, receiver: ReceiverServer
) -> None:
    create(client, callback=receiver.url("hook"))
    end_next(services, "trained")
    (due,) = services.store.waiting_callbacks()
    assert [webhooks.attempt(services, due) is None for _ in range(3)] == [False, True, True]
    assert len(receiver.taken) == 1


# Clocks


def test_a_callback_that_a_wrong_clock_wrote_waits_no_longer_than_was_planned(
    services: Services, client: TestClient, hurry: None, receiver: ReceiverServer
) -> None:
    first, second = (create(client, title, callback=receiver.url(title))["id"] for title in ("first", "second"))
    end_next(services, "trained")
    end_next(services, "trained")
    next_year = stamp(datetime.now(UTC) + timedelta(days=365))
    with services.store.transaction() as db:
        db.execute("UPDATE callbacks SET due_at = ?", (next_year,))  # the first was never tried: it was due at once
        tried = "UPDATE callbacks SET attempts = 3, delay = 0.1, answer = 'answered 500' WHERE tune_id = ?"
        db.execute(tried, (second,))
    next_process = WebhookSender(services)
    next_process.start()
    wait_for(lambda: arrived(services, first) and arrived(services, second))
    next_process.close()


class Clock:
    """A system clock that anybody sets, and a monotonic one that nobody does."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.wall = datetime(2026, 5, 1, tzinfo=UTC)
        self.monotonic = 1000.0
        clock = self

        class Time(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return clock.wall

        patch.setattr(webhooks, "datetime", Time)
        patch.setattr(webhooks, "time", SimpleNamespace(monotonic=lambda: clock.monotonic))

    def pass_(self, seconds: float) -> None:
        self.monotonic += seconds
        self.wall += timedelta(seconds=seconds)


def fuzzed_answer(chance: random.Random, clock: Clock) -> tuple[int, str | None, float]:
    """Status and Retry-After of an answer, and the seconds that it asks for at least."""
    status = chance.choices((200, 204, 410, 301, 429, 500, 503), (2, 1, 2, 10, 30, 30, 30))[0]
    number = 10 ** chance.uniform(0, 12)
    moments = clock.wall + timedelta(seconds=min(number, 10**11) * chance.choice((1, -0.01)))
    left = (moments - clock.wall).total_seconds()
    garbage = "".join(chance.choice("0123456789 :,-+/GMTDec\u0663\u00b2\x00") for _ in range(chance.randrange(40)))
    retry_after, seconds = chance.choice((
        (None, 0.0), (str(int(number)), int(number)), ("9" * 6000, 1e9), (f"-{int(number)}", 0.0), (garbage + "x", 0.0),
        (format_datetime(moments), left - 1), (format_datetime(moments).replace("+0000", "GMT"), left - 1),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 1e9), ("Fri, 31 Dec 99999999999999999999 23:59:59 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 +99999999999999999", 0.0), ("120, 240", 0.0), ("\u0663\u0663", 0.0), ("1e9", 0.0),
    ))  # fmt: skip
    return status, retry_after, min(max(seconds, 0.0), webhooks.MOST_SECONDS)


@pytest.mark.parametrize("restarts", [False, True])
def test_no_answer_and_no_clock_make_posts_come_faster_or_for_ever(
    restarts: bool, services: Services, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,000 answers each. restarts: of the app, where the clock is set back only: nobody could tell a wait that is
    over from one that a clock set forward has skipped."""
    seed = 20260501 + restarts
    chance, clock, callbacks_ = random.Random(seed), Clock(monkeypatch), 550
    tune = create(client)
    with services.store.transaction() as db:
        db.execute("INSERT INTO callbacks (tune_id, kind, url, created_at, due_at) SELECT ?, 'tune', 'http://a', ?, ?"
                   f" FROM (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {callbacks_})"
                   " SELECT i FROM n)", (tune["id"], stamp(clock.wall), stamp(clock.wall)))  # fmt: skip
    with services.store.transaction() as db:
        db.commit()
        db.execute("PRAGMA synchronous=OFF")  # nobody pulls the plug here, and there are thousands of commits
        db.execute("BEGIN")
    posted: dict[int, list[float]] = defaultdict(list)
    earliest: dict[int, float] = {}  # when each may be posted next
    ended: set[int] = set()

    def answer(_: object, __: object, ___: object, headers: dict[str, str]) -> tuple[int, str | None]:
        number = int(headers["webhook-id"].rpartition("-")[2])
        assert number not in ended and clock.monotonic >= earliest.get(number, 0.0), seed
        status, retry_after, asked = fuzzed_answer(chance, clock)
        tries = len(posted[number])
        posted[number].append(clock.monotonic)
        if status in (200, 204, 410) or tries == len(webhooks.DELAYS):
            ended.add(number)
        else:
            earliest[number] = clock.monotonic + max(webhooks.DELAYS[tries], asked)
        return status, retry_after

    monkeypatch.setattr(webhooks, "post", answer)
    monkeypatch.setattr(webhooks, "entity", lambda *_: {})
    schedule, latest = webhooks.Schedule(), clock.monotonic + 13 * 86_400
    while waiting := services.store.waiting_callbacks():
        assert clock.monotonic < latest, f"{len(waiting)} have not ended; seed {seed}"
        for row in schedule.due(waiting):
            planned = webhooks.attempt(services, row)
            assert planned is not None
            schedule.plan(row, planned)
        clock.pass_(10 ** chance.uniform(0, 4.3))
        if chance.random() < 0.3:
            days = 10 ** chance.uniform(-4, 5)
            forward = not restarts and chance.random() < 0.5 and clock.wall.year < 2500
            if forward or clock.wall.year > 1900:
                clock.wall += timedelta(days=days if forward else -min(days, 36_500))
        if restarts and chance.random() < 0.05:
            schedule, latest = webhooks.Schedule(), latest + 86_400
    assert ended == posted.keys() and len(ended) == callbacks_
    assert sum(map(len, posted.values())) > 4000
    assert max(map(len, posted.values())) == len(webhooks.DELAYS) + 1


# Who sent it


def test_signatures_are_those_of_standard_webhooks(
    services: Services, client: TestClient, hurry: None, receiver: ReceiverServer
) -> None:
    signing = Services(
        services.settings.model_copy(update={"webhook_secret": SecretStr(SECRET)}),
        services.store,
        services.decoder,
        services.analyzer,
    )
    create(client_of(signing), callback=receiver.url("hook"))
    end_next(services, "trained")
    (due,) = services.store.waiting_callbacks()
    webhooks.attempt(signing, due)
    ((_, headers, body),) = receiver.taken
    assert Webhook(SECRET).verify(body.decode(), headers)["tune"]["title"] == "Rex"
    with pytest.raises(Exception, match="No matching signature"):
        Webhook("whsec_" + base64.b64encode(bytes(32)).decode()).verify(body.decode(), headers)
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    digest = hmac.new(bytes(range(32)), signed, "sha256").digest()  # by hand: who signs here is who checks above
    assert headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < PATIENCE


@pytest.mark.parametrize("secret", ["short", "whsec_", "not base64!" * 5])
def test_a_secret_that_is_none_is_refused_at_the_start(secret: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="openssl rand -base64 32"):
        read_settings(outputs=tmp_path / "o", models=tmp_path / "m", webhook_secret=secret)


# Restarts


@pytest.mark.long
def test_a_kill_between_the_sending_and_its_record_means_that_it_comes_again(
    tmp_path: Path, receiver: ReceiverServer, dog_photos: Callable[[int], list[Path]]
) -> None:
    (outputs := tmp_path / "outputs").mkdir()
    with running(outputs, "--models", str(tmp_path)) as app:
        app.ready()
        receiver.before_answer = lambda path: app.kill()  # it has arrived, and nobody hears of it
        form = {"tune[title]": "Rex", "tune[name]": "dog", "tune[branch]": "fast", "tune[steps]": "2"}
        files = [("tune[images][]", (one.name, one.read_bytes())) for one in dog_photos(1)]
        app.http.post("/tunes", data=form | {"tune[callback]": receiver.url("hook")}, files=files).raise_for_status()
        wait_for(lambda: app.process.poll() is not None)
    assert len(receiver.taken) == 1
    receiver.before_answer = lambda path: None
    with running(outputs, "--models", str(tmp_path)) as app:
        wait_for(lambda: len(receiver.taken) == 2)
        (first, second) = receiver.taken
        assert first[1]["webhook-id"] == second[1]["webhook-id"]
        assert json.loads(second[2])["tune"]["status"] == "trained"
        app.ready()
        wait_for(lambda: app.http.get("/tunes/1/callbacks").json()[0]["arrived_at"])


@pytest.mark.long
def test_a_clock_that_was_a_year_ahead_holds_up_no_callback_of_the_app(
    tmp_path: Path,
    receiver: ReceiverServer,
    dog_photos: Callable[[int], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    far = "Fri, 31 Dec 99999999999999999999 23:59:59 GMT"
    monkeypatch.setitem(FAULTS, "far", lambda one: one.fail(503, Retry_After=far))
    receiver.failures = 1
    (outputs := tmp_path / "outputs").mkdir()
    with running(outputs, "--models", str(tmp_path / "models")) as app:
        app.ready()
        form = {"tune[title]": "Rex", "tune[name]": "dog", "tune[branch]": "fast", "tune[steps]": "2"}
        files = [("tune[images][]", (one.name, one.read_bytes())) for one in dog_photos(1)]
        app.http.post("/tunes", data=form | {"tune[callback]": receiver.url("far")}, files=files).raise_for_status()
        wait_for(lambda: [one["answer"] for one in app.http.get("/tunes/1/callbacks").json()] == ["answered 503"])
    with closing(sqlite3.connect(outputs / "tunebooth.db")) as database, database:
        next_year = stamp(datetime.now(UTC) + timedelta(days=365))
        database.execute("UPDATE callbacks SET due_at = ?, attempts = 1, arrived_at = NULL", (next_year,))
    with running(outputs, "--models", str(tmp_path / "models")) as app:
        app.ready()
        wait_for(lambda: app.http.get("/tunes/1/callbacks").json()[0]["arrived_at"])
    assert receiver.tries["/far"] == 2 and len(receiver.taken) == 1
