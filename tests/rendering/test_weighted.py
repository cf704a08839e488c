"""use_lpw: weights and long texts, beside what the stock pipelines make of the same words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.branches.protocol import load_branch
from trainer.library.bases import Base
from trainer.methods import new_tokens
from trainer.rendering import weighted
from trainer.rendering.weighted import BREAK, encode, parse

KEYS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
FAMILIES = ["sd15", "sdxl1"]
CPU = torch.device("cpu")
LONG = " ".join(["a red dog"] * 43)  # 301 tokens for the tiny tokenizers, which know letters alone

Pipelines = Callable[[str], Any]


@pytest.fixture(scope="module")
def pipelines(tiny_sd15: Path, tiny_sdxl1: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipelines:
    """pipelines(family): its stock pipeline with random weights, loaded once."""
    folders, loaded = {"sd15": tiny_sd15, "sdxl1": tiny_sdxl1}, dict[str, Any]()

    def pipeline(family: str) -> Any:
        if family not in loaded:
            base = Base(1, family, family, path=folders[family])
            loaded[family] = load_branch(base, CPU, tmp_path_factory.mktemp("cache")).pipeline
            # A fresh layer norm leaves a mean of 0, which trained ones do not.
            norms = [m for name, m in loaded[family].text_encoder.named_modules() if name.endswith("final_layer_norm")]
            assert len(norms) == 1
            norms[0].bias.data += 0.3
        return loaded[family]

    return pipeline


def stock(pipeline: Any, text: str, negative: str | None = None) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(zip(KEYS, pipeline.encode_prompt(text, device=CPU, num_images_per_prompt=1,
                    do_classifier_free_guidance=True, negative_prompt=negative), strict=False))  # fmt: skip


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Bit for bit, and of the same number formats."""
    return ours.keys() == theirs.keys() and all(
        ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in ours
    )


# The syntax


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("a dog", [("a dog", 1.0)]),
        ("a (red) dog", [("a ", 1.0), ("red", 1.1), (" dog", 1.0)]),
        ("((red))", [("red", 1.21)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("[[red]] dog", [("red", 1 / 1.21), (" dog", 1.0)]),
        ("(red:1.3), dog", [("red", 1.3), (", dog", 1.0)]),
        ("(red:-0.5)", [("red", -0.5)]),
        ("(red: .5 )", [("red", 0.5)]),
        ("(red:+2.)", [("red", 2.0)]),
        ("(red:0)", [("red", 0.0)]),
        ("(a (red:2) dog:1.5)", [("a ", 1.5), ("red", 3.0), (" dog", 1.5)]),
        ("([red])", [("red", 1.0)]),
        ("(at 12:30:1.2)", [("at 12:30", 1.2)]),
        ("(at 12:30 pm)", [("at 12:30 pm", 1.1)]),
        ("[red:0.5]", [("red:0.5", 1 / 1.1)]),  # a number is for round brackets
        (r"a dog \(a \[corgi\]\)", [("a dog (a [corgi])", 1.0)]),
        (r"(a \(b\):1.3)", [("a (b)", 1.3)]),
        (r"a \ b \n", [(r"a \ b \n", 1.0)]),
        ("do(:1)g (s:1.0)", [("dog s", 1.0)]),
        ("(red:1e3)", [("red:1e3", 1.1)]),
        ("(red:200) (dog:-1" + 400 * "0" + ")", [("red", 100.0), (" ", 1.0), ("dog", -100.0)]),
        ("a BREAK b", [("a ", 1.0), (BREAK, 1.0), (" b", 1.0)]),
        ("(a BREAK b:1.3)", [("a ", 1.3), (BREAK, 1.0), (" b", 1.3)]),
        ("BREAKFAST, break, \nBREAK\n", [("BREAKFAST, break, \n", 1.0), (BREAK, 1.0), ("\n", 1.0)]),
        # without a partner
        ("a (red dog", [("a (red dog", 1.0)]),
        ("a red) dog", [("a red) dog", 1.0)]),
        ("a (red:1.3 dog", [("a (red:1.3 dog", 1.0)]),
        ("a red:1.3) dog", [("a red:1.3) dog", 1.0)]),
        ("(a [red) dog]", [("a [red", 1.1), (" dog]", 1.0)]),
        (":( and (:)", [(":( and ", 1.0), (":", 1.1)]),
        (r"(red\)", [("(red)", 1.0)]),
        ("]]((", [("]]((", 1.0)]),
    ],
)
def test_the_syntax(text: str, pieces: list[tuple[str, float]]) -> None:
    read = parse(text)
    assert [piece for piece, _ in read] == [piece for piece, _ in pieces]
    assert [weight for _, weight in read] == pytest.approx([weight for _, weight in pieces])


@given(st.text(alphabet="ab:1.5 ()[]\\-", max_size=60))
def test_no_text_is_refused_and_none_of_it_gets_lost(text: str) -> None:
    letters = "".join(piece for piece, _ in parse(text))
    assert [one for one in letters if one in "ab"] == [one for one in text if one in "ab"]


