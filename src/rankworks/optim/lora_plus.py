"""LoRA+: the B's of an adapted model learn faster than its A's.

    lr_B = ratio * lr        lr_A = lr

In a network of width n both factors contribute to learning the features only if lr_A = Theta(1/n) and lr_B = Theta(1),
so one rate for both is too small for B or too large for A. As in the released code vectors (magnitudes, gates, biases)
go with B; the factors of embeddings have a rate of their own, `embedding_lr`. The steps are those of any `base`
optimizer, AdamW by default; ratio = 1 without embeddings is the base.

The released code has no default for the ratio: 1 (LLaMA-7B), 10 (GPT-2), 20 (README) and 80 (RoBERTa) stand in its
files. 16 is the number usually quoted; the README's advice goes with it: half the usual rate as `lr`.
Source: arXiv:2402.12354, section 4 and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.delta import Delta
from rankworks.core.fields import Positive, Setting
from rankworks.core.hooks import Hook
from rankworks.core.optim.method import Group, OptimizerMethod, grouped, roles
from rankworks.core.registry import OptimizerSpec, build, optimizer


@optimizer("lora-plus", title="LoRA+", year=2024, paper="arXiv:2402.12354")
class LoRAPlus(OptimizerMethod):
    """Any optimizer with a larger rate for B."""

    base: OptimizerSpec = Setting("adamw", "the optimizer whose steps these are")
    ratio: float = Setting(16.0, "rate of B over that of A", ge=1)
    embedding_lr: float = Positive(1e-6, "rate of both factors at embeddings")

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """A's and other matrices at lr, B's and vectors at ratio lr, embeddings at theirs."""
        role = roles(model)
        embedded = {
            id(p)
            for delta in model.modules()
            if isinstance(delta, Delta) and delta.kind == "embedding"
            for p in delta.parameters()
        }

        def mark(name: str, parameter: nn.Parameter) -> tuple[float, Group]:
            if id(parameter) in embedded:
                return self.embedding_lr / lr, {}
            return (self.ratio if role.get(id(parameter)) == "B" or parameter.ndim <= 1 else 1.0), {}

        return grouped(model, lr, self.weight_decay, mark)

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The base's."""
        return self._base.build(groups, lr)

    def hook(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Hook | None:
        """The base's."""
        return self._base.hook(model, optimizer)

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """The base's."""
        return self._base.state_bytes(parameter, group)

    @classmethod
    def accepted(cls, values: Mapping[str, Any]) -> list[str]:
        """Its own and the base's."""
        base = build("optimizer", values.get("base", "adamw")).method.cls
        return [*super().accepted(values), *base.accepted(values)]  # type: ignore[attr-defined]

    @property
    def _base(self) -> OptimizerMethod:
        return self.spec.base.method.cls(self.spec.base)

    @classmethod
    def route(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Pass settings that are not its own on to the base: betas=(0.9, 0.95) is AdamW's."""
        own = {k: v for k, v in values.items() if k in cls.Spec.model_fields}
        passed = {k: v for k, v in values.items() if k not in own}
        return {**own, "base": build("optimizer", own.get("base", "adamw"), **passed)} if passed else own
