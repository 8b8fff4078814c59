"""Learning to adapt: the prior of an ABMLL adapter from many tasks, and its posterior for one, in a few steps.

    model = rw.adapt(model, "abmll", rank=8, targets=["q_proj", "v_proj"])
    meta = rw.MetaLearner(model)
    meta.fit(tasks, steps=500)              # a list of data sets, one per task
    meta.adapt(examples)                    # a new task: ten steps from the prior; the model now predicts for it
    rw.save(model, "adapter")               # posterior and prior; rw.export writes the mean as a plain LoRA

One step, on a few tasks of which each gives a support and a query batch:

    per task      phi <- theta;  `steps` times AdamW on  loss(support; phi sampled) + beta KL(phi || theta)
                  then  loss(query; phi sampled) + beta KL(phi || theta)  gives the task's gradient
    once          AdamW on theta along the sum of these and of  -gamma log p(theta)

(deltas/abmll.py says what phi and theta are.) Nothing is differentiated through the steps on phi. outer="first-order"
takes d phi/d theta for the identity, so theta gets phi's gradient and its own of the divergence, which with beta = 0
and samples = 0 is first-order MAML with LoRA; outer="prior" leaves phi constant, and theta learns from the divergence
alone. Posterior factors and their moments exist once, however many tasks there are.

Not found in the paper, with what is taken: 5 steps on a task in training (10 afterwards is its own), AdamW for both
loops with a rate of 1e-4. Its second version prints log p(theta) unscaled; over out x in entries a layer that swamps a
mean loss over tokens, so gamma is beta / (tasks of the step), as the method it builds on scales it; gamma=1.0 is the
literal form. p(theta) is N(0, 1) of means and Gamma(1, 0.01) of precisions, the constants of an implementation of that
method, here measured in each weight's own units (its entries' standard deviation; c): absolute ones would expect
spreads of a tenth, ten thousand times c, and pull there with a force of 2 * 0.01 / c^2 an entry. hyper_prior="absolute"
takes them literally. beta is small enough to vanish in half precision: divergence and product are float32.
Source: arXiv:2508.14285; Ravi and Beatson, ICLR 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankworks.core.draw import seed_of
from rankworks.core.errors import ConfigError, DivergedError
from rankworks.core.kernels.gaussian import divergence, log_prior
from rankworks.core.progress import track
from rankworks.core.state import state_of
from rankworks.deltas.abmll import ABMLL, Noise
from rankworks.train.batching.batches import Batch, Collator
from rankworks.train.losses.objective import Objective

Pair = tuple[Any, Any]
"""A task's support and query batch: what `loss` takes, by default a list of examples or a `Batch`."""


