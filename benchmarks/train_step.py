"""The cost of a training step beside peft's, and beside the floor: the frozen model's own forward and backward.

    python benchmarks/train_step.py                          # everything, about 15 minutes on two cores
    python benchmarks/train_step.py --variants lora,peft-lora --rounds 5 --batch 2 --length 256 --no-memory

One process, rounds in which every variant takes one step after the other; the ratios are taken within each round.
Two questions: what does the adapter cost when nothing else differs (full logits, transformers' own loss on every
token), and what does a step of the real task cost per token that is not padding (news articles with their labels to
learn: peft with padding and full logits, ours with packing and logits where a label stands)? Peak memory is measured in
a process per variant: the whole process's largest resident set, libraries and model included. The first question is
asked with freed memory kept in the process (heap.py), the second as a user runs it. See README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A training step beside peft's.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", default="all", help="names from variants.py, with commas; floors are added")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    parser.add_argument("--output", type=Path, help="default: results/train_step.json when everything is measured")
    parser.add_argument("--only-memory-of", help=argparse.SUPPRESS)  # what the child processes are called with
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)  # before torch is imported
    import torch

    torch.set_num_threads(options.threads)
    if options.only_memory_of:
        child(options)
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Measure what was chosen and print the result."""
    import common
    import heap
    import variants

    known = {*variants.FULL, *variants.TASK}
    chosen = list(known) if options.variants == "all" else options.variants.split(",")
    if unknown := set(chosen) - known:
        sys.exit(f"unknown variants: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    result: dict[str, Any] = {"benchmark": "train_step", "environment": common.environment(options.clock)}
    result["setting"] = {
        "model": variants.MODEL,
        "dtype": "float32",
        "batch": options.batch,
        "length": options.length,
        "rank": variants.RANK,
        "dropout": variants.DROPOUT,
        "rounds": options.rounds,
        "targets": "all seven projections of every layer",
    }
    base, tokenizer = variants.load()
    tokens, examples, pad = variants.data(tokenizer, base, options.batch, options.length)
    as_it_is = task(options, base, examples, pad, [n for n in variants.TASK if n in chosen])  # before the heap is kept
    with heap.kept_heap() as kept:
        result["setting"]["full_logits_heap"] = "kept" if kept else "as the system has it"
        result["full_logits"] = full(options, base, tokens, [n for n in variants.FULL if n in chosen])
    result["task"] = as_it_is
    if options.memory:
        for part in ("full_logits", "task"):
            memory(options, result[part])
    everything = options.variants == "all" and options.memory
    common.finish(result, options.output or (common.RESULTS / "train_step.json" if everything else None))


def full(options: argparse.Namespace, base: Any, tokens: Any, names: list[str]) -> dict[str, Any]:
    """Measure the full-logit variants."""
    import common
    import variants

    if not names:
        return {}
    steps, sizes = {}, {}
    for name in dict.fromkeys(["floor", *names]):
        steps[name], sizes[name] = variants.full_step(name, base, tokens)
    common.note("full logits: " + ", ".join(steps))
    seconds = common.alternate(steps, options.rounds, warmup=2, clock=options.clock)  # two, until the heap has settled
    rows = {}
    for name in steps:
        peer = {"peft": seconds[f"peft-{name}"]} if f"peft-{name}" in seconds else {}
        rows[name] = common.summarise(seconds[name], {"floor": seconds["floor"], **peer}) | {"trained": sizes[name]}
    return rows


def task(options: argparse.Namespace, base: Any, examples: Any, pad: int, names: list[str]) -> dict[str, Any]:
    """Measure the variants on the real task."""
    import common
    import variants

    if not names:
        return {}
    names = list(dict.fromkeys(["floor-task", "peft-task", *names]))
    steps = {name: variants.task_step(name, base, examples, pad)[0] for name in names}
    common.note("task: " + ", ".join(steps))
    warmup = 2 if "ours-task-compiled" in names else 1
    seconds = common.alternate(steps, options.rounds, warmup, options.clock)
    tokens = sum(variants.useful(examples(warmup + r)) for r in range(options.rounds))
    rows = {}
    for name in names:
        rows[name] = common.summarise(seconds[name], {"peft": seconds["peft-task"], "floor": seconds["floor-task"]})
        rows[name]["tokens_per_second"] = round(tokens / sum(seconds[name]), 1)
        rows[name]["over_peft_total"] = round(sum(seconds[name]) / sum(seconds["peft-task"]), 4)
    return rows


def memory(options: argparse.Namespace, rows: dict[str, Any]) -> None:
    """Add each variant's peak memory, measured in a process of its own."""
    import common

    for name, row in rows.items():
        common.note(f"peak memory: {name}")
        arguments = ["--only-memory-of", name, "--batch", str(options.batch), "--length", str(options.length)]
        row |= common.in_child(__file__, [*arguments, "--threads", str(options.threads)])
    for name, row in rows.items():
        peer = rows.get("peft-task" if name.endswith(("-task", "compiled")) else f"peft-{name}")
        if peer is not None:
            row["peak_over_peft"] = round(row["peak_bytes"] / peer["peak_bytes"], 4)


def child(options: argparse.Namespace) -> None:
    """Take three steps of one variant and print what memory they took."""
    import common
    import variants

    name = options.only_memory_of
    base, tokenizer = variants.load()
    tokens, examples, pad = variants.data(tokenizer, base, options.batch, options.length)
    if name in variants.FULL:
        step, _ = variants.full_step(name, base, tokens)
    else:
        step, _ = variants.task_step(name, base, examples, pad)
    before = common.resident_bytes()
    for round_ in range(3):
        step(round_)
    common.finish({"peak_bytes": common.peak_bytes(), "before_step_bytes": before}, None)


if __name__ == "__main__":
    main()
