"""Packs: the three that come along, who gets which prompts, and packs made of tunes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from hypothesis import example, given
from hypothesis import strategies as st

from trainer.config import branch_file, resolve
from trainer.contract.errors import InvalidRequest
from trainer.contract.fields import parse_request
from trainer.contract.prompts import PromptRequest
from trainer.contract.tunes import TuneRequest
from trainer.studio import pack_file, packs
from trainer.studio.pack_file import Pack
from trainer.web.html import cards

PRESETS = Path(__file__).parents[2] / "presets"
FILES = sorted((PRESETS / "packs").glob("*.toml"))
SHIPPED = {file.stem: pack_file.load(tomllib.loads(file.read_text("utf-8")), file.stem) for file in FILES}
HOSTILE = "<script>alert('x')</script>\" onload=\"alert(1)\" & 'ä"

TABLE: dict[str, Any] = {
    "title": "Pets",
    "description": "At home.",
    "branch": "flux1",
    "base_tune_id": 3063697,
    "model_type": "lora",
    "preset": "flux-lora-focus",
    "args": "rank=8",
    "steps": 500,
    "face_crop": False,
    "classes": ["Dog", "cat"],
    "defaults": {"num_images": 4, "w": 512, "h": 768, "super_resolution": True},
    "prompts": [
        {"text": "{subject} in the snow, {{colour}}", "seed": 7},
        {"text": "a {name} called {token}", "classes": ["DOG"], "num_images": 2},
        {"text": "{subject} on a sofa", "classes": ["cat"], "aspect_ratio": "16:9"},
    ],
}


def changed(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in (TABLE | values).items() if value is not None}


@pytest.fixture(scope="module")
def pack() -> Pack:
    return pack_file.load(TABLE, "pets")


def refusal(call: Any, *args: Any, **values: Any) -> dict[str, list[str]]:
    with pytest.raises(InvalidRequest) as caught:
        call(*args, **values)
    return caught.value.problems


# Those that come along


def test_three_packs_come_along() -> None:
    assert sorted(SHIPPED) == ["headshots", "pet-portraits", "product-shots"]


@pytest.mark.parametrize("slug", SHIPPED)
def test_a_pack_that_comes_along_can_be_trained_and_rendered(slug: str) -> None:
    pack = SHIPPED[slug]
    assert pack.parameters["model_type"] in branch_file.model_types(PRESETS, pack.branch)
    name = "teapot" if pack.classes == ("*",) else pack.classes[0]
    asked = packs.tune_request(pack, {"name": name, "title": "x", "image_urls": ["https://a.b"]}, pack.branch, "ohwx")
    assert len(parse_request(TuneRequest, asked).prompts_attributes) == len(asked["prompts_attributes"])
    method = branch_file.method_of(PRESETS, pack.branch, asked["model_type"])
    resolve.resolve(
        PRESETS, branch=pack.branch, model_type=method, preset=asked.get("preset"), name=name, photos=10, steps=None,
        args=None,
    )  # fmt: skip  # raises where the preset is not for this


@pytest.mark.parametrize("slug", SHIPPED)
def test_its_prompts_are_worth_sending(slug: str) -> None:
    pack = SHIPPED[slug]
    for one in pack.classes:
        prompts = packs.prompts_for(pack, "teapot" if one == "*" else one, "ohwx")
        assert 8 <= len(prompts) <= 12, one
        texts = [prompt["text"] for prompt in prompts]
        assert len(set(texts)) == len(texts)
        for prompt in prompts:
            request = parse_request(PromptRequest, prompt)
            assert request.ignored == {} and request.num_images == 4
            assert re.search(
                rf"\bohwx {'teapot' if one == '*' else one}\b", request.text[:60]
            )  # CLIP heeds it most there
            assert len(request.text.replace(",", " , ").split()) < 55  # of CLIP's 75 tokens
            assert re.search(r"light|sun|softbox|lamp|glow|key|lights", request.text)
            assert not set("{}<>()[]\\\n") & set(request.text) and "--" not in request.text
            assert (request.negative_prompt is None) == (
                not branch_file.render_config(PRESETS, pack.branch).negative_prompt
            )


def test_faces_are_drawn_again_only_where_there_are_some() -> None:
    drawn = {slug: pack.defaults.get("inpaint_faces", False) for slug, pack in SHIPPED.items()}
    assert drawn == {"headshots": True, "pet-portraits": False, "product-shots": False}
    assert SHIPPED["headshots"].defaults["super_resolution"]  # which that needs


# Classes


@pytest.mark.parametrize(
    ("classes", "name", "expected"),
    [
        (["dog"], "dog", "dog"),
        (["dog"], " DOG ", "dog"),
        (["Old  Dog", "dog"], "old dog", "old dog"),
        (["dog"], "golden retriever dog", "dog"),
        (["dog"], "dog house", None),
        (["dog"], "cat", None),
        (["dog", "*"], "cat", "*"),
        (["*", "dog"], "dog", "dog"),
        (["person"], "woman", "person"),
        (["person", "woman"], "young woman", "woman"),
        (["woman"], "man", None),
        (["woman"], "person", None),
        (["person"], "dog", None),
        (["animal"], "kitten", "animal"),
        (["pet", "dog"], "cat", "pet"),
        (["style"], "comic style", "style"),
        (["person"], "   ", None),
    ],
)
def test_class_of(classes: list[str], name: str, expected: str | None) -> None:
    made = pack_file.load(changed(classes=classes, prompts=[{"text": "{subject}"}]), "pets")
    assert packs.class_of(made, name) == expected


def test_each_class_gets_its_prompts(pack: Pack) -> None:
    dog = packs.prompts_for(pack, "Dog", "ohwx")
    shared = {"w": 512, "h": 768, "super_resolution": True}
    assert dog == [
        {"text": "ohwx Dog in the snow, {{colour}}", "num_images": 4, "seed": 7, **shared},
        {"text": "a Dog called ohwx", "num_images": 2, **shared},
    ]
    cat = packs.prompts_for(pack, "cat", None)  # of a face, which has no token
    assert [prompt["text"] for prompt in cat] == ["cat in the snow, {{colour}}", "cat on a sofa"]
    assert cat[1] == {"text": "cat on a sofa", "num_images": 4, "super_resolution": True, "aspect_ratio": "16:9"}


def test_a_class_that_the_pack_lacks(pack: Pack) -> None:
    assert refusal(packs.prompts_for, pack, "horse", "ohwx") == {
        "name": ["the pack Pets has prompts for cat, dog, not for 'horse'"]
    }


def test_prompt_ids(pack: Pack) -> None:
    assert [one["seed"] for one in packs.prompts_for(pack, "cat", "ohwx", prompt_ids=[1])] == [7]
    assert packs.prompts_for(pack, "cat", "ohwx", prompt_ids=[3, 1]) == packs.prompts_for(pack, "cat", "ohwx")
    assert refusal(packs.prompts_for, pack, "cat", "ohwx", prompt_ids=[1, 2, 9]) == {
        "prompt_ids": ["the pack Pets has for 'cat' the prompts 1, 3, not 2, 9"]
    }


# What a request may change


def test_attributes_of_the_request_go_over_all(pack: Pack) -> None:
    asked = {"num_images": "1", "seed": None, "super_resolution": "", "film_grain": "true", "callback": "https://a.b/c"}
    for prompt in packs.prompts_for(pack, "dog", "ohwx", asked):
        given = {key: value for key, value in prompt.items() if key not in ("text", "w", "h")}
        assert given == {"num_images": 1, "film_grain": True, "callback": "https://a.b/c"}
        assert (prompt["w"], prompt["h"]) == (512, 768)


def test_a_ratio_takes_the_place_of_width_and_height(pack: Pack) -> None:
    for name in ("aspect_ratio", "ar"):
        for prompt in packs.prompts_for(pack, "cat", "ohwx", {name: "1:1"}):
            assert {key for key in pack_file.SIZES if key in prompt} == {name}
    first, second = packs.prompts_for(pack, "cat", "ohwx", {"w": 640})
    assert (first["w"], first["h"]) == (640, 768)
    assert (second["w"], second["aspect_ratio"]) == (640, "16:9")  # the height follows from both


def test_what_attributes_of_the_request_cannot_be(pack: Pack) -> None:
    assert refusal(packs.prompts_for, pack, "dog", "ohwx", {"text": "mine"}) == {
        "prompt_attributes": ["text is each prompt's own; send prompts of yours as prompts_attributes"]
    }
    problems = refusal(packs.prompts_for, pack, "horse", "ohwx", {"num_image": 2, "seed": -2})
    assert problems.keys() == {"name", "prompt_attributes"}  # all at once
    assert problems["prompt_attributes"] == [
        "seed must be at least -1, got -2",
        "num_image unknown parameter (did you mean 'num_images'?)",
    ]


def test_a_request_with_a_pack(pack: Pack) -> None:
    mine = {"text": "ohwx dog, my own"}
    data = {"name": "dog", "title": "Rex", "prompts_attributes": [mine], "prompt_attributes": {"num_images": 1},
            "args": "", "prompt_ids": ["2"], "steps": 20}  # fmt: skip
    asked = packs.tune_request(pack, data, "flux1", "ohwx")
    prompts = asked.pop("prompts_attributes")
    assert asked == {
        "name": "dog", "title": "Rex", "branch": "flux1", "base_tune_id": 3063697, "model_type": "lora",
        "preset": "flux-lora-focus", "steps": 20, "face_crop": False,
    }  # fmt: skip
    assert [(one["text"], one.get("num_images")) for one in prompts] == [("a dog called ohwx", 1), (mine["text"], None)]


@pytest.mark.parametrize(
    ("data", "branch", "expected"),
    [
        ({"branch": "fast"}, "fast", {"branch": "fast"}),
        ({"branch": "sd15", "model_type": "lora"}, "sd15", {"branch": "sd15", "model_type": "lora"}),
        ({"base_tune_id": 690204}, "sd15", {"base_tune_id": 690204}),
        ({"base_tune_id": 1504944, "steps": 9}, "flux1",
         {"base_tune_id": 1504944, "model_type": "lora", "preset": "flux-lora-focus", "args": "rank=8", "steps": 9}),
        ({"model_type": "pti"}, "flux1", {"branch": "flux1", "base_tune_id": 3063697, "model_type": "pti"}),
        ({"base_tune_id": None, "preset": None}, "flux1",
         {"branch": "flux1", "model_type": "lora", "args": "rank=8", "steps": 500}),
    ],
)  # fmt: skip
def test_what_belongs_to_another_branch_is_left_out(pack: Pack, data: Any, branch: str, expected: Any) -> None:
    asked = packs.tune_request(pack, {"name": "dog", "title": "Rex", **data}, branch, "ohwx")
    del asked["prompts_attributes"]
    assert asked == {"name": "dog", "title": "Rex", "face_crop": False, **expected}
    assert packs.asked_base(pack, data) == (asked.get("base_tune_id"), asked.get("branch"))


def test_the_token_of_a_request(pack: Pack) -> None:
    def first(**data: Any) -> str:
        asked = packs.tune_request(pack, {"name": "dog", "title": "Rex", **data}, "flux1", "sks")
        return str(asked["prompts_attributes"][0]["text"]).partition(" in")[0]

    assert first() == "sks dog"
    assert first(token="zwx") == "zwx dog"
    assert first(model_type="faceid") == "dog"
    own = pack_file.load(changed(token="qq"), "pets")
    assert packs.tune_request(own, {"name": "dog"}, "flux1", "sks")["prompts_attributes"][1]["text"].endswith("qq")


def test_what_a_request_with_a_pack_cannot_be(pack: Pack) -> None:
    def refused(**data: Any) -> Any:
        return refusal(packs.tune_request, pack, {"name": "dog", "title": "Rex", **data}, "flux1", "ohwx")

    assert refused(prompt_attribute={}) == {
        "prompt_attribute": ["unknown parameter (did you mean 'prompt_attributes'?)"]
    }
    assert refused(name="horse").keys() == {"name"}
    assert refused(prompt_ids=[0]) == {"prompt_ids": ["0: must be at least 1, got 0"]}
    assert refused(prompt_ids=3) == {"prompt_ids": ["must be a list"]}
    assert refused(prompt_attributes=[]).keys() == {"prompt_attributes"}
    assert refused(base_tune_id="flux").keys() == {"base_tune_id"}
    assert refused(tune_ids=[1]).keys() == {"tune_ids"}
    for wrong in ({"name": 5}, {"name": None}, {"prompts_attributes": "x"}):  # what POST /tunes refuses, in its words
        asked = packs.tune_request(pack, {"name": "dog", "title": "Rex", **wrong}, "flux1", "ohwx")
        assert refusal(parse_request, TuneRequest, asked).keys() == wrong.keys()


def test_a_request_for_a_tune_that_is_there(pack: Pack) -> None:
    data = {"tune_ids": ["12"], "title": "Rex", "name": "Dog", "prompt_ids": [1], "prompt_attributes": {"seed": 1}}
    assert packs.asked_tune(data) == 12
    assert packs.prompt_requests(pack, data, "dog", "ohwx") == packs.prompts_for(pack, "dog", "ohwx", {"seed": 1}, [1])
    assert packs.asked_tune({"title": "Rex", "tune_ids": []}) is None
    assert refusal(packs.asked_tune, {"tune_ids": [1, 2]}) == {
        "tune_ids": ["takes one tune, got 2; send the request once for each"]
    }
    needless = refusal(packs.asked_tune, {"tune_ids": [1], "steps": 5, "branch": "fast", "preset": ""})
    assert needless.keys() == {"steps", "branch"}
    assert refusal(packs.prompt_requests, pack, {"name": "cat"}, "dog", "ohwx") == {
        "name": ["the tune is of a dog, not of 'cat'; leave name out"]
    }


def test_describe(pack: Pack) -> None:
    told = packs.describe(pack, "ohwx")
    prompts = told.pop("prompts")
    assert told == {
        "slug": "pets", "title": "Pets", "description": "At home.", "branch": "flux1", "model_type": "lora",
        "preset": "flux-lora-focus", "base_tune_id": 3063697, "classes": ["dog", "cat"],
    }  # fmt: skip
    for name, listed in prompts.items():
        assert [{"id": one["id"]} for one in listed] == [{"id": 1}, {"id": 2 if name == "dog" else 3}]
        sent = packs.prompts_for(pack, name, "ohwx")
        assert [{key: one[key] for key in one if key != "id"} for one in listed] == sent
    any_ = packs.describe(SHIPPED["product-shots"], "ohwx")["prompts"]["*"]
    assert all("ohwx {name}" in one["text"] for one in any_)


# Broken ones


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"titel": "x"}, "unknown key 'titel' (did you mean 'title'?)"),
        ({"title": None}, "title is required"),
        ({"title": "a\nb"}, "title must not contain line breaks"),
        ({"branch": None}, "branch is required"),
        ({"branch": " "}, "branch is required"),
        ({"branch": "flux"}, "branch unknown branch 'flux' (did you mean 'flux1'?)"),
        ({"model_type": "loar"}, "unknown model_type 'loar' (did you mean 'lora'?)"),
        ({"steps": "many"}, "steps must be a whole number"),
        ({"description": 5}, "description must be a text"),
        ({"classes": None}, "classes must be a list of class names"),
        ({"classes": "dog"}, "classes must be a list of class names"),
        ({"classes": ["dog", "cat", "d_g"]}, "classes: 'd_g' is no class name"),
        ({"classes": ["dog", "cat", "cow"], "prompts": TABLE["prompts"][1:]}, "no prompt is for the class 'cow'"),
        ({"defaults": []}, "defaults must be a table, [defaults]"),
        ({"defaults": {"num_image": 2}}, "defaults: unknown attribute 'num_image' (did you mean 'num_images'?)"),
        ({"defaults": {"num_images": 9}}, "defaults: num_images must be at most 8, got 9"),
        ({"defaults": {"text": "x"}}, "defaults: unknown attribute 'text'"),
        ({"defaults": {"callback": "https://a.b"}}, "defaults: callback is of a request, and not of a pack"),
        ({"prompts": None}, "prompts must be one or more tables, [[prompts]]"),
        ({"prompts": []}, "prompts must be one or more tables, [[prompts]]"),
        ({"prompts": [{"seed": 1}]}, "prompt 1: text is required"),
        ({"prompts": [{"text": " "}]}, "prompt 1: text is required"),
        ({"prompts": [{"text": "x"}, {"text": 5}]}, "prompt 2: text is required"),
        ({"prompts": [{"text": "a {subjct}"}]}, "prompt 1: unknown {subjct} in its text (did you mean 'subject'?)"),
        ({"prompts": [{"text": "<lora:x:much>"}]}, "prompt 1: text <lora:x:much>: the weight must be a number"),
        ({"prompts": [{"text": "x", "classes": ["dgo"]}]},
         "'dgo' is not among the pack's classes (did you mean 'dog'?)"),
        ({"prompts": [{"text": "x", "w": 100}]}, "prompt 1: base w must be a multiple of 8"),
        ({"prompts": [{"text": "x", "input_image": "a.png"}]}, "prompt 1: input_image is of a request"),
        ({"prompts": [{"text": "\x01"}]}, "prompt 1: text must not contain control characters"),
        ({"prompts": [{"text": "x" * 10_001}]}, "prompt 1: text must have at most 10000 characters"),
    ],
)  # fmt: skip
def test_a_broken_pack_says_why(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        pack_file.load(changed(**values), "pets")


def test_all_that_is_wrong_is_reported_at_once_and_a_name_must_fit_an_address() -> None:
    with pytest.raises(ValueError) as caught:
        pack_file.load({"titel": "x", "classes": ["*"], "prompts": [{"text": "x", "sed": 1}]}, "My Pack")
    for part in ("'titel'", "title is required", "branch is required", "'sed'", "got 'My Pack'"):
        assert part in str(caught.value)


def test_texts_with_braces_of_their_own_stay() -> None:
    text = "{a|b} {{name}} { subject } {subject}s {other thing} {42}"
    made = pack_file.load(changed(prompts=[{"text": text}], classes=["*"]), "pets")
    filled = packs.prompts_for(made, "dog", "ohwx")[0]["text"]
    assert filled == text.replace("{subject}s", "ohwx dogs")


# Packs made of tunes

TUNE = {
    "id": 12, "title": "Jane", "token": "ohwx", "name": "woman", "branch": "flux1", "method": "lora",
    "model_type": None, "preset": "flux-lora-portrait", "base_tune_id": 1504944, "steps": None, "face_crop": 0,
    "training_face_correct": 1, "args": "steps=300 lr=0.0005",
}  # fmt: skip


def test_a_pack_of_a_tune() -> None:
    prompts = [
        {"text": "<lora:12:0.8> portrait of ohwx  Woman, OHWX smiles", "num_images": 4, "seed": 7, "w": 512, "h": 512,
         "callback": "https://a.b/secret", "negative_prompt": None},
        {"text": "ohwx woman, <lora:film:0.3>, a woman behind", "num_images": 4, "seed": 8, "w": 512, "h": 512,
         "aspect_ratio": "1:1", "input_image_url": "https://a.b/jane.png", "controlnet": "pose",
         "denoising_strength": 0.5, "lora_scale": 0.5},
        {"text": "ohwx woman, <lora:film:0.3>, a woman behind", "num_images": 4, "seed": 8, "w": 512, "h": 512,
         "aspect_ratio": "1:1", "lora_scale": 0.5},
    ]  # fmt: skip
    written = pack_file.to_toml("Jane's set", TUNE, prompts, args="rank=8")
    assert "a.b" not in written and "lr=0.0005" not in written
    assert tomllib.loads(written) == {
        "title": "Jane's set", "branch": "flux1", "base_tune_id": 1504944, "model_type": "lora",
        "preset": "flux-lora-portrait", "args": "rank=8", "face_crop": False, "training_face_correct": True,
        "classes": ["woman"], "defaults": {"num_images": 4},
        "prompts": [
            {"text": "portrait of {subject}, {token} smiles", "seed": 7, "w": 512, "h": 512, "lora_scale": 0.8},
            {"text": "{subject}, <lora:film:0.3>, a woman behind", "seed": 8, "w": 512, "h": 512,
             "aspect_ratio": "1:1", "lora_scale": 0.5},
        ],
    }  # fmt: skip


def test_characteristics_and_names_of_other_models_are_no_subject() -> None:
    text = "{{ohwx woman}} {{ ohwx }} <lora:ohwx woman in film:0.5> ohwxy ohwx womanly"
    assert pack_file.placed(text, "ohwx", "woman") == text.removesuffix("ohwx womanly") + "{token} womanly"


def test_a_pack_of_a_face() -> None:
    face = TUNE | {"method": "faceid", "token": None, "preset": None, "training_face_correct": 0, "face_crop": None}
    written = pack_file.to_toml("Jane", face, [{"text": "<faceid:12:0.7> womanly woman and a woman, <lora:12:1>"}])
    made = pack_file.load(tomllib.loads(written), "jane")
    assert made.prompts[0].text == "womanly {subject} and a woman, <lora:12:1>"
    assert made.parameters == {"branch": "flux1", "base_tune_id": 1504944, "model_type": "faceid"}
    assert packs.prompts_for(made, "woman", None)[0]["text"].startswith("womanly woman and")


def test_a_pack_of_a_tune_on_fast_names_no_base() -> None:
    written = pack_file.to_toml("Jane", TUNE | {"branch": "fast", "face_crop": None}, [{"text": "x"}], placeholder=True)
    made = pack_file.load(tomllib.loads(written), "jane")
    assert made.parameters == {"branch": "fast", "model_type": "lora", "training_face_correct": True}


def test_a_prompt_that_only_names_its_tune_shows_the_subject() -> None:
    assert tomllib.loads(pack_file.to_toml("Jane", TUNE, [{"text": "<lora:ohwx:1>"}]))["prompts"] == [
        {"text": "{subject}"}
    ]


def test_what_no_pack_can_be_made_of() -> None:
    assert refusal(pack_file.to_toml, "Jane", TUNE, []).keys() == {"prompts"}
    assert refusal(pack_file.to_toml, "a\nb", TUNE, [{"text": "x"}]) == {"pack": ["title must not contain line breaks"]}
    assert refusal(pack_file.to_toml, "Jane", TUNE, [{"text": "a \ud800"}]).keys() == {"pack"}


PIECES = [
    "ohwx woman", "ohwx", "woman", "{", "}", "{{", "}}", "<", ">", "<lora:12:1>", "<lora:5:.5>", " ", ", ", "\\", '"',
    "'''", '"""', "\n", "\t", "\r", "\x7f", "\x85", "\u2028", "#", "=", "--mask_prompt ", "é", "\U0001f600",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), min_size=1, max_size=12).map("".join)
