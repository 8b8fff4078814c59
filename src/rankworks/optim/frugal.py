"""FRUGAL: a share of every gradient is trained by a rule with moments, the rest by the sign of the gradient, in turns.

    g = down(G),  rest = G - up(g)                  which share: drawn or found anew every `refresh` steps
    W <- (1 - lr decay) W
    W <- W - lr c up(direction of the rule on g) - lr c c_rest sign(rest)          c = scale, c_rest = rest_scale

`projection` says what down and up are. `block` (default): whole tensors, round(density N) of N at a time in an `order`;
those whose turn ends lose their moments. `columns`, `rows`, `randk`: the share `density` of a matrix's columns, rows or
entries, rounded down. `svd`, `random`, `dct`, `randperm`: round(density d) directions of the `side` of size d, leading
singular vectors of the gradient, random orthonormal ones, cosines (DCT-FRUGAL), or random rows or columns. `rank` may
stand for the density: rank / the shorter side of each weight, so that of a square one so many columns are kept.
Draws depend on (seed, step, name) alone. `rule` for g: adamw (torch's), lion, sgdm, signsgdm. For the `rest`: sign_sgd,
sgd, or no step at all. `moments` at a change: reset with the count of steps (published), keep, or realign
(core/optim/carry.py); among blocks both of these go on with what stays active.

Projected are the weights `targets` names, with adapters the matrices they train there. Norms, embeddings and output
heads are trained by the rule as a whole unless `norms`, `embeddings`, `logits` say otherwise (a tied head is a head);
vectors have entries only, so bases do not take them, and tensors that are no matrices likewise. The weights `free`
names are always trained by the rule for the rest: fine-tuning's linear layers that are not projected.

State of a projected W (m, n) with k moments for each number of g: block k m n while active, columns and rows k m n
density, randk the same and a list of places, bases r (S + k L) numbers, cosines r k L and a list of r.
Where the released code is not followed: its SGD starts momentum from the weights themselves in blocks and counts the
first gradient 1 + mu times elsewhere, here it starts from zero; its randperm is a dense matrix, here a list; its count
of entries is cut off after rounding (0.29 of 100 is 28), here it is 29; one of its densities serves all weights where a
rank is given, here each its own. A momentum's decay is decoupled as its AdamW's is.
The published settings differ: pretraining as the defaults; fine-tuning columns, rest_scale 0.1, refresh 500, decay 0.1.
GaLore in these words: svd, moments=keep, rest=no, scale=0.25.
Source: arXiv:2411.07837, algorithm 1, and its released code; arXiv:2505.17967 for cosines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankworks.core.draw import Draw
from rankworks.core.errors import ConfigError
from rankworks.core.fields import NonNegative, Positive, Setting
from rankworks.core.optim.blocks import Blocks, Order
from rankworks.core.optim.carry import Carry, Kept, carry, drop_moments
from rankworks.core.optim.method import Group, OptimizerMethod, grouped
from rankworks.core.optim.moments import Direction, adam_step
from rankworks.core.optim.projection import Side
from rankworks.core.optim.rules import BETAS, Rule, direction, moments_of
from rankworks.core.optim.split import BASES, Projection, Share, add_kept, left_over, store, stored
from rankworks.core.optim.stepwise import Stepwise, count_step
from rankworks.core.optim.subspace import Subspace
from rankworks.core.optim.targeted import embedding_weights, factors_at, head_weights, norm_weights, weights_at
from rankworks.core.registry import optimizer

Rest = Literal["sign_sgd", "sgd", "no"]


@optimizer("frugal", title="FRUGAL", year=2024, paper="arXiv:2411.07837")
class Frugal(OptimizerMethod):
    """Moments for a share of every gradient, its sign for the rest."""

    try_with: ClassVar[Mapping[str, Any]] = {"rank": None}  # the density says it

    density: float = Setting(0.25, "share of the projected weights that has moments", ge=0, le=1)
    rank: int | None = Setting(None, "give the density as rank / shorter side of each weight", ge=1)
    refresh: int = Setting(200, "steps from one share to the next", ge=1)
    projection: Literal["block", Projection] = Setting("block", "which share: whole tensors, or a part of each")
    side: Side = Setting("std", "svd, random, dct, randperm: which side of the gradient; std: the shorter one")
    subspace: Subspace = Setting("warm", "svd: how it is found, from the one before, from probes, or exactly")
    order: Order = Setting("random", "block: the order of turns")
    moments: Carry = Setting("reset", "what becomes of the moments when the share changes")
    rule: Rule = Setting("adamw", "the rule for the share")
    rest: Rest = Setting("sign_sgd", "the rule for the rest")
    scale: float = Positive(1.0, "factor on the rate of projected weights")
    rest_scale: float = NonNegative(1.0, "a further factor on the rate of the rest; 0.1 for fine-tuning")
    targets: str | list[str] = Setting("all-linear", "which weights are projected (see core/targets.py)")
    free: str | list[str] | None = Setting(None, "weights that never have moments, of those that targets does not name")
    norms: bool = Setting(False, "project the weights of norms too")
    embeddings: bool = Setting(False, "project the embeddings too")
    logits: bool = Setting(False, "project the output head too, which suffers most from it")
    betas: tuple[float, float] | None = Setting(None, "decays of the moments; (0.9, 0.999) for adamw, (0.9, 0.99) lion")
    momentum: float = Setting(0.9, "sgdm, signsgdm: share of the past that is kept", ge=0, lt=1)
    eps: float = Positive(1e-8, "adamw: added to the root, against division by zero")
    seed: int = Setting(0, "of the draws")

    @classmethod
    def agree(cls, spec: Any) -> None:
        """A basis needs a matrix."""
        if spec.norms and spec.projection in (*BASES, "randperm"):
            raise ConfigError(
                f"frugal with norms=True projects vectors, and projection={spec.projection!r} is for matrices: choose "
                "block, columns, rows or randk."
            )

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """What is projected, what is always free, and the others."""
        projected = weights_at(model, self.targets) | factors_at(model, self.targets)
        flags = ((self.norms, norm_weights), (self.embeddings, embedding_weights), (self.logits, head_weights))
        for wanted, find in flags:
            projected |= find(model) if wanted else set()
        free = set() if self.free is None else weights_at(model, self.free) | factors_at(model, self.free)
        matrices_only = self.projection in (*BASES, "randperm")

        def mark(name: str, parameter: nn.Parameter) -> tuple[float, Group]:
            if id(parameter) in projected and not (matrices_only and parameter.ndim != 2):
                return 1.0, {"projected": True, "density": self._density(parameter)}
            return 1.0, {"projected": id(parameter) in free, "density": 0.0}

        made = grouped(model, lr, self.weight_decay, mark)
        names, count = turns(made)
        for group in made:  # of blocks, what part of the time one is active
            group["share"] = count / len(names) if group["density"] else 0.0
        return made

    def _density(self, parameter: Tensor) -> float:
        return self.density if self.rank is None else min(1.0, self.rank / min(parameter.shape))

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The optimizer on its groups."""
        blocks = Blocks(*turns(groups), self.order, self.seed) if self.projection == "block" else None
        settings = (
            "refresh",
            "projection",
            "side",
            "subspace",
            "moments",
            "rule",
            "rest",
            "scale",
            "rest_scale",
            "momentum",
        )
        defaults = {name: getattr(self, name) for name in (*settings, "eps", "seed", "weight_decay")}
        betas = self.betas or BETAS.get(self.rule, (0.0, 0.0))
        return SplitOptimizer(groups, blocks, lr=lr, betas=betas, **defaults)

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """The rule's moments for the share; of blocks, those of the active ones or, before a run, the mean of turns."""
        each, shape = moments_of(self.rule, self.momentum) * parameter.element_size(), tuple(parameter.shape)
        if not group["projected"]:
            return each * parameter.numel()
        if self.projection != "block":
            share = Share(self.projection, group["density"], self.side)
            return each * share.numbers(shape) + share.bytes(shape, parameter.element_size())
        if "active" not in group:
            return round(group["share"] * each * parameter.numel())
        name = next(n for n, p in zip(group["names"], group["params"], strict=True) if p is parameter)
        return each * parameter.numel() if name in group["active"] else 0


