"""ALLoRA: the gradient of every row of a low-rank change times a factor that falls as the row grows.

    c_i = 1 / sqrt(||w_i|| + 1/eta^2)        w_i row i of the change: c_i = eta at zero, ~ ||w_i||^(-1/2) far from it

c is a constant for the gradient. Scaling the rows of G = dL/dW', G <- diag(c) G, means for the factors of s B A

    gB = s diag(c) G A^T        gA = s B^T diag(c) G        dL/dx as without c: lower layers see the true gradient

gA is no function of LoRA's own gradient, so in training steps the layer runs with the factors [B - cB, cB] and [A; A],
the same product, of whose gradients the second halves are the ones wanted and the first are dropped: thin matrices of
twice the rank, nothing else. B leaves zero faster so, which is what the method is for; it takes LoRA's dropout and
scale out (s = 1: alpha = rank). Here both stay the adapter's own settings, and w_i is the row of what the adapter
adds, s times B A, less its start where that is taken out of the base, with gates and all.

`rows` says whose norm counts. "BA": the change's, as the paper's text has it (as a reviewer quotes it: a function
inversely proportional to ||(BA)_i||), found through the Gram matrix A A^T. "B": those of B's own rows, and gB alone
is scaled, as third-party optimizers do; while B = 0 the two readings of c agree. `apply` says what is scaled. "grad",
the default: the gradients, as in the paper's words; under Adam a factor of a row of B that stays cancels, so that its
change over time acts, and the weights of rows in gA. "lr": the base's steps of the rows of B, a rate for each row
(decay included), while A keeps its own. Under SGD both are the same for B. eta is not given in what could be read of
the paper, which takes the scale's place with it: 2, the usual alpha/rank. "B" and "lr" act on clipped gradients, "BA"
before they are clipped.

No state besides the base's. Everything happens in hooks: a loop of one's own has to call `optimizer.method_hooks`.
Source: arXiv:2410.09692.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankworks.core.amend import Amendment
from rankworks.core.delta import Factors
from rankworks.core.fields import Positive, Setting
from rankworks.core.hooks import Hook, Moment
from rankworks.core.optim.amending import PerStep, Place
from rankworks.core.optim.method import Trains
from rankworks.core.optim.over import Over
from rankworks.core.optim.thin import row_squares
from rankworks.core.registry import optimizer

Rows = Literal["BA", "B"]
Apply = Literal["grad", "lr"]


@optimizer("allora", title="ALLoRA", year=2024, paper="arXiv:2410.09692")
class ALLoRA(Over):
    """A factor on the gradient of every output's row."""

    layerwise: ClassVar[bool] = False
    trains: ClassVar[tuple[Trains, ...]] = ("adapter",)

    eta: float = Positive(2.0, "factor of a row that is zero")
    rows: Rows = Setting("BA", "whose rows' norms count: the change's, or B's")
    apply: Apply = Setting("grad", "what is scaled: gradients, or the steps of B")

    def extra_hook(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Hook:
        """What scales."""
        return RowScaling(model, self.eta, self.rows, self.apply)


def row_factors(squares: Tensor, eta: float) -> Tensor:
    """Return c (m,) of the squared norms of rows (m,)."""
    return (squares.sqrt() + eta**-2).rsqrt()


class RowScaling(PerStep):
    """Amends forward passes, scales gradients of B, or scales what a step did to B."""

    def __init__(self, model: nn.Module, eta: float, rows: Rows, apply: Apply):
        super().__init__(model, "ALLoRA")
        self.eta, self.rows, self.apply = eta, rows, apply
        self.before: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # B, its numbers before a step, and c

    @torch.no_grad()
    def factors_of(self, place: Place) -> Tensor:
        """Return c (out,) of a place."""
        if self.rows == "B":
            B = place.pair.B
            wide = B.to(torch.promote_types(B.dtype, torch.float32))
            return row_factors(wide.square().sum(dim=1), self.eta)
        return row_factors(row_squares(*place.factored.factors()), self.eta)

    def amendment(self, place: Place, moment: Moment) -> Amendment | None:
        """The factors whose gradients are scaled."""
        return ScaledRows(self.factors_of(place)) if (self.rows, self.apply) == ("BA", "grad") else None

    @torch.no_grad()
    def after_backward(self, moment: Moment) -> None:
        """Scale the gradients of B, or remember B."""
        if (self.rows, self.apply) == ("B", "grad"):
            for place in self.places:
                B = place.pair.B
                if B.grad is not None:
                    B.grad.mul_(self.factors_of(place).to(B.grad.dtype).unsqueeze(1))
        elif self.apply == "lr":
            moved = [p for p in self.places if p.pair.B.grad is not None]
            self.before = [(p.pair.B, p.pair.B.clone(), self.factors_of(p)) for p in moved]

    @torch.no_grad()
    def after_step(self, moment: Moment) -> None:
        """Scale what the step did to B: B_before + c (B - B_before)."""
        for B, was, c in self.before:
            torch.lerp(was, B, c.to(B.dtype).unsqueeze(1).expand_as(B), out=B.data)
        self.before = []
        super().after_step(moment)


class ScaledRows(Amendment):
    """Factors of the same product, whose gradients are those of rows scaled by c."""

    def __init__(self, c: Tensor):
        self.c = c

    def factors(self, factors: Factors) -> Factors:
        """[B - cB, cB] and [A; A]."""
        return Factors(*_ScaledRows.apply(factors.B, factors.A, self.c.to(factors.B.dtype).unsqueeze(1)))  # type: ignore


class _ScaledRows(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, B: Tensor, A: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(c)
        ctx.rank = len(A)
        scaled = c * B
        return torch.cat([B - scaled, scaled], dim=1), torch.cat([A, A])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        of_B, of_A = gradients
        (c,) = ctx.saved_tensors
        return c * of_B[:, ctx.rank :], of_A[ctx.rank :], None
