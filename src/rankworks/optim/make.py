"""make_optimizer: any registered optimizer over what a model trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rankworks.core.optim.pairs import release
from rankworks.core.optim.resting import wake_all
from rankworks.core.registry import MethodSpec, build
from rankworks.core.weights.integers import make_dense


def make_optimizer(
    model: nn.Module, name: str | MethodSpec | Mapping[str, Any] = "adamw", lr: float = 1e-4, **settings: Any
) -> torch.optim.Optimizer:
    """Return an optimizer over the parameters of `model` that require a gradient.

    name: a key (`rankworks methods --axis optimizer`), a spec, or a mapping {"optimizer": key, ...}; lr: the learning
    rate; settings: the method's. Every parameter group carries the `names` of its parameters. What the method does
    besides its steps is in `optimizer.method_hooks`: the own loop and `train.HookCallback` call these. Raises
    `UnknownNameError`, `ConfigError`, or `TrainingError` when nothing is trainable.
    """
    make_dense(model)
    release(model)
    wake_all(model)
    spec = build("optimizer", name, **settings)
    method: Any = spec.method.cls(spec)  # type: ignore[call-arg]
    made = method.build(method.groups(model, lr), lr)
    hook = method.hook(model, made)
    made.method_hooks = hook if isinstance(hook, list) else [] if hook is None else [hook]
    made.layerwise, made.closure = method.layerwise, method.closure
    return made
