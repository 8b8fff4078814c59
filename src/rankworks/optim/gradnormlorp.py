"""GradNormLoRP: weights as lengths times directions, and the gradients of the directions in a subspace of low rank.

    W = g v / ||v||       dL/dg = sum(G * v / ||v||),  dL/dv = (g / ||v||) (G - (v / ||v||) dL/dg)
    every `refresh` steps   P, Q: leading singular vectors of dL/dv, on the sides that are projected
    every step              v <- v - lr_t scale back(N(into(dL/dv))),  g <- g - lr_t N(dL/dg)      N: AdamW's direction

On an adapter, the paper's W = M (W0 + I J) / ||W0 + I J||, it is the optimizer for DoRA, whose layer holds the norm:
`rw.adapt(model, "dora", rank=r, alpha=r, detach_norm=False)` has no factor alpha / r, and detach_norm=False keeps the
exact gradient (by default DoRA holds the norm constant, and the gradient of v keeps its part along v). Its two factors
are projected, each at most to its own rank, magnitudes have AdamW. On a model's own weights (m, n) the norm is part of
the step: v is not kept, as W and ||v|| say what it is (core/optim/weight_norm.py).

`side`: std, as the released projector; full, U rho(U^T D V) V^T, is the paper's equation. `norm_axis`: out, a length
per output as DoRA and the released code have it, or in, the paper's columns; on adapters the delta decides. eps is not
corrected for the bias and decay, of v and of g, follows the step, as in GaLore's code. Moments are kept at a refresh.

State of a normalised weight: r S numbers of the basis, 2 r L moments, and three numbers per length: ||v|| and the two
moments of g. Of a factor: the first two. `rule` adamw8bit keeps the moments in 8 bits (core/optim/moments.py).

Read second-hand are the paper's equations; its algorithm box was not. The released optimizer is another one and is not
offered: it overwrites g by ||v|| at the start of every step, so that what g learned acts in one forward pass and is
thrown away; its gradient of v keeps the part along v; and it keeps a copy of every weight, which takes back the memory
that the projection saved. Less the lengths that come and go it is GaLore, which is there.
Source: arXiv:2412.19616 and its released code.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankworks.core.delta import Delta
from rankworks.core.draw import Draw
from rankworks.core.fields import Positive, Rank, Setting
from rankworks.core.hooks import Hook
from rankworks.core.optim.method import Group, OptimizerMethod, grouped
from rankworks.core.optim.moments import adam_bytes, adam_direction, adam_step
from rankworks.core.optim.projected import wide
from rankworks.core.optim.projection import Basis, Side, add_back, basis_numbers, projected_shape
from rankworks.core.optim.split import store, stored
from rankworks.core.optim.stepwise import Stepwise, count_step
from rankworks.core.optim.subspace import Subspace, find_basis
from rankworks.core.optim.targeted import factors_at, weights_at
from rankworks.core.optim.weight_norm import NormAxis, gradients, join, split, summed
from rankworks.core.registry import optimizer

log = logging.getLogger(__name__)


@optimizer("gradnormlorp", title="GradNormLoRP", year=2024, paper="arXiv:2412.19616")
class GradNormLoRP(OptimizerMethod):
    """AdamW in a subspace of the gradients of normalised weights."""

    rank: int = Rank(128, "rank r of the projected gradient")
    refresh: int = Setting(200, "steps from one subspace to the next", ge=1)
    scale: float = Positive(0.25, "factor on the projected step")
    side: Side = Setting("std", "which side of the gradient is projected; std: the shorter one, full: the paper's both")
    subspace: Subspace = Setting("warm", "how the subspace is found: from the one before, from probes, or exactly")
    norm_axis: NormAxis = Setting("out", "a model's own weights have a length per output, or per input")
    rule: Literal["adamw", "adamw8bit"] = Setting("adamw", "the moments in their own type, or in 8 bits")
    targets: str | list[str] = Setting("all-linear", "which weights are normalised and projected (see core/targets.py)")
    betas: tuple[float, float] = Setting((0.9, 0.999), "decays of the two moments")
    eps: float = Positive(1e-6, "added to the root, against division by zero")
    seed: int = Setting(0, "of the random probes of the first subspace")

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """The weights that are normalised, the factors that are projected, and the others."""
        normalised, factors = weights_at(model, self.targets), factors_at(model, self.targets)

        def mark(name: str, parameter: nn.Parameter) -> tuple[float, Group]:
            own = id(parameter) in normalised and parameter.ndim == 2
            return 1.0, {"normalised": own, "projected": own or id(parameter) in factors}

        return grouped(model, lr, self.weight_decay, mark)

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The optimizer on its groups."""
        names = ("rank", "refresh", "scale", "side", "subspace", "norm_axis", "rule", "betas", "eps", "seed")
        defaults = {name: getattr(self, name) for name in (*names, "weight_decay")}
        return NormalisedAdamW(groups, lr=lr, **defaults)

    def hook(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Hook | None:
        """None; notes where an adapter's weights are not normalised, or not with exact gradients."""
        deltas = [module for module in model.modules() if isinstance(module, Delta)]
        exact = any(getattr(delta, "detach_norm", True) is False for delta in deltas)
        if factors_at(model, self.targets) and not exact:
            log.warning(
                "gradnormlorp trains an adapter here whose layer has no normalised weight with exact gradients, so it "
                'only projects the gradients of its factors: adapt with delta="dora", detach_norm=False.'
            )
        return None

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """The moments and basis of what is projected, three numbers per length, two moments of any other number."""
        shape, size, bits = tuple(parameter.shape), parameter.element_size(), _bits(self.rule)
        if not group["projected"]:
            return adam_bytes(parameter.numel(), size, bits)
        told = size * basis_numbers(shape, self.rank, self.side)
        told += adam_bytes(math.prod(projected_shape(shape, self.rank, self.side)), size, bits)
        if group["normalised"]:
            count, exact = shape[1 - summed(self.norm_axis)], wide(parameter).itemsize
            told += exact * count + adam_bytes(count, exact, bits)
        return told


def _bits(rule: str) -> int | None:
    return 8 if rule == "adamw8bit" else None


class NormalisedAdamW(Stepwise):
    """AdamW on g, and on the projected gradient of v, in the groups marked `normalised`; on that of W in `projected`.

    State: step, the moments of R, P and Q; `norm`, ||v|| with the sign of g, and the moments of g as g_...
    """

    def __init__(self, groups: Iterable[Group], **defaults: Any):
        super().__init__(groups, projected=False, normalised=False, **defaults)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """One step, then decay."""
        t, lr, decay = count_step(state), group["lr"], group["weight_decay"]
        if group["normalised"]:
            self._normalised(parameter, gradient, state, group, t)
            return
        if not group["projected"]:
            bits = _bits(group["rule"])
            adam_step(parameter, gradient, state, t, group["betas"], group["eps"], lr, decay, bits=bits)
            return
        self._move(parameter, gradient, state, group, t)
        if decay:
            parameter.mul_(1 - lr * decay)

    def _move(self, v: Tensor, gradient: Tensor, state: dict[str, Any], group: Group, t: int) -> None:
        """A step along the direction of AdamW on R, taken back. The basis and the moments have the gradient's type."""
        basis = stored(state, gradient)
        if (t - 1) % group["refresh"] == 0:
            draw = Draw(group["seed"], f"{self.name}:subspace:{t}")
            basis = find_basis(gradient, group["rank"], group["side"], group["subspace"], basis, draw)  # type: ignore[arg-type]
            store(state, basis, gradient)
        assert isinstance(basis, Basis)
        R = basis.into(gradient)
        N, factor = adam_direction(state, R, t, group["betas"], group["eps"], bits=_bits(group["rule"]))
        size = -group["lr"] * factor * group["scale"]
        if v.dtype == R.dtype:
            add_back(v, basis, N, size)
        else:
            v.add_(basis.back(N.to(R.dtype)), alpha=size)

    def _normalised(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group, t: int) -> None:
        """Take W apart, step on v and on g, and put it together again; in place where W is wide enough."""
        axis, lr = group["norm_axis"], group["lr"]
        weight = parameter.to(wide(parameter), copy=not lr)  # a rate of zero changes not even the last bit
        parts = split(weight, state.get("norm"), axis)
        of_v, of_g = gradients(gradient.to(weight.dtype), parts, axis)
        self._move(parts.v, of_v.to(parameter.dtype), state, group, t)
        N, factor = self._length_direction(state, of_g, group, t)
        g = torch.sub(parts.g, N, alpha=lr * factor)
        if group["weight_decay"]:
            shrunk = 1 - lr * group["weight_decay"]
            parts.v.mul_(shrunk)
            g.mul_(shrunk)
        norm = join(parts.v, g, parts.has_direction, axis)
        if lr:
            state["norm"] = norm
            if weight is not parameter:
                parameter.copy_(weight)
        elif "norm" not in state:
            state["norm"] = parts.norm

    def _length_direction(self, state: dict[str, Any], of_g: Tensor, group: Group, t: int) -> Any:
        """AdamW's direction of g, whose moments stand in the state under names of their own."""
        own = {name.removeprefix("g_"): value for name, value in state.items() if name.startswith("g_")}
        found = adam_direction(own, of_g, t, group["betas"], group["eps"], bits=_bits(group["rule"]))
        state |= {f"g_{name}": value for name, value in own.items()}
        return found
