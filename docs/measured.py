"""Tables of the documentation that are made from committed results: what a page shows is what was measured.

A page says where a table stands: <!-- table: NAME, made by docs/generate.py --> ... <!-- end of table -->
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from show import RESULTS, gigabytes, ratio  # noqa: E402 - the benchmarks' own tables, in the terminal

PLACE = re.compile(r"(<!-- table: (\S+), made by docs/generate.py -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)
Rows = Iterable[Iterable[Any]]

TASKS = {
    "minilm": "MiniLM, BBC News",
    "minilm-long": "MiniLM, BBC News",
    "tiny": "llama of 0.5 M, arithmetic",
    "tiny-long": "llama of 0.5 M, arithmetic",
    "tiny-new": "llama of 0.5 M from random weights, source code",
    "smol-arithmetic": "SmolLM2, arithmetic",
    "smol-bbc": "SmolLM2, BBC News as text",
    "smol-stdlib": "SmolLM2, source code",
}
"""Tasks of the automatic rate's pairs in words."""

STEPS = {
    "lora": "LoRA",
    "lora-dropout": "LoRA, dropout 0.05",
    "dora": "DoRA",
    "ours-task": "LoRA",
    "ours-task-compiled": "LoRA, `train.compile`",
}
"""Variants of the training step in words."""


def with_tables(page: str) -> str:
    """Return a page with the tables it asks for."""
    return PLACE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


