"""AltLoRA and AltLoRA+: A and B take turns, each by a step whose effect on the weight is its projected gradient.

    A's step    dA = (B^T B)^-1 gA / s^2        s B dA = P_B G          gA = s B^T G,  gB = s G A^T
    B's step    dB = gB (A A^T)^-1 / s^2        s dB A = G P_A

The momentum of A was gathered while the other factor was B_old: it moved the weight along B_old MA. It is carried over
by projecting that onto what B spans now, and likewise for B's:

    MA <- b1 (B^T B)^-1 B^T B_old MA + (1 - b1) dA        A <- A - lr (MA + decay A)        B_old <- B
    MB <- b1 MB A_old A^T (A A^T)^-1 + (1 - b1) dB        B <- B - lr (MB + decay B)        A_old <- A

so the product's path is the same from (B0, A0) and from (B0 R, R^-1 A0). AltLoRA+ divides by the root of the mean
square, MA / (sqrt(VA) + eps) with VA <- b2 VA + (1 - b2) dA^2, and is not invariant. No moment is corrected for its
bias; `correct_bias` corrects the first, as the released code does.

The factor whose turn it is gets its gradient at the other's new value, in a step of its own, and in training with
hooks it alone gets one: half a backward pass for the factors, and where A is held the layer's input is not kept.
Without hooks both gradients are computed and one is used. Turns last `every` steps (1 in the paper; the released
trainer has 10, and moves both factors in every step before the first change). B goes first: it is zero at the start,
and A, whose gradient is then zero, could not move. The Gram matrices are damped relatively to their trace; the released
code adds 1e-3 I, far more than B^T B is in the first steps, and leaves 1 / s^2 out. With damping the carried momentum
is written MA + (B^T B + d I)^-1 B^T (B_old - B) MA: MA to the bit where B did not move, and the formula above at d = 0.
The released AltLoRA+ keeps the momentum as it was before it is carried over; here the carried one is kept, as in the
paper. The rate is that of a step on the weight: AltLoRA wants SGD's rates, AltLoRA+ Adam's.

State: 2 r (m + n) numbers of a pair, the momentum of each factor and its value when the other last moved; AltLoRA+ has
3 r (m + n). What is trained besides pairs takes AdamW's steps.
Source: arXiv:2505.12455, algorithm 1 and section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankworks.core.fields import NonNegative, Positive, Setting
from rankworks.core.forms.lowrank import Pair
from rankworks.core.hooks import Hook, Moment
from rankworks.core.optim.gram import grams
from rankworks.core.optim.method import Group, OptimizerMethod, Trains
from rankworks.core.optim.pairs import FoundPair, Paired, paired_groups, trained_pairs
from rankworks.core.optim.stepwise import count_step
from rankworks.core.registry import optimizer

Turn = Literal["A", "B"]


@optimizer("altlora", title="AltLoRA", year=2025, paper="arXiv:2505.12455")
class AltLoRA(OptimizerMethod):
    """Projected gradients for A and B in turn, and a momentum that follows them."""

    layerwise: ClassVar[bool] = False
    trains: ClassVar[tuple[Trains, ...]] = ("adapter",)
    plus: ClassVar[bool] = False

    betas: tuple[float, float] = Setting((0.9, 0.999), "decays of the two moments")
    eps: float = Positive(1e-8, "added to the root, against division by zero")
    damping: float = NonNegative(1e-6, "added to the Gram matrices of the factors, times the mean eigenvalue")
    every: int = Setting(1, "steps of one factor before it is the other's turn", ge=1)
    correct_bias: bool = Setting(False, "correct the first moment for its bias")

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """The pairs, and all else."""
        return paired_groups(model, lr, self.weight_decay, title=type(self).__name__)

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The optimizer on its groups."""
        names = ("weight_decay", "betas", "eps", "damping", "every", "correct_bias", "plus")
        return Alternating(groups, lr=lr, **{name: getattr(self, name) for name in names})

    def hook(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Hook:
        """What keeps the other factor out of the backward pass."""
        return HalfBackward(model)

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """Two numbers for every one of a factor, three in AltLoRA+; without a pair two."""
        kept = 3 if group["paired"] and self.plus else 2
        return kept * parameter.numel() * parameter.element_size()


@optimizer("altlora-plus", title="AltLoRA+", year=2025, paper="arXiv:2505.12455")
class AltLoRAPlus(AltLoRA):
    """AltLoRA with a second moment."""

    plus: ClassVar[bool] = True


class Alternating(Paired):
    """See the module's text. State of a factor: step, exp_avg, old, and exp_avg_sq with `plus`; elsewhere AdamW's.

    `old` is the factor's value when the other one moved last. Groups of pairs count the steps `taken`.
    """

    def __init__(self, groups: Iterable[Group], **defaults: Any):
        super().__init__(groups, paired=False, scales=None, taken=0, **defaults)

    @staticmethod
    def turn(group: Group) -> Turn:
        """Return the factor that the next step moves."""
        return "A" if group["taken"] // group["every"] % 2 else "B"

    def step_group(self, group: Group) -> None:
        """Step on the factors whose turn it is, or on each parameter by itself."""
        super().step_group(group)
        if group["paired"]:
            group["taken"] += 1

    def update_pairs(self, pairs: list[FoundPair], group: Group) -> None:
        """Move those whose turn it is; A's step is B's with everything transposed."""
        of_A = self.turn(group) == "A"
        turns = [(p.A, p.B, p.scale) if of_A else (p.B, p.A, p.scale) for p in pairs]
        moved = [(T, H, s) for T, H, s in turns if T.grad is not None and T.numel()]
        found = grams([H.t() if of_A else H for _, H, _ in moved], group["damping"])
        for (T, H, scale), decomposed in zip(moved, found, strict=True):
            self._move(T, H, decomposed.inverse / scale**2, scale, group, transposed=of_A)

    def _move(
        self, T: nn.Parameter, H: nn.Parameter, inverse: Tensor, scale: float, group: Group, *, transposed: bool
    ) -> None:
        """Move T while H stays. Written for B's step, with T (m, r) and H (r, n); A's is its transpose.

        inverse: (H H^T)^-1 / s^2, (r, r).
        """
        assert T.grad is not None
        exact = inverse.dtype

        def turned(x: Tensor) -> Tensor:
            return x.t() if transposed else x

        h, state = turned(H).to(exact), self.state[T]
        step = turned(T.grad).to(exact) @ inverse
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(T)
        mean = turned(state["exp_avg"]).to(exact)
        if "old" in self.state[H]:
            apart = turned(self.state[H]["old"]).to(exact) - h
            mean = torch.addmm(mean, mean @ (apart @ h.t()), inverse, alpha=scale**2)
        mean = mean.lerp(step, 1 - group["betas"][0])
        turned(state["exp_avg"]).copy_(mean)
        direction = self._normed(mean, step, turned, state, group) if group["plus"] else mean
        t, decay = count_step(state), group["lr"] * group["weight_decay"]
        if decay:
            T.mul_(1 - decay)
        corrected = 1 - group["betas"][0] ** t if group["correct_bias"] else 1.0
        T.add_(turned(direction).to(T.dtype), alpha=-group["lr"] / corrected)
        self.state[H]["old"] = H.detach().clone()

    def _normed(self, mean: Tensor, step: Tensor, turned: Any, state: dict[str, Any], group: Group) -> Tensor:
        """MA / (sqrt(VA) + eps)."""
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        b2 = group["betas"][1]
        square = (b2 * turned(state["exp_avg_sq"]).to(step.dtype)).addcmul_(step, step, value=1 - b2)
        turned(state["exp_avg_sq"]).copy_(square)
        return mean / square.sqrt_().add_(group["eps"])


class HalfBackward(Hook):
    """Lets the factor whose turn it is get a gradient alone, in every micro-batch of its step."""

    def __init__(self, model: nn.Module):
        self.pairs: list[Pair] = [found.pair for found in trained_pairs(model)]

    def before_forward(self, moment: Moment) -> None:
        """Hold the others."""
        group = next(g for g in moment.optimizer.param_groups if g["paired"])
        for pair in self.pairs:
            pair.held = "B" if Alternating.turn(group) == "A" else "A"

    def after_step(self, moment: Moment) -> None:
        """Let them go."""
        self._let_go()

    def on_end(self, moment: Moment) -> None:
        """Let them go."""
        self._let_go()

    def _let_go(self) -> None:
        for pair in self.pairs:
            pair.held = None
