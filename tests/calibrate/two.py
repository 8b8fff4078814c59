"""One of two processes of torchrun, which measure different data; each writes the evidence it was given to a file."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import rankworks as rw
from rankworks.core.evidence import Need
from rankworks.train.processes import leave
from tiny import tiny_llama, token_batch


def main(path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ids = token_batch(batch=4, seed=rank)  # unequal on purpose: what all get must be the first one's
    needs = ["gradient", Need("input_svd", {"rank": 2, "limit": 4})]
    found = rw.calibrate(tiny_llama(), [{"input_ids": ids, "labels": ids}], needs, progress=False)
    tensors = {f"{site}/{part}": t.clone() for site, parts in found.items() for part, t in parts.items()}
    save_file(tensors, f"{path}.{rank}")


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
