"""LoRA-GGPO: training at weights with Gaussian noise, a row's noise sized by the norms of its weight and gradient.

    min over A, B of  E[ L(W0 + s B A + E) ]        E_ij ~ N(0, tau_i^2)
    tau_i^2 = (sigma^2 / n) (||W'_i||^2 + beta ||g_i||^2)        W' = W0 + s B A (m, n)

so that a flat minimum is found rather than a sharp one; beta = 0 is Flat-LoRA's noise. E is a constant for the
gradient, and so is tau. Of the weight's row norms ||W'_i||^2 = ||W0_i||^2 + ||s (BA)_i||^2, the first found once, the
second through a Gram matrix; `cross` adds 2 s <W0_i, (BA)_i>, a product W0 A^T in every step. The gradient is not at
hand in LoRA: g = s (B gA + gB A) = s^2 (B B^T G + G A^T A) stands for it, its row norms taken from one step's (clipped)
gradients for the next step's noise; before there are any nothing is perturbed, unless beta is 0.

E is drawn once for a step, from the seed, the step and the place's name: micro-batches, processes and a recomputed
layer see the same E, so that they act as one large batch. It is made when a layer runs and again on the way back, never
kept, never added to W0, and absent in evaluation: y += x E^T costs one more product as large as the layer's own each
way. Inside DoRA the noise is on V, whose norms are taken without it.

`form="variance"` is the text above, in which two renderings of the paper's covariance agree; sigma^2 / n there is read
as the paper's sigma_n^2. `form="deviation"` is what a trainer of diffusion models made of it, for parity with that
alone: tau_i = (sigma ||W'_i|| + beta ||g_i||^2) / sqrt(m), a norm plus a squared norm over the number of outputs (it
takes a mean over sampled rows of W0 for each of them, and leaves s out). sigma = 0.03 and beta = 0.01 are its
recommendation; the paper's own values could not be found. The published version of the paper replaced the noise by a
step along the momentum: `lora-mgpo`.

State: the base's, and m numbers of a site, which stand with the hook in a checkpoint. Everything happens in hooks: a
loop of one's own has to call `optimizer.method_hooks`.
Source: arXiv:2502.14538, version 1.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankworks.core.amend import Amendment
from rankworks.core.draw import seed_of
from rankworks.core.errors import TrainingError
from rankworks.core.fields import NonNegative, Setting
from rankworks.core.hooks import Hook, Moment
from rankworks.core.inputs import Input, linear
from rankworks.core.kernels import add_noise, noise
from rankworks.core.optim.amending import PerStep, Place
from rankworks.core.optim.method import Trains
from rankworks.core.optim.over import Over
from rankworks.core.optim.thin import row_squares
from rankworks.core.registry import optimizer
from rankworks.core.weights.tied import Transposed


@optimizer("lora-ggpo", title="LoRA-GGPO", year=2025, paper="arXiv:2502.14538v1")
class LoRAGGPO(Over):
    """Gradient-guided noise on the weights."""

    layerwise: ClassVar[bool] = False
    trains: ClassVar[tuple[Trains, ...]] = ("adapter",)

    sigma: float = NonNegative(0.03, "size of the noise")
    beta: float = NonNegative(0.01, "weight of the gradient's norms in it")
    form: Literal["variance", "deviation"] = Setting("variance", "what norms are added up to")
    cross: bool = Setting(False, "count the inner products of the base's rows with the change's")
    seed: int = Setting(0, "of the noise")

    def extra_hook(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Hook:
        """What perturbs."""
        return RowNoise(model, self)


class RowNoise(PerStep):
    """Gives every pair's layer its noise; keeps the row norms of the gradients."""

    def __init__(self, model: nn.Module, method: LoRAGGPO):
        super().__init__(model, "LoRA-GGPO")
        if any(isinstance(module, Transposed) for module in model.modules()):
            raise TrainingError(
                "LoRA-GGPO draws noise for the weight of each layer, and two layers share one change here, one of them "
                "transposed: adapt them with tied='separate'."
            )
        self.method = method
        self.of_base = {place.name: _row_squares(place.site.weight) for place in self.places}  # (m,) each
        self.of_gradient: dict[str, Tensor] = {}

    @torch.no_grad()
    def amendment(self, place: Place, moment: Moment) -> Amendment | None:
        """The noise, where there is some."""
        method, of_gradient = self.method, self.of_gradient.get(place.name)
        silent = not method.sigma and (method.form == "variance" or not method.beta)
        if silent or (method.beta and of_gradient is None):
            return None
        B, A = place.factored.factors()
        squares = self.of_base[place.name] + row_squares(B, A)
        if method.cross:
            weight = place.site.weight
            squares = squares + 2 * ((weight @ A.t().to(weight.dtype)) * B).sum(dim=1)
        extra = 0.0 if of_gradient is None else method.beta * of_gradient.to(squares.device)
        if method.form == "variance":
            tau = method.sigma * ((squares + extra).clamp_min(0) / A.shape[1]).sqrt()
        else:
            tau = (method.sigma * squares.clamp_min(0).sqrt() + extra) / len(B) ** 0.5
        return Noise(tau, A.shape[1], seed_of(method.seed, place.name, moment.step))

    @torch.no_grad()
    def after_backward(self, moment: Moment) -> None:
        """Take the row norms of s (B gA + gB A)."""
        for place in self.places:
            pair, gA, gB = place.pair, place.pair.A.grad, place.pair.B.grad
            if gA is not None and gB is not None:
                P, Q = torch.cat([pair.B, gB], dim=1), torch.cat([gA, pair.A])
                self.of_gradient[place.name] = row_squares(P, Q) * pair.scale**2

    def state_dict(self) -> dict[str, Any]:
        """The row norms of the last gradients."""
        return {"gradient": dict(self.of_gradient)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with those."""
        self.of_gradient = dict(state["gradient"])


def _row_squares(weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=wide).square()


class Noise(Amendment):
    """y + x E^T, E (out, inputs) from tau (out,) and a seed; a compiler leaves it out, whose graphs know no seeds."""

    def __init__(self, tau: Tensor, inputs: int, seed: int):
        self.tau, self.inputs, self.seed = tau, inputs, seed

    @torch.compiler.disable
    def output(self, y: Tensor, x: Input) -> Tensor:
        """With a layer's noise on the way."""
        if isinstance(x, Tensor):
            return add_noise(y, x, self.tau, self.seed)
        return y + linear(x, self.matrix_of(y.dtype)).to(y.dtype)

    @torch.compiler.disable
    def matrix(self, change: Tensor) -> Tensor:
        """With the noise itself."""
        return change + self.matrix_of(change.dtype)

    def matrix_of(self, dtype: torch.dtype) -> Tensor:
        """E."""
        return noise(self.tau, self.inputs, self.seed, dtype)
