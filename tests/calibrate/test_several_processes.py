"""Every process of a run starts from the same evidence, bit for bit: the first one's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rankworks as rw
from launching import launched
from tiny import tiny_llama, token_batch


@pytest.mark.slow
def test_all_get_what_the_first_measured(tmp_path: Path) -> None:
    launched(Path(__file__).parent / "two.py", tmp_path / "found")
    first, second = (load_file(tmp_path / f"found.{rank}") for rank in range(2))
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    ids = token_batch(batch=4, seed=0)
    alone = rw.calibrate(tiny_llama(), [{"input_ids": ids, "labels": ids}])
    for site, parts in alone.items():
        torch.testing.assert_close(first[f"{site}/gradient"], parts["gradient"], rtol=1e-4, atol=1e-7)
