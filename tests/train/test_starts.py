"""Every start that takes something from data or from the base, in the real loop: it learns, and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training import make_examples, make_loop

import rankworks as rw
from rankworks.calibrate import needed
from rankworks.train.checkpoint import trained_tensors
from rankworks.train.hooks import Hook
from tiny import tiny_llama

CASES: dict[str, dict[str, Any]] = {
    "lora-ga": {"delta": "lora", "init": "lora-ga", "scaling": "rslora"},
    "lora-ga random": {"delta": "dora", "init": {"init": "lora-ga", "direction": "random", "scale": "unit"}},
    "lora-sb": {"delta": "lora-xs", "init": {"init": "lora-sb", "eta": 1e-3}},
    "slora": {"delta": "nlora"},
    "nlora": {"delta": "nlora", "init": "nlora"},
    "nystrom": {"delta": "nlora", "init": {"init": "nlora", "form": "nystrom"}},
    "inttune": {"delta": "inttune", "init": "nlora"},
    "loftq": {"delta": "lora", "init": "loftq"},
    "qpissa": {"delta": "lora", "init": {"init": "pissa", "quantised": True}},
}


def started(case: str) -> nn.Module:
    """A tiny Llama with this start, from the gradient of the loop's own examples or from its quantised base."""
    spec = rw.AdaptSpec.from_flat({"rank": 4, "seed": 1, **CASES[case]})
    model, evidence = tiny_llama(), None
    if case in ("loftq", "qpissa"):
        evidence = rw.quantise(model, bits=3, rank=4, init="loftq" if case == "loftq" else "pissa")
    elif needed(model, spec):
        data = []
        for example in make_examples(8):
            data.append({"input_ids": torch.tensor([example.input_ids]), "labels": torch.tensor([example.labels])})
        evidence = rw.calibrate(model, data, spec, progress=False)
    return rw.adapt(model, spec, evidence=evidence)


class StopError(Exception):
    """What ends a run in the middle."""


class Stop(Hook):
    """Ends the run after a step."""

    def __init__(self, step: int = 0):
        self.step = step

    def after_step(self, moment: Any) -> None:
        if moment.step == self.step:
            raise StopError


@pytest.mark.parametrize("case", CASES)
def test_it_learns_and_resumes_bit_for_bit(case: str, tmp_path: Path) -> None:
    settings = {"steps": 9, "lr": 2e-2, "save_every": 3}
    whole = make_loop(started(case), tmp_path / "whole", hooks=[Stop()], **settings)
    losses = whole.run().losses
    assert sum(losses[-3:]) < sum(losses[:3])
    with pytest.raises(StopError):
        make_loop(started(case), tmp_path / "cut", hooks=[Stop(5)], **settings).run()
    again = make_loop(started(case), tmp_path / "cut", hooks=[Stop()], **settings)
    assert again.restore()
    assert again.step == 3
    assert again.run().losses == losses
    wanted = trained_tensors(whole.model)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in trained_tensors(again.model).items())
