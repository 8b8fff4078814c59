"""Parameters that rest: they are to be trained, and for now require no gradient.

The mark stays on the parameter, so that one which a run left resting when it was cut short is found by the next.
"""

from __future__ import annotations

from torch import nn

MARK = "rests_for_now"


def rest(parameter: nn.Parameter) -> None:
    """Let a parameter require no gradient until it is woken, and free the one it has."""
    setattr(parameter, MARK, True)
    parameter.requires_grad_(False)
    parameter.grad = None


def wake(parameter: nn.Parameter) -> None:
    """Let a parameter that rests require a gradient again; others stay as they are."""
    if getattr(parameter, MARK, False):
        delattr(parameter, MARK)
        parameter.requires_grad_(True)


def wake_all(model: nn.Module) -> None:
    """Wake every parameter of a model that rests."""
    for parameter in model.parameters():
        wake(parameter)
