"""What was tried on a model, remembered for as long as the model is made of the same parts.

Whether a model can be split at its head, or keeps packed documents apart, is found by running it on a few tokens. A few
tokens read every weight, so on a CPU a trial takes as long as a small evaluation, and a run asks before each of those.
An answer holds while the classes of the model's modules, its configuration, its type and its device are the same: an
adapter put on or taken off, or another attention, asks again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_ANSWERS: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], bool]] = WeakKeyDictionary()


def remembered(model: nn.Module, question: str, attempt: Callable[[], bool]) -> bool:
    """Return the answer of `attempt`, from memory where the model was asked the same before."""
    answers = _ANSWERS.setdefault(model, {})
    key = (question, *_made_of(model))
    if key not in answers:
        answers[key] = attempt()
    return answers[key]


def _made_of(model: nn.Module) -> tuple[Any, ...]:
    """What the answers depend on: the code that runs, and the numbers it runs in."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    weight = next(model.parameters(), None)
    return (
        tuple(type(module) for module in model.modules()),
        str(config.to_dict()) if hasattr(config, "to_dict") else None,
        getattr(text, "_attn_implementation", None),
        None if weight is None else (weight.dtype, weight.device),
    )
