"""LayRA: adapt the first and the last layers, where a multilingual model maps from and to the surface language.

    adapted = {0 .. first-1} and {L-last .. L-1} of L layers; the middle, where it reasons, stays frozen

Made for adding languages without losing others, by continued pretraining with LoRA of rank 8, alpha 16 in all linear
layers (learning rate 3e-4, linear decay, about 1.2B tokens per language). Afterwards instruction following may be
brought back without instruction data, W = W_adapted + lambda (W_instruct - W_base), lambda chosen per task:
`model_arithmetic`. Source: arXiv:2509.11414.

Choices of ours: the paper's counts, 10 first and 2 last of 28 and of 32 layers, are kept from 24 layers on, and scaled
to the depth below, round(10 L / 32) and max(1, round(2 L / 32)). Which of the layers' weights are adapted is the
adapter's `targets`, all linear ones unless it says otherwise. The stacks of an encoder-decoder are counted separately,
each by its own depth, and may be given counts of their own: first={"encoder": 4, "decoder": 2}. What lies in no layer
(embeddings, heads) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rankworks.core.errors import ConfigError, did_you_mean
from rankworks.core.fields import Setting
from rankworks.core.registry import selection
from rankworks.core.select import Selection, layer_of
from rankworks.core.site import Site

Count = Annotated[int, Field(ge=0)]
DEEP = 24
"""From so many layers on, the paper's counts are used as they are."""


@selection("layra", title="LayRA", year=2025, paper="arXiv:2509.11414")
class LayRA(Selection):
    """The first and the last layers of every stack."""

    first: Count | dict[str, Count] | None = Setting(
        None, "layers from the input, also by stack; None: 10, less in a model of under 24 layers"
    )
    last: Count | dict[str, Count] | None = Setting(
        None, "layers at the output, also by stack; None: 2, less in a model of under 24 layers"
    )

    def choose(self, sites: Sequence[Site], stacks: Mapping[str, int]) -> list[str]:
        """Return the sites of the outer layers."""
        placed = [(site.name, layer) for site in sites if (layer := layer_of(site.name)) is not None]
        if not placed:
            raise ConfigError("layra chooses layers by their numbers, and none of the targeted sites lies in a layer.")
        kept = {stack: self._layers(stack, stacks) for stack in {layer.stack for _, layer in placed}}
        return [name for name, layer in placed if layer.number in kept[layer.stack]]

    def _layers(self, stack: str, stacks: Mapping[str, int]) -> set[int]:
        """Return the numbers of the layers to adapt in one stack."""
        depth = stacks[stack]
        first, last = default_counts(depth)
        first, last = _given(self.first, stack, stacks, first), _given(self.last, stack, stacks, last)
        return {i for i in range(depth) if i < first or i >= depth - last}


def default_counts(depth: int) -> tuple[int, int]:
    """Return how many of the first and of the last layers are adapted, of `depth`."""
    return (10, 2) if depth >= DEEP else (round(10 * depth / 32), max(1, round(2 * depth / 32)))


def _given(count: int | dict[str, int] | None, stack: str, stacks: Mapping[str, int], default: int) -> int:
    """Return the count for a stack; one given by stack is named by any word of the stack's name, or all of it."""
    if not isinstance(count, dict):
        return default if count is None else count
    names = {word: name for name in stacks for word in [*name.split("."), name]}
    unknown = [name for name in count if name not in names]
    if unknown:
        raise ConfigError(
            f"layra: no stack of layers is called {unknown[0]!r}.{did_you_mean(unknown[0], names)} This model has "
            f"{', '.join(stacks)}."
        )
    return next((n for name, n in count.items() if name == stack or name in stack.split(".")), default)


@torch.no_grad()
def model_arithmetic(
    adapted: Mapping[str, Tensor], base: Mapping[str, Tensor], instruct: Mapping[str, Tensor], strength: float
) -> dict[str, Tensor]:
    """Return W_adapted + strength (W_instruct - W_base) by name: linear in `strength`, and W_adapted itself at 0.

    adapted: a merged model's state (`rankworks.export(..., kind="merged")`); base and instruct: the states of the model
    it was adapted from and of that model's instruction-tuned sibling. Sums are made in at least float32 and cast once;
    what does not hold floating numbers is taken from `adapted`. Raises `ConfigError` where names or shapes differ.
    """
    for title, other in (("base", base), ("instruct", instruct)):
        odd = sorted(set(adapted) ^ set(other)) or [n for n in adapted if adapted[n].shape != other[n].shape]
        if odd:
            raise ConfigError(
                f"the adapted and the {title} model do not have the same tensors ({', '.join(odd[:5])} differ): merge "
                "the adapter first, and take two models of the same architecture and vocabulary."
            )
    return {
        name: _moved(tensor, base[name], instruct[name], strength) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in adapted.items()
    }


def _moved(adapted: Tensor, base: Tensor, instruct: Tensor, strength: float) -> Tensor:
    wide = torch.promote_types(adapted.dtype, torch.float32)
    change = instruct.to(adapted.device, wide) - base.to(adapted.device, wide)
    return (adapted.to(wide) + strength * change).to(adapted.dtype)
