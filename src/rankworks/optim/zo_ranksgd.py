"""ZO-RankSGD: a model learns from rankings alone: which of several candidates is better, and no number, no gradient.

    candidates   x + mu z_i,  z_i ~ N(0, I),  i = 1..m             of which the oracle names the k best, in order
    d            = 1/|E| sum_i w_i z_i,   |E| = k (k - 1)/2 + k (m - k) pairs whose order is known
    w_i          = m - 1 - 2 p  for the one in place p = 0, 1, .. of the k,  -k for the others; they sum to 0
    x            <- x + lr d

d is the mean over the known pairs of (better - worse), so it points where things become better. With a `line_search`
of q points there is a second question: x + lr 2^-j D for j = 0 .. q - 1, the best candidate of the first, and x
itself; the best of them is the new x. Where that is x, the round has failed: D is the mean of the d of the failed
rounds since the last success and of this one. So with a line search the objective never gets worse.

Anything that can be ranked can be learned. A closure returns a loss, and its losses are ranked (any increasing function
of it gives the same steps): `optimizer.step(closure)`. An oracle is asked; going through the candidates puts the model
at each of them in turn, and it answers with their numbers, the best first. A person, for example:

    optimizer = rw.make_optimizer(model, "zo-ranksgd", lr=0.5, candidates=4, ranked=1, line_search=3)

    def person(candidates):
        for number in candidates:
            print(number, model.generate(...))
        return [int(input("the best: "))]

    for _ in range(20):
        optimizer.step(oracle=person)

Candidates are drawn anew from (seed, round, number, the parameter's name) whenever they are needed, on the parameter's
own device (another kind of device draws other numbers), so that none is stored: a step takes the memory of inference
and one copy of what is trained; the state is D with a line search, and nothing without. A step costs m evaluations, and
q + 1 more with a line search. x is put back from its copy, so nothing drifts as it does where noise is added and
subtracted again. At a rate of zero nothing moves.

The released code weighs a ranked candidate with m - 2 p, one more than above, which adds k/|E| times the mean of the
ranked perturbations: weights="released". It also leaves a factor mu in d, so that its step size times mu is lr here. As
there, D is reset by a success only. Decay, decoupled, follows the step.
Source: arXiv:2303.03751, algorithms 1 and 2 and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankworks.core.draw import seed_of
from rankworks.core.errors import ConfigError, DivergedError, TrainingError
from rankworks.core.fields import Positive, Setting
from rankworks.core.optim.method import Group, OptimizerMethod
from rankworks.core.registry import optimizer

Weights = Literal["published", "released"]


@optimizer("zo-ranksgd", title="ZO-RankSGD", year=2023, paper="arXiv:2303.03751")
class ZORankSGD(OptimizerMethod):
    """Steps from the ranking of random candidates."""

    layerwise = False
    closure = True
    try_with: ClassVar = {"line_search": 4, "radius": 3e-3}

    candidates: int = Setting(8, "m: how many random points are ranked", ge=2)
    ranked: int | None = Setting(None, "k: how many of them the ranking names, the best first; None: all", ge=1)
    radius: float = Positive(1e-2, "mu: standard deviation of the candidates around the weights")
    line_search: int = Setting(0, "q: points on the line, each half as far as the one before; 0: a fixed rate", ge=0)
    weights: Weights = Setting("published", "released: ranked candidates weigh one more, as in the released code")
    seed: int = Setting(0, "seed of the candidates")

    @classmethod
    def agree(cls, spec: Any) -> None:
        """Refuse rankings longer than what is ranked."""
        if spec.ranked is not None and spec.ranked > spec.candidates:
            raise ConfigError(
                f"zo-ranksgd: ranked={spec.ranked} of candidates={spec.candidates} cannot be named: lower ranked."
            )

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The optimizer on its groups."""
        names = ("candidates", "ranked", "radius", "line_search", "weights", "seed", "weight_decay")
        return RankSGD(groups, lr=lr, **{name: getattr(self, name) for name in names})

    def evaluations(self) -> int:
        """The candidates, and with a line search its points; the best candidate is known."""
        return self.candidates + (self.line_search + 1 if self.line_search else 0)

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """One number a parameter with a line search, none without."""
        return parameter.numel() * parameter.element_size() if self.line_search else 0


