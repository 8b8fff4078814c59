"""A model that cannot run without values gets a note in place of an estimate; a fault of the change is raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.delta import Delta
from rankworks.core.errors import ConfigError
from rankworks.core.fields import Rank
from rankworks.core.inputs import Input, linear
from rankworks.core.registry import register, unregister
from tiny import tiny_llama

ROWS = torch.empty(4, 6)


class Odd(nn.Module):
    """A layer and something that the meta device may not know: (rows, 6) -> (rows, 6)."""

    def __init__(self, does: Callable[[Tensor], Any]):
        super().__init__()
        self.first, self.does = nn.Linear(6, 6), does

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.does(y)
        return y


def wrong_input(y: Tensor) -> None:
    raise ValueError("give labels too")


UNKNOWN: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "an operation without a meta kernel": (lambda y: torch.nonzero(y > 0), "NotImplementedError"),
    "numbers that are not there": (lambda y: y.detach().to("cpu"), "NotImplementedError"),
    "an array": (lambda y: y.detach().numpy(), "TypeError"),
    "shapes that follow from values": (lambda y: y.split([int(y[0, 0].item()), 2]), "RuntimeError"),
    "a check of its own": (wrong_input, "ValueError"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_the_model_cannot_is_a_note(case: str) -> None:
    does, error = UNKNOWN[case]
    told = rw.plan(Odd(does), "lora", rank=2, targets="first", example=ROWS, fits="1MB")
    assert told.notes[0].startswith(f"no activation estimate: the model does not run without values ({error}: ")
    assert told.notes[1:] == ["whether it fits is not said, since the step could not be traced"]
    assert told.fit is None
    assert told.activation_bytes == 0
    assert told.trainable_parameters == 2 * 12


def test_a_model_that_can_be_traced_has_no_note() -> None:
    told = rw.plan(Odd(lambda y: None), "lora", rank=2, targets="first", example=ROWS, fits="1MB")
    assert told.notes == []
    assert told.fit is not None
    assert told.activation_bytes > 0


def test_a_model_that_takes_one_batch_size_alone_is_not_said_to_fit() -> None:
    told = rw.plan(Odd(lambda y: y.view(4, 6)), "lora", rank=2, targets="first", example=ROWS, fits="1MB", batch_size=4)
    assert told.activation_bytes > 0
    assert told.fit is None
    (note,) = told.notes
    assert "with other batch sizes: the model does not run without values (RuntimeError: shape '[4, 6]'" in note


def test_a_model_that_does_not_say_what_it_takes_is_asked_for_an_example() -> None:
    told = rw.plan(Odd(lambda y: None), "lora", rank=2, targets="first")
    assert told.notes == ["no activation estimate: the model does not say what it takes; give example="]


def test_what_the_user_set_wrongly_is_raised_as_ever() -> None:
    with pytest.raises(ConfigError, match="no gradient checkpointing"):
        rw.plan(Odd(lambda y: None), "lora", rank=2, targets="first", example=ROWS, gradient_checkpointing=True)


# ---- faults of a change ----


@contextmanager
def faulty(fault: Callable[[Tensor], Any]) -> Iterator[None]:
    """A registered delta whose branch has this fault."""

    class Faulty(Delta):
        """B A x, after something that goes wrong."""

        rank: int = Rank(2)

        def setup(self, weight: Tensor) -> None:
            self.A = self.trainable(self.rank, self.shape.in_)
            self.B = self.trainable(self.shape.out, self.rank)

        def branch(self, x: Input) -> Tensor:
            h = linear(x, self.A)
            fault(h)
            return linear(h, self.B)

        @classmethod
        def count(cls, spec: Any, shape: Any) -> int:
            return spec.rank * (shape.in_ + shape.out)

    register("delta", "faulty", title="Faulty", year=2026, paper="none")(Faulty)
    try:
        yield
    finally:
        unregister("delta", "faulty")


FAULTS: dict[str, tuple[Callable[[Tensor], Any], type[Exception]]] = {
    "shapes": (lambda h: h @ h, RuntimeError),
    "values": (lambda h: torch.nonzero(h > 0), NotImplementedError),
    "arguments": (lambda h: torch.relu(h, 3), TypeError),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.parametrize("build", [tiny_llama, lambda: Odd(lambda y: None)])
def test_a_fault_of_the_change_is_raised(build: Any, case: str) -> None:
    fault, error = FAULTS[case]
    model = build()
    targets, example = ("q_proj", None) if hasattr(model, "config") else ("first", ROWS)
    with faulty(lambda h: None):
        assert rw.plan(model, "faulty", targets=targets, example=example, sequence=8).notes == []
    with faulty(fault), pytest.raises(error):
        rw.plan(model, "faulty", targets=targets, example=example, sequence=8)


def test_where_the_model_cannot_either_it_is_the_models_note() -> None:
    """The base is asked first: nothing is known of a change on a model that does not run."""
    with faulty(lambda h: h @ h):
        told = rw.plan(Odd(UNKNOWN["an array"][0]), "faulty", targets="first", example=ROWS)
    assert "(TypeError: " in told.notes[0]
