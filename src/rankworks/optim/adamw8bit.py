"""AdamW with both moments in 8 bits: blocks of 256 numbers with a scale each, codes in the dynamic code books.

    m = b1 dec(q1) + (1 - b1) g        v = b2 dec(q2) + (1 - b2) g^2
    W <- W (1 - lr decay) - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)        q1 = enc(m),  q2 = enc(v)

All in float32, and the step is taken with the moments before they are rounded. Two bytes a parameter and two float32
scales a block; tensors of less than 4,096 numbers, and those that `keep` names, have float32 moments. The paper
advises that for embeddings (its stable embedding layer): `keep=["embed_tokens"]`.

On a CUDA device the kernels of bitsandbytes are used where it is installed; codes, scales and books are the same, so a
run may go on elsewhere. On the CPU a chunk after the other is decoded, stepped and encoded (core/optim/moments.py).
Source: arXiv:2110.02861; `AdamW8bit` of bitsandbytes, whose default decay of 1e-2 is 0 here as everywhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.codes.books import dynamic_book
from rankworks.core.fields import Positive, Setting
from rankworks.core.optim.method import Group, OptimizerMethod, grouped
from rankworks.core.optim.moments import SMALLEST, adam_bytes, adam_step, make_codes
from rankworks.core.optim.stepwise import Stepwise, count_step
from rankworks.core.registry import optimizer
from rankworks.core.targets import find_sites


@optimizer("adamw8bit", title="8-bit AdamW", year=2021, paper="arXiv:2110.02861")
class AdamW8bit(OptimizerMethod):
    """AdamW that keeps two bytes a parameter."""

    betas: tuple[float, float] = Setting((0.9, 0.999), "decays of the two moments")
    eps: float = Positive(1e-8, "added to the root, against division by zero")
    keep: list[str] = Setting([], "weights whose moments stay in float32 (see core/targets.py)")

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """Weights with moments in 8 bits, and those that keep float32."""
        kept = {id(site.tensor) for site in find_sites(model, self.keep)} if self.keep else set()

        def mark(name: str, parameter: nn.Parameter) -> tuple[float, Group]:
            return 1.0, {"bits": 32 if id(parameter) in kept else 8}

        return grouped(model, lr, self.weight_decay, mark)

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The optimizer on its groups."""
        return EightBitAdamW(groups, lr=lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """2 bytes a number and 8 a block; 8 a number of small and kept tensors."""
        return adam_bytes(parameter.numel(), parameter.element_size(), group["bits"])


class EightBitAdamW(Stepwise):
    """The optimizer. State: step, exp_avg and exp_avg_sq (n,) uint8 with _scales (blocks,), or float32 as they are."""

    def __init__(self, groups: Iterable[Group], **defaults: Any):
        super().__init__(groups, bits=8, **defaults)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """One step."""
        t = count_step(state)
        if group["bits"] == 8 and parameter.numel() >= SMALLEST and _has_kernel(parameter):
            _in_one_kernel(parameter, gradient, state, group, t)
            return
        adam_step(
            parameter, gradient, state, t, group["betas"], group["eps"], group["lr"], group["weight_decay"],
            released=False, bits=group["bits"],
        )  # fmt: skip


def _has_kernel(parameter: Tensor) -> bool:
    """Whether bitsandbytes takes the step: not on a CPU, where it is no faster and puts 1 code in 700 a place off."""
    return parameter.is_cuda and _bitsandbytes()


@cache
def _bitsandbytes() -> bool:
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes  # noqa: F401 - registers its kernels

    return hasattr(torch.ops.bitsandbytes, "optimizer_update_8bit_blockwise")


def _in_one_kernel(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group, t: int) -> None:
    """The whole step in one kernel of bitsandbytes, on the same state."""
    for name in ("exp_avg", "exp_avg_sq"):
        make_codes(state, name, parameter)
    books = [dynamic_book(signed).to(parameter.device) for signed in (True, False)]
    codes = [state[name].view(parameter.shape) for name in ("exp_avg", "exp_avg_sq")]
    b1, b2 = group["betas"]
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "adam", gradient.to(parameter.dtype).contiguous(), parameter, *codes, b1, b2,
        0.0, 0.0, group["eps"], t, group["lr"], *books, state["exp_avg_scales"], state["exp_avg_sq_scales"],
        group["weight_decay"], 1.0,
    )  # fmt: skip
