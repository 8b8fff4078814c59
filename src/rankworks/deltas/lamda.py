"""LaMDA: train an r x r core between two projections from the weight's spectrum, and freeze the output one gradually.

    residual    W' = W + s (B S - U_r S_r) V_r^T       B = U_r, S = S_r at the start: W' = W_main + s B S A
    zero-core   W' = W + s B S V_r^T                   B = U_r, S = 0 at the start
    code        W' = W + s B S A                       A ~ U(+-1/sqrt(in)), B = 0, S ~ U(+-1/sqrt(r)), as released

A (r, in) is frozen always; B (out, r) and S (r, r) are trained, and over the first share `freeze` (eta) of a run's T
steps B freezes: after t steps its first c = floor(r t / (eta T)) columns stand still to the bit, and from c = r on B is
out of training altogether, without gradient or optimizer state, and r^2 numbers are left. The released trainer leaves
out the factor r, so that hardly three columns ever freeze; here it is as the paper's figure has it.

That the projections are singular vectors is the paper's; whether W_main is the residual W - U_r S_r V_r^T with S = S_r
is not printed. It is the default because B then has a gradient from the first step, when its freezing clock already
runs, which with S = 0 it has not. The scale is 1 for the two spectral starts (the numbers are singular values) and
16/rank for the released one, unless `alpha` gives alpha/rank. Columns freeze from the largest singular value on
(`freeze_order`): what the released index order is once columns are sorted, and the leading directions are the best
determined. The residual form is written (B - U_r) S + U_r (S - S_r), zero to the bit at the start. A, U_r and S_r come
from the weight (or the seed) again on load. With H = s G A^T (out, r): dL/dS = B^T H, dL/dB = H S^T.
Source: arXiv:2406.12832.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from rankworks.core.delta import Delta, Factors
from rankworks.core.fields import Probability, Rank, Setting
from rankworks.core.forms.projected import Projected
from rankworks.core.hooks import Hook, Moment
from rankworks.core.registry import delta
from rankworks.core.site import Shape
from rankworks.linalg import truncated_svd


@delta("lamda", title="LaMDA", year=2024, paper="arXiv:2406.12832")
class LaMDA(Projected):
    """A frozen input projection, a trained core, and an output projection that freezes during the run."""

    rank: int = Rank(32)
    alpha: float | None = Setting(None, "numerator of the scale alpha/rank; without it 1, or 16/rank for code", gt=0)
    dropout: float = Probability(0.0, "probability of dropping an input in training")
    start: Literal["residual", "zero-core", "code"] = Setting(
        "residual", "the core at the singular values, at zero, or the released code's random projections"
    )
    freeze: float = Setting(0.3, "share of a run over which B freezes; 0 trains the core alone", ge=0, le=1)
    freeze_order: Literal["largest_first", "smallest_first"] = Setting(
        "largest_first", "which columns of B freeze first, by singular value"
    )

    @property
    def scale(self) -> float:
        """s."""
        alpha = self.alpha if self.alpha is not None else 16.0 if self.start == "code" else float(self.rank)
        return alpha / self.rank

    def setup(self, weight: Tensor) -> None:
        """Take the projections; every start leaves the output unchanged."""
        self.masking: Any = None  # while a step is under way, what zeroes the gradients of B's held columns
        (out, in_), r = self.shape, self.rank
        if self.start == "code":
            self.A = self.frozen(self.draw.uniform(r, in_, bound=in_**-0.5))
            self.B = self.trainable(out, r)
            self.S = self.trainable(r, r, bound=r**-0.5)
            return
        u, s, vh = (t.to(self.draw.dtype) for t in truncated_svd(weight, r))  # (out, r), (r,), (r, in)
        self.A = self.frozen(vh)
        self.B = nn.Parameter(u.clone())
        if self.start == "zero-core":
            self.S = self.trainable(r, r)
        else:
            self.U, self.sigma = self.frozen(u), self.frozen(s)
            self.S = nn.Parameter(torch.diag(s))

    def left(self) -> Tensor:
        """The trained product, less its start where that was taken out of the weight: (out, r)."""
        if self.start != "residual":
            return self.scale * (self.B @ self.S)
        moved = torch.addmm(self.U @ (self.S - torch.diag(self.sigma)), self.B - self.U, self.S)
        return self.scale * moved

    def factors(self) -> Factors:
        """Exact at rank r, because A is frozen: (left, A)."""
        return Factors(self.left(), self.A)

    def frozen_columns(self, done: int, steps: int) -> slice:
        """Return which columns of B stand still once `done` of `steps` steps have been taken."""
        span = self.freeze * steps
        c = min(self.rank, math.floor(self.rank * done / span + 1e-9)) if span else self.rank
        return slice(0, c) if self.freeze_order == "largest_first" else slice(self.rank - c, self.rank)

    @classmethod
    def training_hook(cls, spec: Any, deltas: Mapping[str, Delta]) -> Hook:
        """The gradual freezing."""
        return GradualFreezing([d for d in deltas.values() if isinstance(d, LaMDA)])

    @classmethod
    def inner_rank(cls, spec: Any, shape: Shape) -> int:
        """The rank."""
        return spec.rank

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """rank^2 + out rank, of which rank^2 are left at the end of a run."""
        return spec.rank * (spec.rank + shape.out)

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """A matrix has min(out, in) singular vectors and no more."""
        if spec.start != "code" and spec.rank > min(shape):
            return [
                f"lamda takes at most min(out, in) = {min(shape)} singular vectors and rank is {spec.rank}: lower it "
                "there, or set start='code'"
            ]
        return super().problems(spec, shape)


class GradualFreezing(Hook):
    """Hold columns of every B still, more of them with every step.

    A held column's gradient is zeroed while the backward pass makes it, so that it has no part in clipping either; its
    numbers are put back after the optimizer, whose weight decay does not ask for a gradient; its moments are zeroed.
    There is no state: what is held follows from the step. After a run B can be trained again, by the next one.
    """

    def __init__(self, deltas: list[LaMDA]):
        self.deltas = deltas
        self.step = 0  # the one that the masks were made for
        self.kept: list[tuple[nn.Parameter, slice, Tensor]] = []
        self._thaw()  # a run that was cut short may have left them frozen

    def before_forward(self, moment: Moment) -> None:
        """Let go of what is frozen as a whole, and mask the gradients of held columns until the step is taken."""
        if moment.step == self.step:
            return
        self._unmask()
        self.step = moment.step
        for one, held in self._held(moment):
            whole = held == slice(0, one.rank)
            if whole:
                moment.optimizer.state.pop(one.B, None)
            if whole and not _several_processes():  # which would wait for its gradient
                one.B.requires_grad_(False)
                one.B.grad = None
            else:
                one.masking = one.B.register_hook(_masked(held))

    def after_backward(self, moment: Moment) -> None:
        """Remember the held columns; a B that is frozen as a whole is kept from the optimizer."""
        self._unmask()
        self.kept = []
        for one, held in self._held(moment):
            if held == slice(0, one.rank):
                one.B.grad = None
            else:
                self.kept.append((one.B, held, one.B.detach()[:, held].clone()))

    @torch.no_grad()
    def after_step(self, moment: Moment) -> None:
        """Put the held columns back, and zero their moments."""
        for B, held, numbers in self.kept:
            B[:, held] = numbers
            for moments in _moments(moment.optimizer, B):
                moments[:, held] = 0
        self.kept = []

    def on_end(self, moment: Moment) -> None:
        """Leave B as it was found: the freezing belongs to the run."""
        self._thaw()

    def _held(self, moment: Moment) -> list[tuple[LaMDA, slice]]:
        """Return the deltas that have held columns during this step, and which."""
        found = [(d, d.frozen_columns(moment.step - 1, moment.steps)) for d in self.deltas]
        return [(d, held) for d, held in found if held.stop > held.start]

    def _unmask(self) -> None:
        for one in self.deltas:
            if one.masking is not None:
                one.masking.remove()
                one.masking = None

    def _thaw(self) -> None:
        self._unmask()
        for one in self.deltas:
            one.B.requires_grad_(True)


def _masked(held: slice) -> Any:
    """Return a function that copies a gradient (out, r) with the held columns at zero."""

    def mask(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:, held] = 0
        return gradient

    return mask


def _moments(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """Return what the optimizer keeps per number of a parameter."""
    kept = optimizer.state.get(parameter, {}).values()
    return [t for t in kept if isinstance(t, Tensor) and t.shape == parameter.shape]


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
