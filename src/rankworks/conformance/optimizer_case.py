"""The material of the checks of optimizers: a tiny Llama trained as a whole or through LoRA, and runs of a dozen steps.

A run makes the steps that the training loop makes, hooks included, and can be left and taken up from what a checkpoint
holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankworks.conformance.case import Case, shake, variants_of
from rankworks.conformance.models import tiny_llama
from rankworks.core.adapt import adapt
from rankworks.core.hooks import Hook, Moment, optimizer_hooks
from rankworks.core.registry import Method, build
from rankworks.optim import make_optimizer
from rankworks.train.hooks import add_penalties
from rankworks.train.layerwise import Layerwise

STEPS = 12
SMALL = {"rank": 3, "refresh": 5}
"""Settings of many methods, such that a dozen steps on the tiny model show what they do."""


@dataclass(frozen=True)
class OptimizerCase(Case):
    """A case whose kind is what is trained, "model" or "adapter", and whose settings are the optimizer's."""

    def targets(self) -> list[str]:
        """What is trained."""
        return [self.kind]

    def network(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a fresh tiny Llama of which everything is trained, or adapters on every linear layer."""
        model = tiny_llama().to(dtype)
        if self.kind == "model":
            return model.requires_grad_(True)
        model = adapt(model, "lora", rank=4, targets="all-linear", seed=5)
        shake(model)
        return model

    def optimizer(self, model: nn.Module, lr: float = 1e-2, **changes: Any) -> Any:
        """Return the optimizer over what the model trains."""
        return make_optimizer(model, self.method.key, lr, **{**self.settings, **changes})

    def built(self) -> Any:
        """Return the method with its settings."""
        spec = build("optimizer", self.method.key, **self.settings)
        return self.method.cls(spec)  # type: ignore[call-arg]


def optimizer_case(method: Method, kind: str) -> OptimizerCase:
    """Return the case of a method's settings, small where the default is made for large matrices."""
    accepted = method.cls.accepted({})  # type: ignore[attr-defined]
    small = {name: value for name, value in SMALL.items() if name in accepted}
    return OptimizerCase(method, kind, {**small, **method.cls.try_with})  # type: ignore[attr-defined]


def optimizer_cases(method: Method, variants: bool) -> list[Case]:
    """Return a case for each thing the method can train, and for every other choice of settings on the first."""
    first, *others = (optimizer_case(method, kind) for kind in method.cls.trains)  # type: ignore[attr-defined]
    return [first, *others, *(variants_of(first) if variants else [])]


class Run:
    """A short run that can be left and taken up again. `alter` may change the gradients before each step."""

    def __init__(
        self,
        case: OptimizerCase,
        dtype: torch.dtype = torch.float32,
        *,
        layerwise: bool = False,
        alter: Callable[[nn.Module], None] | None = None,
        **changes: Any,
    ):
        self.case, self.model, self.done = case, case.network(dtype), 0
        self.optimizer = case.optimizer(self.model, **changes)
        self.hooks: list[Hook] = optimizer_hooks(self.optimizer)
        self.alter = alter
        self.layerwise = Layerwise(self.optimizer, case.method.key, self.hooks, 1) if layerwise else None

    def go(self, until: int = STEPS) -> nn.Module:
        """Take the steps up to `until`."""
        self.model.train()
        self._call("on_start")
        while self.done < until:
            self.done += 1
            self._step()
        if until == STEPS:
            self._call("on_end")
        self.model.eval()
        return self.model

    def _step(self) -> None:
        self.optimizer.zero_grad()
        self._call("before_forward")
        if self.optimizer.closure:
            self.optimizer.step(lambda: language_loss(self.model, self.done % 3))
            return
        with self.layerwise.doing("step") if self.layerwise is not None else contextlib.nullcontext():
            language_loss(self.model, self.done % 3).backward()
        add_penalties(self.hooks, self._moment())
        if self.alter is not None:
            self.alter(self.model)
        self._call("after_backward")
        if self.layerwise is None:
            self.optimizer.step()
        self._call("after_step")

    def _moment(self) -> Moment:
        return Moment(self.model, self.optimizer, self.done, STEPS)

    def _call(self, name: str) -> None:
        for hook in self.hooks:
            getattr(hook, name)(self._moment())


def language_loss(model: nn.Module, seed: int = 0) -> Tensor:
    """Return the loss of predicting each next token of a seeded random batch."""
    ids = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(6000 + seed))
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def numbers(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of everything a model holds."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
