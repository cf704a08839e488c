"""`args` as people write them: understood through one table, or refused with the value and what to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.config import args_text, resolve, train_config
from trainer.config.train_config import TrainConfig, parse_args
from trainer.contract.errors import InvalidRequest

ROOT = Path(__file__).parents[2]
UNDERSTOOD: dict[str, dict[str, Any]] = {
    "rank=4,lr=1e-4": {"rank": 4, "lr": 1e-4},
    "rank=4, lr=1e-4": {"rank": 4, "lr": 1e-4},
    "rank=4 , lr=1e-4 ,": {"rank": 4, "lr": 1e-4},
    "rank = 4; lr = 1e-4": {"rank": 4, "lr": 1e-4},
    "rank=4\r\nlr=1e-4\n": {"rank": 4, "lr": 1e-4},
    "rank: 4, lr: 1e-4": {"rank": 4, "lr": 1e-4},
    '{"rank": 4, "lr": 1e-4}': {"rank": 4, "lr": 1e-4},
    "--rank=4 --lr 1e-4": {"rank": 4, "lr": 1e-4},
    "RANK=4 Learning-Rate=1E-4": {"rank": 4, "lr": 1e-4},
    "lr=0,0001": {"lr": 1e-4},
    "lr=0,0001, rank=4": {"lr": 1e-4, "rank": 4},
    "alpha=2,5 caption_dropout=0,1": {"alpha": 2.5, "caption_dropout": 0.1},
    "resolution=512,": {"resolution": (512,)},
    "resolution=512,768": {"resolution": (512, 768)},
    "resolution=512, 768": {"resolution": (512, 768)},
    "resolution=512 , 768 rank=4": {"resolution": (512, 768), "rank": 4},
    "resolution=[512, 768], rank=4": {"resolution": (512, 768), "rank": 4},
    "learning_rate=1e-4": {"lr": 1e-4},
    "network_dim=32": {"rank": 32},
    "network_dim=32 network_alpha=16": {"rank": 32, "alpha": 16.0},
    "lora_rank=8 lora_alpha=8": {"rank": 8, "alpha": 8.0},
    "train_batch=2": {"batch": 2},
    "batch_size=2": {"batch": 2},
    "train_batch_size=2 max_train_steps=300": {"batch": 2, "steps": 300},
    "lr_scheduler=cosine lr_warmup_steps=20": {"schedule": "cosine", "warmup_steps": 20},
    "optimizer_type=AdamW": {"optimizer": "adamw"},
    "min_snr_gamma=5 save_precision=fp16": {"min_snr": 5.0, "save_dtype": "float16"},
    "flip=True": {"flip": True},
}
REFUSED = {  # args -> parts of the first message
    "rank=four": ("rank must be a whole number, got 'four'",),
    "rank=4,5": ("rank must be a whole number, got '4,5'", "separated by blanks or commas"),
    "rank=4|lr=1e-4": ("rank must be a whole number, got '4|lr=1e-4'", "separated by blanks or commas"),
    "rank=600": ("rank must be at most 512, got '600'",),
    "lr=much": ("lr must be a number, got 'much'",),
    "lr=0": ("lr must be more than 0, got '0'",),
    "alpha=1,000": ("alpha: '1,000' may be a thousand or a decimal number",),
    "lr=nan": ("lr must be a number, got 'nan'",),
    "flip=perhaps": ("flip must be true or false, got 'perhaps'",),
    "optimizer=adamw8bit": ("optimizer must be 'adamw' or 'adafactor', got 'adamw8bit'", "mean 'adamw'"),
    "resolution=500": ("resolution must be a multiple of 8, got '500'",),
    "resolution=512x768": ("resolution must be a whole number, got '512x768'",),
    "resolution=512 768": ("'768' is not key=value",),
    "resolution=64,128,192,256,320": ("resolution takes one to four numbers",),
    "learning_rat=1": ("unknown word 'learning_rat' (did you mean 'learning_rate'?)",),
    "epochs=10": ("'epochs' cannot be set here; write steps",),
    "gradient_accumulation_steps=4": ("cannot be set here; write batch",),
    "network_dim=4 rank=8": ("rank is given twice",),
    "rank=4 lora_rank=8": ("rank is given twice: as lora_rank, too",),
    "rank=": ("rank= has no value",),
    "rank lr=1e-4": ("'rank' is not key=value",),
    "warmup_steps=100000": ("warmup_steps=100000 is longer than the run of ",),
    "steps=50, warmup_steps=51": ("warmup_steps=51 is longer than the run of 50 steps",),
}


def config_of(args: str | None, **more: Any) -> TrainConfig:
    asked: dict[str, Any] = {"preset": None, "name": "dog", "photos": 4, "steps": None} | more
    return resolve.resolve(ROOT / "presets", branch="sd15", model_type="lora", args=args, **asked)


@pytest.mark.parametrize("args", UNDERSTOOD)
def test_what_people_write_is_understood(args: str) -> None:
    config = config_of(args)
    assert {word: getattr(config, word) for word in UNDERSTOOD[args]} == UNDERSTOOD[args]
    assert parse_args(args).keys() == UNDERSTOOD[args].keys()  # nothing else was set


@pytest.mark.parametrize("args", REFUSED)
def test_what_cannot_be_read_is_refused_in_our_words(args: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        config_of(args)
    assert list(refused.value.problems) == ["args"]
    messages = refused.value.problems["args"]
    assert all(part in messages[0] for part in REFUSED[args]), messages
    assert not any("Input should" in message or "unable to parse" in message for message in messages)


def test_each_spelling_means_a_word_of_ours() -> None:
    table, ours = args_text.spellings(), set(TrainConfig.model_fields)
    assert set(table["words"].values()) <= ours
    assert not ours & (table["words"].keys() | table["not_here"].keys())
    assert not table["words"].keys() & table["not_here"].keys()
    assert table["values"].keys() <= ours


def test_a_warm_up_that_is_not_longer_than_the_run_is_taken() -> None:
    assert config_of("steps=50 warmup_steps=50").warmup_steps == 50
    short = config_of(None, steps=1)  # the default warm-up may be longer; these args can be sent again
    assert config_of(train_config.as_args(short)) == short


@pytest.mark.parametrize("seed", ["-1", "random", "Random"])
def test_a_seed_is_drawn_where_one_is_asked_for(seed: str) -> None:
    drawn = {config_of(f"seed={seed}").seed for _ in range(3)}
    assert len(drawn) > 1 and all(0 <= one < 2**32 for one in drawn)
    assert config_of("seed=7").seed == 7 and config_of(None).seed == config_of(None).seed
    with pytest.raises(InvalidRequest, match="seed must be at least 0, got '-2'"):
        config_of("seed=-2")
