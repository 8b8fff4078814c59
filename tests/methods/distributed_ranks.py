"""A few steps of a rank schedule on a tiny model, started by a launcher; writes what it trained to the file given."""

from __future__ import annotations

import json
import sys

from runs import tiny_run
from safetensors.torch import save_file

from rankworks.train.checkpoint import trained_tensors
from rankworks.train.processes import leave


def main(path: str, schedule: str, delta: str = "lora") -> None:
    ranks = json.loads(schedule) if schedule.startswith("{") else schedule
    settings = {"rank": 4} if delta == "lora" else {}
    plain = {"name": "sgd", "lr": 0.1, "options": {"momentum": 0.9}}  # Adam makes a step of a gradient that is rounding
    loop = tiny_run(delta=delta, ranks=ranks, steps=5, optim=plain, **settings)
    loop.run()
    if loop.main:
        save_file({k: t.detach().contiguous() for k, t in trained_tensors(loop.model).items()}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
