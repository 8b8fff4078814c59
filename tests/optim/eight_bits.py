"""Moments in 8 bits, ours and those of bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def adopt_moments(theirs: dict[str, Any], ours: Mapping[str, Any]) -> None:
    """Let bitsandbytes' state of a parameter hold the codes and scales that ours holds."""
    for number, name in enumerate(("exp_avg", "exp_avg_sq"), start=1):
        codes = theirs[f"state{number}"]
        codes.copy_(ours[name].view(codes.shape))
        theirs[f"absmax{number}"].copy_(ours[f"{name}_scales"])
