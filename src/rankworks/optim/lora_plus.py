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

from torch import nn

from rankworks.core.delta import Delta
from rankworks.core.fields import Positive, Setting
from rankworks.core.optim.method import Group, grouped, roles
from rankworks.core.optim.over import Over
from rankworks.core.registry import optimizer


@optimizer("lora-plus", title="LoRA+", year=2024, paper="arXiv:2402.12354")
class LoRAPlus(Over):
    """Any optimizer with a larger rate for B."""

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
