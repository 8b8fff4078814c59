"""A few steps from rankings on a tiny model in several processes; writes weights and losses to the file given."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from train.training import make_loop, weights

SETTINGS = {"name": "zo-ranksgd", "lr": 0.05, "options": {"candidates": 4, "radius": 0.05}}


def main(path: str) -> None:
    loop = make_loop(steps=4, **SETTINGS)
    history = loop.run()
    flat = torch.cat([t.flatten() for t in weights(loop.model).values()])
    first = flat.clone()
    dist.broadcast(first, 0)
    apart = (first != flat).sum().float()
    dist.all_reduce(apart)
    if loop.main:
        save_file({**weights(loop.model), "losses": torch.tensor(history.losses), "apart": apart}, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