ATTRIBUTES = st.fixed_dictionaries({}, optional={
    "seed": st.integers(0, 2), "num_images": st.sampled_from([1, 4]), "cfg_scale": st.sampled_from([1e-05, 3.0, 15.0]),
    "w": st.sampled_from([512, 768]), "h": st.sampled_from([512, 768]), "aspect_ratio": st.sampled_from(["1:1", "4:5"]),
    "negative_prompt": TEXTS, "film_grain": st.booleans(), "lora_scale": st.sampled_from([0.5, -1.0]),
})  # fmt: skip


def accepted(prompt: dict[str, Any]) -> bool:
    """Whether the API took this prompt, and its text names no place of a pack."""
    try:
        parse_request(PromptRequest, prompt)
    except InvalidRequest:
        return False
    return not pack_file.PLACE.search(prompt["text"]) and not prompt["text"].isspace()


@given(
    st.text(min_size=1, max_size=20), TEXTS, st.lists(st.builds(dict, ATTRIBUTES, text=TEXTS), min_size=1, max_size=4)
)
@example("T", "", [{"text": "a {ohwx woman} b"}, {"text": "{{ohwx woman}}"}, {"text": "{ohwx woman, b}"}])
@example("T", "", [{"text": "a", "w": 512, "h": 512}, {"text": "b", "w": 512, "h": 512, "aspect_ratio": "1:1"}])
def test_a_written_pack_sends_what_its_tune_was_sent(title: str, description: str, prompts: list[Any]) -> None:
    prompts = [prompt for prompt in prompts if accepted(prompt)] or [{"text": "ohwx woman"}]
    try:
        written = pack_file.to_toml(title, TUNE, prompts, description=description)
    except InvalidRequest as invalid:  # a title or a weight that no request can have, either
        assert "title" in str(invalid) or "lora_scale" in str(invalid)
        return
    table = tomllib.loads(written.encode().decode())
    made = pack_file.load(table, pack_file.slug_of(title))
    assert made == pack_file.load(tomllib.loads(tomlkit.dumps(table)), made.slug)
    assert (made.title, made.description) == (title, description)
    expected = []
    for prompt in prompts:
        request = parse_request(PromptRequest, prompt).model_dump(exclude_none=True)
        text = re.sub("(?i)ohwx\\s+woman", "ohwx woman", re.sub("(?i)ohwx", "ohwx", prompt["text"]))
        if "<lora:12:1>" in text:
            text = re.sub(r" {2,}", " ", text.replace("<lora:12:1>", "")).strip()
            request.pop("lora_scale", None)
        expected.append(request | {"text": text or "ohwx woman"})
    sent = packs.prompts_for(made, "woman", "ohwx")
    assert all(one in expected for one in sent) and all(one in sent for one in expected)


