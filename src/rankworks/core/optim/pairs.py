"""Pairs: the trained factors A and B of one change, found together in the groups of an optimizer that needs both.

    W' = W + s B A        A (r, in),  B (out, r);    with G = dL/dW'    dL/dA = s B^T G,    dL/dB = s G A^T

`paired_groups` makes the groups of a model's trained parameters. In those marked `paired` the parameters stand in the
order A, B, A, B, ..., and `scales` has s of every pair; all else that is trained (biases, magnitudes, gates, whole
modules, deltas without a pair) stands in groups that are not marked. Entries are names and numbers, so that groups go
through a checkpoint. Surgery on ranks (core/ranks/surgery.py) puts new parameters in the places of the old and keeps
s, so a pair stays a pair while its rank changes; alpha follows the rank and is not needed here. Around a pair in DoRA
nothing changes: with V = W + s B A, A and B have these gradients with G = dL/dV. A start that is taken out of the base
(s (B A - B0 A0)) is a constant and changes no gradient either.

Schedules that let only the first ranks of a pair act (DyLoRA) change s from step to step and leave whole ranks without
a gradient: they are refused. Gates between the factors, W + s B diag(g) A, are for each method to take or refuse.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from rankworks.core.delta import Delta
from rankworks.core.errors import TrainingError
from rankworks.core.forms.lowrank import Factored, Pair
from rankworks.core.optim.adamw import adamw_update
from rankworks.core.optim.method import Group, grouped
from rankworks.core.optim.stepwise import Stepwise
from rankworks.core.ranks.surgery import gated_of
from rankworks.core.state import NAME, State
from rankworks.core.summary import trained


class TrainedPair(NamedTuple):
    """A pair both of whose factors are trained, and the outermost delta around it."""

    name: str  # of the outermost delta in the model
    pair: Pair
    delta: Delta

    @property
    def gate(self) -> nn.Parameter | None:
        """The gates (r,) between the factors, or None."""
        gated = gated_of(self.delta)
        return None if gated is None else gated.gate


def trained_pairs(model: nn.Module) -> list[TrainedPair]:
    """Return the pairs that training changes now, each once, in the model's order."""
    acting = {id(p) for p in trained(model)}
    found: dict[int, TrainedPair] = {}
    for name, module in model.named_modules():  # what wraps a pair comes before it
        pair = module.pair if isinstance(module, Delta) else None
        if isinstance(pair, Pair) and id(pair.A) in acting and id(pair.B) in acting:
            found.setdefault(id(pair), TrainedPair(name, pair, module))  # type: ignore[arg-type]
    return list(found.values())


def paired_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, *, title: str, gates: bool = False
) -> list[Group]:
    """Return the groups of what a model trains, those of pairs first; see the module's text.

    title: how the method is called in a refusal; gates: whether it takes pairs with gates between the factors. A pair
    learns at the rate of its A. Raises `TrainingError` where no pair is trained, or a schedule stands in the way.
    """
    found = checked_pairs(model, title, gates)
    inside = {id(factor) for _, pair, _ in found for factor in (pair.A, pair.B)}
    groups = grouped(model, lr, weight_decay, lambda name, p: (1.0, {"paired": id(p) in inside}))
    names = {id(p): name for name, p in model.named_parameters()}
    paired = [group for group in groups if group["paired"]]
    for group in paired:
        held = {id(p) for p in group["params"]}
        mine = [pair for _, pair, _ in found if id(pair.A) in held]
        group["params"] = [factor for pair in mine for factor in (pair.A, pair.B)]
        group["names"] = [names[id(factor)] for factor in group["params"]]
        group["scales"] = [float(pair.scale) for pair in mine]
    return [*(g for g in paired if g["params"]), *(g for g in groups if not g["paired"])]


def checked_pairs(model: nn.Module, title: str, gates: bool = False) -> list[TrainedPair]:
    """Return the trained pairs. Raises `TrainingError` where there is none, or where the method cannot take them."""
    found = trained_pairs(model)
    if not found:
        raise TrainingError(
            f"{title} works on the two factors of a low-rank change together, and no such pair is trained here: adapt "
            "the model with a delta that has one (lora, dora, maestro), or choose adamw."
        )
    state: State | None = getattr(model, NAME, None)
    schedules: list[Any] = [state.adapter(name).spec.ranks for name in state.active] if state is not None else []
    ordered = next((s.key for s in schedules if s is not None and s.method.cls.ordered), None)
    if ordered is not None:
        raise TrainingError(
            f"{title} works on whole factors, and the schedule {ordered!r} trains their first ranks alone, others in "
            "every step: leave the schedule out, or choose adamw."
        )
    if not gates and any(pair.gate is not None for pair in found):
        raise TrainingError(
            f"{title} solves for the factors of a plain product B A, and gates stand between them here, which may be "
            "zero: leave out the schedule or the delta that puts them there, or choose adamw."
        )
    return found


class FoundPair(NamedTuple):
    """A (r, in), B (out, r) and s of a pair in a group."""

    A: nn.Parameter
    B: nn.Parameter
    scale: float


def pairs_of(group: Group) -> list[FoundPair]:
    """Return the pairs of a group marked `paired`."""
    parameters = group["params"]
    return [FoundPair(*p) for p in zip(parameters[::2], parameters[1::2], group["scales"], strict=True)]


def release(model: nn.Module) -> None:
    """Undo what optimizers do to deltas during a step, which a run that was cut short may have left."""
    for module in model.modules():
        if isinstance(module, Pair):
            module.held = None
        if isinstance(module, Factored):
            module.amended = None


def partner(parameter: Tensor, group: Group) -> Tensor:
    """Return the other factor of a parameter in a group marked `paired`."""
    place = next(i for i, p in enumerate(group["params"]) if p is parameter)
    return group["params"][place ^ 1]


class Paired(Stepwise):
    """Base of optimizers that step on A and B together, `update_pairs`; what is in no pair takes AdamW's steps.

    The groups of the latter need `betas`, `eps` and `weight_decay`.
    """

    def step_group(self, group: Group) -> None:
        """Step on the pairs, or on each parameter by itself."""
        if not group.get("paired"):
            super().step_group(group)
            return
        self.update_pairs(pairs_of(group), group)

    def update_pairs(self, pairs: list[FoundPair], group: Group) -> None:
        """Change the factors of pairs in place from their gradients, any of which may be None."""
        raise TypeError(f"{type(self).__name__} must define update_pairs(pairs, group)")

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """AdamW's step."""
        adamw_update(parameter, gradient, state, group)
