"""Runs of optimizers on a tiny model, in one process or in several: the jobs, and how each is run.

As a script, started by torchrun, it runs every job and writes what came of it to the folder given: all are run in one
go, since starting processes takes longer than any of them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from training import adapted, make_loop

from rankworks.train.loop import Loop
from rankworks.train.processes import leave
from tiny import tiny_llama


@dataclass(frozen=True)
class Job:
    """An optimizer with its options. near: how far weights of one process and of two may be apart; loose: a share free.

    trains: a whole model, or the adapters on one; dtype: of the numbers, float64 where signs would hang on rounding.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    trains: str = "model"
    dtype: torch.dtype = torch.float32
    near: float = 1e-6
    loose: float = 0.0

    def loop(self) -> Loop:
        """A loop of a few steps."""
        model: Any = adapted() if self.trains == "adapter" else tiny_llama().requires_grad_(True)
        rate = 1e-2 if self.trains == "adapter" else 1e-3
        settings = {"steps": 5, "batch_size": 8, "lr": rate, **self.settings}
        return make_loop(model.to(self.dtype), name=self.name, options=self.options, **settings)


def _pairs(name: str, near: float, **options: Any) -> Job:
    return Job(name, options, trains="adapter", dtype=torch.float64, near=near)


def _exact(name: str, **options: Any) -> Job:
    return Job(name, options, dtype=torch.float64)


LISA: dict[str, Any] = {"blocks": 1, "refresh": 2, "eps": 1e-3}
JOBS = {
    "altlora": _pairs("altlora", 1e-10),  # a held factor gets no gradient, which nobody must wait for
    "altlora-plus": _pairs("altlora-plus", 1e-8),
    "allora": _pairs("allora", 1e-8),
    "lora-ggpo": _pairs("lora-ggpo", 1e-8),
    "lora-mgpo": _pairs("lora-mgpo", 1e-8),
    "lora-plus": _pairs("lora-plus", 1e-8),
    "lora-pro": _pairs("lora-pro", 1e-8),
    "riemannian": _pairs("riemannian", 1e-5),
    "zo-ranksgd": Job(
        "zo-ranksgd", {"candidates": 4, "radius": 0.05}, {"steps": 4, "lr": 0.05, "batch_size": 8}, trains="adapter"
    ),
    "adafactor": _exact("adafactor"),
    "adamw8bit": _exact("adamw8bit"),
    "apollo-mini": _exact("apollo-mini", refresh=2),
    "apollo": Job("apollo", {"rank": 8, "refresh": 2}, near=2e-6),
    "dct-adamw": Job("dct-adamw", {"rank": 4, "feedback": "own", "eps": 1e-3}),
    "fira": _exact("fira", rank=4, refresh=2),
    "frugal": _exact("frugal", refresh=3),
    "frugal-columns": _exact("frugal", refresh=3, projection="columns", moments="realign"),
    "frugal-full": _exact("frugal", refresh=3, projection="svd", side="full", moments="realign"),
    "galore": Job("galore", {"rank": 4, "refresh": 2, "subspace": "warm"}, near=1e-5),
    "galore-svd": Job("galore", {"rank": 4, "refresh": 2, "subspace": "svd"}, near=1e-5),
    "gradnormlorp": _exact("gradnormlorp", rank=8, refresh=3, subspace="randomised"),
    "lisa": Job("lisa", LISA, {"steps": 7}),  # blocks that rest keep nobody waiting
    "lisa-layerwise": Job("lisa", LISA, {"steps": 7, "layerwise": True}),
    "lisa-accumulate": Job("lisa", LISA, {"steps": 7, "accumulate": 2, "batch_size": 4}),
    "q-galore": Job("q-galore", {"rank": 4, "refresh": 2}, dtype=torch.float64, loose=1e-3),  # draws may hang on sums
    "trion": Job("trion", {"rank": 4, "eps": 1e-3, "precision": "full", "other_rate": 0.1}, near=1e-5),
}


def numbers(loop: Loop) -> dict[str, Tensor]:
    """Everything the model holds."""
    return {name: p.detach().clone().contiguous() for name, p in loop.model.named_parameters()}


def main(folder: str) -> None:
    for name, job in JOBS.items():
        loop = job.loop()
        losses = loop.run().losses
        held = numbers(loop)
        flat = torch.cat([t.flatten().double() for t in held.values()])
        first = flat.clone()
        dist.broadcast(first, 0)
        apart = (first != flat).sum()
        dist.all_reduce(apart)
        if loop.main:
            more = {"losses": torch.tensor(losses), "world": torch.tensor(loop.world), "apart": apart}
            save_file({**held, **more}, Path(folder) / f"{name}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
