"""Comparison: which method is best for a model, data and a budget, with equal tuning and honest intervals."""

from rankworks.compare.api import compare
from rankworks.compare.config import BudgetConfig, CompareConfig, TuneConfig, load_compare_config
from rankworks.compare.markdown import markdown
from rankworks.compare.result import ArmResult, CompareResult, RerunResult, Row, Skipped, TrialResult
from rankworks.core.callable import make_callable

__all__ = [
    "ArmResult",
    "BudgetConfig",
    "CompareConfig",
    "CompareResult",
    "RerunResult",
    "Row",
    "Skipped",
    "TrialResult",
    "TuneConfig",
    "compare",
    "load_compare_config",
    "markdown",
]

make_callable(__name__, compare)
