"""What an adapter adds to a weight, for every format that is read: LoRA, LoHa, LoKr, full differences, and DoRA.

The formulas are those of KohakuBlueleaf/LyCORIS, lycoris/modules and lycoris/functional (locon.py, loha.py, lokr.py,
full.py, general.py). Parts are named as in trainer/library/lora_keys.py. Everything is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

Parts = Mapping[str, Tensor]


def scale_of(parts: Parts) -> float:
    """alpha divided by the rank; 1 without an alpha, and for a LoKr of two full matrices, which has no rank."""
    if "alpha" not in parts:
        return 1.0
    for part in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if part in parts:
            return float(parts["alpha"]) / len(parts[part])
    return 1.0


def change_of(parts: Parts, shape: Sequence[int]) -> Tensor:
    """What is added to a weight of this shape (out, in) or (out, in, h, w); without a DoRA's magnitudes.

    Raises ValueError where the parts do not give this shape, KeyError for a missing part.
    """
    parts = {part: tensor.float() for part, tensor in parts.items()}
    if "diff" in parts:
        change = parts["diff"]
    elif "hada_w1_a" in parts:
        change = _factor(parts, "hada_w1", "hada_t1") * _factor(parts, "hada_w2", "hada_t2")
    elif parts.keys() & {"lokr_w1", "lokr_w1_a"}:
        left, right = _matrix(parts, "lokr_w1"), _matrix(parts, "lokr_w2")
        # A kernel (h, w) belongs to the second factor, whose columns are (in, h, w).
        change = torch.kron(left, right)
    elif "mid" in parts:
        change = _tucker(parts["mid"], parts["up"].flatten(1).T, parts["down"].flatten(1))
    else:
        change = parts["up"].flatten(1) @ parts["down"].flatten(1)
    if change.numel() != math.prod(shape) or len(change) != shape[0]:
        raise ValueError(f"it changes a layer of {tuple(change.shape)} numbers, and the base's has {tuple(shape)}")
    scaled: Tensor = change.reshape(*shape) * scale_of(parts)
    return scaled


def as_lora(parts: Parts, shape: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """The same change as one LoRA without a scale, down (r, in, ...) and up (out, r, ...); None: a LoRA of it would be
    larger than the change itself, or there is none.

    LoHa: (A B) * (C D), element by element, is the product of the row-wise and the column-wise Khatri-Rao products, of
    rank r1 r2. LoKr: kron(A B, C D) = kron(A, C) kron(B, D).
    """
    parts = {part: tensor.float() for part, tensor in parts.items()}
    if parts.keys() & {"hada_t1", "hada_t2", "lokr_t2", "magnitude", "diff", "mid"}:
        return None
    if "hada_w1_a" in parts:
        first, second = _pair(parts, "hada_w1"), _pair(parts, "hada_w2")
        rank = first[0].shape[1] * second[0].shape[1]
    elif parts.keys() & {"lokr_w1", "lokr_w1_a"}:
        first, second = _pair(parts, "lokr_w1"), _pair(parts, "lokr_w2")
        rank = first[0].shape[1] * second[0].shape[1]
    else:
        return None
    out, into = shape[0], math.prod(shape[1:])
    if rank * (out + into) > out * into:
        return None
    if "hada_w1_a" in parts:
        up = (first[0][:, :, None] * second[0][:, None, :]).reshape(-1, rank)
        down = (first[1][:, None, :] * second[1][None, :, :]).reshape(rank, -1)
    else:
        up, down = torch.kron(first[0], second[0]), torch.kron(first[1], second[1])
    if up.shape != (out, rank) or down.shape != (rank, into):
        raise ValueError(f"it changes a layer of {(len(up), down.shape[1])} numbers, and the base's has {tuple(shape)}")
    return down.reshape(rank, *shape[1:]), up.reshape(out, rank, *[1] * (len(shape) - 2)) * scale_of(parts)


def factor_of(parts: Parts, weight: Tensor) -> Tensor | None:
    """A DoRA's magnitudes divided by the norms of the changed weight; None: it is no DoRA.

    They are along the output, (out, 1, ...), or along the input, (1, in, ...), as their shape says.
    """
    if "magnitude" not in parts:
        return None
    magnitude, changed = parts["magnitude"].float(), weight.float() + change_of(parts, weight.shape)
    out, into = changed.shape[:2]
    along_output = magnitude.shape[0] == out if magnitude.ndim > 1 else len(magnitude) == out  # peft: (out,)
    if magnitude.numel() != (out if along_output else into):
        raise ValueError(f"its magnitudes {tuple(magnitude.shape)} fit no side of a layer {tuple(changed.shape)}")
    norms = changed.transpose(0, 0 if along_output else 1).flatten(1).norm(dim=1) + torch.finfo(torch.float32).eps
    factor: Tensor = magnitude.flatten() / norms
    return factor.reshape(*((-1, 1) if along_output else (1, -1)), *[1] * (changed.ndim - 2))


def _pair(parts: Parts, name: str) -> tuple[Tensor, Tensor]:
    """A factor as two matrices, whose product it is; the smaller side of a full matrix becomes an identity."""
    if f"{name}_a" in parts:
        return parts[f"{name}_a"], parts[f"{name}_b"].flatten(1)
    full = parts[name].flatten(1)
    if full.shape[0] < full.shape[1]:
        return torch.eye(len(full)), full
    return full, torch.eye(full.shape[1])


def _factor(parts: Parts, name: str, core: str) -> Tensor:
    left, right = parts[f"{name}_a"], parts[f"{name}_b"]
    return _tucker(parts[core], left, right) if core in parts else left @ right.flatten(1)


def _matrix(parts: Parts, name: str) -> Tensor:
    if name in parts:
        return parts[name].flatten(1)
    if name == "lokr_w2" and "lokr_t2" in parts:
        return _tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"]).flatten(1)
    return parts[f"{name}_a"] @ parts[f"{name}_b"].flatten(1)


def _tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """core (r, r, h, w), left (r, out), right (r, in) -> (out, in, h, w)."""
    change: Tensor = torch.einsum("ij...,ip,jr->pr...", core, left, right)
    return change


class Change(nn.Module):
    """A change of a layer that is no LoRA of a useful rank. peft calls it in the LoRA's place (`lora_variant`).

    Only the small tensors of the file are kept; the change (out, in) is computed at each use.
    """

    factor: Tensor | None

    def __init__(self, parts: Parts, shape: Sequence[int], rows: slice, swapped: bool, factor: Tensor | None) -> None:
        """shape: of the layer in the file. rows: those of the base's layer in it. swapped: its halves change places.

        factor: of a DoRA, for all rows.
        """
        super().__init__()
        self.shape, self.rows, self.swapped, self.names = tuple(shape), rows, swapped, tuple(parts)
        for part, tensor in parts.items():
            self.register_buffer(part, tensor)
        self.register_buffer("factor", factor[rows] if factor is not None and len(factor) > 1 else factor)

    def of(self, weight: Tensor) -> Tensor:
        """The change of the base's weight, float32."""
        parts = {name: self.get_buffer(name) for name in self.names}
        change: Tensor = change_of(parts, self.shape)[self.rows]
        if self.swapped:
            change = torch.cat(change.chunk(2)[::-1])
        if self.factor is not None:
            change = (weight.float() + change) * self.factor - weight.float()
        return change

    def forward(self, layer: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        """The result of the base's layer, plus the change's."""
        base = layer.get_base_layer()
        change = (self.of(base.weight) * layer.scaling[active_adapter]).to(result.dtype)
        if change.ndim == 2:
            return result + nn.functional.linear(x.to(result.dtype), change)
        return result + nn.functional.conv2d(
            x.to(result.dtype), change, None, base.stride, base.padding, base.dilation, base.groups
        )

    def merge_safe(self, layer: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        merged: Tensor = orig_weight.float() + self.of(orig_weight) * layer.scaling[active_adapter]
        return merged.to(orig_weight.dtype)

    def merge_unsafe(self, layer: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = self.merge_safe(layer, active_adapter, orig_weight.data)

    def unmerge(self, _layer: LoraLayer, _active_adapter: str, _orig_weight: Tensor) -> Tensor:
        raise ValueError("a merged change cannot be removed: load the base from its file")

    def supports_lora_conversion(self) -> bool:
        return False
