"""Runs of optimizers through the training loop: whether the loss falls, and whether a run goes on bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from training import make_loop, weights  # type: ignore[import-not-found]

from rankworks.core.hooks import Hook, Moment
from rankworks.train.checkpoint import trained_tensors
from rankworks.train.loop import Loop
from tiny import tiny_llama


class StopError(Exception):
    """What ends a run in the middle."""


class Stops(Hook):
    """Ends the run before the optimizer's step `at`."""

    def __init__(self, at: int):
        self.at = at

    def before_forward(self, moment: Moment) -> None:
        """Stop."""
        if moment.step == self.at:
            raise StopError


def whole_loop(
    name: str, options: dict[str, Any], folder: Path | None = None, dtype: torch.dtype = torch.float32, **settings: Any
) -> Loop:
    """A loop that trains a whole tiny model."""
    model: Any = tiny_llama()
    model = model.to(dtype).requires_grad_(True)
    return make_loop(model, folder, name=name, options=options, **settings)


def check_falls(name: str, options: dict[str, Any], lr: float = 1e-2, **settings: Any) -> Loop:
    """Eight steps of the loop on the same examples again and again lower the loss."""
    loop = whole_loop(name, options, lr=lr, steps=9, batch_size=24, **settings)
    losses = loop.run().losses
    assert losses[-1] < losses[0] - 0.1, losses
    return loop


def check_resumes(folder: Path, name: str, options: dict[str, Any], stop: int = 6, **settings: Any) -> None:
    """Left before step `stop` and taken up from the checkpoint before it, a run of eight ends bit for bit the same."""
    settings = {"steps": 8, "save_every": 2, "lr": 1e-2, **settings}
    wanted = whole_loop(name, options, folder / "whole", hooks=[Stops(0)], **settings)
    losses = wanted.run().losses
    try:
        whole_loop(name, options, folder / "cut", hooks=[Stops(stop)], **settings).run()
        raise AssertionError("the run was not cut")
    except StopError:
        pass
    second = whole_loop(name, options, folder / "cut", hooks=[Stops(0)], **settings)
    torch.manual_seed(99)
    assert second.restore()
    assert second.step == (stop - 1) // 2 * 2
    assert second.run().losses == losses
    resumed = trained_tensors(second.model)
    for key, tensor in trained_tensors(wanted.model).items():
        assert torch.equal(resumed[key], tensor), key


def check_is_plain_lora(name: str, options: dict[str, Any]) -> None:
    """With these options a method's steps on an adapter are AdamW's, bit for bit."""
    runs = [make_loop(steps=4, name=name, options=options), make_loop(steps=4)]
    for run in runs:
        run.run()
    for key, tensor in weights(runs[0].model).items():
        assert torch.equal(tensor, weights(runs[1].model)[key]), key


def check_perturbs(folder: Path, name: str, options: dict[str, Any]) -> None:
    """A method that trains at perturbed weights learns, leaves the base, resumes bit for bit; its first step is plain.

    There is no gradient or momentum yet that the first perturbation could be sized by.
    """
    settings: dict[str, Any] = {"name": name, "steps": 8, "accumulate": 2, "options": options}
    whole = make_loop(**settings)
    base = {n: p.clone() for n, p in whole.model.named_parameters() if not p.requires_grad}
    losses = whole.run().losses
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(torch.equal(p, base[n]) for n, p in whole.model.named_parameters() if n in base)
    plain = make_loop(steps=8, accumulate=2).run().losses
    assert losses[0] == plain[0]
    assert losses[1] != plain[1]
    make_loop(**settings, save_every=3, folder=folder).run()
    later = make_loop(**settings, save_every=3, folder=folder)
    assert later.restore()
    later.run()
    for key, tensor in weights(whole.model).items():
        assert torch.equal(weights(later.model)[key], tensor), key
