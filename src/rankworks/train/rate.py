"""`optim.lr: auto`: the learning rate from a measurement at the start, in place of a sweep.

    lr = c / sqrt(n lambda)        lambda: largest eigenvalue of the Hessian over the n trained numbers, at the start

Adam moves every coordinate by about lr, so a step has the norm lr sqrt(n), and along the most curved direction it costs
n lambda lr^2 / 2: the best rates of methods as different as LoRA, VeRA and full fine-tuning spend the same there. The
constant is calibrated (benchmarks/auto_rate.py; figures in docs/auto-rate.md) for optimizers whose steps are of that
kind, `CALIBRATED`; others are refused.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate.utils import broadcast_object_list
from torch import nn

from rankworks.core.errors import TrainingError
from rankworks.train.batches import Example
from rankworks.train.config import TrainConfig
from rankworks.train.probe import probing
from rankworks.train.processes import processes
from rankworks.train.progress import Bar
from rankworks.train.sharpness import sharpness

CONSTANT = 1.1
"""c: calibrated on the pairs that benchmarks/auto_rate_tasks.py lists as CALIBRATE."""

ITERATIONS = 6
"""Products with the Hessian; more of them move the rate by a few per cent."""

FILE = "rate.json"


@dataclass(frozen=True)
class MeasuredRate:
    """What `lr: auto` took and why.

    lr: the peak rate; sharpness: the largest eigenvalue of the Hessian at the start; numbers: how many are trained;
    passes: what the measurement cost, in forward-backward passes over a batch of the run; seconds: the same in time.
    """

    lr: float
    sharpness: float
    numbers: int
    passes: float
    seconds: float

    def to_json(self) -> str:
        """Return what `read_rate` reads."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        return (
            f"{self.lr:g} = {CONSTANT:g} / sqrt({self.numbers:,} numbers x sharpness {self.sharpness:.3g}), measured "
            f"at the cost of {self.passes:.3g} steps"
        )


def measure_rate(
    model: nn.Module, examples: Sequence[Example], train: TrainConfig, *, pad: int = 0, progress: bool = True
) -> MeasuredRate:
    """Measure the learning rate for a run of these settings on the model as it stands, which is left bit for bit.

    examples: of the run; its first ones are used. In a run of several processes all measure the same, and go on with
    what the first found. Raises `TrainingError` where the loss has no finite curvature.
    """
    started = time.monotonic()
    bar = Bar("measuring the learning rate", 2 * ITERATIONS + 1, show=progress)
    with bar, probing(model, examples, train, pad=pad, tick=bar.advance) as probe:
        found = sharpness(probe.gradient, probe.parameters, iterations=ITERATIONS)
    if not found.value > 0:
        raise TrainingError(
            "lr: auto found no direction in which the loss curves upwards, so no rate follows: give optim.lr a number, "
            "e.g. 2e-4, or tune it with `rankworks compare`."
        )
    rate = _rounded(CONSTANT / math.sqrt(found.numbers * found.value))
    seconds = round(time.monotonic() - started, 3)
    return _agreed(MeasuredRate(rate, found.value, found.numbers, round(probe.passes, 2), seconds))


def _rounded(value: float) -> float:
    """Two digits: what a measurement of this kind can tell."""
    return float(f"{value:.2g}")


def _agreed(rate: MeasuredRate) -> MeasuredRate:
    """Return what the first process found."""
    if processes().num_processes == 1:
        return rate
    return broadcast_object_list([rate])[0]


def read_rate(folder: Path) -> MeasuredRate | None:
    """Return the rate an earlier start of a run measured, or None where it left none."""
    try:
        return MeasuredRate(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
