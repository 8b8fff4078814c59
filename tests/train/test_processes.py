"""Two processes give the weights of one, with the same global batch, whichever launcher starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import make_loop, weights

HERE = Path(__file__).parent
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    # `accelerate launch --cpu` starts several processes through MPI only; without a GPU this starts them on the CPU.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"],
}
OPTIONS = {"torchrun": [], "accelerate": ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "accumulate", "layerwise"),
    [("accelerate", 1, []), ("torchrun", 2, []), ("torchrun", 1, ["layerwise"]), ("torchrun", 2, ["layerwise"])],
)
def test_two_processes_equal_one(tmp_path: Path, launcher: str, accumulate: int, layerwise: list[str]):
    loop = make_loop(steps=5)
    losses = loop.run().losses
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    path = tmp_path / "two.safetensors"
    script = [str(HERE / "distributed.py"), str(path), str(accumulate), *layerwise]
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *OPTIONS[launcher], *script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = load_file(path)
    assert two.pop("world").item() == 2
    torch.testing.assert_close(two.pop("losses"), torch.tensor(losses), atol=1e-5, rtol=1e-5)
    one = weights(loop.model)
    assert set(two) == set(one)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=0)
