"""`args` and seeds through REST, as people write them (../shared/cases/12-args-spelling)."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.helpers.api import GOOD, create, post

pytest_plugins = ("tests.helpers.web",)


def asked(client: TestClient, args: str) -> Any:
    return post(client, [*GOOD, ("tune[args]", args)])


@pytest.mark.parametrize(
    ("args", "held"),
    [
        ("rank=4,lr=1e-4", "rank=4 lr=0.0001"),
        ("rank=4, lr=1e-4", "rank=4 lr=0.0001"),
        ("lr=0,0001", "lr=0.0001"),
        ("resolution=512, 768", "resolution=512,768"),
        ("learning_rate=1e-4", "lr=0.0001"),
        ("network_dim=32", "rank=32"),
    ],
)
def test_the_words_of_the_case_are_understood(client: TestClient, args: str, held: str) -> None:
    answer = asked(client, args)
    assert answer.status_code == 201, answer.text
    assert set(held.split()) <= set(answer.json()["args"].split())


def test_a_warm_up_longer_than_the_run_is_refused(client: TestClient) -> None:
    answer = asked(client, "warmup_steps=100000")
    assert answer.status_code == 422
    assert answer.json() == {"args": ["warmup_steps=100000 is longer than the run of 128 steps"]}
    assert asked(client, "warmup_steps=128").status_code == 201


def test_a_value_that_cannot_be_read_is_said_in_our_words(client: TestClient) -> None:
    answer = asked(client, "rank=4/lr=1e-4")
    assert answer.status_code == 422
    (message,) = answer.json()["args"]
    assert message.startswith("rank must be a whole number, got '4/lr=1e-4'; words are separated by blanks or commas")


def test_a_drawn_seed_is_in_the_answer(client: TestClient) -> None:
    answer = asked(client, "seed=random")
    assert answer.status_code == 201 and re.search(r"\bseed=\d+\b", answer.json()["args"])
    create(client, "Bob")
    prompts = [
        client.post("/tunes/1/prompts", json={"prompt": {"text": "ohwx dog", "num_images": 1, "seed": seed}}).json()
        for seed in (-1, "-1", "random", " Random ")
    ]
    drawn = [prompt["seed"] for prompt in prompts]
    assert len(set(drawn)) > 1 and all(0 <= seed < 2**32 for seed in drawn)
    assert client.get(f"/prompts/{prompts[0]['id']}").json()["seed"] == drawn[0]
    assert client.post(f"/prompts/{prompts[0]['id']}/duplicate", json={}).json()["seed"] == drawn[0]
    for seed, told in ((-2, "must be at least -1, got -2"), ("some", "must be a whole number")):
        refused = client.post("/tunes/1/prompts", json={"prompt": {"text": "ohwx dog", "seed": seed}})
        assert refused.status_code == 422 and refused.json() == {"seed": [told]}