def test_ten_thousand_brackets_take_no_time() -> None:
    assert parse("(" * 5000 + "a" + ")" * 5000) == [("a", 100.0)]
    assert parse("([" * 3000 + ")" * 3000) != []
    assert parse("[" * 10 + ")" * 5000 + "(" * 5000)[0][1] == 1.0
    assert parse(":1" * 5000) == [(":1" * 5000, 1.0)]


# What becomes of it


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("negative", [None, "", "blurry, dull"])
def test_without_weights_it_is_the_stock_encoding(pipelines: Pipelines, family: str, negative: str | None) -> None:
    for text in ("a red dog, in the snow", "x" * 75, ""):
        assert same(encode(pipelines(family), text, negative), stock(pipelines(family), text, negative))


def test_no_negative_is_zeros_where_the_base_wants_it(pipelines: Pipelines) -> None:
    pipeline = pipelines("sdxl1")
    short, long = encode(pipeline, "a dog", None), encode(pipeline, LONG, None)
    assert not short["negative_prompt_embeds"].any() and not short["negative_pooled_prompt_embeds"].any()
    assert long["negative_prompt_embeds"].shape == long["prompt_embeds"].shape == (1, 5 * 77, 24)
    assert encode(pipeline, "a dog", "")["negative_prompt_embeds"].any()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        assert same(encode(pipeline, "a dog", None), stock(pipeline, "a dog"))
        assert encode(pipeline, "a dog", None)["negative_prompt_embeds"].any()
    finally:
        pipeline.register_to_config(force_zeros_for_empty_prompt=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_of_one_and_literal_brackets_change_nothing(pipelines: Pipelines, family: str) -> None:
    pipeline = pipelines(family)
    assert same(encode(pipeline, "a (red:1.0) dog", "([dull])"), stock(pipeline, "a red dog", "dull"))
    assert same(encode(pipeline, r"a \(red\) dog", r"\[dull\]"), stock(pipeline, "a (red) dog", "[dull]"))
    assert same(encode(pipeline, "a (red dog", "dull]"), stock(pipeline, "a (red dog", "dull]"))


@pytest.mark.parametrize("weight", [1.3, 0.0, -0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_is_for_its_own_tokens(pipelines: Pipelines, family: str, weight: float) -> None:
    plain = stock(pipelines(family), "a red dog", "dull")
    ours = encode(pipelines(family), f"a (red:{weight}) dog", "dull")
    rows = torch.ones(77)
    rows[2:5] = weight  # begin, a, r, e, d
    start = 0
    for width in {"sd15": [16], "sdxl1": [8, 16]}[family]:  # each encoder has a mean of its own
        before = plain["prompt_embeds"][0, :, start : start + width]
        after = ours["prompt_embeds"][0, :, start : start + width]
        factor = (after[0] / before[0]).mean()  # of the begin, which no weight touches
        assert 0.5 <= factor <= 2.0
        assert torch.allclose(after, before * rows[:, None] * factor, atol=1e-5)
        if 0.5 < factor < 2.0:
            assert torch.allclose(after.mean(), before.mean(), atol=1e-6)
        start += width
    assert not torch.equal(ours["prompt_embeds"], plain["prompt_embeds"])
    for key in plain.keys() - {"prompt_embeds"}:
        assert torch.equal(ours[key], plain[key]), key


def test_the_mean_is_restored_as_far_as_that_makes_sense(pipelines: Pipelines) -> None:
    pipeline = pipelines("sd15")

    def factor(text: str) -> tuple[float, float]:
        """By how much the begin of the text was scaled, and how much the mean of the whole is off."""
        after = encode(pipeline, text, None)["prompt_embeds"]
        before = stock(pipeline, re.sub(r"[():]|-?[0-9.]+", "", text))["prompt_embeds"]
        return float(after[0, 0, 0] / before[0, 0, 0]), float(after.mean() - before.mean())

    scale, off = factor("a (red:1.3) dog")
    assert 0.9 < scale < 0.999 and abs(off) < 1e-6
    scale, off = factor("a (red:0.5) dog")
    assert 1.001 < scale < 1.1 and abs(off) < 1e-6
    everything = "a red dog" + " dull" * 10
    scale, off = factor(f"({everything}:9)")
    assert scale == pytest.approx(0.5) and off > 0.1
    scale, off = factor(f"({everything}:-9)")  # the mean turns around, and the begin must not turn with it
    assert scale == pytest.approx(0.5) and off < -0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_longer_texts_are_not_cut(pipelines: Pipelines, family: str) -> None:
    pipeline = pipelines(family)
    one, other = LONG + " cat", LONG + " cow"
    assert torch.equal(stock(pipeline, one)["prompt_embeds"], stock(pipeline, other)["prompt_embeds"])
    ours, theirs = encode(pipeline, one, "dull"), encode(pipeline, other, "dull")
    size = 77 * 5  # 304 tokens
    assert ours["prompt_embeds"].shape[1] == ours["negative_prompt_embeds"].shape[1] == size
    assert torch.equal(ours["prompt_embeds"][:, : 4 * 77], theirs["prompt_embeds"][:, : 4 * 77])
    assert not torch.equal(ours["prompt_embeds"][:, 4 * 77 :], theirs["prompt_embeds"][:, 4 * 77 :])
    # Chunks are what they are alone; the negative goes on with empty ones.
    empty = stock(pipeline, "", "")["prompt_embeds"]
    assert torch.equal(ours["prompt_embeds"][:, :77], stock(pipeline, LONG)["prompt_embeds"])
    assert torch.equal(ours["negative_prompt_embeds"][:, 77:], empty.repeat(1, 4, 1))
    assert torch.equal(ours["negative_prompt_embeds"][:, :77], stock(pipeline, "x", "dull")["negative_prompt_embeds"])
    if family == "sdxl1":
        assert torch.equal(ours["pooled_prompt_embeds"], stock(pipeline, LONG)["pooled_prompt_embeds"])
    # The other way round: a long negative makes the prompt as long.
    assert encode(pipeline, "a dog", LONG)["prompt_embeds"].shape[1] == size


@pytest.mark.parametrize("family", FAMILIES)
def test_break_begins_a_new_chunk(pipelines: Pipelines, family: str) -> None:
    pipeline = pipelines(family)
    chunks = [stock(pipeline, text)["prompt_embeds"] for text in ("a red dog", "in the snow")]
    for text in ("a red dog BREAK in the snow", "BREAK a red dog BREAK BREAK in the snow BREAK"):
        assert torch.equal(encode(pipeline, text, None)["prompt_embeds"], torch.cat(chunks, 1))
    assert torch.equal(encode(pipeline, "BREAK", None)["prompt_embeds"], stock(pipeline, "")["prompt_embeds"])


def test_encoders_keep_their_number_format(tiny_sdxl1: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    for family, folder in (("sd15", tiny_sd15), ("sdxl1", tiny_sdxl1)):
        pipeline = load_branch(Base(1, family, family, path=folder), CPU, tmp_path, torch.bfloat16).pipeline
        assert same(encode(pipeline, "a red dog", "dull"), stock(pipeline, "a red dog", "dull"))
        pipeline.text_encoder.requires_grad_(True)  # as while it is trained
        inputs = encode(pipeline, f"a (red:1.4) dog, {LONG}", "(dull:0.3)")
        assert {value.dtype for value in inputs.values()} == {torch.bfloat16}
        assert not any(value.requires_grad for value in inputs.values())


def test_new_words_are_spelled_out_and_carry_their_weight_whole(tiny_sdxl1: Path, tmp_path: Path) -> None:
    pipeline = load_branch(Base(1, "sdxl1", "sdxl1", path=tiny_sdxl1), CPU, tmp_path).pipeline
    # Four for one encoder alone: its text is then longer than the other's.
    new_tokens.add(pipeline, "ohwx", {"text_encoder": torch.randn(4, 8, generator=torch.Generator().manual_seed(0))})
    pieces = parse("a (OHWX:1.5) dog")
    counts = []
    for name in ("tokenizer", "tokenizer_2"):
        (chunk,) = weighted.chunks(pipeline, pieces, getattr(pipeline, name))
        counts.append([weight for _, weight in chunk])
    assert counts == [[1.0, *[1.5] * 4, 1.0, 1.0, 1.0]] * 2  # o, h, w, x are four tokens as well
    first = pipeline.tokenizer.convert_tokens_to_ids("<ohwx-0>")
    ids = [token for token, _ in weighted.chunks(pipeline, pieces, pipeline.tokenizer)[0]]
    assert ids[1:5] == [first, first + 1, first + 2, first + 3]
    assert same(encode(pipeline, "a ohwx dog", "dull"), stock(pipeline, "a ohwx dog", "dull"))
    new_tokens.remove(pipeline)


def test_encoders_that_read_different_lengths_get_as_many_chunks(tiny_sdxl1: Path, tmp_path: Path) -> None:
    pipeline = load_branch(Base(1, "sdxl1", "sdxl1", path=tiny_sdxl1), CPU, tmp_path).pipeline
    new_tokens.add(pipeline, "ohwx", {"text_encoder": torch.zeros(1, 8)})
    text = " ".join(["ohwx"] * 30)  # 30 tokens for one, 120 for the other
    assert encode(pipeline, text, None)["prompt_embeds"].shape == (1, 2 * 77, 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_pipeline_renders_with_it(pipelines: Pipelines, family: str) -> None:
    def pixels(text: str) -> Tensor:
        inputs = encode(pipelines(family), text, "(dull:1.2)")
        picture = pipelines(family)(
            **inputs, width=64, height=64, num_inference_steps=2, output_type="pt", num_images_per_prompt=2,
            generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        ).images  # fmt: skip
        assert picture.shape == (2, 3, 64, 64)
        return picture

    assert not torch.equal(pixels(f"{LONG} (cat:1.3)"), pixels(f"{LONG} (cat:0.3)"))


def test_other_text_encoders_are_refused_in_words(tiny_flux1: Path) -> None:
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(tiny_flux1, local_files_only=True)
    with pytest.raises(ValueError, match=r"works with CLIP text encoders \(sd15, sdxl1\), and this base has t5"):
        encode(pipeline, "a dog", None)
