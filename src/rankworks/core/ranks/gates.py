"""Gates: what rank schedules that act through them (deltas/gated.py) have in common."""

from __future__ import annotations

from typing import Any

import torch

from rankworks.core.delta import Delta
from rankworks.core.errors import ConfigError
from rankworks.core.ranks.surgery import gated_of

STD = 0.02
"""Standard deviation of the factors of a change that starts as U diag(0) V."""


def free(delta: Delta) -> bool:
    """Whether the gates may start anywhere, since at every rank one of the two factors is zero."""
    inner = gated_of(delta).inner
    factors = inner.factors()
    if factors is None or getattr(inner.pair, "A0", None) is not None:
        return False
    return not bool((factors.A.any(dim=1) & factors.B.any(dim=0)).any())


@torch.no_grad()
def start_as_svd(delta: Delta, init: str) -> None:
    """Start a gated change as B diag(0) A with both factors alive: the change is zero, and its gates can move.

    With the default initialiser A and B ~ N(0, 0.02^2); another one that gives a factor keeps it, and the factor of
    zeros gets those numbers. A start that is taken out of the base, or that lies in factors which are not a trained
    pair, stays as it is, with gates of one: there the gates begin with the change's own ranks.
    """
    gated = gated_of(delta)
    pair: Any = delta.pair
    if gated.gate.is_meta or pair is None or not free(delta):
        return
    for factor in (pair.A, pair.B):
        if init == "default" or not bool(factor.any()):
            factor.copy_(pair.draw.normal(*factor.shape, std=STD))
    gated.gate.zero_()


@torch.no_grad()
def start_at_random(delta: Delta) -> None:
    """Let the gates of a change that is zero by another factor start at N(0, 1); others stay at one."""
    gated = gated_of(delta)
    if not gated.gate.is_meta and free(delta):
        gated.gate.copy_(gated.draw.normal(len(gated.gate)))


def steps_of(what: str, wanted: float, steps: int) -> int:
    """Return a number of steps given as such, or as a share of all steps below 1. Raises `ConfigError` where broken."""
    if wanted >= 1 and wanted != int(wanted):
        raise ConfigError(f"{what} is {wanted}: give a share of all steps below 1, or a whole number of steps.")
    return int(wanted * steps) if wanted < 1 else int(wanted)
