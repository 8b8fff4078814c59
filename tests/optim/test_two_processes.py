"""Two processes end with the weights of one at the same global batch, whatever an optimizer draws or decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_processes import JOBS, numbers

from launching import launched


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what came of all jobs in two processes."""
    folder = tmp_path_factory.mktemp("two")
    launched(Path(__file__).parent / "two_processes.py", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_two_processes_end_where_one_does(name: str, finished: Path) -> None:
    job, two = JOBS[name], load_file(finished / f"{name}.safetensors")
    assert two.pop("world").item() == 2
    assert two.pop("apart").item() == 0, "both processes hold the same weights to the bit"
    loop = job.loop()
    losses = loop.run().losses
    torch.testing.assert_close(two.pop("losses"), torch.tensor(losses), atol=1e-5, rtol=1e-5)
    one = numbers(loop)
    assert set(two) == set(one)
    for key, tensor in one.items():
        apart = (two[key] - tensor).abs() > job.near
        assert apart.float().mean() <= job.loose, key
