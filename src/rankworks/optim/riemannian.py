"""Riemannian preconditioned LoRA: the gradient of each factor divided by the other factor's Gram matrix.

    gA <- (B^T B + reg I)^-1 gA        gB <- gB (A A^T + reg I)^-1        then a step of the `base`

Without reg the step on W = s B A is, to first order, that of the gradients' projections, s^2 (P_B G + G P_A), P_B onto
the columns of B and P_A onto the rows of A: the same whichever of the equivalent factors B M^-1, M A stand there. So
one learning rate suits both, whatever their sizes. As B starts at zero, reg must be above zero.

A (r, in), B (out, r); two systems of r x r per pair and step, solved in float32 at least. State: the base's. Acts when
the gradients are complete and before the base steps; what is in no pair is left as it is.
Source: arXiv:2402.02347.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankworks.core.fields import Positive
from rankworks.core.hooks import Hook
from rankworks.core.optim.method import Group, Trains
from rankworks.core.optim.over import Over
from rankworks.core.optim.pairs import checked_pairs
from rankworks.core.registry import optimizer

TITLE = "Riemannian preconditioned LoRA"


@optimizer("riemannian", title=TITLE, year=2024, paper="arXiv:2402.02347")
class Riemannian(Over):
    """Any optimizer on gradients that do not depend on how a product is divided into factors."""

    layerwise: ClassVar[bool] = False
    trains: ClassVar[tuple[Trains, ...]] = ("adapter",)

    reg: float = Positive(1e-2, "added to the diagonals of the Gram matrices")

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """The base's. Raises `TrainingError` where no pair is trained, or gates or a schedule stand in the way."""
        checked_pairs(model, TITLE)
        return super().groups(model, lr)

    def extra_hook(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Hook | None:
        """None: the gradients are changed at the start of every step, which no run can leave out."""
        names = {id(p): name for name, p in model.named_parameters()}
        pairs = [(names[id(pair.A)], names[id(pair.B)]) for _, pair, _ in checked_pairs(model, TITLE)]

        def before(made: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
            if closure is None:
                precondition(made, pairs, self.reg)
                return None

            def gradients_too() -> Any:
                loss = closure()
                precondition(made, pairs, self.reg)
                return loss

            return args[:1], {**kwargs, "closure": gradients_too}

        optimizer.register_step_pre_hook(before)
        return None


@torch.no_grad()
def precondition(made: torch.optim.Optimizer, pairs: list[tuple[str, str]], reg: float) -> None:
    """Change the gradients of the pairs with these names in place; ranks may have changed since the last time."""
    named = {n: p for group in made.param_groups for n, p in zip(group["names"], group["params"], strict=True)}
    for A, B in ((named[a], named[b]) for a, b in pairs):
        if not A.numel():
            continue
        if A.grad is not None:
            A.grad.copy_(_solved(B.t(), A.grad, reg))
        if B.grad is not None:
            B.grad.copy_(_solved(A, B.grad.t(), reg).t())


def _solved(F: Tensor, g: Tensor, reg: float) -> Tensor:
    """(F F^T + reg I)^-1 g for F (r, n), g (r, k)."""
    exact = torch.promote_types(F.dtype, torch.float32)
    F = F.to(exact)
    G = F @ F.t()
    G.diagonal().add_(reg)
    return torch.cholesky_solve(g.to(exact), torch.linalg.cholesky(G))
