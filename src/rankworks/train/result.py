"""What a run gives back: measurements before and after, what it cost, and where the adapter lies."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHARES = ("accuracy", "exact_match")
"""Metrics that are a share of the records, in the order in which one of them becomes a report's headline."""


@dataclass
class Shown:
    """One prompt with its right answer and what the model answered before and after."""

    prompt: str
    expected: str
    before: str
    after: str


@dataclass
class Confusion:
    """How often a record of class `classes[i]` was answered with `classes[j]`: counts[i][j]."""

    classes: list[str]
    counts: list[list[int]]


@dataclass
class RunResult:
    """The result of a run.

    rate: what `lr: auto` measured and took (a `train.rate.MeasuredRate`), None where the rate was given.
    before, after: metrics on the evaluation data ("accuracy" for classification; "exact_match", "loss", "perplexity"
    for completions; "loss", "perplexity" for text). losses: mean training loss of every step. tokens_per_second counts
    tokens that are not padding; peak_memory_bytes is the accelerator's, or the process's on a CPU. chosen: what the
    adapter's selection chose, layers or modules; None without one. model: where the model lies that was trained as a
    whole, None beside an adapter. optimizer_bytes: what the optimizer kept in the end, but for step counters.
    precision: what it computed in, "float32" or "bf16". judged: test records whose answers were right or wrong, 0 where
    a loss alone was measured.
    """

    before: dict[str, float]
    after: dict[str, float]
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    tokens_per_second: float
    peak_memory_bytes: int
    adapter: str | None
    steps: int
    seconds: float
    losses: list[float] = field(default_factory=list)
    valid: list[dict[str, float]] = field(default_factory=list)
    examples: list[Shown] = field(default_factory=list)
    confusion: Confusion | None = None
    output: str | None = None
    chosen: list[str] | None = None
    rate: dict[str, Any] | None = None
    model: str | None = None
    model_bytes: int = 0
    optimizer_bytes: int = 0
    precision: str = "float32"
    judged: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_file(cls, path: str | Path) -> RunResult:
        """Read a result.json."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        confusion = values.pop("confusion")
        shown = [Shown(**example) for example in values.pop("examples")]
        return cls(**values, examples=shown, confusion=Confusion(**confusion) if confusion else None)
