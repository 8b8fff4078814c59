"""LoRA-Pro: steps on A and B that together move the weight as close to its own gradient as a pair can.

A step (hA, hB) on a pair moves W' = W + s B A along the equivalent gradient g~ = s (B hA + hB A). In closed form from
gA = s B^T G and gB = s G A^T alone, without G = dL/dW', the smallest ||g~ - G|| is that of

    hA = (B^T B)^-1 gA / s^2 + X A
    hB = (I - B (B^T B)^-1 B^T) gB (A A^T)^-1 / s^2 - B X          any X (r, r):  g~ = P_B G + G P_A - P_B G P_A

with P_B = B (B^T B)^-1 B^T and P_A = A^T (A A^T)^-1 A. X makes hA and hB stay nearest to gA and gB:

    B^T B X + X A A^T = -(B^T B)^-1 gA A^T / s^2        both Gram matrices decomposed: X_ij = C_ij / (lb_i + la_j)

Then <gA, hA> + <gB, hB> = ||g~||^2 >= 0, whatever X is. `variant="sgd"` steps along (hA, hB). `variant="adamw"`, the
one the authors use, keeps Adam's moments of g~ (X = 0 in it, which changes nothing), and takes its direction U for the
gradient of the weight: gA' = s B^T U, gB' = s U A^T through the closed form again, with X, give the step.

    A <- (1 - lr decay) A - lr hA          B <- (1 - lr decay) B - lr hB

The moments have the size of the weight: 2 m n numbers for W (m, n), none with sgd; they are of the factors' type, or of
the type `moments` names (the released code has bfloat16). They are updated in strips of rows, so no other matrix of
the weight's size is made. The Gram matrices are damped relatively to their trace (`damping`; the released code adds
1e-8 I, which means less the larger the factors are) and decomposed as the symmetric matrices they are (there: by a
solver for general ones, with complex numbers). A factor of zeros, as B is at the start, has the inverse zero: the first
step is hA = 0, hB = gB (A A^T)^-1 / s^2, so that g~ = G P_A, and likewise hB = 0 where A starts at zero. s is the
pair's own (the released code writes 2, also where rsLoRA has another). Around a pair in DoRA G is the gradient of what
the magnitudes scale, V = W + s B A, and g~ what V moves along. With dropout before A, G is that of the dropped input.
What is trained besides pairs takes AdamW's steps.
Source: arXiv:2407.18242, theorems 2.1 to 2.3 and appendix on AdamW; its released code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rankworks.core.fields import NonNegative, Positive, Setting
from rankworks.core.optim.gram import Gram, grams, reciprocal
from rankworks.core.optim.method import Group, OptimizerMethod, Trains
from rankworks.core.optim.pairs import FoundPair, Paired, paired_groups, partner
from rankworks.core.optim.stepwise import count_step
from rankworks.core.registry import optimizer

STRIP_NUMBERS = {"cpu": 2**18}
"""Numbers of the weight whose moments are updated at once, by device: what a cache holds, elsewhere 2^24."""


@optimizer("lora-pro", title="LoRA-Pro", year=2024, paper="arXiv:2407.18242")
class LoRAPro(OptimizerMethod):
    """The pair's step nearest to full fine-tuning's."""

    layerwise: ClassVar[bool] = False
    trains: ClassVar[tuple[Trains, ...]] = ("adapter",)

    variant: Literal["adamw", "sgd"] = Setting("adamw", "what steps on the equivalent gradient")
    betas: tuple[float, float] = Setting((0.9, 0.999), "decays of the two moments")
    eps: float = Positive(1e-8, "added to the root, against division by zero")
    damping: float = NonNegative(1e-6, "added to the Gram matrices of the factors, times the mean eigenvalue")
    moments: Literal["float32", "bfloat16"] | None = Setting(None, "type of the moments of pairs; None: the factors'")

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """The pairs, and all else."""
        return paired_groups(model, lr, self.weight_decay, title="LoRA-Pro")

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The optimizer on its groups."""
        names = ("weight_decay", "variant", "betas", "eps", "damping", "moments")
        return EquivalentGradient(groups, lr=lr, **{name: getattr(self, name) for name in names})

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """2 m n numbers with the B of a pair and none with its A; without a pair two of every number."""
        if not group["paired"]:
            return 2 * parameter.numel() * parameter.element_size()
        other = partner(parameter, group)
        is_a = next(i for i, p in enumerate(group["params"]) if p is parameter) % 2 == 0
        if is_a or self.variant == "sgd" or not parameter.numel():
            return 0
        kind = parameter.dtype if self.moments is None else getattr(torch, self.moments)
        return 2 * parameter.shape[0] * other.shape[1] * kind.itemsize


class Directions(NamedTuple):
    """The step of a pair: hA (r, in) and hB (out, r)."""

    A: Tensor
    B: Tensor