@given(st.text(max_size=300))
def test_slugs_are_file_names(title: str) -> None:
    slug = pack_file.slug_of(title)
    assert pack_file.SLUG.fullmatch(slug) and not slug.startswith("-") and pack_file.slug_of(slug) == slug
    taken = {slug}
    for _ in range(11):
        taken.add(pack_file.free_slug(title, taken))
    assert len(taken) == 12 and all(pack_file.SLUG.fullmatch(one) for one in taken)


def test_slugs() -> None:
    assert pack_file.slug_of("  Jane & Joe: Ärzte, Größe 5!") == "jane-joe-arzte-grosse-5"
    assert pack_file.slug_of("写真") == "pack" and pack_file.slug_of("../../etc") == "etc"
    assert pack_file.free_slug("Pets", {"cats"}) == "pets"
    assert pack_file.free_slug("Pets", {"pets", "pets-2"}) == "pets-3"
    assert pack_file.free_slug("x" * 99, {"x" * 64}) == "x" * 62 + "-2"


# The page


def test_cards() -> None:
    html = cards([packs.describe(pack, "ohwx") for pack in SHIPPED.values()])
    assert html.count("<article") == html.count("</article>") == 3
    for pack in SHIPPED.values():
        assert pack.title in html and pack.description in html and f'data-pack="{pack.slug}"' in html
    assert ">woman</b>" in html and ">anything</b>" in html and ">11 prompts<" in html and "10 to 12" not in html
    assert "No packs yet" in cards([])


def test_cards_escape_what_users_wrote() -> None:
    made = packs.describe(pack_file.load(changed(title=HOSTILE, description=HOSTILE), "pets"), "ohwx")
    html = cards([made, {"slug": HOSTILE, "error": HOSTILE}])
    assert "<script" not in html and 'onload="' not in html and html.count("&lt;script&gt;") == 5
    assert "2 prompts" in html
    one = pack_file.load(changed(classes=["dog"], prompts=[{"text": "x"}]), "one")
    assert "1 prompt<" in cards([packs.describe(one, "ohwx")])
