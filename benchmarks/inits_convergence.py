"""How fast every initialiser learns: steps to the loss that plain LoRA has at the end, each at its own best rate.

    python benchmarks/inits_convergence.py                     # both tasks, all starts: some hours on two cores
    python benchmarks/inits_convergence.py --tasks bbc --only pissa,eva

Rank 16 on every projection of SmolLM2-135M, alpha/rank = 2; triples (lora-sb, nlora) with the delta they belong to. See
convergence.py for what is equal for all. Finished runs are kept, so the command can be stopped and given again.
"""

from __future__ import annotations

from typing import Any

import convergence

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


if __name__ == "__main__":
    convergence.command(
        "inits_convergence", "How fast every initialiser learns.", CONTENDERS, "default", convergence.Setting()
    )
