"""BO-REP: two levels of training, the upper one through the solution of the lower, by normalised steps of momentum.

    min_x f(x, y*(x)),   y*(x) = argmin_y g(x, y)                       x: upper parameters,  y: lower ones

    every `interval` steps   `lower_steps` times (`warm_start` times before the first)   y <- y - lr_y grad_y g
    every step               z <- z - nu (grad_yy g z - grad_y f)                     so z -> (grad_yy g)^-1 grad_y f
                             h  = grad_x f - grad_xy g z                              the hypergradient, once z is there
                             u <- beta u + (1 - beta) h
                             x <- x - lr u / (|u| + 1e-10)                            a step of length lr

Products with second derivatives are taken by differentiating grad_y g once more, two backward passes for one forward;
no matrix is formed. g should be strongly convex in y: a head on a representation, a ridge penalty. Both losses are
given as closures, so that each may have its data:

    optimizer = rw.make_optimizer(model, "bo-rep", lr=1e-2, lower="score")     the head is fitted, the adapter judged
    for support, query in batches:
        optimizer.step(lambda: model(**query).loss, lambda: model(**support).loss)       upper loss, lower loss

which is hyper-representation: an adapter whose features let a head, fitted to one set, do well on another. Parameters
outside of a model go the same way; so an adapter is trained on examples of which each has a weight, itself trained such
that the adapter does well on clean ones:

    optimizer = rw.Bilevel([{"params": [w]}, {"params": adapter, "lower": True}], lr=5e-2)
    optimizer.step(lambda: loss(clean).mean(), lambda: (w.sigmoid() * loss(noisy)).mean())

With one closure both levels have the same loss, and x moves as if y were always fitted to it; this is what the own loop
does, in one process. Attention runs in torch's plain form within a step, since fused ones have no second derivative.

`lower` names the lower parameters (patterns as for `targets`); None: those of the last layer that has any. Their rate
is `ratio` times lr. Decay of lower parameters belongs to g, as a penalty decay/2 |y|^2; that of upper ones is
decoupled. State: z for every lower number, u for every upper one.

Choices: z and u start at zero (the released code draws z), and z is renewed before h is formed, on the lower loss's
data, as there. The released code has no warm start of its own but takes `warm_start` in place of `lower_steps` in every
periodic round, and leaves out grad_x f, which is zero in its task; the defaults are its settings for
hyper-representation (interval 2, 3 steps, lower rate a tenth of the upper), nu and beta those of all its tasks.
Source: arXiv:2401.09587 and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rankworks.core.errors import DivergedError, TargetError, TrainingError
from rankworks.core.fields import Positive, Probability, Setting
from rankworks.core.optim.method import Group, OptimizerMethod, grouped
from rankworks.core.registry import optimizer
from rankworks.core.targets import as_patterns

Loss = Callable[[], Tensor]
SMALLEST = 1e-10  # added to the norm of u


@optimizer("bo-rep", title="BO-REP", year=2024, paper="arXiv:2401.09587")
class BORep(OptimizerMethod):
    """Bilevel training with products of second derivatives."""

    layerwise = False
    closure = True

    lower: str | list[str] | None = Setting(None, "which parameters are the lower ones; None: the last layer's")
    ratio: float = Positive(0.1, "rate of the lower steps over lr")
    interval: int = Setting(2, "steps from one fit of the lower parameters to the next", ge=1)
    lower_steps: int = Setting(3, "gradient steps of a fit", ge=1)
    warm_start: int = Setting(3, "gradient steps of the first fit", ge=1)
    nu: float = Positive(1e-2, "rate of z")
    beta: float = Probability(0.9, "decay of the momentum u")

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """The upper and the lower parameters."""
        trained = {name for group in grouped(model, lr) for name in group["names"]}
        chosen = self._lower([name for name, _ in model.named_parameters() if name in trained])

        def mark(name: str, parameter: nn.Parameter) -> tuple[float, Group]:
            return (self.ratio if name in chosen else 1.0), {"lower": name in chosen}

        return grouped(model, lr, self.weight_decay, mark)

    def _lower(self, names: list[str]) -> set[str]:
        """Return which of the trained parameters, named in the model's order, are the lower ones."""
        if self.lower is None:
            found = {name for name in names if _layer(name) == _layer(names[-1])}
        else:
            patterns = as_patterns(self.lower)
            found = {n for n in names if any(p.names(n) or p.names(_layer(n)) for p in patterns)}
        if not found or len(found) == len(names):
            which = "all" if found else "none"
            raise TargetError(
                f"bo-rep trains parameters at two levels, and lower={self.lower!r} names {which} of the {len(names)} "
                f"trained ones, such as {names[-1]}: name some of them, a head that is trained in full for example."
            )
        return found

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The optimizer on its groups."""
        names = ("interval", "lower_steps", "warm_start", "nu", "beta", "weight_decay")
        return Bilevel(groups, lr=lr, **{name: getattr(self, name) for name in names})

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """One number for each."""
        return parameter.numel() * parameter.element_size()


def _layer(name: str) -> str:
    """The layer whose parameter this is, or its adapter's, or its copy's that is trained in full."""
    own = next((mark for mark in (".adapters.", ".copies.") if mark in name), None)
    return name.split(own)[0] if own is not None else name.rpartition(".")[0]


class Bilevel(torch.optim.Optimizer):
    """See the module. Groups with `lower` true hold the lower parameters, the others the upper ones."""

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float = 1e-2,
        *,
        interval: int = 2,
        lower_steps: int = 3,
        warm_start: int = 3,
        nu: float = 1e-2,
        beta: float = 0.9,
        weight_decay: float = 0.0,
    ):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "lower": False, "rounds": 0})
        self.interval, self.lower_steps, self.warm_start = interval, lower_steps, warm_start
        self.nu, self.beta = nu, beta
        if {bool(group["lower"]) for group in self.param_groups} != {False, True}:
            raise TrainingError(
                "two levels are trained: give a group of upper parameters and one of lower ones, with 'lower': True."
            )

    @torch.no_grad()
    def step(self, upper: Loss | None = None, lower: Loss | None = None) -> Tensor:  # type: ignore[override]
        """Take one step, given closures that return the losses f and g; without `lower` g is f. Returns f.

        Raises `DivergedError` where a loss is not finite, before anything is done with it.
        """
        if upper is None:
            raise TrainingError(
                "bo-rep differentiates the losses itself: call step(upper, lower) with functions that return them; of "
                "trainers, rankworks' own loop does so, with one loss for both."
            )
        x, y = self._level(False), self._level(True)
        rounds = self.param_groups[0]["rounds"]
        with sdpa_kernel(SDPBackend.MATH):
            if rounds % self.interval == 0:
                self._fit(y, lower or upper, self.lower_steps if rounds else self.warm_start)
            loss, h = self._hypergradient(x, y, upper, lower)
        self._move(x, h)
        for group in self.param_groups:
            group["rounds"] += 1
        return loss

    def _level(self, lower: bool) -> list[nn.Parameter]:
        return [p for group in self.param_groups if bool(group["lower"]) == lower for p in group["params"]]

    def _fit(self, y: list[nn.Parameter], lower: Loss, steps: int) -> None:
        """Gradient steps on g."""
        groups = [group for group in self.param_groups if group["lower"]]
        rates = [(group["lr"], group["weight_decay"]) for group in groups for _ in group["params"]]
        for _ in range(steps):
            found = _gradients(_value(lower, "lower"), y)
            for parameter, gradient, (lr, decay) in zip(y, found, rates, strict=True):
                parameter.mul_(1 - lr * decay).add_(gradient, alpha=-lr)

    def _hypergradient(
        self, x: list[nn.Parameter], y: list[nn.Parameter], upper: Loss, lower: Loss | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Renew z; return f and h."""
        f = _value(upper, "upper")
        of_f = _gradients(f, [*x, *y], twice=lower is None)
        of_g = of_f[len(x) :] if lower is None else _gradients(_value(lower, "lower"), y, twice=True)  # grad_y g
        z = [self._kept(parameter, "z") for parameter in y]
        decays = [group["weight_decay"] for group in self.param_groups if group["lower"] for _ in group["params"]]
        bent = _products(of_g, y, z, again=True)
        for each, second, first, decay in zip(z, bent, of_f[len(x) :], decays, strict=True):
            if decay:
                second = second + decay * each
            each.sub_(second - first.detach(), alpha=self.nu)
        mixed = _products(of_g, x, z)
        return f.detach(), [first.detach() - second for first, second in zip(of_f[: len(x)], mixed, strict=True)]

    def _move(self, x: list[nn.Parameter], h: list[Tensor]) -> None:
        """The step of momentum, of length lr."""
        u = [self._kept(parameter, "momentum") for parameter in x]
        for each, gradient in zip(u, h, strict=True):
            each.lerp_(gradient, 1 - self.beta)
        length = float(nn.utils.get_total_norm(u)) + SMALLEST
        groups = [group for group in self.param_groups if not group["lower"] for _ in group["params"]]
        for parameter, each, group in zip(x, u, groups, strict=True):
            parameter.add_(each, alpha=-group["lr"] / length)
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])

    def _kept(self, parameter: nn.Parameter, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]


def _value(closure: Loss, which: str) -> Tensor:
    """Return the loss with its graph."""
    with torch.enable_grad():
        loss = closure()
    if not math.isfinite(float(loss.detach())):
        raise DivergedError(
            f"the {which} loss became {float(loss.detach())}: lower lr, or ratio, which sets the rate of the lower "
            "steps."
        )
    return loss


def _gradients(loss: Tensor, of: Sequence[Tensor], twice: bool = False) -> list[Tensor]:
    """Return the gradients, zeros where the loss does not depend on a tensor; `twice`: they have gradients too."""
    found = torch.autograd.grad(loss, of, create_graph=twice, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(of, found, strict=True)]


def _products(first: Sequence[Tensor], of: Sequence[Tensor], z: Sequence[Tensor], again: bool = False) -> list[Tensor]:
    """Return sum_i z_i d first_i / d of; `again`: the graph of `first` is needed once more."""
    bent = [(g, each) for g, each in zip(first, z, strict=True) if g.requires_grad]
    if not bent:
        return [torch.zeros_like(p) for p in of]
    roots, weights = zip(*bent, strict=True)
    found = torch.autograd.grad(roots, of, weights, retain_graph=again, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(of, found, strict=True)]
