"""Flexora: learn on held-out data how much every layer's change should count, and adapt the layers that count.

    W'_l = W_l + w_l dW_l        w = L softmax(a),  a (L,) = 0 at first: every w_l = 1, and their sum stays L

The search alternates steps of the changes on training data with a step of a on held-out data (`rankworks train`, block
`search:`); then layers with a_l > 0 are kept (the best one where none is), or the `top_k` best, and trained afresh:
nothing of a remains. With g_l = <dL/dW'_l, dW_l>, dL/da_l = w_l (g_l - sum_m w_m g_m / L), which sums to zero over l.

`order="first"` takes that gradient at the changes as they are, after every step of theirs, as the released code does.
"unrolled" takes the gradient of L_val(theta_K(a), a) through K = `unroll` steps theta_{k+1} = theta_k - lr dL_train/d
theta_k: the paper's bilevel problem at a depth it does not print; K = 1 unless told otherwise, K = 0 is "first".

Of the released code's peculiarities none is copied: there the weight acts on every module whose name contains "lora",
so that the change is multiplied by w^3, and the optimizer's moments are forgotten at every step. Here the change is
multiplied once, whatever delta makes it, and the optimizer is an ordinary one. What lies in no layer is left out.
Source: arXiv:2408.10774.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rankworks.core.errors import ConfigError
from rankworks.core.fields import Setting
from rankworks.core.registry import selection
from rankworks.core.select import Searching, layer_of
from rankworks.core.site import Site


@selection("flexora", title="Flexora", year=2024, paper="arXiv:2408.10774")
class Flexora(Searching):
    """A softmax weight per layer."""

    top_k: int | None = Setting(None, "keep so many layers, the best; None: all with a score above zero", ge=1)

    def unit(self, site: Site) -> str | None:
        """The site's layer."""
        layer = layer_of(site.name)
        return None if layer is None else layer.name

    def weights(self, scores: Tensor) -> Tensor:
        """L softmax(a), (L,)."""
        return len(scores) * scores.softmax(0)

    def decide(self, scores: Mapping[str, float]) -> list[str]:
        """The layers above zero, or the best ones."""
        if self.top_k is not None and self.top_k > len(scores):
            raise ConfigError(f"flexora: top_k is {self.top_k}, but the targets lie in {len(scores)} layers: lower it.")
        ranked = sorted(scores, key=lambda layer: -scores[layer])  # stable: of equal ones the earlier
        above = sum(score > 0 for score in scores.values())
        kept = set(ranked[: self.top_k or max(1, above)])
        return [layer for layer in scores if layer in kept]
