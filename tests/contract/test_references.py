"""The tags that name models in a prompt's text: one grammar, and nothing is drawn as words in silence."""

from __future__ import annotations

import pytest

from trainer.contract.errors import InvalidRequest
from trainer.contract.references import references

UNDERSTOOD = {  # tag -> the model that it names
    "<lora:nosuch>": ("lora", "nosuch", 1.0),
    "<lora:nosuch:>": ("lora", "nosuch", 1.0),
    "<lora:nosuch:0.8>": ("lora", "nosuch", 0.8),
    "<LORA:NoSuch:1>": ("lora", "NoSuch", 1.0),
    "<LoRA:nosuch:-.5>": ("lora", "nosuch", -0.5),
    "<lyco:nosuch:0.8>": ("lora", "nosuch", 0.8),
    "<Lyco:nosuch>": ("lora", "nosuch", 1.0),
    "< lora:nosuch:1>": ("lora", "nosuch", 1.0),
    "<lora : no such : 0.5 >": ("lora", "no such", 0.5),
    "<lora:\nnosuch:\r\n1>": ("lora", "nosuch", 1.0),
    "<<lora:nosuch:1>>": ("lora", "nosuch", 1.0),
    "<lora:nosuch:0,8>": ("lora", "nosuch", 0.8),
    "<lora:a:b:0.8>": ("lora", "a:b", 0.8),
    "<lora:Rex: the dog:1>": ("lora", "Rex: the dog", 1.0),
    "<lora:1:0.8:0.5>": ("lora", "1:0.8", 0.5),  # no LoRA has this name, unless one has this title
    "<FaceID: 7 :1>": ("faceid", "7", 1.0),
    "<faceid:a:b:1>": ("faceid", "a:b", 1.0),
}
NAMELESS = (
    "<lora...>", "<lora…>", "<lora>", "<lora:>", "<lora::0.8>", "<LORA: ... :1>", "<faceid>", "<lyco...>", "< lora >",
    "<lora", "<lora:", "<faceid...",
)  # fmt: skip
REFUSED = {  # tag -> a part of the message
    "<lora:1:0.375:ALL>": "weights of single blocks (ALL) cannot be used here",
    "<lora:1:1:lbw=IN02>": "weights of single blocks (lbw=IN02)",
    "<faceid:1:1:lbw=IN02>": "weights of single blocks",
    "<lora:nosuch:1": "it has no closing >",
    "<faceid:nosuch:1": "it has no closing >",
    "<lora:nosuch:much>": "the weight must be a number",
    "<lora:nosuch:80%>": "the weight must be a number",
    "<lora:Rex: the dog>": "write the weight as well: <lora:Rex: the dog:1>",
    "<lora:nosuch:1:>": "the weight must be a number",
    "<lora:nosuch:11>": "the weight must be from -10 to 10",
    "<lora=nosuch:1>": "write <lora:NAME:WEIGHT>",
    "<lora nosuch 1>": "write <lora:NAME:WEIGHT>",
    "<lora-nosuch>": "write <lora:NAME:WEIGHT>",
    "<hypernet:nosuch:1>": "hypernet tags cannot be used here",
    "<lroa:nosuch:1>": "there is no tag 'lroa' (did you mean 'lora'?)",
    "<loras:nosuch:0.5>": "there is no tag 'loras'",
    "<face_id:7:1>": "(did you mean 'faceid'?)",
}
WORDS = ("I <3 dogs", "<b>dog</b>", "at <time: 10:30>", "a lora: painting", "<flora:roses>", "a < b > c", "<Lorain>")


@pytest.mark.parametrize("tag", UNDERSTOOD)
def test_a_tag_that_can_be_understood_names_its_model(tag: str) -> None:
    assert references(f"ohwx dog {tag} in snow") == ("ohwx dog in snow", [UNDERSTOOD[tag]], [])


@pytest.mark.parametrize("tag", NAMELESS)
def test_a_tag_without_a_name_is_left_out_with_a_warning(tag: str) -> None:
    text, models, warnings = references(f"{tag} ohwx dog" if tag.endswith(">") else f"ohwx dog {tag}")
    assert (text, models) == ("ohwx dog", [])
    assert warnings == [f"{tag} names no model and was left out of the prompt"]


def test_an_unclosed_tag_without_a_name_leaves_the_prompt() -> None:
    assert references("<lora ohwx dog")[0] == references("<lora... ohwx dog")[0] == "ohwx dog"


@pytest.mark.parametrize("tag", REFUSED)
def test_a_tag_with_a_name_that_cannot_be_read_is_refused_by_name(tag: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        references(f"ohwx dog {tag}")
    (message,) = refused.value.problems["text"]
    assert message.startswith(f"{tag}: ") and REFUSED[tag] in message


def test_each_tag_is_read_by_itself() -> None:
    with pytest.raises(InvalidRequest) as refused:
        references("<lora:a:1> <lora:b:x> <lora:c <lyco:d:99>")
    assert [message.partition(": ")[0] for message in refused.value.problems["text"]] == [
        "<lora:b:x>", "<lora:c", "<lyco:d:99>",
    ]  # fmt: skip


@pytest.mark.parametrize("text", WORDS)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert references(text) == (text, [], [])
