"""Ghost batch normalisation: in training every `ghost` examples of a batch are normalised with their own statistics.

    x (B, C, ...) in K = ceil(B / ghost) ghosts of nearly equal size;  y_j = gamma (x_j - mean_j) / sd_j + beta
    running mean <- (1 - eta)^K running mean + sum_j (1 - eta)^(K - j) eta mean_j,  j = 1 ... K;  the variance likewise

so that a large batch is normalised with the noise of small ones, which is what it generalises worse for lack of. The
closed form is the ordinary average moved ghost by ghost, and is computed so; with `momentum=None` it is the mean over
all ghosts seen. Evaluation uses the running statistics and knows no ghosts. gamma and beta are shared.

    rw.ghost_batch_norm(model, ghost=128)        swaps the class of every nn.BatchNorm1d, 2d and 3d in place
    rw.ghost_batch_norm(model, None)             and back

Parameters, buffers and their names stay, so state dicts fit both ways. No ghost is larger than `ghost` and sizes differ
by one at most; the released code cuts a batch into B // ghost pieces, which may be larger, and puts each through the
whole network. A batch of at most `ghost` examples is normalised as ever. Each process has its own ghosts.
The rest of the paper's recipe is `rw.adapted_regime` (core/rates.py).
Source: arXiv:1705.08741, section 4 and its released code; the closed form there is the average unrolled.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from rankworks.core.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Ghosts(nn.Module):
    """Mixed in before a batch normalisation's own class."""

    ghost: int

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        if not self.training or len(input) <= self.ghost:
            return super().forward(input)
        count = -(-len(input) // self.ghost)
        return torch.cat([super(Ghosts, self).forward(part) for part in input.tensor_split(count)])


@cache
def _with_ghosts(kind: type[nn.Module]) -> Any:
    return type(f"Ghost{kind.__name__}", (Ghosts, kind), {"__module__": kind.__module__})


def ghost_batch_norm(model: Model, ghost: int | None = 128) -> Model:
    """Let every batch normalisation of `model` see ghosts of at most so many examples, or none again (None).

    Acts in place and returns the model; call it again to change the size. Raises `ConfigError` where the model has no
    batch normalisation of nn.BatchNorm1d, 2d or 3d, one that is not made yet (lazy), or `ghost` is below 1.
    """
    if ghost is not None and ghost < 1:
        raise ConfigError(f"a ghost has at least 1 example, not {ghost}: give ghost=128, or None to take them away.")
    found: list[Any] = [m for m in model.modules() if isinstance(m, NORMS)]
    lazy = next((m for m in model.modules() if isinstance(m, LazyModuleMixin)), None)
    if lazy is not None and isinstance(lazy, nn.modules.batchnorm._NormBase):
        raise ConfigError(
            f"{type(lazy).__name__} becomes a batch normalisation with the first batch: run the model once before."
        )
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no nn.BatchNorm1d, BatchNorm2d or BatchNorm3d that could have ghosts "
            "(SyncBatchNorm has one batch over all processes on purpose): leave ghost_batch_norm out."
        )
    for module in found:
        plain: Any = type(module).__mro__[2] if isinstance(module, Ghosts) else type(module)
        module.__class__ = plain if ghost is None else _with_ghosts(plain)
        if ghost is None:
            vars(module).pop("ghost", None)
        else:
            module.ghost = ghost
    return model
