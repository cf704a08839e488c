"""A prompt's text is parsed once, and the result survives its row."""

from __future__ import annotations

import json

import pytest

from trainer.contract import parsed_text, prompts
from trainer.contract.errors import InvalidRequest
from trainer.contract.flags import Flags
from trainer.contract.parsed_text import ParsedText, parse_text
from trainer.contract.prompts import PromptRequest, prompt_of

TEXT = "<lora:film look:0.5> a red <faceid:7> dog --mask_prompt the dog --mask_blur 4 --mask_invert --unknown 3"
ROW = {
    "text": TEXT, "negative_prompt": None, "num_images": 1, "seed": None, "steps": None, "cfg_scale": None, "w": None,
    "h": None, "callback": None, "attributes": {}, "parsed": None,
}  # fmt: skip


def test_text_models_and_flags_are_parted() -> None:
    parsed = parse_text(TEXT)
    assert parsed.text == "a red dog"
    assert parsed.models == (("lora", "film look", 0.5), ("faceid", "7", 1.0))
    assert parsed.flags == Flags(mask_prompt="the dog", mask_blur=4.0, mask_invert=True)
    assert len(parsed.warnings) == 1 and "unknown" in parsed.warnings[0]


def test_a_row_holds_what_was_parsed_without_its_warnings() -> None:
    parsed = parse_text(TEXT)
    again = parsed_text.of_row(json.loads(json.dumps(parsed_text.as_row(parsed))))
    assert again == ParsedText(parsed.text, parsed.models, parsed.flags)


def test_a_flag_of_zero_is_kept() -> None:
    parsed = parse_text("a dog --face_inpaint_denoising 0 --mask_blur 0")
    assert parsed_text.of_row(parsed_text.as_row(parsed)).flags == Flags(face_inpaint_denoising=0.0, mask_blur=0.0)


def test_a_flag_of_a_later_version_is_left_out() -> None:
    row = {"text": "a dog", "models": [], "flags": {"mask_blur": 2.0, "of_a_later_version": 1}}
    assert parsed_text.of_row(row).flags == Flags(mask_blur=2.0)


def test_a_request_parses_its_text_once_and_a_row_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def spy(text: str) -> ParsedText:
        asked.append(text)
        return parse_text(text)

    monkeypatch.setattr(prompts, "parse_text", spy)
    request = PromptRequest(text=TEXT)
    assert request.parsed is request.parsed and asked == [TEXT]
    row = ROW | {"parsed": parsed_text.as_row(request.parsed)}
    assert prompt_of(row).parsed.models == request.parsed.models and asked == [TEXT]
    assert prompt_of(ROW).parsed.text == "a red dog" and asked == [TEXT, TEXT]  # a row of an older version


@pytest.mark.parametrize("weight", ["11", "much"])
def test_a_weight_that_cannot_be_is_refused(weight: str) -> None:
    with pytest.raises(InvalidRequest, match="the weight must be"):
        parse_text(f"<lora:1:{weight}> a dog")
