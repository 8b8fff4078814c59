"""Two processes give the weights of one, with the same global batch, whichever launcher starts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import make_loop, weights

from launching import TORCHRUN, launched

HERE = Path(__file__).parent
LAUNCHERS = {
    "torchrun": TORCHRUN,
    # `accelerate launch --cpu` starts several processes through MPI only; without a GPU this starts them on the CPU.
    "accelerate": (
        "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
        "--main_process_port=0",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "accumulate", "layerwise"),
    [("accelerate", 1, []), ("torchrun", 2, []), ("torchrun", 1, ["layerwise"]), ("torchrun", 2, ["layerwise"])],
)
def test_two_processes_equal_one(tmp_path: Path, launcher: str, accumulate: int, layerwise: list[str]):
    loop = make_loop(steps=5)
    losses = loop.run().losses
    path = tmp_path / "two.safetensors"
    launched(HERE / "distributed.py", path, accumulate, *layerwise, start=LAUNCHERS[launcher])
    two = load_file(path)
    assert two.pop("world").item() == 2
    torch.testing.assert_close(two.pop("losses"), torch.tensor(losses), atol=1e-5, rtol=1e-5)
    one = weights(loop.model)
    assert set(two) == set(one)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=0)
