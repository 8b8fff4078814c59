"""One accessor for the dense weight behind any holder, quantised or not.

A quantised linear layer keeps its numbers packed; every method that needs to read the weight (DoRA's norms, SVD
initialisers, merging) goes through `dense_weight` and so works on any holder that can be read back.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from rankworks.core.codes.groups import dequantise_groups
from rankworks.core.errors import TargetError


def is_quantised(tensor: Any) -> bool:
    """Return whether the tensor holds packed or integer codes in place of the weight's own numbers."""
    return any(hasattr(tensor, name) for name in ("quant_state", "CB", "held")) or not tensor.is_floating_point()


def is_turned(tensor: Any) -> bool:
    """Return whether bitsandbytes has turned 4-bit codes for its CPU kernel, through which no gradient passes."""
    return getattr(getattr(tensor, "quant_state", None), "packing_format_for_cpu", False)


def dense_weight(tensor: Any, module: Any = None) -> Tensor:
    """Return the weight's numbers: the tensor itself where it is dense, else a dequantised copy.

    `module` is the layer that holds it: bitsandbytes moves the scales of 8-bit codes there at the first call. Raises
    `TargetError` for a holder that nobody here can read.
    """
    if not is_quantised(tensor):
        return tensor
    if hasattr(tensor, "held"):  # integers that are trained (core/weights/integers.py)
        return dequantise_groups(tensor.held, tensor.dtype)
    if getattr(tensor, "quant_state", None) is not None:  # bitsandbytes Params4bit
        from bitsandbytes import functional

        codes, state = tensor.data, tensor.quant_state
        if is_turned(tensor):  # turned for its own kernel at the first call without grad
            codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))
            if not state.nested:  # the inverse leaves the scales as the kernel has them
                state.absmax = state.absmax.t().reshape(-1).contiguous().float()
        return functional.dequantize_4bit(codes, state)
    for held in (tensor, getattr(module, "state", None)):  # bitsandbytes Int8Params: codes and one scale per row
        codes, scales = getattr(held, "CB", None), getattr(held, "SCB", None)
        if codes is not None and scales is not None:
            return codes.float() * (scales.float() / 127.0).unsqueeze(1)
    raise TargetError(
        f"a weight of type {type(tensor).__name__} ({tensor.dtype}) cannot be read as numbers here. Load the model in "
        "a floating type or in bitsandbytes' 4 or 8 bits."
    )
