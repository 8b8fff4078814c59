"""Optimisers and learning-rate schedules.

Weight decay acts on matrices only: biases, norms, magnitudes and other vectors are left alone. A schedule is a pure
function of the step, so there is nothing to save or restore.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rankworks.core.delta import Delta
from rankworks.core.errors import ConfigError, TrainingError, UnknownNameError, did_you_mean
from rankworks.core.rates import learning_rate_factor
from rankworks.core.summary import trained

__all__ = ["OPTIMIZERS", "learning_rate_factor", "make_optimizer", "parameter_groups", "set_learning_rate"]

Build = Callable[..., torch.optim.Optimizer]

OPTIMIZERS: dict[str, Build] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
"""Optimiser classes by name; `make_optimizer` takes the settings of their constructors."""


def make_optimizer(model: nn.Module, name: str = "adamw", lr: float = 1e-4, **options: Any) -> torch.optim.Optimizer:
    """Return an optimiser over the parameters of `model` that require a gradient.

    options: settings of the optimiser (`betas`, `eps`, `weight_decay`, `momentum`, `fused`, ...). Every parameter group
    carries the `names` of its parameters. Raises `UnknownNameError`, `ConfigError`, or `TrainingError` when nothing is
    trainable.
    """
    if name not in OPTIMIZERS:
        raise UnknownNameError(f"no optimizer is called {name!r}.{did_you_mean(name, OPTIMIZERS)}")
    build = OPTIMIZERS[name]
    known = [key for key in inspect.signature(build).parameters if key not in ("self", "params", "lr")]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ConfigError(f"the optimizer {name!r} has no setting {unknown[0]!r}.{did_you_mean(unknown[0], known)}")
    return build(parameter_groups(model, lr, options.pop("weight_decay", 0.0)), lr=lr, **options)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups {params, names, lr, weight_decay}: matrices with decay, vectors and scalars without.

    Tensors that a delta trains at a rate of their own (`Delta.rates`) stand in groups of their own.
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
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in sorted(trainable, key=lambda pair: pair[1].ndim <= 1):  # stable: matrices first
        decays, factor = parameter.ndim > 1, factors.get(id(parameter), 1.0)
        empty = {"params": [], "names": [], "lr": lr * factor, "weight_decay": weight_decay if decays else 0.0}
        group = groups.setdefault((decays, factor), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group's rate to `factor` times the rate it was made with; return the first group's rate."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
