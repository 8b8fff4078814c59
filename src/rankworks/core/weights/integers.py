"""Weights held as integers while they are trained: a stand-in parameter carries the gradient, codes the numbers.

    y = x W^T + b,   W = scale (q - zero)          dequantised in the forward pass, and again in the backward pass
    dL/dx = g W      dL/dW = sum over tokens of g x^T, of full size and in the weight's type

Autograd gives integers no gradient. So the layer keeps its parameter, the same object under the same name, with the
shape, type and device it had and the storage of a single number; what it holds stands beside it in `held`
(core/codes/groups.py). Whoever deals with gradients (optimizers, clipping, layer-wise updates, accumulation over
micro-batches, hooks) meets an ordinary parameter. Whoever reads the stand-in as numbers reads nan: the numbers come
from `dense_weight` (core/weights/holders.py), which knows every holder. DDP wants to send parameters and is told to
leave these out (train/apart.py).

The layer's class is swapped in place, as the adapted layer's is. Its state dict has the codes, `weight.codes`,
`weight.scales` and `weight.zeros`, which is exact, and it also takes up a dense `weight`. `make_dense` gives the dense
layer back, and with it everything that saves, merges and exports.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rankworks.core.codes.groups import Groups, dequantise_groups, quantise_groups, write_groups
from rankworks.core.kernels.mode import compute_dtype, no_autocast
from rankworks.core.site import is_conv1d_hf


class IntegerParameter(nn.Parameter):
    """The stand-in for a weight held as integers. `held` are its numbers."""

    held: Groups

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with codes of its own."""
        if id(self) not in memo:
            twin = nn.Parameter(_stand_in(self.detach(), self.shape), self.requires_grad)
            memo[id(self)] = _turn(twin, copy.deepcopy(self.held, memo))
        return memo[id(self)]


class IntegerLayer(nn.Module):
    """Mixed in before a linear layer's own class: computes with the numbers that its weight's codes stand for."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not isinstance(self.weight, IntegerParameter):
            return super().forward(x)
        held = self.weight.held
        cast_to = compute_dtype(x)
        bias = None if self.bias is None else self.bias.to(cast_to)
        with no_autocast(x):
            parts = (held.codes, held.scales, held.zeros)
            return cast(Tensor, _Linear.apply(x.to(cast_to), self.weight, bias, held, is_conv1d_hf(self), *parts))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move what is held, keep the scales' type, and leave the stand-in without storage."""
        weight = self.weight
        if not isinstance(weight, IntegerParameter):
            return super()._apply(fn, recurse)
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = weight
        gradient = None if weight.grad is None else fn(weight.grad)
        weight.grad = None
        weight.data = _stand_in(fn(_nan(weight)), weight.shape)
        weight.grad, weight.held = gradient, weight.held.to(weight.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.weight, IntegerParameter):
            del destination[f"{prefix}weight"]
            destination.update({f"{prefix}weight.{name}": part for name, part in self.weight.held.tensors.items()})

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        weight = self.weight
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        if isinstance(weight, IntegerParameter):
            dense = own.pop(f"{prefix}weight", None)
            parts = {name: own.pop(f"{prefix}weight.{name}", None) for name in weight.held.tensors}
        super()._load_from_state_dict(own, prefix, metadata, strict, missing, unexpected, errors)
        if not isinstance(weight, IntegerParameter):
            return
        missing.remove(f"{prefix}weight")
        if dense is not None:
            write_groups(weight.held, dense.to(weight.device))
        elif any(part is None for part in parts.values()):
            missing.append(f"{prefix}weight")
        else:
            for name, part in weight.held.tensors.items():
                part.copy_(parts[name])


class _Linear(torch.autograd.Function):
    """x (..., in), the stand-in, bias (out,) or None, what is held and its tensors; `turned`: stored as (in, out)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, held: Groups, turned: bool, *parts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, *parts)
        ctx.like, ctx.turned, ctx.stored = (held.bits, held.group, held.shape), turned, weight.dtype
        dense = dequantise_groups(held, x.dtype)
        return F.linear(x, dense.t() if turned else dense, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, *parts = ctx.saved_tensors
        wants = ctx.needs_input_grad
        to_x = to_weight = to_bias = None
        if wants[0]:
            dense = dequantise_groups(Groups(*parts, *ctx.like), g.dtype)
            to_x = g @ (dense.t() if ctx.turned else dense)
        if wants[1]:
            rows, inputs = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
            to_weight = (inputs.t() @ rows if ctx.turned else rows.t() @ inputs).to(ctx.stored)
        if wants[2]:
            to_bias = g.reshape(-1, g.shape[-1]).sum(0)
        return to_x, to_weight, to_bias, None, None, *(None for _ in parts)


@cache
def _derived(cls: type) -> type:
    return type(f"Integer{cls.__name__}", (IntegerLayer, cls), {"__module__": __name__, "__doc__": cls.__doc__})


def holdable(model: nn.Module) -> set[int]:
    """Return the ids of the weights that can be held so: of plain linear layers, and tied to nothing else."""
    fits, others = set(), set()
    for module in model.modules():
        base = type(module).__mro__[2] if isinstance(module, IntegerLayer) else type(module)
        linear = base is nn.Linear or (base.__name__ == "Conv1D" and is_conv1d_hf(module))
        for name, parameter in module.named_parameters(recurse=False):
            (fits if linear and name == "weight" else others).add(id(parameter))
    return fits - others


@torch.no_grad()
def hold(model: nn.Module, parameters: Iterable[Tensor], bits: int = 8, group: int = 256) -> None:
    """Hold weights of the model as integers, rounded to the nearest, in place; what is held so already stays.

    parameters: of `holdable` ones. Gradients and the identity of parameters stay.
    """
    chosen = {id(p): p for p in parameters if not isinstance(p, IntegerParameter)}
    for parameter in chosen.values():
        held = quantise_groups(parameter.detach(), bits, group)
        parameter.data = _stand_in(_nan(parameter), parameter.shape)
        _turn(parameter, held)
    for module in model.modules():
        if id(module._parameters.get("weight")) in chosen:
            module.__class__ = _derived(type(module))


@torch.no_grad()
def make_dense(model: nn.Module) -> None:
    """Give every weight held as integers back its dense form, of the type it had, and its layer its own class."""
    for module in model.modules():
        if isinstance(module, IntegerLayer):
            weight = module.weight
            if isinstance(weight, IntegerParameter):
                weight.data = dequantise_groups(weight.held, weight.dtype)
                del weight.held
                weight.__class__ = nn.Parameter  # type: ignore[assignment]
            module.__class__ = type(module).__mro__[2]


def held_tensors(parameter: Tensor) -> dict[str, Tensor] | None:
    """Return the tensors that hold a stand-in's numbers, by name; None for any other parameter."""
    return parameter.held.tensors if isinstance(parameter, IntegerParameter) else None


def _nan(like: Tensor) -> Tensor:
    return torch.full((), torch.nan, dtype=like.dtype, device=like.device)


def _stand_in(number: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of a shape with the storage of one number."""
    return (number if not number.dim() else _nan(number)).expand(shape)


def _turn(parameter: Tensor, held: Groups) -> IntegerParameter:
    parameter.__class__ = IntegerParameter  # type: ignore[assignment]
    parameter.held = held  # type: ignore[attr-defined]
    return cast(IntegerParameter, parameter)
