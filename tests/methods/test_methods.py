"""pti and checkpoint, and a tune on an earlier one: what moves, what is saved, what others read of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers.marks import long_but
from tests.helpers.methods import FAMILIES, ROUNDING, SOME, distance, picture
from tests.helpers.training import RecordedReport, Run, TrainingSetup, config_of, same
from trainer.branches.protocol import load_branch
from trainer.library.bases import Base
from trainer.methods import checkpoint, lora, new_tokens, pti
from trainer.methods.protocol import get_method
from trainer.names import FORMATS

CAPTIONS = ("a red ohwx dog", "a blue ohwx dog", "ohwx dog")
METADATA = {"modelspec.title": "my dog", "tunebooth.token": "ohwx"}
WAYS = [
    pytest.param(family, model_type, marks=[] if family == "sd15" or model_type == "pti" else pytest.mark.long)
    for family in FAMILIES
    for model_type in ("lora", "pti", "checkpoint")
]


@dataclass
class Shop:
    """Makes benches: for a family and a model type, each with a folder of its own."""

    folder: Path
    photos: list[Path]
    bases: dict[str, Path]
    count: int = 0

    def bench(self, family: str, model_type: str, earlier: Path | None = None, **changes: object) -> TrainingSetup:
        self.count += 1
        asked: dict[str, object] = {"steps": 4, "lr": 2e-2, "resolution": 64, "warmup_steps": 0, "caption_dropout": 0}
        if model_type == "pti":
            asked |= {"token_lr": 1e-2, "token_share": 0.5}
        config = config_of(model_type, **asked | changes)
        cache = self.folder / f"bench {self.count}"
        return TrainingSetup(
            self.bases[family], cache, self.photos, config, family, model_type=model_type, earlier=earlier,
            captions=CAPTIONS,
        )  # fmt: skip

    def trained(
        self, family: str, model_type: str, earlier: Path | None = None, **changes: object
    ) -> tuple[Run, Path, TrainingSetup]:
        """A run that is done, and the folder that its model was saved into."""
        bench = self.bench(family, model_type, earlier, **changes)
        run = bench.start()
        assert run.train(bench.cache / "states", RecordedReport())
        model = bench.cache / "model"
        model.mkdir()
        assert run.method.save(run.branch, model, run.config, METADATA)[0] == next(iter(files_of(model_type)))
        return run, model, bench


def files_of(model_type: str) -> list[str]:
    return [FORMATS["checkpoint" if model_type == "checkpoint" else "kohya"]]


@pytest.fixture(scope="module")
def shop(
    tmp_path_factory: pytest.TempPathFactory, photos: list[Path], request: pytest.FixtureRequest
) -> Callable[..., Shop]:
    bases = {family: request.getfixturevalue(f"tiny_{family}") for family in FAMILIES}
    made = Shop(tmp_path_factory.mktemp("methods"), photos, bases)
    return lambda: made


def stock(shop: Shop, family: str) -> Any:
    """The base in diffusers' own pipeline."""
    options = {"safety_checker": None} if family == "sd15" else {}
    pipeline = DiffusionPipeline.from_pretrained(shop.bases[family], local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(shop: Shop, family: str, path: Path | None = None) -> Any:
    rest = Base(1, "base", family, path=shop.bases[family])
    base = rest if path is None else Base(2, "tune", family, path=path, rest=rest if family == "flux1" else None)
    branch = load_branch(base, torch.device("cpu"), shop.folder / "cache")
    branch.pipeline.set_progress_bar_config(disable=True)
    return branch


def learn(pipeline: Any, file: Path, token: str = "ohwx") -> None:
    """New words into a stock pipeline, by its own calls alone."""
    rows = load_file(file)
    for key, encoder, tokenizer in (
        ("clip_l", "text_encoder", "tokenizer"),
        ("clip_g", "text_encoder_2", "tokenizer_2"),
    ):
        if key in rows:
            parts = {"text_encoder": getattr(pipeline, encoder), "tokenizer": getattr(pipeline, tokenizer)}
            pipeline.load_textual_inversion(rows[key], token=token, **parts)


# What moves


def everything(run: Run) -> dict[str, Tensor]:
    """Every weight and buffer of a branch by name, of adapters and new words, too."""
    parts = {**run.branch.text_encoders, "vae": run.branch.vae, "denoiser": run.branch.denoiser}
    return {
        f"{part}.{key}": value.clone() for part, module in parts.items() for key, value in module.state_dict().items()
    }


def without_gradient(family: str, name: str) -> bool:
    """What these layers put out has no say in tiny models: one latent in the middle block attends to itself alone."""
    return family == "sd15" and "mid_block" in name and "attn1.to_" in name and name.split("attn1.to_")[1][0] in "qk"


@pytest.mark.parametrize(("family", "model_type"), WAYS)
def test_only_what_the_method_trains_moves_and_all_of_it_does(
    shop: Callable[..., Shop], family: str, model_type: str
) -> None:
    bench = shop().bench(family, model_type, steps=3)
    run = bench.start()
    before, names = everything(run), set(run.weights())
    assert run.train(bench.cache / "states", RecordedReport())
    after = everything(run)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    rows = {key.partition(".")[0]: key for key in before if key.endswith("token_embedding.new.weight")}
    trained = {rows.get(name.removesuffix(".new_words"), name) for name in names}
    assert trained <= before.keys()
    assert moved <= trained
    assert {name for name in trained - moved if not without_gradient(family, name)} == set()
    if model_type == "checkpoint":
        assert trained == {name for name in before if name.startswith("denoiser.")}
    if model_type == "pti":
        assert set(rows.values()) <= moved and len(rows) == (2 if family == "sdxl1" else 1)
        assert all(name in rows.values() or ".lora_" in name for name in moved)


@pytest.mark.parametrize(("family", "model_type"), WAYS)
def test_a_resumed_run_ends_with_the_bits_of_a_whole_one(
    shop: Callable[..., Shop], family: str, model_type: str
) -> None:
    changes: dict[str, object] = {"steps": 5, "save_every": 100}
    whole = shop().bench(family, model_type, **changes).start()
    assert whole.train(shop().folder / f"whole {shop().count}", RecordedReport())
    bench = shop().bench(family, model_type, **changes)
    for stop in (1, 3):  # before and after the new words come to rest
        assert not bench.start().train(bench.cache / "states", RecordedReport(stop_at=stop))
    resumed, told = bench.start(), RecordedReport()
    assert resumed.train(bench.cache / "states", told)
    assert told.resumed_at == [3]
    assert same(resumed.weights(), whole.weights())


@pytest.mark.parametrize("family", SOME)
def test_learned_tokens_rest_after_their_share_of_the_run_and_the_adapters_do_not(
    shop: Callable[..., Shop], family: str
) -> None:
    bench = shop().bench(family, "pti", steps=4, token_share=0.5, schedule="constant")
    seen = []
    run = bench.start()
    rows = [found.rows for part in new_tokens.TOKENIZERS if (found := new_tokens.of(run.branch.parts, part))]
    adapter = next(
        p for name, p in zip(run.groups[0]["names"], run.groups[0]["params"], strict=True) if "lora_B" in name
    )
    told = RecordedReport()
    step = told.step

    def watch(number: int, *facts: Any) -> bool:
        seen.append(([row.detach().clone() for row in rows], adapter.detach().clone()))
        return step(number, *facts)

    told.step = watch  # type: ignore[method-assign]
    assert run.train(bench.cache / "states", told)
    moves = [
        (any(not torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True)), not torch.equal(one[1], other[1]))
        for one, other in itertools.pairwise(seen)
    ]
    assert moves == [(True, True), (True, True), (False, True), (False, True)]


