"""Runs of the own loop on a tiny language model, and what every schedule must survive: being cut off and taken up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rankworks as rw
from launching import launched
from rankworks.core.hooks import Hook, Moment
from rankworks.core.ranks.surgery import site_settings
from rankworks.train.checkpoint import trained_tensors
from rankworks.train.config import OptimConfig, TrainConfig
from rankworks.train.loop import Loop
from tiny import tiny_llama
from train.training import make_examples


def tiny_run(
    folder: Path | None = None,
    delta: str = "lora",
    *,
    steps: int = 12,
    train: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    hooks: tuple[Hook, ...] = (),
    examples: int = 24,
    **settings: Any,
) -> Loop:
    """A loop of a few steps on a fresh tiny Llama (float32) with an adapter."""
    model = rw.adapt(tiny_llama(), delta, **{"targets": ["q_proj", "v_proj", "up_proj"], "seed": 1, **settings})
    return Loop(
        model,
        make_examples(examples),
        TrainConfig(**{"steps": steps, "batch_size": 8, **(train or {})}),
        OptimConfig(**{"lr": 1e-2, **(optim or {})}),
        hooks=hooks,
        folder=folder,
        progress=False,
    )


class StopError(Exception):
    """What ends a run in the middle."""


class Stop(Hook):
    """Ends the run after a step, if one is given."""

    def __init__(self, step: int = 0):
        self.step = step

    def after_step(self, moment: Moment) -> None:
        if moment.step == self.step:
            raise StopError


def resumes_exactly(folder: Path, make: Callable[..., Loop], stops: tuple[int, ...], every: int = 2) -> nn.Module:
    """Assert that a run cut after each of `stops` goes on bit for bit: losses, numbers, settings; returns the model.

    `make(folder, hooks=..., train=...)` makes a fresh loop.
    """
    saving = {"save_every": every}
    whole = make(folder / "whole", hooks=(Stop(),), train=saving)
    losses = whole.run().losses
    wanted = trained_tensors(whole.model)
    for stop in stops:
        with pytest.raises(StopError):
            make(folder / f"cut{stop}", hooks=(Stop(stop),), train=saving).run()
        torch.manual_seed(1000 + stop)
        again = make(folder / f"cut{stop}", hooks=(Stop(),), train=saving)
        assert again.restore()
        assert again.step == (stop - 1) // every * every
        assert again.run().losses == losses
        same(trained_tensors(again.model), wanted)
        assert site_settings(again.model) == site_settings(whole.model)
    return whole.model


def same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Assert that two sets of tensors are equal bit for bit."""
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


def trained_by(processes: int, schedule: str, folder: Path, delta: str = "lora") -> dict[str, Tensor]:
    """Train in so many processes, by torchrun; what they trained."""
    path = folder / f"{processes}.safetensors"
    launched(Path(__file__).parent / "distributed_ranks.py", path, schedule, delta, processes=processes)
    return load_file(path)


def falls(losses: list[float]) -> bool:
    """Whether the last third of the losses is below the first."""
    third = max(1, len(losses) // 3)
    return sum(losses[-third:]) < sum(losses[:third])
