"""The steps of a search: the changes learn on training data, the scores of a selection on held-out data.

    a <- Adam(a, dL_held(theta_K(a), a)/da)        every change times the weight that the selection makes of a

theta are the trained tensors of the adapter; theta_0 are those of now, theta_{k+1} = theta_k - lr dL_train(theta_k, a)/
dtheta, and K = 0 is the first-order gradient. Dropout is off in all of it, so the gradient is exact and a run's random
numbers are the training steps' alone. For K > 0 it is the full derivative through the K steps, by differentiating
their gradients; attention and loss then take plain forms, which can be differentiated twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from rankworks.core.errors import DivergedError
from rankworks.core.hooks import Hook, Moment
from rankworks.core.scaled import Scaled
from rankworks.core.select import Searching
from rankworks.core.summary import trained
from rankworks.train.batching.batches import Batch, Example, Sampler
from rankworks.train.losses.heads import evaluating
from rankworks.train.losses.objective import Objective
from rankworks.train.precision import Precision

Batches = Callable[[Sequence[Example]], list[Batch]]


class Relaxed:
    """An adapter whose changes act times the weights that `selection` makes of a score per unit.

    units: {unit: its sites}; changes: the scaled changes by site.
    """

    def __init__(self, selection: Searching, units: Mapping[str, Sequence[str]], changes: Mapping[str, Scaled]):
        self.selection, self.units, self.changes = selection, units, changes
        first = next(iter(changes.values()))
        types = [p.dtype for change in changes.values() for p in change.owner.parameters()]
        wide = torch.float64 if torch.float64 in types else torch.float32
        self.scores = torch.zeros(len(units), dtype=wide, device=first.factor.device)

    def act(self, scores: Tensor | None = None) -> None:
        """Let the changes act with these scores (n,), by default the present ones, as a function of them."""
        weights = self.selection.weights(self.scores if scores is None else scores)  # (n,)
        for weight, sites in zip(weights, self.units.values(), strict=True):
            for site in sites:
                self.changes[site].factor = weight

    def gradient(
        self, objective: Objective, held_out: Sequence[Batch], inner: Sequence[Batch] = (), rate: float = 0.0
    ) -> Tensor:
        """Return the gradient (n,) of the mean held-out loss by the scores, through a step of `rate` per inner batch.

        No tensor of the model changes, and no `.grad`; the present scores act afterwards.
        """
        model, scores = objective.model, self.scores.clone().requires_grad_()
        acting = {id(p) for p in trained(model)}
        theta = {f"model.{n}": p.detach() for n, p in model.named_parameters() if id(p) in acting}
        labels = max(1, sum(batch.learned for batch in held_out))
        total = torch.zeros_like(scores)
        with evaluating(model), sdpa_kernel(SDPBackend.MATH) if inner else contextlib.nullcontext():
            for batch in held_out:
                self.act(scores)
                moved = self._moved(objective, theta, inner, rate)
                (part,) = torch.autograd.grad(_loss(objective, moved, batch) / labels, scores)
                total += part
        self.act()
        return total

    def _moved(
        self, objective: Objective, theta: dict[str, Tensor], inner: Sequence[Batch], rate: float
    ) -> dict[str, Tensor]:
        """Return theta after a step of gradient descent on each inner batch, as a function of the acting scores."""
        if inner:
            theta = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
        for batch in inner:
            loss = _loss(objective, theta, batch) / max(1, batch.learned)
            slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=True, allow_unused=True)
            pairs = zip(theta.items(), slopes, strict=True)
            theta = {name: t if slope is None else t - rate * slope for (name, t), slope in pairs}
        return theta


class WholeObjective(Objective):
    """The same loss with all logits at once, which can be differentiated twice."""

    def __init__(self, model: nn.Module, precision: Precision = "float32"):
        super().__init__(model, precision=precision)
        object.__setattr__(self, "split", None)
        object.__setattr__(self, "call", model)


def _loss(objective: Objective, theta: dict[str, Tensor], batch: Batch) -> Tensor:
    """The summed loss of a batch with the adapter's tensors at theta."""
    batch = batch.to(next(objective.model.parameters()).device)
    return functional_call(objective, theta, (batch.inputs, batch.labels, batch.documents))


class ScoreSteps(Hook):
    """A hook that takes the steps of the scores; `batches` makes batches of examples, set once a loop is there."""

    batches: Batches

    def __init__(
        self,
        relaxed: Relaxed,
        objective: Objective,
        held_out: Sequence[Example],
        inner: Sequence[Example],
        *,
        rate: float,
        batch_size: int,
        count: int,
        seed: int = 0,
    ):
        self.relaxed, self.objective, self.held_out, self.inner = relaxed, objective, held_out, inner
        self.optimizer = torch.optim.Adam([relaxed.scores], lr=rate)
        self.batch_size, self.count = batch_size, count
        self.samplers = {"held_out": Sampler(len(held_out), seed + 1), "inner": Sampler(len(inner), seed + 2)}

    def on_start(self, moment: Moment) -> None:
        """Let the scores act, which a resumed search has from its checkpoint."""
        self.relaxed.act()

    def after_step(self, moment: Moment) -> None:
        """Take a step of the scores where one is due."""
        selection, relaxed = self.relaxed.selection, self.relaxed
        if moment.step % selection.every:
            return
        held_out = self._take("held_out", self.held_out, self.count)
        inner = self._take("inner", self.inner, selection.depth)
        rate = float(moment.optimizer.param_groups[0]["lr"])
        gradient = relaxed.gradient(self.objective, held_out, inner, rate)
        if not bool(torch.isfinite(gradient).all()):
            raise DivergedError(
                f"the search stopped at step {moment.step}: the gradient of the scores is not finite. Try a smaller "
                "search.lr."
            )
        relaxed.scores.grad = gradient
        self.optimizer.step()
        relaxed.act()

    def _take(self, name: str, examples: Sequence[Example], count: int) -> list[Batch]:
        """Return the next `count` batches."""
        sampler = self.samplers[name]
        taken = [[examples[i] for i in sampler.take(self.batch_size)] for _ in range(count)]
        return [batch for part in taken for batch in self.batches(part)]

    def state_dict(self) -> dict[str, Any]:
        """The scores, their moments, and what data were used."""
        samplers = {name: sampler.state_dict() for name, sampler in self.samplers.items()}
        return {"scores": self.relaxed.scores, "optimizer": self.optimizer.state_dict(), "samplers": samplers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.relaxed.scores.copy_(state["scores"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, sampler in self.samplers.items():
            sampler.load_state_dict(state["samplers"][name])