def test_new_words_begin_as_the_class_name_and_stay_in_the_range_of_the_table(shop: Callable[..., Shop]) -> None:
    bench = shop().bench("sd15", "pti", token_lr=1.0, tokens=3)
    run = bench.start()
    found = new_tokens.of(run.branch.parts, "text_encoder")
    assert found is not None
    ids = run.branch.parts.tokenizer("dog", add_special_tokens=False).input_ids
    assert torch.allclose(found.rows, found.weight[ids].mean(0).expand(3, -1))
    least, most = (float(norm) for norm in torch.aminmax(found.weight.norm(dim=1)))
    run.train(bench.cache / "states", RecordedReport())
    norms = found.rows.norm(dim=1)
    assert bool((norms <= most * 1.0001).all()) and bool((norms >= least * 0.9999).all())
    assert float(norms.max()) > 0.99 * most  # at this rate they ran against it


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("A photo of SKS man", "A photo of <sks-0> <sks-1> man"),
        ("sks", "<sks-0> <sks-1>"),
        ("two desks, masks and sks_1", "two desks, masks and sks_1"),  # other words that have the token in them
        ("sks's hat (sks)", "<sks-0> <sks-1>'s hat (<sks-0> <sks-1>)"),
    ],
)
def test_a_token_is_read_as_a_word_of_its_own_in_any_case(shop: Callable[..., Shop], text: str, read: str) -> None:
    branch = ours(shop(), "sd15")
    plain, before = branch.parts.tokenizer, branch.encode_prompts([text, read])["encoder_hidden_states"]
    new_tokens.add(branch.parts, "Sks", {"text_encoder": torch.zeros(2, 16)})
    assert branch.parts.maybe_convert_prompt(text, branch.parts.tokenizer) == read
    assert branch.parts.maybe_convert_prompt([text], plain) == [text]  # for a tokenizer that does not know them
    ids = branch.parts.tokenizer(read, add_special_tokens=False).input_ids
    first = branch.parts.tokenizer.convert_tokens_to_ids("<sks-0>")
    assert [one - first for one in ids if one >= first] == [0, 1] * read.count("<sks-0>")
    after = branch.encode_prompts([text])["encoder_hidden_states"]
    assert (distance(after, before[:1]) > 1e-3) == (text != read)
    new_tokens.remove(branch.parts)
    assert torch.equal(branch.encode_prompts([text, read])["encoder_hidden_states"], before)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            {"text_encoder": torch.zeros(2, 17)},
            r"learned tokens \(2, 17\) do not fit text_encoder, whose tokens have 16",
        ),
        ({"text_encoder_2": torch.zeros(2, 16)}, "do not fit text_encoder_2, whose tokens have None"),
    ],
)
def test_words_of_another_family_are_refused(shop: Callable[..., Shop], rows: dict[str, Tensor], told: str) -> None:
    branch = ours(shop(), "sd15")
    with pytest.raises(ValueError, match=told):
        new_tokens.add(branch.parts, "ohwx", rows)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            ["bundle_emb.rex.emb_params"],
            "has learned tokens under 'bundle_emb.rex.emb_params'; known are clip_l, clip_g",
        ),
        (["bundle_emb.rex.clip_l", "bundle_emb.tom.clip_l"], "has the words of several tokens; one is possible"),
    ],
)
def test_words_in_other_forms_are_refused(tmp_path: Path, keys: list[str], told: str) -> None:
    save_file({key: torch.zeros(2, 16) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=told):
        new_tokens.load(tmp_path / "x.safetensors")


def test_token_files_of_another_lora_are_not_its_own(shop: Callable[..., Shop], tmp_path: Path) -> None:
    _, model, _ = shop().trained("sd15", "pti")
    _, style, _ = shop().trained("sd15", "lora")
    for name, file in (("lora_emb", model / FORMATS["embeddings"]), ("style", style / FORMATS["kohya"])):
        (tmp_path / f"{name}.safetensors").write_bytes(file.read_bytes())
    branch = ours(shop(), "sd15")
    assert lora.load(branch.pipeline, tmp_path / "style.safetensors", "one")[1] == []
    assert new_tokens.rows_of(branch.parts) == {}


def test_an_encoder_with_new_words_keeps_its_number_format(shop: Callable[..., Shop]) -> None:
    encoder = ours(shop(), "sd15").parts.text_encoder.to(torch.bfloat16)
    branch = ours(shop(), "sd15")
    branch.parts.register_modules(text_encoder=encoder)
    new_tokens.add(branch.parts, "ohwx", {"text_encoder": torch.zeros(2, 16)})
    assert encoder.dtype == torch.bfloat16  # pipelines compute in what it says
    found = new_tokens.of(branch.parts, "text_encoder")
    assert found is not None and found.rows.dtype == torch.float32
    ids = branch.parts.tokenizer("<ohwx-0> <ohwx-1>", return_tensors="pt").input_ids
    assert found(ids).dtype == torch.bfloat16 and not found(ids)[0, 1:3].any() and found(ids)[0, 0].any()


def test_the_end_of_a_text_is_found_where_a_config_names_the_wrong_one(shop: Callable[..., Shop]) -> None:
    branch = ours(shop(), "flux1")  # whose picture depends on CLIP's vector at the end of the text
    encoder = branch.parts.text_encoder
    holder = next(module for module in encoder.modules() if hasattr(module, "eos_token_id"))
    right = branch.encode_prompts(["ohwx dog"])["pooled_projections"]
    holder.eos_token_id = (
        new_tokens.LEGACY_EOS
    )  # as the published configs have it: the highest id of a text counts as its end
    new_tokens.add(branch.parts, "ohwx", {"text_encoder": torch.zeros(1, 8)})
    assert holder.eos_token_id == branch.parts.tokenizer.eos_token_id
    with_word = branch.encode_prompts(["ohwx dog"])["pooled_projections"]
    new_tokens.remove(branch.parts)
    assert distance(with_word, right) > 1e-3  # the new word is read ...
    assert torch.equal(branch.encode_prompts(["ohwx dog"])["pooled_projections"], right)  # ... and forgotten again


# What is saved


@pytest.mark.parametrize("family", SOME)
def test_stock_diffusers_renders_a_saved_pti_as_the_trained_one(shop: Callable[..., Shop], family: str) -> None:
    run, model, _ = shop().trained(family, "pti")
    base = stock(shop(), family)
    gone = {name: getattr(base, name) for name, part in run.branch.parts.components.items() if part is None}
    run.branch.pipeline.register_modules(**gone)  # those that were not needed any more; FLUX.1's T5
    run.branch.pipeline.set_progress_bar_config(disable=True)
    expected, bare = picture(run.branch.pipeline), picture(base)
    assert distance(expected, bare) > 0.05
    for file in pti.checkable_files(run.branch):
        pipeline = stock(shop(), family)
        pipeline.load_lora_weights(model, weight_name=file)
        without = picture(pipeline)
        learn(pipeline, model / FORMATS["embeddings"])
        assert distance(picture(pipeline), expected) < ROUNDING
        assert distance(without, expected) > 1e-3  # the words have their part in it
    plain = ours(shop(), family)
    lora.apply(plain, model, 1.0)
    assert distance(picture(plain.pipeline), expected) < ROUNDING
    lora.remove(plain.pipeline)
    assert distance(picture(plain.pipeline), bare) < ROUNDING


def test_a_pti_is_saved_in_the_forms_that_others_read(shop: Callable[..., Shop]) -> None:
    _, model, _ = shop().trained("sdxl1", "pti", tokens=3)
    rows = load_file(model / FORMATS["embeddings"])
    assert {key: tuple(value.shape) for key, value in rows.items()} == {"clip_l": (3, 8), "clip_g": (3, 16)}
    kohya, bundled = load_file(model / FORMATS["kohya"]), load_file(model / FORMATS["bundled"])
    assert bundled.keys() - kohya.keys() == {"bundle_emb.ohwx.clip_l", "bundle_emb.ohwx.clip_g"}
    assert all(torch.equal(bundled[f"bundle_emb.ohwx.{key}"], value) for key, value in rows.items())
    assert new_tokens.load(model / FORMATS["bundled"]).keys() == new_tokens.load(model / FORMATS["embeddings"]).keys()
    with safe_open(model / FORMATS["kohya"], "pt") as file:
        assert file.metadata()["tunebooth.tokens"] == "3"


def test_a_pti_without_its_words_gives_a_warning(shop: Callable[..., Shop], tmp_path: Path) -> None:
    _, model, _ = shop().trained("sd15", "pti")
    alone = tmp_path / "mine.safetensors"
    alone.write_bytes((model / FORMATS["kohya"]).read_bytes())
    branch = ours(shop(), "sd15")
    _, warnings = lora.load(branch.pipeline, alone, "one")
    assert len(warnings) == 1 and "mine_emb.safetensors is missing" in warnings[0] and "'ohwx'" in warnings[0]
    assert new_tokens.rows_of(branch.parts) == {}
    (tmp_path / "mine_emb.safetensors").write_bytes((model / FORMATS["embeddings"]).read_bytes())
    branch = ours(shop(), "sd15")
    assert lora.load(branch.pipeline, alone, "one")[1] == []
    assert set(new_tokens.rows_of(branch.parts)) == {"text_encoder"}
    bundled = ours(shop(), "sd15")
    assert lora.load(bundled.pipeline, model / FORMATS["bundled"], "one")[1] == []
    assert distance(picture(bundled.pipeline), picture(branch.pipeline)) < ROUNDING


@pytest.mark.parametrize("family", SOME)
def test_a_saved_checkpoint_needs_no_other_file_and_renders_as_the_trained_one(
    shop: Callable[..., Shop], family: str
) -> None:
    run, model, _ = shop().trained(family, "checkpoint", text_encoder_lr=0 if family == "flux1" else 1e-3, lr=1e-3)
    base = stock(shop(), family)
    gone = {name: getattr(base, name) for name, part in run.branch.parts.components.items() if part is None}
    run.branch.pipeline.register_modules(**gone)
    run.branch.pipeline.set_progress_bar_config(disable=True)
    expected = picture(run.branch.pipeline)
    assert distance(expected, picture(base)) > 0.01
    file = model / FORMATS["checkpoint"]
    assert distance(picture(ours(shop(), family, file).pipeline), expected) < ROUNDING
    again = ours(shop(), family)
    checkpoint.apply(again, model, 1.0)
    assert distance(picture(again.pipeline), expected) < ROUNDING
    if family == "flux1":  # stock diffusers has the width of the real one built in
        return
    kind = {"sd15": StableDiffusionPipeline, "sdxl1": StableDiffusionXLPipeline}[family]
    options = {"safety_checker": None} if family == "sd15" else {}
    whole = kind.from_single_file(str(file), config=str(file.with_suffix("")), local_files_only=True, **options)
    whole.set_progress_bar_config(disable=True)
    assert distance(picture(whole), expected) < ROUNDING


@pytest.mark.parametrize("targets", ["cross_attention", "attention"])
def test_a_checkpoint_trains_only_the_layers_that_are_asked_for(shop: Callable[..., Shop], targets: str) -> None:
    run = shop().bench("sd15", "checkpoint", targets=targets).start()
    ends = tuple(run.branch.lora_targets[targets])
    names = [name.rpartition(".")[0] for name in run.weights()]
    assert names and all(name.endswith(ends) for name in names)
    assert {end for end in ends if any(name.endswith(end) for name in names)} == set(ends)


@pytest.mark.parametrize("family", SOME)
def test_a_checkpoint_in_bfloat16_moves_although_each_step_is_below_its_spacing(
    shop: Callable[..., Shop], family: str
) -> None:
    changes = {"optimizer": "adafactor", "trained_dtype": "bfloat16", "lr": 1e-5, "schedule": "constant"}
    bench = shop().bench(family, "checkpoint", **changes)
    run = bench.start()
    before = run.weights()
    assert {value.dtype for value in before.values()} == {torch.bfloat16}
    assert run.train(bench.cache / "states", RecordedReport())
    after = run.weights()
    moved = sum(int((before[name] != after[name]).sum()) for name in before)
    total = sum(value.numel() for value in before.values())
    assert 0 < moved < 0.2 * total  # by chance, a few of them
    again = bench.start()
    assert not again.train(bench.cache / "other", RecordedReport(stop_at=2))
    resumed = bench.start()
    assert resumed.train(bench.cache / "other", RecordedReport())
    assert same(resumed.weights(), after)


# On an earlier tune


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("on_top", long_but(["continue"], ["continue", "merge"]))
def test_a_lora_on_a_lora_begins_where_that_ended_and_is_whole_by_itself(
    shop: Callable[..., Shop], family: str, on_top: str
) -> None:
    encoders = {} if family == "flux1" else {"text_encoder_lr": 1e-2}
    first, model, _ = shop().trained(family, "lora", **encoders)
    plain = ours(shop(), family)
    lora.apply(plain, model, 1.0)
    before = picture(plain.pipeline)
    bench = shop().bench(family, "lora", model, on_top=on_top, **encoders)
    run = bench.start()
    complete(run, shop(), family)
    assert distance(picture(run.branch.pipeline), before) < ROUNDING  # nothing is lost at the start
    assert run.train(bench.cache / "states", RecordedReport())
    expected = picture(run.branch.pipeline)
    assert distance(expected, before) > 1e-3
    second = bench.cache / "model"
    second.mkdir()
    lora.save(run.branch, second, run.config, METADATA)
    ranks = {len(value) for key, value in load_file(second / lora.DIFFUSERS_FILE).items() if "lora_A" in key}
    assert ranks == {2 if on_top == "continue" else 4}
    for file in lora.checkable_files(run.branch):
        pipeline = stock(shop(), family)
        pipeline.load_lora_weights(second, weight_name=file)
        assert distance(picture(pipeline), expected) < ROUNDING, file
    assert first.branch is not run.branch


def complete(run: Run, shop: Shop, family: str) -> None:
    """Parts of the pipeline that training did without are put back, for pictures."""
    base = stock(shop, family)
    gone = {name: getattr(base, name) for name, part in run.branch.parts.components.items() if part is None}
    run.branch.pipeline.register_modules(**gone)
    run.branch.pipeline.set_progress_bar_config(disable=True)


@pytest.mark.long
def test_a_lora_of_another_rank_is_kept_and_a_new_one_begun(shop: Callable[..., Shop]) -> None:
    _, model, _ = shop().trained("sd15", "lora", rank=3, alpha=3)
    run, second, _ = shop().trained("sd15", "lora", model, rank=2)
    ranks = {len(value) for key, value in load_file(second / lora.DIFFUSERS_FILE).items() if "lora_A" in key}
    assert ranks == {5}
    complete(run, shop(), "sd15")
    pipeline = stock(shop(), "sd15")
    pipeline.load_lora_weights(second, weight_name=lora.KOHYA_FILE)
    assert distance(picture(pipeline), picture(run.branch.pipeline)) < ROUNDING


@pytest.mark.long
def test_adapters_of_a_text_encoder_that_is_not_trained_on_stay(shop: Callable[..., Shop]) -> None:
    _, model, _ = shop().trained("sd15", "lora", text_encoder_lr=1e-2)
    run, second, bench = shop().trained("sd15", "lora", model, text_encoder_lr=0)
    assert len(bench.warnings) == 1 and "in the text encoder: they stay as they are" in bench.warnings[0]
    ours_, theirs = (load_file(folder / lora.DIFFUSERS_FILE) for folder in (second, model))
    kept = [key for key in theirs if key.startswith("text_encoder.")]
    assert kept and all(torch.allclose(ours_[key], theirs[key]) for key in kept)
    complete(run, shop(), "sd15")
    pipeline = stock(shop(), "sd15")
    pipeline.load_lora_weights(second, weight_name=lora.KOHYA_FILE)
    assert distance(picture(pipeline), picture(run.branch.pipeline)) < ROUNDING


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("model_type", long_but(["pti"], ["pti", "lora"]))
def test_a_tune_on_a_pti_tune_has_its_tokens(shop: Callable[..., Shop], family: str, model_type: str) -> None:
    _, model, _ = shop().trained(family, "pti")
    rows = load_file(model / FORMATS["embeddings"])
    run, second, bench = shop().trained(family, model_type, model)
    assert bench.warnings == []
    after = load_file(second / FORMATS["embeddings"])
    moved = {key for key in rows if not torch.equal(rows[key], after[key])}
    assert moved == (set(rows) if model_type == "pti" else set())
    complete(run, shop(), family)
    pipeline = stock(shop(), family)
    pipeline.load_lora_weights(second, weight_name=lora.DIFFUSERS_FILE)
    learn(pipeline, second / FORMATS["embeddings"])
    assert distance(picture(pipeline), picture(run.branch.pipeline)) < ROUNDING


@pytest.mark.long
def test_another_number_of_tokens_starts_again_with_a_warning(shop: Callable[..., Shop]) -> None:
    _, model, _ = shop().trained("sd15", "pti", tokens=2)
    _, second, bench = shop().trained("sd15", "pti", model, tokens=1)
    assert "has 2 learned tokens for its token, not 1" in bench.warnings[0]
    assert load_file(second / FORMATS["embeddings"])["clip_l"].shape == (1, 16)


@pytest.mark.parametrize("family", SOME)
def test_a_checkpoint_on_a_lora_has_it_in_its_weights(shop: Callable[..., Shop], family: str) -> None:
    _, model, _ = shop().trained(family, "lora")
    plain = ours(shop(), family)
    lora.apply(plain, model, 1.0)
    before = picture(plain.pipeline)
    run = shop().bench(family, "checkpoint", model).start()
    complete(run, shop(), family)
    assert distance(picture(run.branch.pipeline), before) < 1e-3
    assert not any(isinstance(layer, nn.Module) and hasattr(layer, "lora_A") for layer in run.branch.denoiser.modules())


def test_a_checkpoint_on_a_pti_is_refused_in_words(shop: Callable[..., Shop]) -> None:
    _, model, _ = shop().trained("sd15", "pti")
    with pytest.raises(ValueError, match="a checkpoint cannot hold"):
        shop().bench("sd15", "checkpoint", model).start()


@pytest.mark.parametrize("file", long_but([lora.KOHYA_FILE], [lora.KOHYA_FILE, lora.DIFFUSERS_FILE]))
def test_training_continues_from_a_lora_file_from_elsewhere(
    shop: Callable[..., Shop], tmp_path: Path, file: str
) -> None:
    _, model, _ = shop().trained("sd15", "lora")
    elsewhere = tmp_path / "theirs.safetensors"
    save_file(load_file(model / file), elsewhere)  # no metadata of ours
    plain = ours(shop(), "sd15")
    lora.apply(plain, model, 1.0)
    run = shop().bench("sd15", "lora", elsewhere).start()
    complete(run, shop(), "sd15")
    assert distance(picture(run.branch.pipeline), picture(plain.pipeline)) < ROUNDING


def test_a_lora_of_another_family_is_refused_in_words(shop: Callable[..., Shop]) -> None:
    _, model, _ = shop().trained("sdxl1", "lora")
    with pytest.raises(ValueError, match="does not fit its base"):
        shop().bench("sd15", "lora", model).start()


def test_every_method_has_what_the_story_asks_of_it() -> None:
    for model_type in ("lora", "pti", "checkpoint"):
        method = get_method(model_type)
        for name in ("prepare", "needed_text_encoders", "attach", "after_step", "save", "checkable_files", "apply"):
            assert callable(getattr(method, name))
