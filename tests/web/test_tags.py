"""Tags that name models, through REST: nothing is drawn as words in silence."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.helpers.api import GOOD, create, post
from trainer.studio.rows import Services

pytest_plugins = ("tests.helpers.web",)

CASE = {  # a tag of ../shared/cases/04-lora-tag-not-read -> what the refusal names
    "<lora:1:0.8:0.5>": "<lora:1:0.8>: there is no LoRA with this id, token or title",
    "<lora:1:0.375:ALL>": "<lora:1:0.375:ALL>: the weight must be a number",
    "<lora:1:1:lbw=IN02>": "<lora:1:1:lbw=IN02>: the weight must be a number",
    "<LORA:nosuch:1>": "<lora:nosuch>: there is no LoRA",
    "<lora:nosuch:1": "<lora:nosuch:1: it has no closing >",
    "<lyco:nosuch:1>": "<lora:nosuch>: there is no LoRA",
    "<lora:a:b:0.8>": "<lora:a:b>: there is no LoRA",
    "< lora:nosuch:1>": "<lora:nosuch>: there is no LoRA",
    "<lora:nosuch:1>": "<lora:nosuch>: there is no LoRA",
    "<FaceID:nosuch:1>": "<faceid:nosuch>: there is no faceid tune nosuch",
    "<faceid:1:1:lbw=IN02>": "<faceid:1:1:lbw=IN02>: the weight must be a number",
}


def ask(client: TestClient, text: str, **more: Any) -> Any:
    return client.post("/tunes/1/prompts", json={"prompt": {"text": text, "num_images": 1, "steps": 1} | more})


@pytest.fixture
def tune(client: TestClient) -> TestClient:
    create(client, "Rex: the dog")
    return client


def test_a_tag_that_cannot_be_used_is_refused_by_name(tune: TestClient) -> None:
    for tag, told in CASE.items():
        answer = ask(tune, f"ohwx dog {tag}")
        assert answer.status_code == 422 and list(answer.json()) == ["text"], tag
        assert answer.json()["text"][0].startswith(told), answer.json()
    assert "a tag has one weight, as <lora:1:0.5>" in ask(tune, "a <lora:1:0.8:0.5>").json()["text"][0]
    assert tune.get("/prompts").json() == []


@pytest.mark.parametrize(
    "tag",
    [
        "<LORA:1:0.5>",
        "<lyco:1:0.5>",
        "< lora : 1 : 0.5 >",
        "<lora:1:0,5>",
        "<lora:Rex: the dog:0.5>",
        "<LoRA: ohwx:.5>",
    ],
)
def test_a_tag_that_is_understood_works_without_a_warning(tune: TestClient, services: Services, tag: str) -> None:
    answer = ask(tune, f"ohwx dog {tag}")
    assert (answer.status_code, answer.json()["warnings"], answer.json()["tunes"]) == (201, [], [1])
    row = services.store.find("prompts")[0]
    assert row["named"] == [["lora", 1, 0.5]] and (row["parsed"] or {})["text"] == "ohwx dog"


def test_a_tag_that_names_no_model_is_left_out_with_a_warning(tune: TestClient, services: Services) -> None:
    answer = ask(tune, "<lora...> ohwx woman holding flowers")  # the product document's sample
    assert answer.status_code == 201
    assert answer.json()["warnings"] == ["<lora...> names no model and was left out of the prompt"]
    assert (services.store.find("prompts")[0]["parsed"] or {})["text"] == "ohwx woman holding flowers"


def test_a_tag_in_negative_prompt_is_named(tune: TestClient) -> None:
    told = ask(tune, "ohwx dog", negative_prompt="blurry <lora:1:1>")
    assert told.status_code == 201 and "<lora:1> in negative_prompt has no effect" in told.json()["warnings"][0]
    refused = ask(tune, "ohwx dog", negative_prompt="blurry <lora:1:1")
    assert refused.status_code == 422 and list(refused.json()) == ["negative_prompt"]
    assert ask(tune, "ohwx dog", negative_prompt="blurry <3").json()["warnings"] == []


def test_the_prompts_of_a_tune_have_the_same_grammar(client: TestClient) -> None:
    fields = [one for one in GOOD if one[0] != "tune[title]"] + [("tune[title]", "Bob")]
    for tag, told in (CASE | {"<lroa:1:1>": "<lroa:1:1>: there is no tag 'lroa'"}).items():
        answer = post(client, [*fields, ("tune[prompts_attributes][][text]", f"ohwx dog {tag}")])
        assert answer.status_code == 422 and list(answer.json()) == ["prompts_attributes"], tag
        assert answer.json()["prompts_attributes"][0].startswith(f"0.text: {told}"), answer.json()
    made = post(client, [*fields, ("tune[prompts_attributes][][text]", "ohwx dog <LYCO: Bob :0.5>")])
    assert made.status_code == 201 and made.json()["prompts"][0]["warnings"] == []
