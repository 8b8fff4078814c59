"""A comparison of any size, made up with a fixed seed: what its report must stay readable with."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from rankworks.compare.result import CompareResult

EXAMPLE = Path(__file__).with_name("example.json")
CLASSES = ["business", "entertainment", "politics", "sport", "tech"]
RECORDS = 40  # test records per class
NAMES = (
    "lora", "pissa", "vera", "dora", "lora-xs", "shira", "hira", "loha", "lokr", "mora", "oft", "boft", "hra", "goat",
    "corda", "milora", "olora", "lora-ga", "eva", "adalora", "dylora", "rslora", "randlora", "delora", "fourierft",
    "c3a", "bitfit", "ia3", "svft", "road", "tied-lora", "nola", "flora", "galore", "apollo", "fira", "lora-pro",
    "altlora", "loraplus + galore with a very long label", "full",
)  # fmt: skip


def made_up(count: int = 40, seed: int = 5, **changes: Any) -> CompareResult:
    """Return a comparison of `count` methods: the last one failed, two were skipped; a method has one of 5 classes."""
    draw = random.Random(seed)
    values = json.loads(EXAMPLE.read_text())
    arms = [_arm(name, i, draw) for i, name in enumerate(NAMES[:count])]
    rows = sorted((_row(arm, arms[0], draw) for arm in arms[:-1]), key=lambda row: -row["mean"])
    for row in rows:
        above = [other for other in rows if other["low"] > row["mean"] + 0.01]
        row["rank"], row["tie"] = 1 + len(above), not above
    failed = {**_row(arms[-1], arms[0], draw), "status": "failed", "reason": "out of memory: 93 GB asked for"}
    failed |= dict.fromkeys(("mean", "low", "high", "difference", "p", "p_corrected", "lr", "memory_bytes"))
    arms[-1] |= {"reruns": [], "best": None}
    skipped = [
        {"label": name, "key": name, "reason": "it stands beside feed-forward blocks, and the model has none."}
        for name in ("locas", "<b>odd & ends</b>")
    ]
    data = {**values["data"], "classes": CLASSES, "test": RECORDS * len(CLASSES)}
    values |= {"title": f"{count} methods on news", "leaderboard": [*rows, failed], "arms": arms, "skipped": skipped}
    return CompareResult.from_dict({**values, "data": data, **changes})


def _arm(name: str, i: int, draw: random.Random) -> dict[str, Any]:
    level, best = 0.86 + 0.1 * draw.random(), 10 ** draw.uniform(-3.6, -1.7)
    rates = [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2]
    trials = [
        _trial(k, lr, abs(draw.gauss(0, 0.02)) + 0.2 * (lr / best - best / lr) ** 2, draw) for k, lr in enumerate(rates)
    ]
    done = [t for t in trials if t["outcome"] == "complete"] or trials[:1]
    command = (
        f"rankworks train runs/many/arms/{name.replace(' ', '-')}.yaml optim.lr={best:.3g} --output runs/again/{i}"
    )
    return {
        "label": name, "axis": "delta", "key": name.split()[0], "title": name.upper(), "paper": "arXiv:2106.09685",
        "adapt": {"delta": name, "rank": 8, "targets": "all-linear"}, "optim": {"name": "adamw", "lr": round(best, 6)},
        "steps": 100, "recipe": f"runs/many/arms/{i}.yaml", "command": command,
        "trainable_parameters": round(10 ** draw.uniform(3, 7)), "adapter_parameters": 900,
        "planned_bytes": round(9e8 * draw.uniform(1, 1.6)), "planned_flops": 2e12, "searched": [1e-4, 3.16e-2],
        "best": min(done, key=lambda t: t["value"] or 9.0)["slot"],
        "notes": ["rank 8 was solved for the budget"] if i % 5 == 0 else [], "trials": trials,
        "reruns": [_rerun(seed, level, draw) for seed in (1, 2, 3)],
    }  # fmt: skip


def _curve(end: float, steps: int, draw: random.Random) -> list[list[float]]:
    return [[s, round(end + (1.6 - end) * 0.6 ** (s / 10) + draw.gauss(0, 0.01), 5)] for s in range(4, steps + 1, 4)]


def _trial(k: int, lr: float, excess: float, draw: random.Random) -> dict[str, Any]:
    outcome = "complete" if excess < 0.8 else "pruned" if excess < 30 else "diverged"
    steps = {"complete": 100, "pruned": 50, "diverged": 7}[outcome]
    value = 0.15 + min(excess, 1.4)
    return {
        "slot": f"trial {k}", "number": k, "lr": lr, "settings": {}, "outcome": outcome,
        "reason": "the loss became nan at step 7" if outcome == "diverged" else None,
        "value": None if outcome == "diverged" else round(value, 5), "steps": steps, "seconds": steps / 10,
        "losses": [], "valid": [] if outcome == "diverged" else _curve(value, steps, draw),
    }  # fmt: skip


def _rerun(seed: int, level: float, draw: random.Random) -> dict[str, Any]:
    counts = []
    for i in range(len(CLASSES)):
        right = sum(draw.random() < level - 0.02 * i for _ in range(RECORDS))
        row = [0] * len(CLASSES)
        row[i], row[(i + 1) % len(CLASSES)] = right, RECORDS - right
        counts.append(row)
    outcomes = [float(j < row[i]) for i, row in enumerate(counts) for j in range(RECORDS)]
    accuracy = sum(outcomes) / len(outcomes)
    return {
        "seed": seed, "outcome": "complete", "reason": None, "metrics": {"accuracy": accuracy, "loss": 1.2 - accuracy},
        "outcomes": outcomes, "weights": None, "confusion": {"classes": CLASSES, "counts": counts}, "steps": 100,
        "seconds": draw.uniform(8, 30), "step_seconds": draw.uniform(0.05, 0.3), "tokens_per_second": 5000.0,
        "peak_memory_bytes": round(9e8 * draw.uniform(1, 1.5)), "trainable_parameters": 0,
        "losses": _curve(0.1, 100, draw), "valid": _curve(1.2 - level, 100, draw),
    }  # fmt: skip


def _row(arm: dict[str, Any], baseline: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    def score(one: dict[str, Any]) -> float:
        return sum(r["metrics"]["accuracy"] for r in one["reruns"]) / 3

    gap, own = score(arm) - score(baseline), arm is baseline
    p = min(1.0, max(1e-6, 0.8 - 16 * abs(gap)))
    return {
        "method": arm["label"], "rank": None, "tie": False, "mean": score(arm), "low": score(arm) - 0.025,
        "high": min(1.0, score(arm) + 0.025), "difference": None if own else gap,
        "difference_low": None if own else gap - 0.03, "difference_high": None if own else gap + 0.03,
        "p": None if own else p, "p_corrected": None if own else min(1.0, 4 * p), "status": "ok", "reason": None,
        "lr": arm["optim"]["lr"], "trainable_parameters": arm["trainable_parameters"],
        "memory_bytes": max(r["peak_memory_bytes"] for r in arm["reruns"]), "planned_bytes": arm["planned_bytes"],
        "step_seconds": draw.uniform(0.05, 0.3), "seconds": draw.uniform(60, 4000), "trials": 6,
        "pruned": sum(t["outcome"] == "pruned" for t in arm["trials"]),
        "diverged": sum(t["outcome"] == "diverged" for t in arm["trials"]), "seeds": 3, "command": arm["command"],
    }  # fmt: skip
