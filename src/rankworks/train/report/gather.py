"""What a report tells, read from a run's folder: nothing in it is computed from anything else."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rankworks.core.errors import StoreError
from rankworks.core.version import __version__
from rankworks.train.result import SHARES, Confusion, RunResult


@dataclass
class Evidence:
    """A finished run: its configuration, result, the measurement before, the lines of metrics.jsonl, the machine."""

    folder: Path
    config: dict[str, Any]
    result: RunResult
    before: Confusion | None
    steps: list[dict[str, Any]]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        """The metric to begin with."""
        measured = self.result.after
        return next((name for name in (*SHARES, "perplexity", "loss") if name in measured), next(iter(measured), ""))


def gather(folder: str | Path) -> Evidence:
    """Read a run's folder. Raises `StoreError` where it holds no finished run."""
    folder = Path(folder)
    try:
        result = RunResult.from_file(folder / "result.json")
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise StoreError(f"{folder} holds no finished run (it needs result.json and config.yaml): {error}") from None
    before = None
    try:
        measured = json.loads((folder / "before.json").read_text(encoding="utf-8"))
        before = Confusion(**measured["confusion"]) if measured.get("confusion") else None
    except (OSError, ValueError, AttributeError):
        before = None  # an older or foreign folder: the report shows the state after training alone
    return Evidence(folder, config, result, before, _steps(folder / "metrics.jsonl"), environment(result.precision))


def _steps(path: Path) -> list[dict[str, Any]]:
    """Return the training steps of a metrics.jsonl; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if "loss" in row:
            rows.append(row)
    return rows


def interval(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a share that was seen in `count` records."""
    from scipy.stats import binomtest

    seen = binomtest(round(share * count), count).proportion_ci(confidence, method="wilson")
    return float(seen.low), float(seen.high)


def per_class(confusion: Confusion) -> dict[str, tuple[int, int]]:
    """Return {class: (how many of its records were right, how many there are)}."""
    rows = zip(confusion.classes, confusion.counts, strict=True)
    return {name: (row[i], sum(row)) for i, (name, row) in enumerate(rows)}


def environment(precision: str) -> dict[str, str]:
    """Return what the machine and the libraries are, and what was computed in."""
    import torch
    import transformers

    described = {
        "rankworks": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{_processor()}, {torch.get_num_threads()} threads of {os.cpu_count()} CPUs",
    }
    described["computes in"] = precision
    if torch.cuda.is_available():
        described["accelerator"] = torch.cuda.get_device_name()
    return described


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def flat(values: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    """Return nested settings with dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{head}{key}.") if isinstance(value, Mapping) and value else {f"{head}{key}": value}
    return found