class Candidates:
    """Points to be ranked. Going through them puts the model at each in turn; `at(number)` goes to one of them again.

    `known`, where there is one, is the number of the point that the question before had as its best.
    """

    def __init__(self, place: Callable[[int], None], count: int, known: int | None = None):
        self.at, self.count, self.known = place, count, known

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        for number in range(self.count):
            self.at(number)
            yield number


Oracle = Callable[[Candidates], Sequence[int]]


class ByLoss:
    """The oracle that ranks by a loss; what is not finite comes last. `losses` are those of the last question."""

    def __init__(self, closure: Callable[[], Any]):
        self.closure = closure
        self.losses: list[float] = []

    def __call__(self, candidates: Candidates) -> list[int]:
        """Return the numbers of the candidates with a finite loss, the smallest first."""
        best = min(self.losses, default=math.nan)
        self.losses = [best if i == candidates.known else self._loss(candidates, i) for i in range(len(candidates))]
        finite = [i for i, loss in enumerate(self.losses) if math.isfinite(loss)]
        return sorted(finite, key=lambda i: self.losses[i])  # stable: of equal ones the first

    def _loss(self, candidates: Candidates, number: int) -> float:
        candidates.at(number)
        loss = float(self.closure())
        return loss if math.isfinite(loss) else math.inf


def rank_weights(order: Sequence[int], candidates: int, weights: Weights = "published") -> list[float]:
    """Return what each of m perturbations weighs in d, |E| divided out, given the numbers of the k best in order."""
    m, k = candidates, len(order)
    place = {number: p for p, number in enumerate(order)}
    more = 1 if weights == "released" else 0
    edges = k * (k - 1) // 2 + k * (m - k)
    return [(m - 1 - 2 * place[i] + more if i in place else -k) / edges for i in range(m)]


