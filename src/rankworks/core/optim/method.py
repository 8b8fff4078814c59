"""OptimizerMethod: how gradients become steps. A subclass is registered with `@optimizer` and writes `build`.

What it builds is a torch optimizer whose state is tensors and numbers only, so that checkpoints, FSDP and accelerate
work. What it must know of a parameter besides its gradient travels in the parameter groups: every group carries
the `names` of its parameters, and a method that treats some of them in another way sorts them in `groups`, for example
the A's and the B's of an adapted model (`roles`), or the weights that are projected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankworks.core.delta import Delta
from rankworks.core.errors import ConfigError, TrainingError
from rankworks.core.fields import HasSettings, NonNegative
from rankworks.core.hooks import Hook
from rankworks.core.summary import trained

Group = dict[str, Any]
Trains = Literal["model", "adapter"]


class OptimizerMethod(HasSettings):
    """How gradients become steps."""

    Spec: ClassVar[Any]
    spec: Any
    layerwise: ClassVar[bool] = True
    """Whether the step of a parameter needs no other's, so that it can be taken in the middle of the backward pass."""
    closure: ClassVar[bool] = False
    """Whether its step evaluates the loss itself, as often as it needs: step(closure), and no gradients before it."""
    trains: ClassVar[tuple[Trains, ...]] = ("model", "adapter")
    """What it can be used on: a whole model, the adapters on one."""
    try_with: ClassVar[Mapping[str, Any]] = {}
    """Settings that make what it does visible within a dozen steps on matrices of about ten rows, for the checks."""

    weight_decay: float = NonNegative(0.0, "decay of matrices; vectors and scalars have none")

    def __init__(self, spec: Any):
        self.spec, self.key = spec, spec.key
        for name in type(spec).model_fields:
            if name != "optimizer":
                setattr(self, name, getattr(spec, name))

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """Return the parameter groups {params, names, lr, weight_decay, ...} of what the model trains."""
        return grouped(model, lr, self.weight_decay)

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer."""
        raise TypeError(f"{type(self).__name__} must define build(groups, lr)")

    def hook(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Hook | list[Hook] | None:
        """Return what it does during training besides its steps (several hooks in their order), or None."""
        return None

    @classmethod
    def agree(cls, spec: Any) -> None:
        """A rank of zero, which schedules may give an adapter, means nothing here."""
        if getattr(spec, "rank", 1) == 0:
            raise ConfigError(f"{spec.key} works in a subspace of rank 1 or more: give another rank than 0.")

    @classmethod
    def accepted(cls, values: Mapping[str, Any]) -> list[str]:
        """Return the settings a configuration may name beside the optimizer's name."""
        return [name for name in cls.Spec.model_fields if name != "optimizer"]

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """Return the bytes it keeps between steps for a parameter of a group, as a formula, without step counters."""
        raise TypeError(f"{type(self).__name__} must define state_bytes(parameter, group)")

    def rests(self, parameter: Tensor, group: Group) -> bool:
        """Whether a plan counts no gradient of a parameter: of those that take turns, as many as rest at one time."""
        return False

    def evaluations(self) -> int:
        """Return how often a step evaluates the loss in place of a forward and a backward pass; 0: it has those."""
        return 0

    def weight_bytes(self, parameter: Tensor, group: Group) -> int:
        """Return the bytes in which a parameter of a group is held while it is trained; most methods leave it alone."""
        return parameter.numel() * parameter.element_size()


Key = tuple[Any, ...]


def grouped(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    mark: Callable[[str, nn.Parameter], tuple[float, Group]] | None = None,
) -> list[Group]:
    """Return the groups {params, names, lr, weight_decay} of what a model trains: matrices with decay, vectors without.

    Tensors that a delta trains at a rate of its own (`Delta.rates`) stand in groups of their own. `mark(name,
    parameter)` may give a parameter a further factor on its rate and entries for its group; equal ones share a group.
    Raises `TrainingError` where nothing is trainable.
    """
    acting = {id(p) for p in trained(model)}  # adapters that are not active keep what they have
    trainable = [(name, p) for name, p in model.named_parameters() if id(p) in acting]
    if not trainable:
        raise TrainingError("nothing to train: no parameter requires a gradient. Call adapt(model, ...) first.")
    factors = {
        id(delta.get_parameter(name)): factor
        for delta in model.modules()
        if isinstance(delta, Delta)
        for name, factor in delta.rates().items()
    }
    groups: dict[Key, Group] = {}
    for name, parameter in sorted(trainable, key=lambda pair: pair[1].ndim <= 1):  # stable: matrices first
        factor, more = mark(name, parameter) if mark is not None else (1.0, {})
        factor *= factors.get(id(parameter), 1.0)
        decays = parameter.ndim > 1
        start = {"params": [], "names": [], "lr": lr * factor, "weight_decay": weight_decay if decays else 0.0, **more}
        group = groups.setdefault((decays, factor, *sorted(more.items())), start)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def roles(model: nn.Module) -> dict[int, str]:
    """Return what each parameter of the model's deltas is, by its id: "A", "B", ... as the delta names them."""
    return {
        id(parameter): role
        for delta in model.modules()
        if isinstance(delta, Delta)
        for role, parameter in delta.named_parameters(recurse=False)
    }
