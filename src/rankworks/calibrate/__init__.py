"""Calibration: one pass over data that gathers what methods ask to know before they start."""

from rankworks.calibrate.api import calibrate, needed
from rankworks.calibrate.inputs import Masks
from rankworks.calibrate.statistic import Statistic
from rankworks.calibrate.statistics import STATISTICS
from rankworks.core.callable import make_callable

__all__ = ["STATISTICS", "Masks", "Statistic", "calibrate", "needed"]

make_callable(__name__, calibrate)