class RankSGD(torch.optim.Optimizer):
    """See the module. State: `direction` with a line search; every group counts `rounds`, and `failed` ones in a row.

    Settings are those of `ZORankSGD`; groups may have a `radius`, a rate and a decay of their own, and `names`.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float = 1e-3,
        *,
        candidates: int = 8,
        ranked: int | None = None,
        radius: float = 1e-2,
        line_search: int = 0,
        weights: Weights = "published",
        seed: int = 0,
        weight_decay: float = 0.0,
    ):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "radius": radius, "rounds": 0, "failed": 0})
        self.candidates, self.ranked = candidates, candidates if ranked is None else ranked
        self.line_search, self.seed = line_search, seed
        self.weights: Weights = weights
        self._x: list[Tensor] = []  # a copy of the weights, during a step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, oracle: Oracle | None = None) -> Any:  # type: ignore[override]
        """Take one step, given a closure that returns a loss or an oracle that ranks `Candidates`.

        Returns the loss before the step with a line search, without one the mean of the candidates' finite losses, and
        None with an oracle. Raises `TrainingError`, with the weights as they were, where too few candidates are ranked.
        """
        if (closure is None) == (oracle is None):
            raise TrainingError(
                "zo-ranksgd evaluates the loss itself and reads no gradient: call step(closure) with a function that "
                "returns the loss, or step(oracle=...) with one that ranks; of trainers, rankworks' own loop does so."
            )
        judge: Oracle = ByLoss(closure) if closure is not None else oracle  # type: ignore[assignment]
        self._x = [p.detach().clone() for p, _, _ in self._trained()]
        for group in self.param_groups:
            group["rounds"] += 1
        try:
            chosen = self._search(judge)
        except BaseException:  # also where somebody stops it: the weights stand at a candidate, which is none of theirs
            self._place(lambda parameter, name, group: None)
            for group in self.param_groups:
                group["rounds"] -= 1
            raise
        finally:
            self._x = []
        if not isinstance(judge, ByLoss):
            return None
        finite = [loss for loss in judge.losses if math.isfinite(loss)]
        return torch.tensor(judge.losses[-1] if chosen else math.fsum(finite) / len(finite))

    def _search(self, judge: Oracle) -> bool:
        """Ask, and move the weights; returns whether a line was searched."""
        order = self._ask(judge, Candidates(self._perturb, self.candidates), self.ranked)
        share = rank_weights(order, self.candidates, self.weights)
        if not self.line_search:
            self._place(lambda p, name, group: p.add_(self._mean(p, name, group, share), alpha=group["lr"]))
            self._decay()
            return False
        for parameter, name, group in self._trained():
            found, state = self._mean(parameter, name, group, share), self.state[parameter]
            if not group["failed"] or "direction" not in state:
                state["direction"] = found
            else:
                state["direction"].lerp_(found, 1 / (group["failed"] + 1))
        last = self.line_search + 1  # the weights themselves
        line = Candidates(lambda j: self._along(j, order[0]), last + 1, known=last - 1)
        best = self._ask(judge, line, 1)[0]
        self._along(best, order[0])
        for group in self.param_groups:
            group["failed"] = group["failed"] + 1 if best == last else 0
        self._decay()
        return True

    def _ask(self, judge: Oracle, points: Candidates, wanted: int) -> list[int]:
        order = [int(number) for number in judge(points)]
        if len(order) < wanted:
            few = (
                f"zo-ranksgd needs the {wanted} best of {len(points)} candidates in order, and {len(order)} were ranked"
            )
            if isinstance(judge, ByLoss):
                raise DivergedError(f"{few} (the loss of the others is not finite: lower radius).")
            raise TrainingError(f"{few}.")
        order = order[:wanted]
        if len(set(order)) < wanted or not all(0 <= number < len(points) for number in order):
            raise TrainingError(
                f"a ranking names different candidates by their numbers, 0 to {len(points) - 1}; this one is {order}."
            )
        return order

    # ---- points ---------------------------------------------------------------------------------------------------

    def _trained(self) -> Iterator[tuple[Tensor, str, Group]]:
        """Every parameter with a name that is its own, and its group."""
        for number, group in enumerate(self.param_groups):
            names = group.get("names") or [f"{number}.{i}" for i in range(len(group["params"]))]
            for parameter, name in zip(group["params"], names, strict=True):
                yield parameter, name, group

    def _place(self, move: Callable[[Tensor, str, Group], Any]) -> None:
        """Put every parameter back to x, and move it from there."""
        for x, (parameter, name, group) in zip(self._x, self._trained(), strict=True):
            parameter.copy_(x)
            move(parameter, name, group)

    def _perturb(self, number: int) -> None:
        """x + mu z."""

        def move(parameter: Tensor, name: str, group: Group) -> None:
            if group["lr"]:
                parameter.add_(self._draw(parameter, name, number, group).to(parameter.dtype), alpha=group["radius"])

        self._place(move)

    def _along(self, number: int, best: int) -> None:
        """The points of the line search: on the line, then the best candidate, then x."""
        if number == self.line_search:
            self._perturb(best)
            return

        def move(parameter: Tensor, name: str, group: Group) -> None:
            if number < self.line_search:
                parameter.add_(self.state[parameter]["direction"], alpha=group["lr"] * 0.5**number)

        self._place(move)

    def _draw(self, parameter: Tensor, name: str, number: int, group: Group) -> Tensor:
        """z of one candidate, of the parameter's shape, in at least float32."""
        seed = seed_of(self.seed, group["rounds"], number, name)
        generator = torch.Generator(parameter.device).manual_seed(seed)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        return torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=wide)

    def _mean(self, parameter: Tensor, name: str, group: Group, share: Sequence[float]) -> Tensor:
        """d in the parameter's type, from the perturbations drawn once more."""
        total = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        for number, weight in enumerate(share):
            total.add_(self._draw(parameter, name, number, group), alpha=weight)
        return total.to(parameter.dtype)

    def _decay(self) -> None:
        for parameter, _, group in self._trained():
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
