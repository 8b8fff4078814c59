"""The same numbers give the same bits: what MKL has to be told for that on processors other than Intel's.

MKL, which multiplies float32 and float64 matrices for torch, may choose its code by where in memory a matrix lies. On
Intel's processors that has not been seen to show; on AMD's equal products of equal matrices differ in their last bits
from one allocation to the next, and a run that goes on from a checkpoint would not end as if it had not been stopped.
MKL_CBWR=AUTO,STRICT rules that out; on an AMD EPYC it makes a training step of SmolLM2-135M 1 to 2 % longer (medians of
three pairs: 1.018 of the frozen model's own, 1.013 with a LoRA). MKL_CBWR=AUTO is for those who would rather not.
MKL reads it at its first product, so it is set when rankworks is imported, and never over what a user has set.
"""

from __future__ import annotations

import os
from pathlib import Path


def settle() -> None:
    """Ask MKL for equal bits, where the processor is not Intel's and nobody has asked for anything."""
    if _vendor() not in ("", "GenuineIntel"):
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def _vendor() -> str:
    """The processor's maker on Linux, "" elsewhere and where it is not told (as on ARM, where there is no MKL)."""
    try:
        with Path("/proc/cpuinfo").open() as lines:  # the first processor's entry has it, among hundreds perhaps
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return ""


settle()
