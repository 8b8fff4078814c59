"""How fast every initialiser learns: steps to the loss that plain LoRA has at the end, each at its own best rate.

    python benchmarks/inits_convergence.py                     # both tasks, all starts: some hours on two cores
    python benchmarks/inits_convergence.py --tasks bbc --only pissa,eva

Rank 16 on every projection of SmolLM2-135M, alpha/rank = 2; triples (lora-sb, nlora) with the delta they belong to. See
convergence.py for what is equal for all. Finished runs are kept, so the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

RANK, ALPHA = 16, 32


def lora(init: Any, **settings: Any) -> dict[str, Any]:
    """Return a LoRA that starts there."""
    return {"delta": "lora", "rank": RANK, "alpha": ALPHA, "init": init, **settings}


CONTENDERS: dict[str, dict[str, Any]] = {
    "default": lora("default"),
    "gaussian": lora("gaussian"),
    "pissa": lora("pissa"),
    "olora": lora("olora"),
    "lora-ga": lora("lora-ga"),
    "lora-ga rslora": lora("lora-ga", scaling="rslora", alpha=16),  # the paper's scheme: alpha/sqrt(r)
    "eva": lora("eva"),
    "corda": lora("corda"),
    "lora-sb": {"delta": "lora-xs", "rank": RANK, "alpha": RANK, "init": "lora-sb"},
    "slora": {"delta": "nlora", "rank": RANK, "alpha": ALPHA},
    "nystrom": {"delta": "nlora", "rank": RANK, "alpha": RANK, "init": {"init": "nlora", "form": "nystrom"}},
}
"""Adapters by name."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast every initialiser learns.")
    parser.add_argument("--tasks", default="bbc,stdlib", help="names of convergence.TASKS, with commas")
    parser.add_argument("--only", default="all", help="contenders, with commas; default is always there")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", type=Path, help="where finished runs are kept; default: results/inits_cells.jsonl")
    parser.add_argument("--output", type=Path, help="default: results/inits_convergence.json when all is measured")
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)  # before torch is imported
    import common
    import convergence
    import torch

    torch.set_num_threads(options.threads)
    names = list(CONTENDERS) if options.only == "all" else ["default", *options.only.split(",")]
    setting = convergence.Setting(steps=options.steps)
    cells = options.cells or common.RESULTS / "inits_cells.jsonl"
    result: dict[str, Any] = {"benchmark": "inits_convergence", "environment": common.environment("none")}
    result["setting"] = convergence.described(setting)
    for task in options.tasks.split(","):
        rows = convergence.Bench(task, setting, cells, {name: CONTENDERS[name] for name in names}).run()
        result[task] = convergence.against(rows, "default")
    everything = options.only == "all" and options.tasks == "bbc,stdlib"
    common.finish(result, options.output or (common.RESULTS / "inits_convergence.json" if everything else None))


if __name__ == "__main__":
    main()
