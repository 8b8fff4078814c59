"""Q-GaLore: GaLore on 8-bit weights with 4-bit projectors, and a subspace found more rarely where it is stable.

    R = G P,  P = dequantised INT4 projector, the same in both directions       core/codes/groups.py, groups of 256
    N, lr_t = 8-bit AdamW's direction and rate on R                             core/optim/moments.py, eps as torch's
    W = dequantised INT8 weight;   W <- W - lr_t scale back(N);   W <- (1 - lr decay) W
    INT8 weight <- W, rounded up with the probability of what is left over       new scale and code of zero per group

    a refresh, at every T-th step of this weight:   u = first singular vector of G;  c = |cos(u, u before)|
    the mean of the last `window` c's is at least `threshold`:   T <- int(growth T)

The first subspace has no predecessor, so with window = 5 T first grows at the sixth; the c's are not forgotten then,
and T grows at every later one as long as their mean stays. A singular vector has no sign of its own: the released code
takes the cosine with it, under which a stable subspace can look opposite; signed=true does so.

While the optimizer is in use the weights are held as integers (core/weights/integers.py); at the end of training
`dense_at_end` gives them back in their own type. The sum is taken in float32: in bfloat16 it would round to nearest
before it is rounded at random, and most steps would be lost. Which random number rounds which weight follows from
(seed, name, step) and the type of device, so that a resumed run and every process round alike; a rate of 0 leaves the
codes alone. Tensors that are not projected have 8-bit AdamW, which decays before the step. subspace: the released code
takes an SVD; "randomised" finds the same vectors to rounding in a fraction of the time, and "warm" continues the old
ones, whose first is then no longer quite the first singular vector.

State of a projected W (m, n), L and S its longer and shorter side: r S / 2 bytes and 5 a group of the projector, 2 r L
bytes and 4 a block of the moments, the last u (S numbers), the interval and the cosines; and W itself takes one byte a
number and 5 a group.
Source: arXiv:2407.08296, algorithm 1, and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankworks.core.codes.groups import Groups, dequantise_groups, group_bytes, quantise_groups, write_groups
from rankworks.core.draw import Draw, seed_of
from rankworks.core.fields import Positive, Setting
from rankworks.core.hooks import Hook, Moment
from rankworks.core.optim.method import Group, grouped
from rankworks.core.optim.moments import adam_bytes, adam_direction, adam_step
from rankworks.core.optim.products import multiplying
from rankworks.core.optim.projected import Projected
from rankworks.core.optim.projection import Basis, add_back, projected_shape, sides
from rankworks.core.optim.stepwise import Stepwise, count_step
from rankworks.core.optim.subspace import Subspace, find_basis
from rankworks.core.optim.targeted import weights_at
from rankworks.core.registry import optimizer
from rankworks.core.weights.integers import IntegerParameter, hold, holdable, make_dense

Bits = Literal[4, 8]


@optimizer("q-galore", title="Q-GaLore", year=2024, paper="arXiv:2407.08296")
class QGaLore(Projected):
    """8-bit AdamW in a subspace, on weights that are integers."""

    eps: float = Positive(1e-8, "added to the root, against division by zero")
    weight_bits: Bits | None = Setting(8, "bits of the projected weights while they are trained; null: their own type")
    projector_bits: Bits | None = Setting(4, "bits of the projectors; null: the weight's own type")
    group_size: int = Setting(256, "numbers that share a scale", ge=2)
    stochastic: bool = Setting(True, "round the weights at random; false: to the nearest, which loses small steps")
    threshold: float = Setting(0.4, "mean cosine from which a subspace counts as stable; above 1: never", ge=0)
    window: int = Setting(5, "refreshes whose cosines are averaged", ge=1)
    growth: float = Setting(2.0, "factor on the interval of a stable subspace", ge=1)
    signed: bool = Setting(False, "take the cosine with the arbitrary sign of singular vectors, as released")
    subspace: Subspace = Setting(
        "randomised", "how the subspace is found: from probes, from the one before, or exactly"
    )
    dense_at_end: bool = Setting(True, "give the model its weights back in their own type after the last step")
    seed: int = Setting(0, "of the rounding and of random probes")

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """The projected weights held as integers, other projected ones, and the rest."""
        chosen = weights_at(model, self.targets)
        whole = holdable(model) if self.weight_bits is not None else set()

        def mark(name: str, parameter: nn.Parameter) -> tuple[float, Group]:
            projected = id(parameter) in chosen and parameter.dim() == 2
            return 1.0, {"projected": projected, "integer": projected and id(parameter) in whole}

        return grouped(model, lr, self.weight_decay, mark)

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The optimizer on its groups."""
        own = [name for name in type(self.spec).model_fields if name not in ("optimizer", "targets", "dense_at_end")]
        return QuantisedGaLore(groups, lr=lr, **self.defaults(*own))

    def hook(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Hook | None:
        """Hold the weights as integers, now and until the end."""
        if self.weight_bits is None:
            return None
        found = HoldsIntegers(self.weight_bits, self.group_size, self.dense_at_end)
        found.hold(model, optimizer)
        return found

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """Projector and past vector, moments, the interval and the cosines; of other tensors the moments."""
        size, shape = parameter.element_size(), tuple(parameter.shape)
        if not group["projected"]:
            return adam_bytes(parameter.numel(), size, 8)
        r = min(self.rank, *shape)
        kept = [length for length, yes in zip(shape, sides(shape, self.side), strict=True) if yes]
        bits = self.projector_bits
        basis = sum(r * d * size if bits is None else group_bytes(r * d, bits, self.group_size) for d in kept)
        moments = adam_bytes(math.prod(projected_shape(shape, self.rank, self.side)), size, 8)
        return basis + moments + kept[0] * size + 8 + 4 * self.window

    def weight_bytes(self, parameter: Tensor, group: Group) -> int:
        """A byte a number and 5 a group, or half as much in 4 bits, of the weights that are integers."""
        if not group["integer"] or self.weight_bits is None:
            return super().weight_bytes(parameter, group)
        return group_bytes(parameter.numel(), self.weight_bits, self.group_size)


class HoldsIntegers(Hook):
    """Holds the weights of the groups marked `integer` as integers, until the end of training."""

    def __init__(self, bits: int, group: int, dense_at_end: bool):
        self.bits, self.group, self.dense_at_end = bits, group, dense_at_end

    def hold(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Round the weights to the nearest integers; those that are integers already stay as they are."""
        chosen = [p for group in optimizer.param_groups if group["integer"] for p in group["params"]]
        hold(model, chosen, self.bits, self.group)

    def on_start(self, moment: Moment) -> None:
        """A model that was given back dense is trained once more."""
        self.hold(moment.model, moment.optimizer)

    def on_end(self, moment: Moment) -> None:
        """Give the weights back."""
        if self.dense_at_end:
            make_dense(moment.model)


class QuantisedGaLore(Stepwise):
    """Q-GaLore in the groups marked `projected`, 8-bit AdamW elsewhere.

    State: step, moments, P and Q with their scales and zeros, past (S,), cosines (window,) with nan where none is yet,
    and interval, the weight's own T.
    """

    counters: ClassVar[tuple[str, ...]] = ("interval", "cosines")

    def __init__(self, groups: Iterable[Group], **defaults: Any):
        super().__init__(groups, projected=False, integer=False, **defaults)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """One step, on the numbers of a weight in whatever form it is held."""
        t = count_step(state)
        lr, decay, betas, eps = (group[name] for name in ("lr", "weight_decay", "betas", "eps"))
        if not group["projected"]:
            adam_step(parameter, gradient, state, t, betas, eps, lr, decay, released=False, bits=8)
            return
        with multiplying(group.get("products", "full"), gradient.device):
            basis = self._basis(state, gradient, group, t)
            R = _cast(basis, gradient.dtype).into(gradient)
        N, factor = adam_direction(state, R, t, betas, eps, released=False, bits=8)
        if lr == 0:
            return
        integer = isinstance(parameter, IntegerParameter)
        W = dequantise_groups(parameter.held) if integer else parameter
        with multiplying(group.get("products", "full"), gradient.device):
            add_back(W, _cast(basis, W.dtype), N, -lr * factor * group["scale"])
        if decay:
            W.mul_(1 - lr * decay)
        if integer:
            write_groups(parameter.held, W, self._rounding(parameter.device, group, t))

    def _rounding(self, device: torch.device, group: Group, t: int) -> torch.Generator | None:
        """The source of this step's rounding, on the weight's device; None rounds to the nearest."""
        if not group["stochastic"]:
            return None
        return torch.Generator(device).manual_seed(seed_of(group["seed"], f"{self.name}:rounding:{t}"))

    def _basis(self, state: dict[str, Any], gradient: Tensor, group: Group, t: int) -> Basis:
        """The basis of this step as its codes have it, found anew where it is time."""
        r = min(group["rank"], *gradient.shape)
        old = None if t == 1 else _read(state, gradient, r, group)
        if t == 1:
            state["interval"] = torch.tensor(group["refresh"], dtype=torch.int64)
            state["cosines"] = torch.full((group["window"],), torch.nan)
        elif (t - 1) % int(state["interval"]):
            assert old is not None
            return old
        draw = Draw(group["seed"], f"{self.name}:subspace:{t}")
        start = None if old is None else _cast(old, gradient.dtype)
        found = find_basis(gradient, r, group["side"], group["subspace"], start, draw)
        first = next(part for part in found if part is not None)[:, 0].clone()
        _pace(state, first, group)
        for name, part in zip("PQ", found, strict=True):
            if part is not None:
                _write(state, name, part, group)
        return _read(state, gradient, r, group)


def _pace(state: dict[str, Any], first: Tensor, group: Group) -> None:
    """Compare the first singular vector with the one before, and lengthen the interval of a stable subspace."""
    if "past" in state:
        cosine = F.cosine_similarity(state["past"].float(), first.float(), dim=0)
        cosine = cosine if group["signed"] else cosine.abs()
        state["cosines"] = torch.cat([state["cosines"][1:], cosine.cpu().view(1)])
        if float(state["cosines"].mean()) >= group["threshold"]:  # nan before the window is full
            state["interval"] = (state["interval"] * group["growth"]).to(torch.int64)
    state["past"] = first


def _write(state: dict[str, Any], name: str, part: Tensor, group: Group) -> None:
    if group["projector_bits"] is None:
        state[name] = part
        return
    codes = quantise_groups(part, group["projector_bits"], group["group_size"])
    state |= {name: codes.codes, f"{name}_scales": codes.scales, f"{name}_zeros": codes.zeros}


def _read(state: dict[str, Any], gradient: Tensor, r: int, group: Group) -> Basis:
    """The basis that stands in the state, in float32 where it is in few bits."""
    parts = []
    for name, length in zip("PQ", gradient.shape, strict=True):
        bits = group["projector_bits"]
        if name not in state or bits is None:
            parts.append(state.get(name))
            continue
        codes, scales, zeros = (state[key] for key in (name, f"{name}_scales", f"{name}_zeros"))
        parts.append(
            dequantise_groups(Groups(codes, scales, zeros, bits, group["group_size"], torch.Size((length, r))))
        )
    return Basis(*parts)


def _cast(basis: Basis, dtype: torch.dtype) -> Basis:
    return Basis(*(None if part is None else part.to(dtype) for part in basis))