def markdown(head: str, rows: Rows) -> str:
    """Return a table; columns of the head that begin with `>` stand to the right."""
    names = [name.strip() for name in head.split("|")]
    rule = ["---:" if name.startswith(">") else "---" for name in names]
    lines = [[name.lstrip("> ") for name in names], rule, *[[str(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" if line is not rule else f"|{'|'.join(line)}|" for line in lines)


def read(name: str) -> dict[str, Any]:
    """Return a committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def share(value: float) -> str:
    """Return a share as people read it."""
    return f"{100 * value:.1f} %"


def between(row: dict[str, float], digits: int = 3) -> str:
    """Return a mean with its interval."""
    return f"{row['mean']:.{digits}f} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def where(result: dict[str, Any]) -> str:
    """Say on what a result was measured, and when."""
    e = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items() if name != "rankworks")
    threads = "one thread" if e["threads"] == 1 else f"{e['threads']} threads"
    return f"\n\n{e['date']}, {e['cpu']}, {threads}; {versions}."


def rates_in_short() -> str:
    """`lr: auto` on both sides of the split."""
    sides = read("auto_rate")["summary"]
    head = "|> pairs |> within 5 % of the best |> median |> worst |> cost of all together |> median cost |> mean cost"
    shares = ("median", "worst", "cost_together", "cost_median", "cost_mean")
    rows = []
    for side, called in (("calibrate", "calibration"), ("held-out", "held out")):
        s = sides[side]["auto"]
        rows.append([called, s["pairs"], s["near"], *(share(s[key]) for key in shares)])
    return markdown(head, rows)


def rates_of_pairs() -> str:
    """`lr: auto` pair by pair."""
    measured = read("auto_rate")
    called = {"calibrate": "calibration", "held-out": "held out"}
    rows = []
    for p in measured["pairs"]:
        setting = measured["settings"][p["task"]]
        task = f"{TASKS[p['task']]}, {setting['steps']} steps of {setting['batch']}"
        lr = f"{p['lr']:g}", f"{p['best']:g}"
        rows.append([called[p["side"]], task, f"`{p['method']}`", *lr, share(p["share"]), share(p["cost"])])
    return markdown("| task | method |> measured |> best of the sweep |> share of its improvement |> cost", rows)


def step() -> str:
    """The cost of a step when nothing differs but the adapter."""
    result = read("train_step")
    rows = result["full_logits"]
    made = []
    for name, words in STEPS.items():
        if name in rows:
            ours, peft = rows[name], rows[f"peft-{name}"]
            made.append([words, ratio(ours, "floor"), ratio(peft, "floor"), ratio(ours, "peft")])
    head = "|> rankworks over the frozen model |> peft over the frozen model |> rankworks over peft"
    return markdown(head, made) + where(result)


def task() -> str:
    """The cost of a step of the real task."""
    result = read("train_step")
    rows = result["task"]
    names = {"peft-task": "peft, padded, all logits", **{n: f"rankworks, {w}" for n, w in STEPS.items() if n in rows}}
    made = []
    for name, words in names.items():
        row = rows[name]
        memory = f"{gigabytes(row)} GB", f"{row['peak_over_peft']:.2f}"
        made.append([words, row["tokens_per_second"], ratio(row, "peft"), *memory])
    head = "|> useful tokens/s |> time per token over peft's |> peak memory |> over peft's"
    return markdown(head, made) + where(result)


def starts() -> str:
    """Time and memory of every initialiser."""
    result = read("inits")
    rows = result["inits"]
    made = []
    for name in sorted(n for n in rows if not n.startswith("peft-")):
        ours, peft = rows[name], rows.get(f"peft-{name}")
        theirs = [f"{peft['seconds']:.2f} s", ratio(ours, "peft"), f"{gigabytes(peft)} GB"] if peft else ["", "", ""]
        made.append([f"`{name}`", f"{ours['seconds']:.2f} s", theirs[0], theirs[1], f"{gigabytes(ours)} GB", theirs[2]])
    return markdown("start |> rankworks |> peft |> over peft |> peak memory |> peft's", made) + where(result)


def learning(name: str, task: str) -> Callable[[], str]:
    """Return the table of a benchmark of learning on one task."""

    def made() -> str:
        result = read(name)
        rows = result[task]
        head = "|> best rate |> trained numbers |> loss at the end |> below the first's |> steps to the first's end"
        lines = []
        for contender, row in rows.items():
            reached = between(row["steps_mean"], 1) if row["steps_mean"] else not_all(row["steps"])
            cells = [f"`{contender}`", f"{row['rate']:g}", f"{row['trained']:,}", between(row["loss"])]
            lines.append([*cells, between(row["below_plain"]), reached])
        return markdown(head, lines) + where(result)

    return made


def budgets(task: str) -> Callable[[], str]:
    """Return the table of rank schedules on one task."""

    def made() -> str:
        result = read("ranks")
        lines = []
        for contender, row in result[task].items():
            ranks = [fmean(r["mean"] for r in row[what]) for what in ("ranks_trained", "ranks")]
            cells = [f"`{contender}`", *(f"{mean:.1f}" for mean in ranks), f"{row['rate']:g}", between(row["loss"])]
            lines.append([*cells, between(row["below_plain"])])
        head = "|> mean rank training left |> as measured |> best rate |> loss at the end |> below plain LoRA's"
        return markdown(head, lines) + where(result)

    return made


def at_one_rate(name: str) -> Callable[[], str]:
    """Return the table of a benchmark of learning where all contenders run at one rate, on both tasks."""

    def made() -> str:
        result = read(name)
        rates = [f"{rate:g}" for rate in result["setting"]["rates"]]
        tasks = list(result["setting"]["tasks"])
        lines = []
        for contender in result[tasks[0]]:
            cells = [result[task][contender]["at_rate"][rate] for task in tasks for rate in rates]
            lines.append([f"`{contender}`", *(f"{c['loss']:.3f}, {after(c['steps'])}" for c in cells)])
        return markdown("".join(f"|> {task}, {rate} " for task in tasks for rate in rates), lines) + where(result)

    return made


def after(steps: float | None) -> str:
    """Say when a loss was reached."""
    return "never" if steps is None else f"{steps:.1f}"


def not_all(steps: list[float | None]) -> str:
    """Say how many seeds reached the plain contender's loss at all."""
    known = sum(s is not None for s in steps)
    return f"reached by {known} of {len(steps)}" if known else "never"


TABLES: dict[str, Callable[[], str]] = {
    "rates": rates_in_short,
    "rates-of-pairs": rates_of_pairs,
    "step": step,
    "task": task,
    "starts": starts,
    "starts-on-bbc": learning("inits_convergence", "bbc"),
    "starts-on-stdlib": learning("inits_convergence", "stdlib"),
    "starts-at-one-rate": at_one_rate("inits_convergence"),
    "ranks-on-bbc": budgets("bbc"),
    "ranks-on-stdlib": budgets("stdlib"),
}
