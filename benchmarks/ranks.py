"""Rank schedules at one final budget: how well does a mean rank of 4 do, by how it came to be?

    python benchmarks/ranks.py                               # both tasks, all schedules: some hours on two cores
    python benchmarks/ranks.py --tasks bbc --only lora,adalora

Every contender ends with at most 4 ranks per site on average: what a schedule leaves beyond that (SoRA, CoDyRA and
Maestro choose themselves how many) is cut to the best approximation before it is measured. All have the scale
alpha/rank = 2 at the start, each at its own best learning rate out of one grid, over several seeds; see convergence.py.
Finished runs are kept, so the command can be stopped and given again.
"""

from __future__ import annotations

from typing import Any

import convergence

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


def cut(model: Any) -> None:
    """Leave of all of DyLoRA's ranks those of the budget."""
    import rankworks as rw

    rw.set_rank(model, FINAL)


def approximate(model: Any) -> None:
    """Leave at every site the best approximation of the budget's rank."""
    import rankworks as rw

    rw.squeeze(model, rank=FINAL)


if __name__ == "__main__":
    setting = convergence.Setting(steps=60, every=10)
    finish = {"dylora": cut, "sora": approximate, "cody-ra": approximate, "maestro": approximate}
    convergence.command("ranks", "Rank schedules at one final budget.", CONTENDERS, "lora", setting, finish=finish)
