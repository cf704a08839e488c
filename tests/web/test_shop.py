"""A shop's story: two customers, one constant title, other photos and callbacks; each gets their own model and call."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.app import post, running, wait_for
from tests.helpers.receiver import ReceiverServer

TITLE = "headshot-user"  # as code in public repositories posts it for everybody
ASKED = {"name": "dog", "branch": "fast", "steps": 3, "args": "batch=1"}


@pytest.mark.long
def test_each_customer_of_a_shop_has_a_model_of_their_own(
    tmp_path: Path, dog_photos: Callable[[int], list[Path]]
) -> None:
    photos = dog_photos(4)
    receiver = ReceiverServer()
    threading.Thread(target=receiver.serve_forever, args=(0.01,), daemon=True).start()
    hook = receiver.url("").rstrip("/")
    (outputs := tmp_path / "outputs").mkdir()
    with running(outputs) as app:
        app.ready()
        # Two customers at the same shop: the same title, their own photos and callbacks.
        first = post(app, TITLE, photos[:2], **ASKED, callback=f"{hook}/customer/1")
        second = post(app, TITLE, photos[2:], **ASKED, callback=f"{hook}/customer/2")
        assert (first.status_code, second.status_code) == (201, 201)
        ids = first.json()["id"], second.json()["id"]
        assert ids[0] != ids[1] and any(f"tune {ids[0]} has the same title" in one for one in second.json()["warnings"])
        # The shop's server did not get the answer, and sends the request once more.
        again = post(app, TITLE, photos[:2], **ASKED, callback=f"{hook}/customer/1")
        assert (again.status_code, again.json()["id"]) == (200, ids[0])
        # A third one is canceled, and comes back.
        third = post(app, TITLE, photos[:1], **ASKED, callback=f"{hook}/customer/3").json()["id"]
        app.http.post(f"/tunes/{third}/cancel")
        fourth = post(app, TITLE, photos[:1], **ASKED, callback=f"{hook}/customer/3")
        assert fourth.status_code == 201 and fourth.json()["id"] not in (*ids, third)

        base = next(row["id"] for row in app.http.get("/gallery/tunes", params={"branch": "fast"}).json())
        ask = {"num_images": 1, "steps": 2, "seed": 7}
        posted = [
            app.http.post(
                f"/tunes/{base}/prompts",
                json={"prompt": ask | {"text": f"<lora:{tune}:1> ohwx dog", "callback": f"{hook}/prompt/{tune}"}},
            ).json()
            for tune in ids
        ]
        tunes = [wait_for(lambda tune=tune: ended(app, f"/tunes/{tune}")) for tune in (*ids, fourth.json()["id"])]
        done = [wait_for(lambda one=one: ended(app, f"/prompts/{one['id']}")) for one in posted]
        assert [tune["status"] for tune in tunes] == ["trained"] * 3
        assert [prompt["tune_id"] for prompt in done] == [base, base]
        models = [app.http.get(tune["ckpt_url"]).content for tune in tunes[:2]]
        pictures = [app.http.get(prompt["images"][0]).content for prompt in done]
        assert models[0] != models[1] and pictures[0] != pictures[1]

        def called() -> dict[str, list[int]] | None:
            told: dict[str, list[int]] = {}
            for path, _, content in list(receiver.taken):
                body = json.loads(content)
                entity = body.get("tune") or body["prompt"]
                told.setdefault(path, []).append(entity["id"])
            return told if len(told) == 5 and len(told["/customer/3"]) == 2 else None

        told = wait_for(called)
    receiver.shutdown()
    assert told["/customer/1"] == [ids[0]] and told["/customer/2"] == [ids[1]]
    assert sorted(told["/customer/3"]) == sorted([third, fourth.json()["id"]])
    assert [told[f"/prompt/{tune}"] for tune in ids] == [[prompt["id"]] for prompt in posted]


def ended(app: Any, path: str) -> dict[str, Any] | None:
    answer = app.http.get(path).json()
    return answer if answer["status"] in ("trained", "rendered", "failed", "canceled") else None
