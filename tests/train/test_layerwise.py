"""Layer-wise updates: the weights of the ordinary order, with about one gradient at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from training import adapted, make_loop, weights

import rankworks as rw
from rankworks.core.errors import ConfigError, DivergedError
from rankworks.core.hooks import Hook, Moment
from rankworks.core.optim.method import OptimizerMethod, grouped
from rankworks.core.optim.stepwise import Stepwise
from rankworks.train.layerwise import Layerwise
from rankworks.train.loop import Loop
from tiny import tiny_llama


def whole_model() -> torch.nn.Module:
    return tiny_llama().requires_grad_(True)


@pytest.mark.parametrize("name", ["adamw", "galore", "lora-plus"])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_weights_are_those_of_the_ordinary_order(name: str, clip: float | None, accumulate: int) -> None:
    """With clipping the norm of the gradient is the same whole norm, and earlier micro-batches only gather.

    GaLore in few dimensions: along directions in which the gradient is all rounding Adam would step as far as anywhere.
    """
    options = {"rank": 4} if name == "galore" else {}
    made = []
    for layerwise in (False, True):
        model = adapted(dropout=0.1) if name == "lora-plus" else whole_model()
        settings = {"steps": 4, "clip": clip, "accumulate": accumulate, "batch_size": 8 // accumulate}
        loop = make_loop(model, name=name, layerwise=layerwise, lr=1e-3, options=options, **settings)
        loop.run()
        made.append((weights(loop.model), loop.history.losses))
    assert made[0][1] == pytest.approx(made[1][1], rel=1e-5)
    for key, tensor in made[0][0].items():
        torch.testing.assert_close(made[1][0][key], tensor, atol=2e-6, rtol=1e-4)


@contextmanager
def gradients_alive(loop: Loop) -> Iterator[list[int]]:
    """Note, whenever a gradient is complete, how many numbers of gradients there are."""
    parameters = [p for p in loop.model.parameters() if p.requires_grad]
    seen: list[int] = []

    def note(_: Tensor) -> None:
        seen.append(sum(p.numel() for p in parameters if p.grad is not None))

    handles = [p.register_post_accumulate_grad_hook(note) for p in parameters]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_no_more_than_one_gradient_exists_at_a_time(clip: float | None) -> None:
    loop = make_loop(whole_model(), layerwise=True, steps=2, clip=clip)
    largest = max(p.numel() for p in loop.model.parameters())
    with gradients_alive(loop) as seen:  # called after the step of each parameter, which frees it
        loop.run()
    assert len(seen) >= 2 * len(list(loop.model.parameters()))
    assert max(seen) <= largest
    ordinary = make_loop(whole_model(), steps=1, clip=clip)
    with gradients_alive(ordinary) as seen:
        ordinary.run()
    assert max(seen) == sum(p.numel() for p in ordinary.model.parameters())


def test_the_norm_that_is_logged_is_the_whole_gradients(tmp_path) -> None:
    from rankworks.train.loop import read_metrics

    norms = []
    for layerwise in (False, True):
        folder = tmp_path / str(layerwise)
        make_loop(whole_model(), layerwise=layerwise, steps=2, clip=None, folder=folder).run()
        norms.append([line["grad_norm"] for line in read_metrics(folder / "metrics.jsonl")])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = whole_model()
    loop = make_loop(model, layerwise=True, steps=2, clip=None)
    name, parameter = next((n, p) for n, p in model.named_parameters() if "layers.0.mlp.down_proj" in n)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    parameter.register_hook(lambda g: g * float("nan"))
    with pytest.raises(DivergedError, match=name):
        loop.run()
    assert torch.equal(parameter.detach(), before[name])


class Gathers(Hook):
    """Looks at the gradients."""

    def after_backward(self, moment: Moment) -> None:
        """Nothing."""


def test_what_needs_all_gradients_is_refused() -> None:
    with pytest.raises(ConfigError, match="layerwise=false"):
        make_loop(whole_model(), layerwise=True, hooks=[Gathers()])
    optimizer = rw.make_optimizer(whole_model(), "adamw")
    assert optimizer.layerwise == OptimizerMethod.layerwise
    optimizer.layerwise = False
    with pytest.raises(ConfigError, match="together"):
        Layerwise(optimizer, "adamw", [], 1)


class NotesNames(Stepwise):
    """Writes down which parameter it is told that it updates."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> None:
        """Note the name and the rate."""
        self.seen.append((self.name, parameter, group["lr"]))  # type: ignore[attr-defined]


def test_each_parameter_steps_under_its_own_name_and_the_rate_of_now() -> None:
    """Also after the optimizer took up a state, for which torch makes new groups."""
    model = whole_model()
    optimizer = NotesNames(grouped(model, 1e-2))
    optimizer.seen = []  # type: ignore[attr-defined]
    layerwise = Layerwise(optimizer, "notes", [], 1)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    with layerwise.doing("step"):
        model(input_ids=torch.arange(8).view(1, 8)).logits.sum().backward()
    found = {name: (id(parameter), rate) for name, parameter, rate in optimizer.seen}  # type: ignore[attr-defined]
    assert found == {name: (id(p), 0.5) for name, p in model.named_parameters()}
