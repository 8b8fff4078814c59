"""LoRA-MGPO: training at weights one look ahead along the optimizer's momentum, at no second pass.

    before a step's forward     v = s (mB A + B mA)             the momentum of the factors, as a change of the weight
                                e = -rho c v / ||v||_F          c = min(1 / gbar, 10)
    forward and backward at     W' + e                          then the step, at W'
    after the backward          gn = ||s (gB A + B gA)||_F      gbar <- gn at first, then beta gbar + (1 - beta) gn

mA, mB are the first moments that the `base` keeps for A and B, and mu of the paper is their decay, AdamW's b1. The sign
is that of the momentum's own steps, unlike SAM's, which climbs. While a pair has no moments, as in the first step, or
v is zero, it is not perturbed; c = 1 while there is no gbar, and always with normalise=False.

The released code adds e to W0 and subtracts it again after the backward pass, which does not give W0 back in a 16-bit
type; here W0 is not touched: v has rank 2r, so e is two thin factors more beside A and B in training forward passes,
and norms come from Gram matrices; nothing has the weight's size. e is a constant for the gradient. It acts on the
layer's input without LoRA's dropout, as a change of W0 does; with gates g between the factors, v = s (mB diag(g) A + B
diag(g) mA). Inside DoRA it moves V, whose norms are taken without it. gn is taken from clipped gradients (the released
code takes it before a trainer clips). All micro-batches of a step see the same e.

Defaults: rho = 0.05, beta = 0.9 with b1 = 0.9, the paper's for T5 on GLUE; for LLaMA-2-7B it has rho = 0.01, beta = 0.8
and b1 = 0.8. State: the base's, and one number of a pair, gbar, which stands with the hook in a checkpoint. Everything
happens in hooks: a loop of one's own has to call `optimizer.method_hooks`.
Source: arXiv:2502.14538, versions 2 and 3, and its released code.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankworks.core.amend import Amendment
from rankworks.core.delta import Factors
from rankworks.core.errors import ConfigError, TrainingError
from rankworks.core.fields import NonNegative, Setting
from rankworks.core.hooks import Hook, Moment
from rankworks.core.inputs import Input, linear
from rankworks.core.optim.amending import PerStep, Place
from rankworks.core.optim.method import Trains
from rankworks.core.optim.over import Over
from rankworks.core.optim.thin import product_norm
from rankworks.core.registry import optimizer

TINY, LARGEST = 1e-12, 10.0  # against division by zero; of c


@optimizer("lora-mgpo", title="LoRA-MGPO", year=2025, paper="arXiv:2502.14538")
class LoRAMGPO(Over):
    """Momentum-guided perturbation."""

    layerwise: ClassVar[bool] = False
    trains: ClassVar[tuple[Trains, ...]] = ("adapter",)

    rho: float = NonNegative(0.05, "size of the perturbation")
    beta: float = Setting(0.9, "decay of the gradient's mean norm", ge=0, lt=1)
    normalise: bool = Setting(True, "divide the size by the gradient's mean norm")

    @classmethod
    def agree(cls, spec: Any) -> None:
        """There must be a momentum to look along."""
        super().agree(spec)
        if spec.base.key == "sgd" and not spec.base.momentum:
            raise ConfigError("lora-mgpo looks along the momentum of its base: give base sgd a momentum above 0.")

    def extra_hook(self, model: nn.Module, optimizer: Optimizer) -> Hook:
        """What perturbs."""
        return LookAhead(model, self)


class LookAhead(PerStep):
    """Gives every pair its perturbation; keeps the mean norm of its gradient."""

    def __init__(self, model: nn.Module, method: LoRAMGPO):
        super().__init__(model, "LoRA-MGPO")
        self.method = method
        self.mean: dict[str, Tensor] = {}  # gbar of a place, a number on its device

    @torch.no_grad()
    def amendment(self, place: Place, moment: Moment) -> Amendment | None:
        """e, where there are moments."""
        found = moments_of(place, moment.optimizer)
        if found is None or not self.method.rho:
            return None
        P, Q = thin(place, *found)
        norm = product_norm(P, Q) * abs(place.pair.scale)  # ||v||
        gbar = self.mean.get(place.name)
        c = 1.0
        if self.method.normalise and gbar is not None:
            c = (1 / (gbar.to(norm) + TINY)).clamp_max(LARGEST)
        size = torch.where(norm > TINY, -self.method.rho * c / (norm + TINY), 0.0) * place.pair.scale
        return Perturbed(P * size.to(P.dtype), Q, apart=place.factored.dropout > 0)

    @torch.no_grad()
    def after_backward(self, moment: Moment) -> None:
        """Count the norm of s (gB A + B gA) into the mean."""
        for place in self.places:
            gA, gB = place.pair.A.grad, place.pair.B.grad
            if gA is not None and gB is not None:
                norm = product_norm(*thin(place, gA, gB)) * abs(place.pair.scale)
                before = self.mean.get(place.name)
                self.mean[place.name] = norm if before is None else torch.lerp(norm, before.to(norm), self.method.beta)

    def after_step(self, moment: Moment) -> None:
        """Let go, and make sure there is a momentum to look along."""
        super().after_step(moment)
        for place in self.places:
            if place.pair.A.grad is not None and moments_of(place, moment.optimizer) is None:
                raise TrainingError(
                    "LoRA-MGPO looks along the first moment of its base, and this one keeps none that has the factors' "
                    "shape: choose base adamw, or sgd with momentum."
                )

    def state_dict(self) -> dict[str, Any]:
        """The mean norms."""
        return {"mean": dict(self.mean)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with those."""
        self.mean = dict(state["mean"])


def moments_of(place: Place, optimizer: Optimizer) -> tuple[Tensor, Tensor] | None:
    """Return the first moments of A and B that an optimizer keeps, None where it does not (yet) for one of them."""
    found = []
    for factor in (place.pair.A, place.pair.B):
        state: Any = optimizer.state.get(factor, {})
        moment = state.get("exp_avg", state.get("momentum_buffer"))
        if moment is None or moment.shape != factor.shape or not moment.is_floating_point():
            return None
        found.append(moment)
    return found[0], found[1]


def thin(place: Place, of_A: Tensor, of_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return P (m, 2r), Q (2r, n) with P Q = of_B A + B of_A, gates between them."""
    gated = of_A if place.gate is None else place.gate.detach().unsqueeze(1) * of_A
    return torch.cat([of_B, place.pair.B.detach()], dim=1), torch.cat([place.gated, gated])


class Perturbed(Amendment):
    """W' + e with e = P Q, (m, k) and (k, n): beside the factors, or `apart` from them, for an input that is whole."""

    def __init__(self, P: Tensor, Q: Tensor, apart: bool):
        self.P, self.Q, self.apart = P, Q, apart

    def factors(self, factors: Factors) -> Factors:
        """Both products as one."""
        if self.apart:
            return factors
        B, A = factors
        return Factors(torch.cat([B, self.P.to(B.dtype)], dim=1), torch.cat([A, self.Q.to(A.dtype)]))

    def output(self, y: Tensor, x: Input) -> Tensor:
        """With e x."""
        return y + linear(linear(x, self.Q), self.P).to(y.dtype) if self.apart else y

    def matrix(self, change: Tensor) -> Tensor:
        """With e."""
        return change + self.P @ self.Q if self.apart else change
