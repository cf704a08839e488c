"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank adapters on frozen weights, with peft.

Learned tokens (trainer/methods/new_tokens.py) are trained by `pti`. An earlier model may have them; then they are saved
with this model too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.branches import loading
from trainer.branches.protocol import Branch
from trainer.config.train_config import TrainConfig
from trainer.methods import adapter_files, new_tokens
from trainer.methods.protocol import Group
from trainer.names import FORMATS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # of transformers' CLIP
ADAPTER, EARLIER = "default", "earlier"
KOHYA_FILE, DIFFUSERS_FILE, WORDS_FILE, BUNDLED_FILE = (
    FORMATS[name] for name in ("kohya", "diffusers", "embeddings", "bundled")
)
LARGE = False


def prepare(branch: Branch, config: TrainConfig, token: str, name: str, earlier: Path | None) -> list[str]:
    """Load the earlier LoRA, frozen, and its learned tokens, under this tune's token."""
    if earlier is None:
        return []
    file, warnings = load(branch.pipeline, earlier, EARLIER, token)
    parts = (branch.denoiser, *branch.text_encoders.values())
    if count := sum(adapter_files.changes_in(part) for part in parts if part is not None):
        raise ValueError(
            f"{file.name}: {count} of its layers are a DoRA, LoHa or LoKr that is no LoRA, and a LoRA cannot continue"
            " them: train model_type=checkpoint on it, or merge it into its base with ComfyUI or kohya's tools"
        )
    if not config.text_encoder_lr and any(hasattr(one, "peft_config") for one in branch.text_encoders.values()):
        warnings.append(f"{file.name} has adapters in the text encoder: they stay as they are (text_encoder_lr=0)")
    return warnings


def attach(branch: Branch, config: TrainConfig) -> list[Group]:
    """Inject adapters into the denoiser, and into the text encoders where they have a learning rate.

    Where an earlier LoRA has a layer at the same rank, training continues from it (`on_top = "continue"`); its other
    layers stay in addition to the new ones.
    """
    modules: dict[str, tuple[ModelMixin, list[str], float]] = {
        "denoiser": (branch.denoiser, branch.lora_targets[config.targets], config.lr)
    }
    if config.text_encoder_lr:
        for name, encoder in branch.text_encoders.items():
            modules[name] = (encoder, TEXT_ENCODER_TARGETS, config.text_encoder_lr)
    groups: list[Group] = []
    for name, (module, targets, lr) in modules.items():
        module.add_adapter(
            LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, init_lora_weights="gaussian"),
            adapter_name=ADAPTER,
        )
        if EARLIER in module.peft_config:
            if config.on_top == "continue":
                continue_earlier(module)
            module.set_adapter([EARLIER, ADAPTER])
            for key, parameter in module.named_parameters():
                parameter.requires_grad_(f".{ADAPTER}." in key)
        trained = {f"{name}.{key}": p for key, p in module.named_parameters() if p.requires_grad}
        for parameter in trained.values():
            # bf16 is too coarse for an optimizer's small steps, unless it rounds at random.
            parameter.data = parameter.data.to(getattr(torch, config.trained_dtype))
        groups.append({"params": list(trained.values()), "names": list(trained), "lr": lr})
    return groups


def needed_text_encoders(branch: Branch, config: TrainConfig) -> list[str]:
    """See `Method.needed_text_encoders`."""
    if config.text_encoder_lr:
        return list(branch.text_encoders)
    # Adapters and tokens of the earlier model are saved again.
    found = branch.text_encoders.items()
    return [name for name, part in found if hasattr(part, "peft_config") or new_tokens.of(branch.parts, name)]


def after_step(branch: Branch) -> None:
    """Nothing to do: learned tokens of the earlier model are not trained."""


