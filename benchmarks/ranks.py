"""Rank schedules at one final budget: how well does a mean rank of 4 do, by how it came to be?

    python benchmarks/ranks.py                               # both tasks, all schedules: some hours on two cores
    python benchmarks/ranks.py --tasks bbc --only lora,adalora

Every contender ends with 4 ranks per site on average (SoRA, CoDyRA and Maestro choose themselves how many: told beside
them), all with the scale alpha/rank = 2 at the start, each at its own best learning rate out of one grid, over several
seeds; see convergence.py. Finished runs are kept, so the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

FINAL = 4

CONTENDERS: dict[str, dict[str, Any]] = {
    "lora": {"delta": "lora", "rank": FINAL, "alpha": 2 * FINAL},
    "lora-16": {"delta": "lora", "rank": 16, "alpha": 32},  # four times the budget: what there is to gain
    "eva": {"delta": "lora", "rank": FINAL, "alpha": 2 * FINAL, "init": "eva"},
    "lamda++": {"delta": "lora", "rank": FINAL, "alpha": 2 * FINAL, "ranks": "lamda++"},
    "adalora": {"delta": "lora", "rank": 6, "alpha": 12, "ranks": {"ranks": "adalora", "target": FINAL}},
    "increlora": {"delta": "lora", "rank": 1, "alpha": 2, "ranks": {"ranks": "increlora", "target": FINAL}},
    "dylora": {"delta": "lora", "rank": 8, "alpha": 16, "ranks": "dylora"},
    "lora-squeeze": {"delta": "lora", "rank": 32, "alpha": 64, "ranks": {"ranks": "lora-squeeze", "target": FINAL}},
    "sora": {"delta": "lora", "rank": 8, "alpha": 16, "ranks": "sora"},
    "cody-ra": {"delta": "lora", "rank": 8, "alpha": 8, "ranks": "cody-ra"},
    "maestro": {"delta": "lora", "rank": 8, "alpha": 16, "ranks": {"ranks": "maestro", "every": 15}},
}
"""Adapters by name."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rank schedules at one final budget.")
    parser.add_argument("--tasks", default="bbc,stdlib", help="names of convergence.TASKS, with commas")
    parser.add_argument("--only", default="all", help="contenders, with commas; lora is always there")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", type=Path, help="where finished runs are kept; default: results/ranks_cells.jsonl")
    parser.add_argument("--output", type=Path, help="default: results/ranks.json when everything is measured")
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)  # before torch is imported
    import common
    import convergence
    import torch

    import rankworks as rw

    torch.set_num_threads(options.threads)
    chosen = (
        CONTENDERS
        if options.only == "all"
        else {"lora": CONTENDERS["lora"]} | {name: CONTENDERS[name] for name in options.only.split(",")}
    )
    setting = convergence.Setting(steps=options.steps, every=10)
    cells = options.cells or common.RESULTS / "ranks_cells.jsonl"
    finish = {"dylora": lambda model: rw.set_rank(model, FINAL)}
    result: dict[str, Any] = {"benchmark": "ranks", "environment": common.environment("none"), "final": FINAL}
    result["setting"] = convergence.described(setting)
    for task in options.tasks.split(","):
        rows = convergence.Bench(task, setting, cells, chosen, finish).run()
        result[task] = convergence.against(rows, "lora")
    everything = options.only == "all" and options.tasks == "bbc,stdlib"
    common.finish(result, options.output or (common.RESULTS / "ranks.json" if everything else None))


if __name__ == "__main__":
    main()
