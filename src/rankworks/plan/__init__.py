"""What adapting a model costs, without its weights: counts, bytes, the memory of a step, and whether it fits."""

from rankworks.core.callable import make_callable
from rankworks.core.hub.shapes import shape_names
from rankworks.plan.compared import compare, rank_for_budget
from rankworks.plan.make import plan
from rankworks.plan.result import Comparison, Fit, Plan
from rankworks.plan.states import optimizer_bytes, weight_bytes
from rankworks.plan.units import format_bytes, parse_bytes

__all__ = [
    "Comparison",
    "Fit",
    "Plan",
    "compare",
    "format_bytes",
    "optimizer_bytes",
    "parse_bytes",
    "plan",
    "rank_for_budget",
    "shape_names",
    "weight_bytes",
]

make_callable(__name__, plan)
