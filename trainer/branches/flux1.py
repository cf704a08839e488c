"""FLUX.1: a rectified-flow transformer over packed 2x2 patches of 8x smaller latents; CLIP and T5 text encoders."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from trainer.branches import loading, single_file
from trainer.branches.flux1_keys import original_layers, transformer_from_file, transformer_weights
from trainer.branches.objectives import logit_normal, masked_mean
from trainer.branches.protocol import Cond, ControlNet, Task
from trainer.branches.single_file_keys import stacked_adapters, vae_weights
from trainer.config.train_config import TrainConfig
from trainer.library.bases import Base
from trainer.library.header import read_header
from trainer.library.leftovers import refuse_unknown, unneeded
from trainer.library.models_folder import sidecar

# black-forest-labs/flux, util.py, with its autoencoder, CLIP ViT-L/14's text tower and the encoder of T5 v1.1 XXL.
CONFIG = loading.published_config("flux1")
HOME = "black-forest-labs/FLUX.1-dev"  # source of the parts that a single file lacks
TEXT_KEYS = ["add_k_proj", "add_v_proj"]  # of the double blocks; single blocks have no keys for text only
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"]


def load(base: Base, device: torch.device, cache: Path, dtype: torch.dtype | None = None) -> Flux1:
    """Load a diffusers folder or a single file; the transformer is loaded at its first use.

    Raises OSError where files are missing, ValueError where their content does not fit the family.
    """
    assert base.path is not None, "load_branch fetches what is not here"
    dtype = dtype or loading.compute_dtype(device)
    with loading.loading_errors(base):
        whole = base.rest or base  # a checkpoint tune has only the transformer
        assert whole.path is not None, "load_branch fetches what is not here"
        read = read_file if whole.path.is_file() else read_folder
        pipeline, read_transformer = read(whole.path, whole.variant, dtype, cache)
        if base.rest is not None:
            config = loading.single_file_config(base.path, cache, CONFIG)
            read_transformer = partial(transformer_from_file, base.path, config, dtype)
    loading.finish(base, pipeline)

    def transformer() -> Any:
        with loading.loading_errors(base):
            module = read_transformer()
            loading.freeze(module)
        return module

    return Flux1(pipeline, transformer, device, dtype)


def read_folder(folder: Path, variant: str | None, dtype: torch.dtype, _cache: Path) -> tuple[Any, Callable[[], Any]]:
    """A diffusers folder."""
    source = loading.folder_source(folder, variant)
    pipeline = FluxPipeline.from_pretrained(
        **source,
        dtype={"vae": torch.float32, "default": dtype},
        transformer=None,
        text_encoder=loading.read_text_encoder(CLIPTextModel, "text_encoder", dtype, source),
        text_encoder_2=loading.read_text_encoder(T5EncoderModel, "text_encoder_2", dtype, source),
        image_encoder=None,
        feature_extractor=None,
    )
    read = partial(FluxTransformer2DModel.from_pretrained, **source, subfolder="transformer", dtype=dtype)
    return pipeline, read


def read_file(file: Path, _variant: str | None, dtype: torch.dtype, cache: Path) -> tuple[Any, Callable[[], Any]]:
    """A single file with the transformer's original keys; other parts come from the file, its sidecar or the hub."""
    config = loading.single_file_config(file, cache, CONFIG)
    keys = read_header(file).shapes
    inside = {
        "vae": any(key.startswith("vae.") for key in keys),
        "text_encoder": any(key.startswith("text_encoders.clip_l.") for key in keys),
        "text_encoder_2": any(key.startswith("text_encoders.t5xxl.") for key in keys),
    }
    in_sidecar = {name: next((sidecar(file) / name).glob("*.safetensors"), None) is not None for name in inside}
    wanted = [name for name in inside if not inside[name] and not in_sidecar[name]]
    wanted += [name for name in ("tokenizer", "tokenizer_2") if not (sidecar(file) / name).exists()]
    home = from_home(wanted) if wanted else None

    def place(name: str) -> Path:
        """The folder of a part: the sidecar's, else the hub's."""
        return home / name if home is not None and name in wanted else sidecar(file) / name

    parts: dict[str, Any] = {
        "tokenizer": AutoTokenizer.from_pretrained(place("tokenizer"), local_files_only=True),
        "tokenizer_2": AutoTokenizer.from_pretrained(place("tokenizer_2"), local_files_only=True),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(config / "scheduler"),
    }
    if inside["vae"]:
        parts["vae"] = vae_from_file(file, config)
    else:
        parts["vae"] = AutoencoderKL.from_pretrained(place("vae"), local_files_only=True, dtype=torch.float32)
    for name, kind, prefix in (
        ("text_encoder", CLIPTextModel, "text_encoders.clip_l.transformer."),
        ("text_encoder_2", T5EncoderModel, "text_encoders.t5xxl.transformer."),
    ):
        if inside[name]:
            parts[name] = encoder_from_file(file, kind, config / name, prefix, dtype)
        else:
            source = {"pretrained_model_name_or_path": place(name), "local_files_only": True, "use_safetensors": True}
            parts[name] = loading.read_text_encoder(kind, "", dtype, source)
    return FluxPipeline(transformer=None, **parts), partial(transformer_from_file, file, config, dtype)


