"""DCT-AdamW: AdamW in a subspace of a fixed cosine basis, of those vectors that the gradient of this step lies along.

    A = G (+ E)                                              E: what earlier steps left out, with `feedback`
    index, R = the r best vectors of A and its projection    (core/optim/dct.py), at step 1 and every `refresh` steps
    E <- A - back(R)
    m, v <- those of the vectors that stay, at their new places; zero for new ones          (with `rotate`)
    N = direction of AdamW on R, as torch has it;  W <- (1 - lr decay) W - lr factor back(N)

The short side is projected: R = G Q_r (m, r) for m >= n, Q_r^T G (r, n) otherwise. Weights with a side of `largest` or
more, and all that `targets` does not name, are trained by AdamW.

The rotation Rm = Q_old^T Q_new is a partial permutation, so it is an index copy. It is off by default, as in the
released code: column j of the moments goes on as column j of whatever vector comes j-th, which with ascending indices
is mostly the same or a near one. With it a new vector starts from moments of zero and takes a step of
(1 - b1) / sqrt(1 - b2), three times the rate. On a language model of 0.7 M numbers (rank 32 of 128, 150 steps, one
seed) the last losses with it and without are 2.23 and 2.29 at a rate of 2e-3, 2.13 and 2.23 at 3e-3, 2.20 and 2.15 at
5e-3, 2.29 and 2.09 at 1e-2. One list of indices is enough for it (the released code keeps two). dct2 is the basis of
the paper's FFT form, dct3 that of the released default; the choice by l1 norm is the released one, `norm: 2` loses
least. Not taken over: one basis for all sizes, and weights of a few shapes projected on their long side.

State of a projected W (m, n), L and S its longer and shorter side: 2 r L moments, r int32, and E: m n numbers in W's
type ("own"), or a byte or half a byte each and two float32 a row (the released 8 bits use 15 steps of 255).
Source: arXiv:2505.17967, algorithm of DCT-AdamW, and its released code.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankworks.core.codes.rows import Rows, dequantise_rows, quantise_rows, row_bytes
from rankworks.core.fields import Positive, Rank, Setting
from rankworks.core.optim.cosine import AlongCosines, matrices_at, short_basis
from rankworks.core.optim.dct import INDEX, Route, Vectors, basis_rows, moved_columns, select
from rankworks.core.optim.method import Group, OptimizerMethod, grouped
from rankworks.core.optim.moments import adam_direction
from rankworks.core.optim.projection import add_back, projected_shape
from rankworks.core.optim.stepwise import count_step
from rankworks.core.registry import optimizer

BITS: dict[str, Any] = {"8bit": 8, "4bit": 4}
SETTINGS = ("rank", "refresh", "feedback", "rotate", "norm", "vectors", "route", "betas", "eps")


@optimizer("dct-adamw", title="DCT-AdamW", year=2025, paper="arXiv:2505.17967")
class DCTAdamW(OptimizerMethod):
    """AdamW in a subspace of the cosine basis."""

    rank: int = Rank(128, "rank r of the projected gradient")
    refresh: int = Setting(1, "steps from one choice of vectors to the next", ge=1)
    feedback: Literal["none", "own", "8bit", "4bit"] = Setting(
        "none",
        "what a projection leaves out comes again in the next step, kept in the weight's own type or in few bits",
    )
    rotate: bool = Setting(False, "moments follow their vectors to new places")
    norm: Literal[1, 2] = Setting(1, "by which vectors are ranked; 2 loses least")
    vectors: Vectors = Setting("dct2", "dct2: cosines; dct3: the transposed basis")
    route: Route = Setting(
        "auto", "how a gradient is compared with the basis: a product, an FFT, or by size and device"
    )
    targets: str | list[str] = Setting("all-linear", "which weights are projected (see core/targets.py)")
    largest: int = Setting(32000, "weights with a side so long are not projected", ge=2)
    betas: tuple[float, float] = Setting((0.9, 0.999), "decays of the two moments")
    eps: float = Positive(1e-8, "added to the root, against division by zero")

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """The projected weights, and the others."""
        chosen = matrices_at(model, self.targets)

        def mark(name: str, parameter: nn.Parameter) -> tuple[float, Group]:
            return 1.0, {"projected": id(parameter) in chosen and max(parameter.shape) < self.largest}

        return grouped(model, lr, self.weight_decay, mark)

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The optimizer on its groups."""
        defaults = {name: getattr(self, name) for name in SETTINGS}
        return ProjectedDCT(groups, lr=lr, weight_decay=self.weight_decay, **defaults)

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """2 r L numbers, r int32 and the feedback of a projected weight, two of every other number."""
        size = parameter.element_size()
        if not group["projected"]:
            return 2 * parameter.numel() * size
        shape = tuple(parameter.shape)
        moments = 2 * math.prod(projected_shape(shape, self.rank, "std")) * size
        kept = {"none": 0, "own": parameter.numel() * size}
        feedback = kept[self.feedback] if self.feedback in kept else row_bytes(shape, BITS[self.feedback])
        return moments + INDEX * min(self.rank, *shape) + feedback


class ProjectedDCT(AlongCosines):
    """State: step, exp_avg, exp_avg_sq, and of what is projected `index`; feedback, or its codes and edges."""

    def project(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """One step along the direction of AdamW on R, taken back."""
        right = parameter.shape[0] >= parameter.shape[1]
        t = count_step(state)
        A = _with_feedback(state, gradient, group["feedback"])
        R = self._projected(A, state, group, t, right)
        basis = short_basis(state["index"], R, parameter.shape, group["vectors"])
        if group["feedback"] != "none":
            add_back(A, basis, R, -1.0)
            _keep_feedback(state, A, group["feedback"])
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        N, factor = adam_direction(state, R, t, group["betas"], group["eps"], released=False)
        add_back(parameter, basis, N, -group["lr"] * factor)

    def _projected(self, A: Tensor, state: dict[str, Any], group: Group, t: int, right: bool) -> Tensor:
        """Return R of A, of new vectors where it is time, and bring the moments along."""
        if t > 1 and t % group["refresh"]:
            rows = basis_rows(state["index"], min(A.shape), A, group["vectors"])
            return A @ rows.t() if right else rows @ A
        index, R = select(A, group["rank"], right, group["norm"], group["vectors"], group["route"])
        if group["rotate"] and t > 1:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = moved_columns(state[name], state["index"], index, right)
        state["index"] = index
        return R


def _with_feedback(state: dict[str, Any], gradient: Tensor, kept: str) -> Tensor:
    """Return G + E: a tensor to write to, but for G itself where nothing is fed back."""
    if kept == "none":
        return gradient
    if kept == "own":
        return state["feedback"].add_(gradient) if "feedback" in state else gradient.clone()
    if "feedback" not in state:
        return gradient.clone()
    rows = Rows(state["feedback"], state["feedback_edges"])
    return dequantise_rows(rows, gradient.shape[1], BITS[kept]).to(gradient.dtype).add_(gradient)


def _keep_feedback(state: dict[str, Any], E: Tensor, kept: str) -> None:
    if kept == "own":
        state["feedback"] = E
    else:
        state["feedback"], state["feedback_edges"] = quantise_rows(E, BITS[kept])
