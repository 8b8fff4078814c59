"""LoRA: a trained low-rank change beside the frozen weight.

    y = W x + b + s (B A drop(x) + c)      A (r, in),  B (out, r),  s = alpha/r,  or alpha/sqrt(r) with scaling="rslora"

B starts at zero, so the model starts as its base; r (in + out) numbers per site. With G = dL/dW',
dL/dA = s B^T G and dL/dB = s G A^T: at first only B moves. rsLoRA's scale keeps the size of the
change independent of r; with r = 1, or alpha' = alpha sqrt(r), the two are the same.

c (out,), zero at the start, is there with `bias=True` (PEFT's lora_bias) and moves the layer's bias by s c: merging
needs a layer that has one, and kinds that never do (embeddings, stacked experts) are refused. Where the layer has a
bias, training c is training that bias, which other tools call bias="lora_only".
Source: arXiv:2106.09685, section 4.1; rsLoRA: arXiv:2312.03732, theorem 3.2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rankworks.core.fields import Setting
from rankworks.core.forms.lowrank import LowRank
from rankworks.core.registry import delta
from rankworks.core.site import Shape


@delta("lora", title="LoRA", year=2021, paper="arXiv:2106.09685")
class LoRA(LowRank):
    """W' = W + s B A; the product stands in `LowRank`, since half the field builds on it."""

    bias: bool = Setting(False, "also train a bias c, scaled like the product")

    c: nn.Parameter | None

    def setup(self, weight: Tensor) -> None:
        """A and B, and c where it is wanted."""
        super().setup(weight)
        self.c = self.trainable(self.shape.out) if self.bias else None

    def shift(self) -> Tensor | None:
        """s c (out,)."""
        return None if self.c is None else self.scale * self.c

    @classmethod
    def changes_bias(cls, spec: Any) -> bool:
        """With `bias`."""
        return spec.bias

    @classmethod
    def portable(cls, spec: Any) -> bool:
        """It knows nothing of its weight."""
        return True

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """rank (in + out), and out with `bias`."""
        return super().count(spec, shape) + spec.bias * shape.out