def from_home(parts: list[str]) -> Path:
    """A folder of FLUX.1-dev with these parts, from the hub or its cache."""
    from trainer.library import hub  # not needed when all files are here

    return hub.fetch_parts(HOME, [f"{part}/*" for part in parts])


def vae_from_file(file: Path, config: Path) -> nn.Module:
    """The VAE in a file with other parts. Raises ValueError for weights that have no place in it."""
    with single_file.opened(file) as (keys, read):
        weights = {key: read(key) for key in keys if key.startswith("vae.")}
    vae: nn.Module = AutoencoderKL.from_single_file(
        weights, config=str(config), subfolder="vae", local_files_only=True, dtype=torch.float32
    )
    single_file.refuse_left_over(weights.keys(), {"vae.": vae_weights(vae)})
    return vae


def encoder_from_file(file: Path, kind: Any, config: Path, prefix: str, dtype: torch.dtype) -> Any:
    """A text encoder from the weights with this prefix in a file. Raises ValueError for missing or unknown weights."""
    with single_file.opened(file, dtype) as (keys, read):
        weights = {key.removeprefix(prefix): read(key) for key in keys - unneeded(keys) if key.startswith(prefix)}
    encoder, facts = kind.from_pretrained(
        None,
        config=kind.config_class.from_pretrained(config),
        state_dict=weights,
        dtype=dtype,
        output_loading_info=True,
    )
    loading.refuse_gaps(facts["missing_keys"])
    refuse_unknown(prefix + key for key in facts["unexpected_keys"])
    return encoder


