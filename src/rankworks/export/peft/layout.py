"""PEFT's tensors: their names, and their shapes for each kind of layer, in both directions.

    linear, conv1d_hf   lora_A.weight (r, in)               lora_B.weight (out, r)        lora_magnitude_vector (out,)
    conv                lora_A.weight (r, in, *kernel)      lora_B.weight (out, r, 1..)   (1, out, 1..)
    embedding           lora_embedding_A (r, vocabulary)    lora_embedding_B (dim, r)     (dim,)

A name is `base_model.model.<layer>.<tensor>`. PEFT's convolution reads all input channels with A (r', C, *kernel) and
splits the r' rows over the groups with a grouped B. A change of a grouped kernel, one A (r, C/g * kernel) for every
group, is that with r' = g r: group j's r rows hold A at its own channels and zeros elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.delta import Factors
from rankworks.core.errors import StoreError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
BIAS = "lora_B.bias"  # (out,), with `lora_bias`: multiplied by the scale like the product
BASE_BIAS = "base_layer.bias"  # (out,), with bias "all" or "lora_only": the layer's own bias as it was trained


def rank_in_file(part_kind: str, module: Any, rank: int) -> int:
    """Return the rank PEFT's file has for a change of this rank: `groups` times it for a grouped convolution."""
    return rank * module.groups if part_kind == "conv" else rank


def to_file(kind: str, module: Any, factors: Factors) -> dict[str, Tensor]:
    """Return {tensor name: tensor} for factors B (out, r), A (r, in) without the scale."""
    B, A = factors
    if kind == "embedding":
        return {"lora_embedding_A": A, "lora_embedding_B": B}
    if kind != "conv":
        return {"lora_A.weight": A, "lora_B.weight": B}
    groups, kernel = module.groups, tuple(module.kernel_size)
    own = A.reshape(A.shape[0], module.in_channels // groups, *kernel)  # (r, C/g, *kernel)
    if groups > 1:
        wide = own.new_zeros(groups, A.shape[0], groups, *own.shape[1:])
        for group in range(groups):
            wide[group, :, group] = own
        own = wide.reshape(groups * A.shape[0], module.in_channels, *kernel)  # (g r, C, *kernel)
    return {"lora_A.weight": own, "lora_B.weight": B.reshape(*B.shape, *(1 for _ in kernel))}


def from_file(kind: str, module: Any, tensors: dict[str, Tensor], layer: str) -> Factors:
    """Return factors B (out, r), A (r, in), undoing `to_file`. Raises `StoreError` for what no weight can hold."""
    if kind == "embedding":
        return Factors(tensors["lora_embedding_B"], tensors["lora_embedding_A"])
    A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
    if kind != "conv":
        return Factors(B, A)
    groups = module.groups
    if groups > 1:
        blocks = A.reshape(groups, A.shape[0] // groups, groups, -1, *A.shape[2:])
        own = blocks[0, :, 0]
        same = all(torch.equal(blocks[g, :, g], own) for g in range(groups))
        apart = all(not blocks[g, :, h].any() for g in range(groups) for h in range(groups) if g != h)
        if not (same and apart):
            raise StoreError(
                f"{layer}: PEFT's adapter of a grouped convolution reads the channels of other groups, which no change "
                "of the layer's weight can express. Train without that layer, or use the model in PEFT."
            )
        A = own
    return Factors(B.flatten(1), A.flatten(1))


def magnitude_to_file(kind: str, module: nn.Module, m: Tensor) -> Tensor:
    """Return DoRA's magnitudes (out,) in the shape PEFT stores."""
    return m.reshape(1, -1, *(1 for _ in module.kernel_size)) if kind == "conv" else m  # type: ignore[arg-type]


def lora_names(kind: str) -> tuple[str, str]:
    """Return the names of the two factors' tensors, A then B."""
    return ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A.weight", "lora_B.weight")
