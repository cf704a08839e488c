"""One list of parameters, whichever door a request comes through: the product document's."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import gradio as gr
import pytest

from tests.helpers.shared import SHARED
from trainer.contract.prompts import PromptRequest
from trainer.contract.tunes import Tune, TuneRequest
from trainer.studio.rows import Services
from trainer.web.form import PROMPT_FIELDS, Form
from trainer.web.page import build
from trainer.web.prompt_form import START_FIELDS
from trainer.web.rest import create_app

pytest_plugins = ("tests.helpers.web",)

DOCUMENT = SHARED / "reference" / "create-a-tune.txt"
OURS = ["args", "prompts_callback"]  # parameters that the document does not have
ENDPOINTS = [
    "/create_tune", "/submit_tune", "/get_tune", "/list_tunes", "/cancel_tune", "/resume_tune", "/delete_tune",
    "/create_prompt", "/get_prompt", "/list_prompts", "/delete_prompt", "/list_base_tunes",
    "/list_presets", "/check_photos",
]  # fmt: skip


@pytest.fixture(scope="module")
def document() -> str:
    """The hosted service's page on creating a tune."""
    if not DOCUMENT.exists():
        pytest.skip("../shared/reference is not on this machine")
    return DOCUMENT.read_text("utf-8")


@pytest.fixture
def published(services: Services) -> dict[str, Any]:
    """What Gradio tells of the endpoints that it serves."""
    info = build(services).get_api_info()
    assert info is not None and not info["unnamed_endpoints"]
    return dict(info["named_endpoints"])


def documented(page: str) -> list[str]:
    """The names in the section `Parameters`: each stands on a line of its own before `(required)` or `(optional)`."""
    lines = page.partition("\nParameters\n")[2].partition("\nReturns\n")[0].splitlines()
    return [name for name, mark in pairwise(lines) if mark in ("(required)", "(optional)")]


def body_fields(services: Services, path: str, root: str) -> dict[str, list[str]]:
    """The parameters that the OpenAPI document names for a POST, for each kind of body."""
    content = create_app(services).openapi()["paths"][path]["post"]["requestBody"]["content"]
    return {kind: list(body["schema"]["properties"][root]["properties"]) for kind, body in content.items()}


def test_a_request_has_the_document_s_parameters_and_ours(document: str) -> None:
    assert documented(document)[:3] == ["name", "title", "images"]
    assert TuneRequest.parameters() == documented(document) + OURS


def test_what_is_required_is_what_the_document_requires(document: str) -> None:
    required = [name for name, field in TuneRequest.model_fields.items() if field.is_required()]
    for name in required:
        assert f"\n{name}\n(required)\n" in document
    assert required == ["name", "title"]  # images and image_urls: one of the two, which jobs.py checks


def test_a_tune_answers_the_document_s_keys_in_its_order(document: str) -> None:
    sample = json.loads(document.partition("\nResponse\n")[2])
    assert list(Tune.model_fields)[: len(sample)] == list(sample)


def test_the_gradio_endpoints_take_the_same_parameters(published: dict[str, Any]) -> None:
    for endpoint in ("/create_tune", "/submit_tune"):
        taken = published[endpoint]["parameters"]
        assert [one["parameter_name"] for one in taken] == TuneRequest.parameters()
        assert all(one["parameter_has_default"] for one in taken)  # what is missing is told by us, all at once
    taken = published["/create_prompt"]["parameters"]
    assert [one["parameter_name"] for one in taken] == ["tune_id", *PromptRequest.parameters()]


def test_the_page_s_form_has_the_same_parameters(services: Services) -> None:
    with gr.Blocks():
        form = Form(services)
    assert sorted(form.fields) == sorted(TuneRequest.parameters())  # in an order of its own
    shown = ["text", *PROMPT_FIELDS, *START_FIELDS]
    elsewhere = ["callback", "ar", "lora_scale", "face_swap", "input_image_url", "mask_image_url"]  # for programs
    assert sorted([*shown, *elsewhere]) == sorted(PromptRequest.parameters())
    # Captions, which are files to the API, and the pack, which is part of the address.
    assert len(form.inputs) == len(form.fields) + len(PROMPT_FIELDS) + 3


def test_the_openapi_document_names_the_same_parameters(services: Services) -> None:
    tune = body_fields(services, "/tunes", "tune")
    prompt = body_fields(services, "/tunes/{tune_id}/prompts", "prompt")
    assert tune.keys() == prompt.keys() == {"application/json", "multipart/form-data"}
    assert all(names == TuneRequest.parameters() for names in tune.values())
    assert all(names == PromptRequest.parameters() for names in prompt.values())


def test_gradio_publishes_what_is_approved_and_nothing_else(published: dict[str, Any]) -> None:
    assert sorted(published) == sorted(ENDPOINTS)
