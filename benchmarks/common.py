"""What the benchmarks share: alternating rounds, ratios, peak memory in processes of their own, the file of results."""

from __future__ import annotations

import copy
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).parent / "results"

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""`wall` is what a user waits; `cpu` counts this process's work alone, for a machine that others use too."""


def alternate(
    steps: Mapping[str, Callable[[int], object]], rounds: int, warmup: int = 1, clock: str = "wall"
) -> dict[str, list[float]]:
    """Time every step once per round, one after the other (A B C A B C ...), so that a slow minute hits all alike.

    A step is called with the number of its round; the first `warmup` rounds are not counted. Returns seconds.
    """
    now = CLOCKS[clock]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(warmup + rounds):
        for name, step in steps.items():
            started = now()
            step(round_)
            if round_ >= warmup:
                seconds[name].append(now() - started)
        note(f"round {round_ + 1 - warmup} of {rounds}" if round_ >= warmup else "warm-up")
    return seconds


def summarise(seconds: Sequence[float], against: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median time and, per reference, the median, the quartiles and the least of the rounds' ratios."""
    row = {"seconds": round(statistics.median(seconds), 4)}
    for name, reference in against.items():
        ratios = sorted(a / b for a, b in zip(seconds, reference, strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        row |= {f"over_{name}": round(middle, 4), f"over_{name}_quartiles": [round(low, 4), round(high, 4)]}  # type: ignore[dict-item]
        row[f"over_{name}_least"] = round(ratios[0], 4)
        row[f"over_{name}_of_least"] = round(min(seconds) / min(reference), 4)
    return row


def sharing_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the modules on the same parameters, so that many adapted models cost one base."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def in_child(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a script in a process of its own and return the JSON of its last line."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes() -> int:
    """Return the largest resident set this program ever had: interpreter, libraries, model and all.

    Linux counts ru_maxrss from before the program began, so a child starts at its parent's size; VmHWM does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Return the resident set now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def environment(clock: str) -> dict[str, Any]:
    """Return where and with what the numbers were made."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "rankworks")}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "clock": clock,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def write(result: dict[str, Any], path: Path | None) -> None:
    """Write the result so far, where asked."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def finish(result: dict[str, Any], path: Path | None) -> None:
    """Write the result where asked, and print it as one JSON line, the last of the output."""
    write(result, path)
    print(json.dumps(result), flush=True)


def note(text: str) -> None:
    """Tell the person who waits."""
    print(text, file=sys.stderr, flush=True)
