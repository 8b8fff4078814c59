"""A tiny model trained whole by an optimizer, in one process or in several; `check_two` compares the two.

As a script, started by torchrun, it writes the weights, the losses and how many processes there are to the file given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from loops import whole_loop
from safetensors.torch import load_file, save_file
from training import weights

HERE = Path(__file__).parent


def check_two(folder: Path, name: str, options: dict[str, Any], near: float = 1e-6, **settings: Any) -> None:
    """Two processes end with the weights and losses of one, to `near`, at the same global batch."""
    settings = {"steps": 5, "batch_size": 8, "lr": 1e-3, **settings}
    loop = whole_loop(name, options, **settings)
    losses = loop.run().losses
    paths = os.pathsep.join(str(path) for path in (HERE, HERE.parent, HERE.parent / "train"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    path, given = folder / "two.safetensors", json.dumps({"name": name, "options": options, **settings})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(HERE / "two_processes.py"), str(path), given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = load_file(path)
    assert two.pop("world").item() == 2
    torch.testing.assert_close(two.pop("losses"), torch.tensor(losses), atol=1e-5, rtol=1e-5)
    one = weights(loop.model)
    assert set(two) == set(one)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=near, rtol=0)


def main(path: str, given: str) -> None:
    loop = whole_loop(**json.loads(given))
    history = loop.run()
    if loop.main:
        made = {"losses": torch.tensor(history.losses), "world": torch.tensor(loop.world)}
        save_file({**weights(loop.model), **made}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