class Closed:
    """The closed form at A (r, in), B (out, r), which may be asked for several gradients."""

    def __init__(self, A: Tensor, B: Tensor, scale: float, of_A: Gram, of_B: Gram):
        self.A, self.B, self.scale = A, B, scale
        self.of_A, self.of_B = of_A, of_B  # A A^T and B^T B
        self.inverse_A, self.inverse_B = self.of_A.inverse, self.of_B.inverse

    def unbalanced(self, gA: Tensor, gB: Tensor) -> Directions:
        """Return hA and hB with X = 0."""
        hA = self.inverse_B @ gA / self.scale**2
        hB = gB @ (self.inverse_A / self.scale**2)
        return Directions(hA, hB - self.B @ (self.inverse_B @ (self.B.t() @ hB)))

    def balanced(self, gA: Tensor, gB: Tensor) -> Directions:
        """Return hA and hB with the X that keeps them nearest to gA and gB."""
        hA, hB = self.unbalanced(gA, gB)
        X = sylvester(self.of_B, self.of_A, -hA @ self.A.t())
        return Directions(hA.addmm_(X, self.A), hB.addmm_(self.B, X, alpha=-1))


def sylvester(left: Gram, right: Gram, C: Tensor) -> Tensor:
    """Return X (r, r) with L X + X R = C for two decomposed symmetric matrices; zero where both eigenvalues are."""
    inner = left.vectors.t() @ C @ right.vectors
    inner *= reciprocal(left.values.unsqueeze(1) + right.values)
    return left.vectors @ inner @ right.vectors.t()


class EquivalentGradient(Paired):
    """See the module's text. State: with every B step, exp_avg and exp_avg_sq (out, in); elsewhere AdamW's."""

    def __init__(self, groups: Iterable[Group], **defaults: Any):
        super().__init__(groups, paired=False, scales=None, **defaults)

    def update_pairs(self, pairs: list[FoundPair], group: Group) -> None:
        """One step of both factors of every pair from both gradients."""
        moved = [p for p in pairs if p.A.grad is not None and p.B.grad is not None and p.A.numel()]
        found = grams([F for A, B, _ in moved for F in (A, B.t())], group["damping"])
        for (A, B, scale), of_A, of_B in zip(moved, found[::2], found[1::2], strict=True):
            exact = torch.promote_types(A.dtype, torch.float32)
            self._update(A, B, Closed(A.to(exact), B.to(exact), scale, of_A, of_B), group)

    def _update(self, A: nn.Parameter, B: nn.Parameter, closed: Closed, group: Group) -> None:
        gA, gB = (t.grad.to(closed.A.dtype) for t in (A, B))  # type: ignore[union-attr]
        if group["variant"] == "adamw":
            gA, gB = self._direction(closed, closed.unbalanced(gA, gB), B, group)
        hA, hB = closed.balanced(gA, gB)
        for factor, h in ((A, hA), (B, hB)):
            if group["weight_decay"]:
                factor.mul_(1 - group["lr"] * group["weight_decay"])
            factor.add_(h.to(factor.dtype), alpha=-group["lr"])

    def _direction(self, closed: Closed, h: Directions, B: nn.Parameter, group: Group) -> tuple[Tensor, Tensor]:
        """Update the moments of g~ = s (B hA + hB A), and return s B^T U and s U A^T of Adam's direction U."""
        a, b = closed.A, closed.B
        m, v, t = self._moments(B, (b.shape[0], a.shape[1]), group)
        (b1, b2), root = group["betas"], math.sqrt(1 - group["betas"][1] ** t)
        left, right = (
            torch.cat([b, h.B], dim=1),
            torch.cat([closed.scale * h.A, closed.scale * a]),
        )  # (m, 2r), (2r, n)
        gA, gB = torch.zeros_like(a), torch.empty_like(b)
        size = max(1, STRIP_NUMBERS.get(a.device.type, 2**24) // a.shape[1])
        for rows in (slice(start, start + size) for start in range(0, len(b), size)):
            g = left[rows] @ right
            mean, square = m[rows].to(g.dtype), v[rows].to(g.dtype)  # the moments themselves where the types agree
            mean.lerp_(g, 1 - b1)
            square.mul_(b2).addcmul_(g, g, value=1 - b2)
            if m.dtype != g.dtype:
                m[rows], v[rows] = mean, square
            U = torch.div(mean, torch.sqrt(square, out=g).add_(group["eps"] * root), out=g)
            gA.addmm_(b[rows].t(), U)
            torch.mm(U, a.t(), out=gB[rows])
        size_of_u = closed.scale * root / (1 - b1**t)
        return gA.mul_(size_of_u), gB.mul_(size_of_u)

    def _moments(self, B: nn.Parameter, shape: tuple[int, int], group: Group) -> tuple[Tensor, Tensor, int]:
        state = self.state[B]
        if "exp_avg" not in state or tuple(state["exp_avg"].shape) != shape:  # new, or made unfit by rank surgery
            state.clear()
            kind = B.dtype if group["moments"] is None else getattr(torch, group["moments"])
            state |= {name: torch.zeros(shape, dtype=kind, device=B.device) for name in ("exp_avg", "exp_avg_sq")}
        return state["exp_avg"], state["exp_avg_sq"], count_step(state)