@torch.no_grad()
def continue_earlier(module: nn.Module) -> None:
    """In each layer where both adapters have one shape, initialize the new one from the earlier one and remove that."""
    for layer in module.modules():
        if not isinstance(layer, LoraLayer) or not {ADAPTER, EARLIER} <= layer.lora_A.keys():
            continue
        pairs = [(matrix[ADAPTER].weight, matrix[EARLIER].weight) for matrix in (layer.lora_A, layer.lora_B)]
        if any(ours.shape != theirs.shape for ours, theirs in pairs):
            continue
        factor = layer.scaling[EARLIER] / layer.scaling[ADAPTER]
        for (ours, theirs), scale in zip(pairs, (1.0, factor), strict=True):
            ours.copy_(theirs * scale)
        layer.delete_adapter(EARLIER)


def adapters_of(module: nn.Module, adapter: str = ADAPTER) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of each layer with the adapter -> its down (r, in) and up (out, r), on the CPU."""
    if adapter not in getattr(module, "peft_config", {}):
        return {}
    # By default peft asks the hub for the base, to check whether tokens were added.
    state = get_peft_model_state_dict(module, adapter_name=adapter, save_embedding_layers=False)
    values = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    layers = [key.removesuffix(".lora_A.weight") for key in values if key.endswith(".lora_A.weight")]
    return {layer: (values[f"{layer}.lora_A.weight"], values[f"{layer}.lora_B.weight"]) for layer in layers}


def together(module: nn.Module, config: TrainConfig) -> tuple[dict[str, tuple[Tensor, Tensor]], float | None]:
    """The adapters of a module, joined with those of an earlier LoRA, and their alpha.

    Two adapters of a layer are concatenated to one of the sum of their ranks, with their scales in the weights; then
    alpha is None, which means the inner width of each.
    """
    ours, theirs = adapters_of(module), adapters_of(module, EARLIER)
    if not theirs:
        return ours, config.alpha
    scales = {name: layer.scaling for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    joined: dict[str, tuple[Tensor, Tensor]] = {}
    for name in dict.fromkeys([*ours, *theirs]):
        pairs = [(down, up * scales[name][adapter]) for adapter, found in ((ADAPTER, ours), (EARLIER, theirs))
                 if name in found for down, up in [found[name]]]  # fmt: skip
        downs, ups = zip(*pairs, strict=True)
        joined[name] = torch.cat([down.float() for down in downs]), torch.cat([up.float() for up in ups], dim=1)
    return joined, None


def save(branch: Branch, folder: Path, config: TrainConfig, metadata: dict[str, str]) -> list[str]:
    """Write `lora.safetensors` with kohya's keys, and `lora_diffusers.safetensors`.

    The presets say which programs read them ([readers]).

    With learned tokens also `lora_emb.safetensors`, and `lora_bundled.safetensors`: kohya keys and tokens in one file.
    """
    kohya, diffusers = file_tensors(branch, config)
    save_file(kohya, folder / KOHYA_FILE, metadata)
    save_file(diffusers, folder / DIFFUSERS_FILE, metadata)
    if not (rows := new_tokens.rows_of(branch.parts)):
        return [KOHYA_FILE, DIFFUSERS_FILE]
    token = new_tokens.token_of(branch.parts)
    new_tokens.save(branch.parts, folder / WORDS_FILE, metadata)
    bundle = {f"bundle_emb.{token}.{new_tokens.KEYS[part]}": tensor for part, tensor in rows.items()}
    save_file(kohya | bundle, folder / BUNDLED_FILE, metadata)
    return [KOHYA_FILE, WORDS_FILE, DIFFUSERS_FILE, BUNDLED_FILE]


def file_tensors(branch: Branch, config: TrainConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapters of all modules under kohya's keys, and under those of diffusers, in the format of the files."""
    dtype = getattr(torch, config.save_dtype)
    kohya: dict[str, Tensor] = {}
    diffusers: dict[str, Tensor] = {}

    def keep(name: str, kohya_name: str, down: Tensor, up: Tensor, alpha: float | None) -> None:
        # diffusers' keys have no alpha, and readers assume the rank: the scale goes into the weights.
        scale = 1.0 if alpha is None else alpha / len(down)
        diffusers[f"{name}.lora_A.weight"], diffusers[f"{name}.lora_B.weight"] = down.to(dtype), (up * scale).to(dtype)
        if kohya_name:
            keep_kohya(kohya_name, down, up, alpha, 1)

    def keep_kohya(name: str, down: Tensor, up: Tensor, alpha: float | None, parts: int) -> None:
        kohya[f"{name}.lora_down.weight"], kohya[f"{name}.lora_up.weight"] = down.to(dtype), up.to(dtype)
        # Readers divide by the inner width.
        kohya[f"{name}.alpha"] = torch.tensor(len(down) if alpha is None else alpha * parts, dtype=dtype)

    adapters, alpha = together(branch.denoiser, config)
    for name, (down, up) in adapters.items():
        keep(f"{branch.denoiser_name}.{name}", "", down, up, alpha)
    for name, (down, up, parts) in branch.kohya_layers(adapters).items():
        keep_kohya(name, down, up, alpha, parts)
    for part, encoder in branch.text_encoders.items():
        adapters, alpha = together(encoder, config)
        for layer, (down, up) in adapters.items():
            # transformers 5 has no prefix `text_model.`; the files need it.
            name = f"text_model.{layer.removeprefix('text_model.')}"
            keep(f"{part}.{name}", f"{branch.kohya_encoders[part]}_{name.replace('.', '_')}", down, up, alpha)
    return kohya, diffusers


