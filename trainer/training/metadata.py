"""The metadata of a model file: how it was trained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from trainer.branches.protocol import Branch
from trainer.clock import now
from trainer.config import train_config
from trainer.config.train_config import TrainConfig
from trainer.contract.rows import TuneRow
from trainer.library.bases import Base
from trainer.names import FORMATS, MODEL_TYPES
from trainer.training.views import Picture


def describe(
    tune: TuneRow,
    base: Base,
    branch: Branch,
    config: TrainConfig,
    pictures: list[Picture],
    step: int,
    readers: Mapping[str, str],
) -> dict[str, str]:
    """Metadata of a model file: modelspec.* (Stability-AI/ModelSpec 1.0.0), kohya's ss_*, and our own tunebooth.*.

    readers: the programs that read each format of a LoRA.
    """
    model_type = MODEL_TYPES[tune["method"]]
    side, tags = config.resolution[0], Counter(picture.caption for picture in pictures if picture.kind != "class")
    facts: dict[str, object] = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": tune["title"],
        "modelspec.date": now(),
        "modelspec.description": f"{model_type.description} of {tune['token']} {tune['name']} on {base.title},"
        " made with Tunebooth",
        "modelspec.trigger_phrase": f"{tune['token']} {tune['name']}",
        "modelspec.resolution": f"{side}x{side}",
        "ss_output_name": tune["title"],
        "ss_sd_model_name": base.title,
        "ss_network_dim": config.rank,
        "ss_network_alpha": config.alpha,
        "ss_learning_rate": config.lr,
        "ss_unet_lr": config.lr,
        "ss_text_encoder_lr": config.text_encoder_lr,
        "ss_optimizer": {"adamw": "torch.optim.adamw.AdamW", "adafactor": "Adafactor"}[config.optimizer],
        "ss_lr_scheduler": config.schedule,
        "ss_lr_warmup_steps": config.warmup_steps,
        "ss_steps": step,
        "ss_max_train_steps": config.steps,
        "ss_total_batch_size": config.batch,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_seed": config.seed,
        "ss_resolution": f"({side}, {side})",
        "ss_enable_bucket": config.buckets,
        "ss_min_snr_gamma": config.min_snr or None,
        "ss_caption_dropout_rate": config.caption_dropout,
        "ss_prior_loss_weight": config.prior_weight,
        "ss_num_train_images": sum(tags.values()),
        "ss_tag_frequency": json.dumps({"dataset": tags}),
        "tunebooth.base": base.title,
        "tunebooth.root": base.root or base.title,
        "tunebooth.stands_on": json.dumps(base.chain),
        "tunebooth.token": tune["token"],
        "tunebooth.class": tune["name"],
        "tunebooth.args": train_config.as_args(config),
    }
    facts |= branch.metadata
    if model_type.whole_model:
        facts = {key: value for key, value in facts.items() if not key.startswith("ss_network_")}
    else:
        facts["modelspec.architecture"] = f"{facts['modelspec.architecture']}/lora"
        facts["tunebooth.read_by"] = json.dumps({FORMATS[name]: programs for name, programs in readers.items()})
    return {key: str(value) for key, value in facts.items()}