def turns(groups: Iterable[Group]) -> tuple[list[str], int]:
    """Return the names of what takes turns in blocks, and how many of them are active at a time."""
    taking = [group for group in groups if group["projected"] and group["density"]]
    names = [name for group in taking for name in group["names"]]
    return names, round(math.fsum(group["density"] for group in taking for _ in group["names"]))


class SplitOptimizer(Stepwise):
    """A rule with moments on a share of the groups marked `projected`, another on the rest, the first alone elsewhere.

    State: step, the moments, and what is kept (core/optim/split.py). Groups say in `active` which blocks have moments.
    """

    def __init__(self, groups: Iterable[Group], blocks: Blocks | None = None, **defaults: Any):
        self.blocks = blocks
        super().__init__(groups, projected=False, density=0.0, **defaults)
        for group in self.param_groups:
            if blocks is not None and group["projected"]:
                group["active"] = sorted(blocks.active(0))

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """Decay, then a step of both rules."""
        t = count_step(state)
        if not group["projected"]:
            self._whole(parameter, gradient, state, group, t, 1.0)
        elif self.blocks is not None:
            self._block(parameter, gradient, state, group, t)
        else:
            self._split(parameter, gradient, state, group, t)

    def _whole(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group, t: int, scale: float
    ) -> None:
        """The rule with moments on a whole tensor."""
        lr = group["lr"] * scale
        if group["rule"] == "adamw":
            decay = group["weight_decay"] / scale  # decay goes with the rate that is not scaled
            adam_step(parameter, gradient, state, t, group["betas"], group["eps"], lr, decay, released=False)
            return
        _decay(parameter, group)
        N, factor = self._direction(state, gradient, group, t)
        parameter.add_(N, alpha=-lr * factor)

    def _block(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group, t: int) -> None:
        """The rule with moments in the tensor's turn, the other one out of it."""
        assert self.blocks is not None
        (period, place), reset = divmod(t - 1, group["refresh"]), group["moments"] == "reset"
        active = self.blocks.active(period)
        if place == 0:
            group["active"][:] = sorted(active)
            if reset or self.name not in active:
                drop_moments(state)
        if self.name in active:
            start = period if reset else self.blocks.since(self.name, period)
            self._whole(parameter, gradient, state, group, t - start * group["refresh"], group["scale"])
        else:
            self._free(parameter, gradient, group)

    def _split(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group, t: int) -> None:
        """The rule with moments on the share of the tensor, the other one on the rest."""
        place = (t - 1) % group["refresh"]
        kept = self._kept(state, gradient, group, t) if place == 0 else stored(state, gradient)
        if kept is None:
            self._free(parameter, gradient, group)
            return
        _decay(parameter, group)
        R = kept.into(gradient)
        lr = group["lr"] * group["scale"]
        size = lr * group["rest_scale"]
        if group["rest"] != "no" and size:
            parameter.add_(left_over(kept, gradient, R, signed=group["rest"] == "sign_sgd"), alpha=-size)
        N, factor = self._direction(state, R, group, place + 1 if group["moments"] == "reset" else t)
        add_kept(parameter, kept, N, -lr * factor)

    def _kept(self, state: dict[str, Any], gradient: Tensor, group: Group, t: int) -> Kept | None:
        """Find the next share, and take the moments over."""
        share = Share(group["projection"], group["density"], group["side"], group["subspace"])
        draw = Draw(group["seed"], f"{self.name} at step {t}", gradient.device)
        old = stored(state, gradient)
        found = share.find(gradient, draw, old)
        if found is None:
            return None
        new = store(state, found, gradient)
        if old is not None:
            carry(state, group["moments"], old, new)
        return new

    def _free(self, parameter: Tensor, gradient: Tensor, group: Group) -> None:
        """The rule without moments on a whole tensor."""
        _decay(parameter, group)
        if group["rest"] != "no":
            step = gradient.sign() if group["rest"] == "sign_sgd" else gradient
            parameter.add_(step, alpha=-group["lr"] * group["scale"] * group["rest_scale"])

    def _direction(self, state: dict[str, Any], R: Tensor, group: Group, t: int) -> Direction:
        return direction(group["rule"], state, R, t, group["betas"], group["eps"], group["momentum"])


def _decay(parameter: Tensor, group: Group) -> None:
    if group["weight_decay"]:
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