def checkable_files(branch: Branch) -> list[str]:
    """The saved files that a stock pipeline can load."""
    return [KOHYA_FILE, DIFFUSERS_FILE] if branch.reads_kohya else [DIFFUSERS_FILE]


def apply(branch: Branch, folder: Path, scale: float, file: str = DIFFUSERS_FILE) -> None:
    """Load the saved adapters and tokens into the branch's pipeline; they replace those before."""
    remove(branch.pipeline)
    load(branch.pipeline, folder / file if folder.is_dir() else folder, "tune")
    branch.pipeline.set_adapters("tune", scale)


def remove(pipeline: DiffusionPipeline) -> None:
    """Remove all LoRAs and learned tokens."""
    pipeline.unload_lora_weights()
    new_tokens.remove(pipeline)


def merge(pipeline: DiffusionPipeline) -> None:
    """Merge the loaded adapters of all parts into the weights; FLUX.1's pipeline itself would merge only one part."""
    pipeline.fuse_lora(components=[part for part in pipeline._lora_loadable_modules if getattr(pipeline, part, None)])
    pipeline.unload_lora_weights()


def load(pipeline: DiffusionPipeline, model: Path, adapter: str, token: str | None = None) -> tuple[Path, list[str]]:
    """Load a LoRA with its learned tokens into a stock pipeline. Returns its file, and warnings.

    model: a file, with tokens inside or in NAME_emb.safetensors next to it; or the `model/` of a tune. token: the new
    name of the tokens; None: the name from training. Raises ValueError where it does not fit the base.
    """
    file = model / DIFFUSERS_FILE if model.is_dir() else model
    state, facts = loading.read_tensors(file)
    weights = {key: value for key, value in state.items() if not new_tokens.is_rows(key)}
    try:
        warnings = adapter_files.load_adapters(pipeline, weights, facts, adapter, file.parent)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as problem:
        raise ValueError(f"{file.name} does not fit its base: {problem}") from problem
    warnings = [f"{file.name}: {warning}" for warning in warnings]
    token_files = [file.with_name(f"{file.stem}_emb.safetensors")]
    token_files += [file.with_name(WORDS_FILE)] if file.name in (KOHYA_FILE, DIFFUSERS_FILE) else []
    token_file = next((one for one in token_files if one.exists()), None) if len(weights) == len(state) else file
    if token_file is not None:
        token = token or facts.get("tunebooth.token", "ohwx")
        taken = {known.token.lower() for part in new_tokens.TOKENIZERS for known in new_tokens.all_of(pipeline, part)}
        if token.lower() in taken:
            return file, [
                *warnings,
                f"two of these models have learned tokens for {token!r}: here it means the one named first",
            ]
        new_tokens.add(pipeline, token, new_tokens.load(token_file))
    elif "tunebooth.tokens" in facts:
        missing = f"{file.name} was trained with learned tokens, but {file.stem}_emb.safetensors is missing"
        return file, [*warnings, f"{missing}: the token {facts['tunebooth.token']!r} does not mean the subject"]
    return file, warnings
