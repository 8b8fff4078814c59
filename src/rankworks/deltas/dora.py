"""DoRA: split the changed weight into direction and magnitude, and train the magnitudes freely.

    V = W + dW(inner)        n_o = ||V_o||_2        W' = diag(m/n) V        m (out,) trained, m = n at the start

`inner` is any additive delta: LoRA in the paper, VeRA ("DVoRA"), SHiRA or any other. With c = m/n and a bias b,

    y = W x + b + (c - 1) (W x_d) + c dW x_d            x_d = dropout(x)

n follows the current inner change but is a constant for the gradient (`detach_norm`, the paper's section 4.3), so
dL/dm_o = sum_t g_to (V x)_to / n_o,  dL/dV = diag(c) dL/dW'. With `detach_norm=False` the gradient of V_o loses its
component along V_o. The norm runs over a row's inputs: one magnitude per output feature, as in both released codes.
With `direction=False` the magnitudes are trained alone, W' = diag(m/||W||) W (the paper's ablation): the norms are then
those of W, taken once, and a layer costs one scaling of its output.
Source: arXiv:2402.09353, sections 3 and 4.3.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rankworks.core.delta import Base, Delta, Factors
from rankworks.core.fields import Probability, Setting
from rankworks.core.forms.wrapper import Wrapper
from rankworks.core.inputs import Input, dropout, linear
from rankworks.core.kernels import scale_rows
from rankworks.core.registry import DeltaSpec, MethodSpec, delta
from rankworks.core.site import Shape


@delta("dora", title="DoRA", year=2024, paper="arXiv:2402.09353")
class DoRA(Wrapper):
    """A magnitude per output feature around any additive delta."""

    additive: ClassVar[bool] = False

    inner: DeltaSpec = Setting("lora", "the delta that changes the direction; must be additive")
    dropout: float = Probability(0.0, "probability of dropping an input of the change in training")
    detach_norm: bool = Setting(True, "treat the row norms as constants in the gradient")
    direction: bool = Setting(
        True, "train the direction too; False trains the magnitudes alone, without an inner delta"
    )

    def setup(self, weight: Tensor) -> None:
        """Build the inner delta; the magnitudes follow in `reset`, once it has its start."""
        self.inner = self.child(self.spec.inner, weight) if self.direction else _Nothing(self, weight)
        self.m = self.trainable(self.shape.out, fill=1.0)

    @torch.no_grad()
    def reset(self, weight: Tensor, init: Any) -> None:
        """Start the inner delta, then take the magnitudes from the weight as it then is."""
        self.inner.reset(weight, init)
        self.m.copy_(self.inner.row_norms(weight))

    def _ratio(self, weight: Tensor) -> Tensor:
        """c = m/n (out,). A row of zeros has no direction: it stays as it is until the inner delta gives it one."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            n = self.inner.row_norms(weight).to(self.m.dtype)
        return torch.where(n > 0, self.m / torch.where(n > 0, n, 1.0), 1.0)

    def forward(self, x: Input, base: Base) -> Tensor:
        """y as in the module's text. The bias is not a part of W and is not scaled."""
        c = self._ratio(base.weight)  # (out,), near 1
        dropped = dropout(x, self.dropout, self.training)
        if dropped is x:  # y = z + (c - 1) (z - b) with z = W x + b + dW x
            return scale_rows(self.inner(x, base), c, base.bias)
        y, frozen = base(x), base(dropped)
        if base.bias is not None:
            frozen = frozen - base.bias.to(y.dtype)
        # c - 1 is taken before the rounding to y's type
        return y + (c - 1).to(y.dtype) * frozen + c.to(y.dtype) * self.inner.branch(dropped)

    @property
    def reader(self) -> Delta | None:
        """The inner delta's, where it sees the input as it is."""
        return None if self.dropout else self.inner.reader

    def dense(self, weight: Tensor) -> Tensor:
        """diag(m/n) (W + dW) - W: (out, in)."""
        changed = weight.to(self.m.dtype) + self.inner.dense(weight)
        return self._ratio(weight).unsqueeze(1) * changed - weight.to(self.m.dtype)

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """The inner delta's count and one magnitude per output."""
        return shape.out + (spec.inner.method.cls.count(spec.inner, shape) if spec.direction else 0)

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """The inner delta's, and that it must be additive."""
        inner = spec.inner.method.cls
        if not spec.direction:
            return []
        if not inner.additive:
            return [f"dora wraps an additive delta, and {spec.inner.key!r} is multiplicative: choose lora, vera, ..."]
        return inner.problems(spec.inner, shape)

    @classmethod
    def wrapped(cls, spec: Any) -> MethodSpec | None:
        """The inner delta's settings, where the direction is trained."""
        return spec.inner if spec.direction else None

    @classmethod
    def exact_gradient(cls, spec: Any) -> bool:
        """Not with `detach_norm`, which holds the row norms constant."""
        return not spec.direction or (not spec.detach_norm and spec.inner.method.cls.exact_gradient(spec.inner))


class _Nothing(Delta):
    """The inner delta of a direction that stays: no change, and the row norms of the weight."""

    def __init__(self, outer: DoRA, weight: Tensor):
        super().__init__(outer.spec, outer.shape, outer.draw, kind=outer.kind)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.norms = self.frozen(torch.linalg.vector_norm(weight.to(wide), dim=1))  # (out,)

    def forward(self, x: Input, base: Base) -> Tensor:
        """The base's output."""
        return base(x)

    def branch(self, x: Input) -> Tensor:
        """Zero (..., out)."""
        B, A = self.factors()
        return linear(linear(x, A), B)

    def factors(self) -> Factors:
        """Zeros of rank 1: a LoRA that is not there."""
        return Factors(self.norms.new_zeros(self.shape.out, 1), self.norms.new_zeros(1, self.shape.in_))

    def row_norms(self, weight: Tensor) -> Tensor:
        """The norm of every row of the weight, (out,)."""
        return self.norms