class MetaLearner:
    """Trains the prior of an ABMLL adapter over tasks, and adapts to one; nothing else of the model learns.

    Args:
        model: a model with an abmll adapter.
        lr, inner_lr: rates of AdamW for the prior and for a task's posterior.
        steps: gradient steps on a task in training.
        beta: factor of the divergence.
        gamma: factor of the prior's own prior; None: beta / tasks of the step.
        samples: weight samples a loss is averaged over; 0: the means alone.
        outer: what the prior learns from, see above.
        hyper_prior: in which units its constants are.
        loss: a function of a batch that returns its mean loss; None: cross-entropy of tokenised examples.
        pad: the id that fills up rows, for the loss by default.
        seed: of samples and of what `fit` draws.
        name: the adapter.

    Raises `ConfigError` where the adapter is not an abmll.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-4,
        inner_lr: float = 1e-4,
        steps: int = 5,
        beta: float = 1e-7,
        gamma: float | None = None,
        samples: int = 1,
        outer: Literal["first-order", "prior"] = "first-order",
        hyper_prior: Literal["relative", "absolute"] = "relative",
        loss: Callable[[Any], Tensor] | None = None,
        pad: int = 0,
        seed: int = 0,
        name: str = "default",
    ):
        self.model, self.lr, self.inner_lr, self.steps, self.seed = model, lr, inner_lr, steps, seed
        self.beta, self.gamma, self.samples, self.outer = beta, gamma, samples, outer
        self.hyper_prior = hyper_prior
        self.deltas = _deltas(model, name)
        self.loss = loss if loss is not None else _language_loss(model, pad)
        self.optimizer = torch.optim.AdamW(self._tensors(prior=True), lr=lr, weight_decay=0.0)
        self.rounds = 0

    # ---- over tasks -----------------------------------------------------------------------------------------------

    def fit(
        self,
        tasks: Sequence[Sequence[Any]],
        steps: int,
        *,
        batch: int = 2,
        support: int = 8,
        query: int = 8,
        progress: bool = True,
    ) -> list[float]:
        """Take steps on `batch` tasks each, of which each gives distinct examples; returns the steps' query losses.

        Raises `ConfigError` where a task has too few examples or there are too few tasks.
        """
        short = next((i for i, task in enumerate(tasks) if len(task) < support + query), None)
        if short is not None or len(tasks) < batch:
            raise ConfigError(
                f"a step takes {batch} tasks with {support} examples to adapt to and {query} others each, and "
                + (f"there are {len(tasks)} tasks" if short is None else f"task {short} has {len(tasks[short])}")
                + ": lower batch, support or query, or give more."
            )
        numbers = range(steps)
        losses = []
        for _ in track(numbers, "learning to adapt") if progress else numbers:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "tasks", self.rounds))
            chosen = torch.randperm(len(tasks), generator=generator)[:batch].tolist()
            pairs = []
            for task in (tasks[i] for i in chosen):
                places = torch.randperm(len(task), generator=generator)[: support + query].tolist()
                taken = [task[i] for i in places]
                pairs.append((taken[:support], taken[support:]))
            losses.append(self.step(pairs))
        return losses

    def step(self, tasks: Sequence[Pair]) -> float:
        """Adapt to each task's support batch, then move the prior; returns the mean loss of the query batches.

        The posterior is the prior afterwards. Raises `DivergedError`, with the prior as it was, where a loss is not
        finite.
        """
        prior, posterior = self._tensors(prior=True), self._tensors()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        with self._training():
            for number, (support, query) in enumerate(tasks):
                self._adapt(support, self.steps, number)
                with _learning([*prior, *posterior]):
                    total += self._objective(query, (number, "query"))
                if self.outer == "first-order":
                    for start, mine in zip(prior, posterior, strict=True):
                        start.grad = _sum(start.grad, mine.grad)
                _forget(posterior)
            with _learning(prior):
                self._expect(self.beta / len(tasks) if self.gamma is None else self.gamma)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.reset()
        self.rounds += 1
        return total / len(tasks)

    def _expect(self, gamma: float) -> None:
        """Add the gradient of -gamma log p(theta)."""
        if not gamma:
            return
        for delta in self.deltas.values():
            prior = delta.hyper_prior(self.hyper_prior == "relative")
            (-gamma * log_prior(delta.law(prior=True), prior)).backward()

    # ---- on one task ----------------------------------------------------------------------------------------------

    def adapt(self, data: Any, steps: int = 10) -> list[float]:
        """Put the posterior to the prior and take steps on a task's examples; returns their losses.

        The prior stays. Raises `DivergedError` where a loss is not finite.
        """
        with self._training():
            return self._adapt(data, steps, "adapt")

    def reset(self) -> None:
        """Put the posterior to the prior: the model predicts for no task in particular."""
        for delta in self.deltas.values():
            delta.start_task()

    def _adapt(self, data: Any, steps: int, which: object) -> list[float]:
        self.reset()
        posterior = self._tensors()
        optimizer = torch.optim.AdamW(posterior, lr=self.inner_lr, weight_decay=0.0)
        losses = []
        for step in range(steps):
            with _learning(posterior):
                losses.append(self._objective(data, (which, step)))
            optimizer.step()
            _forget(posterior)
        return losses

    def _objective(self, data: Any, which: tuple[object, ...]) -> float:
        """Add the gradient of loss + beta KL, for what learns now; returns the loss."""
        found = 0.0
        for sample in range(max(self.samples, 1)):
            seed = seed_of(self.seed, self.rounds, *which, sample) if self.samples else None
            with self.sampled(seed):
                loss = self.loss(data) / max(self.samples, 1)
                value = float(loss.detach())
                if not math.isfinite(value):
                    _forget([*self._tensors(), *self._tensors(prior=True)])
                    raise DivergedError(
                        f"a task's loss became {value} in round {self.rounds}: lower inner_lr or lr. The prior was not "
                        "moved."
                    )
                loss.backward()
            found += value
        if self.beta:
            for delta in self.deltas.values():  # one after the other, so that one layer's is held at a time
                (self.beta * divergence(delta.law(), delta.law(prior=True))).backward()
        return found

    # ---- samples --------------------------------------------------------------------------------------------------

    @contextmanager
    def sampled(self, seed: int | None) -> Iterator[None]:
        """Within the block the model acts with one sample of the posterior; None: with its means."""
        before = {key: delta.noise for key, delta in self.deltas.items()}
        for key, delta in self.deltas.items():
            delta.noise = None if seed is None else Noise(delta, seed_of(seed, key))
        try:
            yield
        finally:
            for key, delta in self.deltas.items():
                delta.noise = before[key]

    @torch.no_grad()
    def average(self, predict: Callable[[], Tensor], samples: int = 8) -> Tensor:
        """Return the mean of `predict()` over samples of the posterior: of probabilities, for example."""
        total: Tensor | None = None
        for sample in range(samples):
            with self.sampled(seed_of(self.seed, "average", sample)):
                found = predict() / samples
            total = found if total is None else total + found
        if total is None:
            raise ConfigError("an average over no samples is none: give samples=1 or more.")
        return total

    @torch.no_grad()
    def divergence(self) -> float:
        """KL(posterior || prior), over all sites."""
        return sum(float(divergence(delta.law(), delta.law(prior=True))) for delta in self.deltas.values())

    # ---- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the adapter: the prior's moments and the number of steps."""
        return {"optimizer": self.optimizer.state_dict(), "rounds": self.rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.rounds = state["rounds"]

    def _tensors(self, prior: bool = False) -> list[Tensor]:
        return [tensor for delta in self.deltas.values() for tensor in delta.tensors(prior)]

    @contextmanager
    def _training(self) -> Iterator[None]:
        mode, mine = self.model.training, {id(tensor) for tensor in self._tensors()}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in mine]
        self.model.train()
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            self.model.train(mode)
            for parameter in others:
                parameter.requires_grad_(True)


def _deltas(model: nn.Module, name: str) -> dict[str, ABMLL]:
    """Return an adapter's deltas, each once (sites that are tied share one)."""
    found: dict[int, tuple[str, ABMLL]] = {}
    for key, delta in state_of(model).adapter(name).deltas.items():
        if not isinstance(delta, ABMLL):
            raise ConfigError(
                f"the adapter {name!r} is a {delta.spec.key}, which has no prior to learn: adapt the model with "
                '"abmll" first.'
            )
        found.setdefault(id(delta), (key, delta))
    return dict(found.values())


def _language_loss(model: nn.Module, pad: int) -> Callable[[Any], Tensor]:
    objective, collator = Objective(model), Collator(pad)

    def loss(data: Any) -> Tensor:
        batch = data if isinstance(data, Batch) else collator.batch(data)
        return objective.loss(batch) / max(batch.learned, 1)

    return loss


@contextmanager
def _learning(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within the block these record gradients, whether parameters or stored tensors; afterwards as before."""
    before = [t.requires_grad for t in tensors]
    for tensor in tensors:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor, flag in zip(tensors, before, strict=True):
            tensor.requires_grad_(flag)


def _forget(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
