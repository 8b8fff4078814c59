"""Learning-rate schedules as pure functions of the step, and what becomes of a regime when batches grow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rankworks.core.errors import ConfigError, UnknownNameError, did_you_mean

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate_factor(schedule: str, step: int, steps: int, warmup: float = 0.0) -> float:
    """Return the factor on the learning rate at `step` (0 for the first) of `steps`.

    warmup: a fraction of all steps when below 1, else a number of steps; the rate climbs linearly over it. After it
    "constant" stays, "linear" falls to 0, "cosine" falls to 0 along half a cosine.
    """
    rising = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
    if step < rising:
        return (step + 1) / (rising + 1)
    done = (step - rising) / max(1, steps - rising)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    raise UnknownNameError(f"no schedule is called {schedule!r}.{did_you_mean(schedule, SCHEDULES)}")


class Regime(NamedTuple):
    """A learning rate, how long it lasts and where it falls."""

    lr: float
    epochs: int
    boundaries: tuple[int, ...]


def adapted_regime(
    batch: int,
    small: int,
    lr: float,
    epochs: int,
    boundaries: Sequence[int] = (),
    *,
    rule: Literal["sqrt", "linear", "none"] = "sqrt",
    longer: bool = True,
) -> Regime:
    """Return the regime for batches of `batch` examples that a regime for `small` ones becomes.

        lr' = lr sqrt(batch / small)        epochs' = ceil(batch / small) epochs, boundaries likewise

    lr, epochs, boundaries (epochs at which the rate falls): those of the small batches. The square root keeps the
    covariance of a step of SGD, and with so many more epochs as many updates are made at each rate. The paper also
    clips the norm of the gradient (at 5; `optim.clip` here) and lets batch normalisation see ghosts of `small` examples
    (core/ghost.py). rule: "linear" multiplies by batch / small, "none" leaves the rate. longer: its released code
    leaves the epochs alone unless asked. Raises `ConfigError` where a number is below 1 or batch is below small.
    Source: arXiv:1705.08741, sections 3 and 5, and its released code.
    """
    if small < 1 or batch < small or epochs < 1:
        raise ConfigError(
            f"a regime for batches of {small} is adapted to larger ones, for at least one epoch: batch={batch}, "
            f"small={small}, epochs={epochs} is none."
        )
    share = batch / small
    factor = {"sqrt": math.sqrt(share), "linear": share, "none": 1.0}[rule]
    times = -(-batch // small) if longer else 1
    return Regime(lr * factor, epochs * times, tuple(times * boundary for boundary in boundaries))
