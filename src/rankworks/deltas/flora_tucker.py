"""FLoRA: the change of a weight of N dimensions as a Tucker tensor, so that a convolution's kernel is not flattened.

    dW[o, i, a, b] = s sum_pqcd G[p, q, c, d] P_in[i, p] P_out[o, q] P_1[a, c] P_2[b, d]      linear: s P_out G^T P_in^T

Core G (r_in, r_out, r_1, ...) = 0 at the start, factors P_in (in, r_in), P_out (out, r_out), P_k (side k, r_k) drawn
with deviation sqrt(1 / (2 r)): Kaiming normal with slope sqrt 3, whose fan is the rank. At first only G moves. All are
trained; sum of dim r, plus prod r, numbers per site. A mode of n values has rank n at most (a depthwise kernel has one
input channel, a pointwise one sides of 1): what is left to the defaults, 16 and 2, is cut to that, and a rank that was
given and is larger is refused.

Exact as LoRA: linear at rank min(r_in, r_out), a convolution at rank r_out. A convolution runs as three thin ones:
1 x 1 into r_in channels, the core's kernel with the base's stride, padding and dilation, 1 x 1 out of r_out.

`scale_mode` and `factor_init` give the authors' second convention, for linear layers, of their language experiments:
dW = (alpha / r) B E A with Kaiming uniform A = P_in^T and B = P_out (slope sqrt 5), or N(0, 0.02^2) on GLUE, where
their code divides by r + 1e-5. The released convolution sizes P_in by all input channels, which fails with groups; here
it is in/groups. Their class for embeddings (N = 1) adds one vector to all tokens, which is no change of the table; here
a table is a matrix like any other (N = 2).
Source: arXiv:2405.14739, section 3; SJTU-DeepVisionLab/FLoRA; Chongjie-Si/Subspace-Tuning for the second convention.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor, nn

from rankworks.core.delta import Delta, Factors
from rankworks.core.fields import Positive, Probability, Setting
from rankworks.core.forms.lowrank import Factored
from rankworks.core.inputs import Input, Patches, dropout, linear
from rankworks.core.registry import delta
from rankworks.core.site import Shape

RANK, KERNEL_RANK = 16, 2
"""The ranks where none is given, cut to the sizes of the modes."""


def _sizes(shape: Shape) -> dict[str, int]:
    """The number of values of every mode: in, out, then the kernel's sides."""
    sides = {f"side {k} of the kernel": n for k, n in enumerate(shape.kernel, start=1)}
    return {"input": shape.in_ // math.prod(shape.kernel), "output": shape.out, **sides}


def _given(spec: Any, shape: Shape) -> list[tuple[str, int] | None]:
    """The setting that gives every mode its rank, and that rank; None where it is left to the default."""
    names = ["rank_in", "rank_out", *("kernel_rank" for _ in shape.kernel)]
    names = [n if n == "kernel_rank" or getattr(spec, n) is not None else "rank" for n in names]
    return [None if getattr(spec, n) is None else (n, getattr(spec, n)) for n in names]


def _modes(spec: Any, shape: Shape) -> list[tuple[int, int]]:
    """The size and rank of every mode."""
    modes = []
    for i, (n, given) in enumerate(zip(_sizes(shape).values(), _given(spec, shape), strict=True)):
        modes.append((n, min(n, RANK if i < 2 else KERNEL_RANK) if given is None else given[1]))
    return modes


@delta("flora-tucker", title="FLoRA (Tucker)", year=2024, paper="arXiv:2405.14739")
class FLoRATucker(Factored):
    """A small core and one factor per dimension of the weight."""

    rank: int | None = Setting(
        None, "rank of the input's and the output's dimension; None: 16, or the dimension where it is smaller", ge=0
    )
    rank_in: int | None = Setting(None, "rank of the input's dimension, in place of rank", ge=1)
    rank_out: int | None = Setting(None, "rank of the output's dimension, in place of rank", ge=1)
    kernel_rank: int | None = Setting(
        None, "rank of each side of a convolution's kernel; None: 2, or 1 where the side is 1", ge=1
    )
    scale: float = Positive(1.0, "multiplier of the change, with scale_mode plain")
    scale_mode: Literal["plain", "alpha_over_r"] = Setting("plain", "the multiplier: scale, or alpha/rank")
    alpha: float = Positive(16.0, "numerator of the multiplier, with scale_mode alpha_over_r")
    factor_init: Literal["kaiming_normal", "kaiming_uniform", "normal002"] = Setting(
        "kaiming_normal", "how the factors are drawn; the other two for linear layers"
    )
    dropout: float = Probability(0.0, "probability of dropping an input in training")

    def setup(self, weight: Tensor) -> None:
        """Draw the factors; G = 0 leaves the output unchanged."""
        modes = _modes(self, self.shape)
        self.G = self.trainable(*(r for _, r in modes))
        self.P_in, self.P_out = (self._drawn(n, r, mode) for mode, (n, r) in enumerate(modes[:2]))
        self.sides = nn.ParameterList(self._drawn(n, r, 2) for n, r in modes[2:])

    def _drawn(self, size: int, rank: int, mode: int) -> nn.Parameter:
        if self.factor_init == "normal002":
            return self.trainable(size, rank, std=0.02)
        if self.factor_init == "kaiming_uniform":  # of A = P_in^T, whose fan is `in`, and of B = P_out, whose fan is r
            return self.trainable(size, rank, bound=(size if mode == 0 else rank) ** -0.5)
        return self.trainable(size, rank, std=(2 * rank) ** -0.5)

    @property
    def multiplier(self) -> float:
        """s."""
        return self.scale if self.scale_mode == "plain" else self.alpha / (self.rank or RANK)

    def _kernel(self) -> Tensor:
        """s G with its kernel modes multiplied out: (r_in, r_out, *kernel)."""
        core = self.multiplier * self.G
        for side in self.sides:  # contracts mode 2 and puts the side's mode last, so the next is at 2 again
            core = core.movedim(2, -1) @ side.t()
        return core

    def branch(self, x: Input) -> Tensor:
        """The change applied to x; on a convolution in three thin ones."""
        if not isinstance(x, Patches):
            return super().branch(x)
        x = dropout(x, self.dropout, self.training)
        assert isinstance(x, Patches)
        image, P_in = x.image, self.P_in.to(x.dtype)
        narrow = (P_in.t() @ image.flatten(2)).unflatten(-1, image.shape[2:])  # (N, r_in, *spatial)
        core = self._kernel().transpose(0, 1).flatten(1)  # (r_out, r_in * kernel)
        return linear(Patches(narrow, x.module).linear(core), self.P_out)

    @property
    def reader(self) -> Delta | None:
        """Itself: on linear layers it is its factors."""
        return self

    def factors(self) -> Factors:
        """Exact at the smaller of r_in and r_out; of a convolution at r_out, B a pointwise convolution."""
        core = self._kernel()  # (r_in, r_out, *kernel)
        if not self.shape.kernel and core.shape[0] < core.shape[1]:
            return Factors(self.P_out @ core.t(), self.P_in.t())
        A = (core.movedim(0, -1) @ self.P_in.t()).movedim(-1, 1)  # (r_out, in, *kernel)
        return Factors(self.P_out, A.flatten(1))

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """sum of dim r, plus prod r, over the modes."""
        modes = _modes(spec, shape)
        return sum(n * r for n, r in modes) + math.prod(r for _, r in modes)

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """A mode has no more rank than values, and the second convention is written for matrices."""
        if spec.rank == 0:
            return super().problems(spec, shape)
        found = []
        for (mode, n), given in zip(_sizes(shape).items(), _given(spec, shape), strict=True):
            if given is not None and given[1] > n:
                name, remedy = given[0], "rank_in" if mode == "input" else "rank_out" if mode == "output" else given[0]
                found.append(
                    f"flora-tucker's {name} {given[1]} is more than the weight's {mode} has values ({n}), which is the "
                    f"largest rank there: lower it, or set {remedy} to at most {n} at this site with overrides"
                )
        if shape.kernel and (spec.scale_mode, spec.factor_init) != ("plain", "kaiming_normal"):
            found.append(
                "flora-tucker with scale_mode alpha_over_r, or another factor_init than kaiming_normal, is defined for "
                "linear layers: leave both out for convolutions"
            )
        return found
