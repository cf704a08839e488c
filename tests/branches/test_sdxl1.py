"""What is true of branch sdxl1 alone. What it shares with the other families: test_families.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.families import FAMILIES, Family, other_weights


@pytest.fixture
def family() -> Family:
    return FAMILIES["sdxl1"]


@pytest.mark.parametrize("without", [(), ("text_encoder",), ("unet", "vae")])
def test_weights_of_a_variant_are_read_and_plain_ones_where_a_part_has_no_others(
    family: Family, folder: Path, tmp_path: Path, stock: Any, without: tuple[str, ...]
) -> None:
    for part in set(family.parts) - set(without):
        plain = next((folder / part).glob("*.safetensors"))
        plain.rename(plain.with_suffix(".fp16.safetensors"))
    assert other_weights(family.load(folder, tmp_path, variant="fp16").pipeline, stock, family.parts) == []
    if without != ("unet", "vae"):
        with pytest.raises((OSError, ValueError)):
            family.load(folder, tmp_path)  # nothing plain is there


@pytest.mark.parametrize("zeros", [True, False])
def test_an_empty_caption_is_what_it_is_when_rendering(
    family: Family, folder: Path, tmp_path: Path, zeros: bool
) -> None:
    index = folder / "model_index.json"
    facts = json.loads(index.read_text())
    assert facts["force_zeros_for_empty_prompt"] is True
    index.write_text(json.dumps(facts | {"force_zeros_for_empty_prompt": zeros}))
    hidden, empty, pooled, empty_pooled = family.load_stock(folder).encode_prompt("a dog", device="cpu")
    cond = family.load(folder, tmp_path).encode_prompts(["a dog", ""])
    # A row of a batch and one on its own differ in their last bits.
    assert torch.allclose(cond["encoder_hidden_states"], torch.cat([hidden, empty]), atol=1e-5)
    assert torch.allclose(cond["text_embeds"], torch.cat([pooled, empty_pooled]), atol=1e-5)
    assert [bool(cond[key][1].any()) for key in cond] == [not zeros] * 2
    assert [bool(cond[key][0].any()) for key in cond] == [True] * 2


def test_the_model_is_told_sizes_in_the_renderer_s_order(loaded: Any, stock: Any) -> None:
    told = loaded.encode_size((1200, 900), (16, 8), (1152, 896))
    assert told.keys() == {"time_ids"}
    assert told["time_ids"].tolist() == [[1200, 900, 16, 8, 1152, 896]]
    theirs = stock._get_add_time_ids((1200, 900), (16, 8), (1152, 896), torch.float32, 16)
    assert torch.equal(told["time_ids"], theirs)