def _mode_for_texts(
    _model: Any, args: tuple[Any, ...], guidance: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat the modes for each text, to concatenate them: diffusers 0.42 passes one, or one for each picture."""
    mode = guidance.get("controlnet_mode")
    if mode is not None:
        guidance["controlnet_mode"] = mode[:1].expand(len(guidance["encoder_hidden_states"]), 1)
    return args, guidance


CONTROL_NET = ControlNet(
    FluxControlNetModel,
    ("FluxControlNetModel",),
    {"text": FluxControlNetPipeline, "image": FluxControlNetImg2ImgPipeline, "inpaint": FluxControlNetInpaintPipeline},
    ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim", "pooled_projection_dim"),
    # InstantX/FLUX.1-dev-Controlnet-Union and Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro, by their model cards.
    modes={"canny": 0, "tile": 1, "depth": 2, "pose": 4},
    mode_count="num_mode",
    prepare=lambda model: model.register_forward_pre_hook(_mode_for_texts, with_kwargs=True),
)


class Flux1:
    """The modules of one base, ready to train and to render. The transformer is loaded at its first use."""

    lora_targets = {  # noqa: RUF012
        "cross_attention": TEXT_KEYS,
        "attention": ATTENTION,
        "all": [*ATTENTION, *FEED_FORWARD],
    }
    token_encoders = ("text_encoder",)
    denoiser_name = "transformer"
    reads_kohya = False  # diffusers 0.42 ignores the final projection and assumes the width of FLUX.1
    whole_file = False
    kohya_encoders = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}  # noqa: RUF012
    control_nets = (CONTROL_NET,)
    metadata = {  # noqa: RUF012
        "modelspec.architecture": "flux-1-dev",
        "ss_base_model_version": "flux1",
        "ss_network_module": "networks.lora_flux",
        "ss_guidance_scale": "1.0",
        "ss_timestep_sampling": "sigmoid",
        "ss_model_prediction_type": "raw",
    }

    def __init__(
        self, pipeline: Any, read_transformer: Callable[[], Any], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._read_transformer = read_transformer
        self.parts = pipeline
        self._t5_states: dict[str, Tensor] = {}  # caption -> T5's output, for when only CLIP is kept
        self.device = device
        self.dtype = dtype
        names = ("text_encoder", "text_encoder_2")
        self.text_encoders: dict[str, nn.Module] = {name: getattr(pipeline, name) for name in names}
        self.vae: nn.Module = pipeline.vae
        self.latent_scale: int = pipeline.vae_scale_factor
        self.size_multiple = 2 * self.latent_scale  # latents are packed two by two

    @property
    def denoiser(self) -> nn.Module:
        transformer: nn.Module = self.pipeline.transformer
        return transformer

    @property
    def pipeline(self) -> Any:
        if self.parts.transformer is None:
            self.parts.register_modules(transformer=self._read_transformer())
        return self.parts

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return loading.encode_pixels(self.vae, pixels, self.device)

    def encode_prompts(self, captions: list[str]) -> Cond:
        """B captions -> {"encoder_hidden_states": (B, 512, D), "pooled_projections": (B, P)}; longer ones are cut."""
        with loading.autocast(self.device, self.dtype):
            if "text_encoder_2" in self.text_encoders:
                hidden, pooled, _ = self.parts.encode_prompt(captions, None, device=self.device)
                self._t5_states |= zip(captions, hidden.detach().split(1), strict=True)
            else:
                hidden = torch.cat([self._t5_states[caption] for caption in captions])
                pooled = self.parts._get_clip_prompt_embeds(captions, device=self.device)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def encode_size(self, original: tuple[int, int], crop: tuple[int, int], size: tuple[int, int]) -> Cond:
        return {}

    def draw(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise like latents (B, C, H/f, W/f), and times (B,) in (0, 1): 1 is all noise."""
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        return noise, logit_normal(len(latents), generator)

    def loss(
        self, latents: Tensor, cond: Cond, noise: Tensor, timesteps: Tensor, config: TrainConfig, weight: Tensor | None
    ) -> Tensor:
        """Squared error of the velocity noise - latents (rectified flow; Liu et al. 2022, arXiv 2209.03003), (B,)."""
        times = timesteps.view(-1, 1, 1, 1)
        noisy = ((1 - times) * latents + times * noise).to(self.dtype)
        batch, _, height, width = latents.shape
        guidance = torch.full((batch,), config.guidance, device=latents.device)
        text = cond["encoder_hidden_states"]
        with loading.autocast(self.device, self.dtype):
            predicted = self.denoiser(
                hidden_states=pack(noisy),
                timestep=timesteps,
                guidance=guidance if self.pipeline.transformer.config.guidance_embeds else None,
                pooled_projections=cond["pooled_projections"],
                encoder_hidden_states=text,
                img_ids=image_ids(height, width, latents.device),
                txt_ids=torch.zeros(text.shape[1], 3, device=latents.device),
                return_dict=False,
            )[0]
        return masked_mean((unpack(predicted.float(), height, width) - (noise - latents)) ** 2, weight)

    def prompt_inputs(self, cond: Cond, empty: Cond) -> dict[str, Any]:
        return {"prompt_embeds": cond["encoder_hidden_states"], "pooled_prompt_embeds": cond["pooled_projections"]}

    def encode_for_pipeline(self, text: str, negative: str | None) -> dict[str, Tensor]:
        """A prompt encoded by the stock pipeline, as its keyword arguments, batch 1. There is no negative prompt."""
        hidden, pooled, _ = self.pipeline.encode_prompt(text, None)
        return {"prompt_embeds": hidden, "pooled_prompt_embeds": pooled}

    def task_pipeline(self, task: Task) -> tuple[Any, frozenset[str]]:
        return loading.task_pipeline(self.pipeline, task)

    def preview_latents(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Packed latents (B, H/2f W/2f, 4 C), unpacked."""
        width, height = (2 * (side // (2 * self.latent_scale)) for side in size)
        return unpack(latents[:1], height, width)

    def original_weights(self) -> dict[str, Tensor]:
        """The transformer's weights only, as in the published file."""
        return transformer_weights(self.denoiser)

    def kohya_layers(self, adapters: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor, int]]:
        """kohya uses the original release's names, where several of our layers are one: see
        `single_file_keys.stacked_adapters`."""
        return stacked_adapters(self.denoiser, original_layers(self.denoiser), adapters)

    def load_weights(self, file: Path, cache: Path) -> None:
        config = loading.single_file_config(file, cache, CONFIG)
        self.denoiser.load_state_dict(transformer_from_file(file, config, self.dtype).state_dict())

    def keep_text_encoders(self, names: Collection[str]) -> None:
        self.text_encoders = loading.keep_parts(self.parts, self.text_encoders, names)


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 W/2, 4 C): each token is a patch of two by two latents."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, H/2 W/2, 4 C) -> (B, C, H, W)."""
    batch, _, channels = tokens.shape
    patches = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """(H/2 W/2, 3): 0, row and column of each token."""
    rows, columns = torch.arange(height // 2.0, device=device), torch.arange(width // 2.0, device=device)
    grid = torch.stack(torch.meshgrid(torch.zeros(1, device=device), rows, columns, indexing="ij"), dim=-1)
    return grid.reshape(-1, 3)
