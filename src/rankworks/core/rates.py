"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from rankworks.core.errors import UnknownNameError, did_you_mean

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
