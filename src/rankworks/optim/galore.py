"""GaLore: the optimizer runs on a projection of the gradient into a subspace that is found anew every so often.

    every `refresh` steps   P (m, r) or Q (n, r): the leading singular vectors of G     (core/optim/subspace.py: how)
    every step              R = P^T G  or  G Q;   N = direction of `rule` on R          (core/optim/projection.py: side)
                            W <- W - lr_t scale back(N)

    rule adamw      N = m / (sqrt(v) + eps), lr_t = lr sqrt(1 - b2^t) / (1 - b1^t), then W <- W - lr decay W: eps is not
                    corrected for the bias and decay comes after the step, as in the released code
    rule adamw8bit  the same with moments in 8 bits (core/optim/moments.py) and eps as torch has it, like the
                    released code with bitsandbytes; tensors that are not projected decay before the step
    rule adafactor  N a step of Adafactor (core/optim/adafactor.py), its root mean square limited in the subspace;
                    decay before the step

The moments are neither rotated nor reset when the subspace changes. What is projected are the weights that `targets`
names (every linear layer but the head, and no embedding), a matrix on one side or both, a tensor of more dimensions
along each (Tucker); everything else is trained by the same rule without a projection.

State of a projected W (m, n), L and S its longer and shorter side: r S numbers of the basis and 2 r L moments, L + r
with adafactor. The basis is a function of a past gradient, so it is saved. r is at most S. The side is decided by W's
shape; the released code looks at R's, which fails for reverse_std at r >= m.

What a step costs at least: two products of 2 m n r operations, G Q and N Q^T, the second added to W as it is made.
Torch's AdamW, one operation after the other, moves about twenty times W's bytes, its fused kernel seven. Measured on
two cores (benchmarks/optimizers.py): at 1024 x 1024 and r = 128 the two products alone take 1.20 of AdamW's step and a
step 1.40 of it, on all weights of SmolLM2-135M 0.79 and 1.04. A subspace found `warm` is worth six such products and
12 n r^2 for its basis. `products: fast` multiplies these in bfloat16 or TF32 (core/optim/products.py): 0.85 of AdamW's
step at 1024 x 1024, and 1.27 in the mean with a subspace found every ten steps, where full products take 2.02.
Source: arXiv:2403.03507, algorithms 1 and 2, and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from rankworks.core.draw import Draw
from rankworks.core.errors import ConfigError
from rankworks.core.fields import Positive, Setting
from rankworks.core.optim.adafactor import CLIP, DECAY, EPS, adafactor_numbers, adafactor_step
from rankworks.core.optim.method import Group
from rankworks.core.optim.moments import adam_bytes, adam_direction, adam_step
from rankworks.core.optim.products import multiplying
from rankworks.core.optim.projected import Projected
from rankworks.core.optim.projection import Basis, Modes, add_back, basis_numbers, projected_shape
from rankworks.core.optim.stepwise import Stepwise, count_step
from rankworks.core.optim.subspace import Subspace, find_basis, find_modes
from rankworks.core.registry import optimizer

Rule = Literal["adamw", "adamw8bit", "adafactor"]
SMALL = {"adamw": 1e-6, "adamw8bit": 1e-8, "adafactor": EPS}  # eps of each in the released code
OF_ADAFACTOR = ("clip_threshold", "decay_rate", "beta1")


@optimizer("galore", title="GaLore", year=2024, paper="arXiv:2403.03507")
class GaLore(Projected):
    """AdamW, 8-bit AdamW or Adafactor in a subspace of every gradient."""

    most_dimensions = 5  # of a convolution's kernel

    subspace: Subspace = Setting("warm", "how the subspace is found: from the one before, from probes, or exactly")
    rule: Rule = Setting("adamw", "the optimizer in the subspace")
    eps: float | Literal["released"] = Setting("released", "added to the root; released: 1e-6, 1e-8 or 1e-30 by rule")
    clip_threshold: float = Positive(CLIP, "adafactor: largest root mean square of a step before the rate")
    decay_rate: float = Setting(DECAY, "adafactor: the mean of squares forgets with 1 - t^decay_rate", lt=0)
    beta1: float = Setting(0.0, "adafactor: decay of the running mean of steps; 0 keeps none", ge=0, lt=1)
    seed: int = Setting(0, "of the random probes of the first subspace")

    @classmethod
    def agree(cls, spec: Any) -> None:
        """Settings of Adafactor are refused where another rule is used, and the other way round."""
        super().agree(spec)
        if spec.eps != "released" and not spec.eps > 0:
            raise ConfigError(f"eps guards a division and must be above zero (given: {spec.eps}).")
        fields = type(spec).model_fields
        others = OF_ADAFACTOR if spec.rule != "adafactor" else ("betas",)
        wrong = [name for name in others if getattr(spec, name) != fields[name].default]
        if wrong:
            owner = "adafactor" if spec.rule != "adafactor" else "adamw"
            raise ConfigError(f"{', '.join(wrong)} belong to rule={owner}, but galore's rule is {spec.rule}.")

    def build(self, groups: list[Group], lr: float) -> torch.optim.Optimizer:
        """The optimizer on its groups."""
        defaults = {name: getattr(self, name) for name in _SETTINGS}
        return GaLoreSteps(
            groups, lr=lr, **{**defaults, "eps": SMALL[self.rule] if self.eps == "released" else self.eps}
        )

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """The basis, and the rule's state of R; of other weights the rule's state."""
        shape, basis, size = tuple(parameter.shape), 0, parameter.element_size()
        if group["projected"]:
            basis = size * basis_numbers(shape, self.rank, self.side)
            shape = projected_shape(shape, self.rank, self.side)
        if self.rule == "adafactor":
            return basis + max(4, size) * adafactor_numbers(shape, self.beta1 > 0)
        return basis + adam_bytes(math.prod(shape), size, 8 if self.rule == "adamw8bit" else None)


_SETTINGS = [name for name in GaLore.Spec.model_fields if name not in ("optimizer", "targets")]


class GaLoreSteps(Stepwise):
    """The rule, on projected gradients in groups marked `projected`. State: step, P, Q or U0, U1, ..., the rule's."""

    def __init__(self, groups: Iterable[Group], **defaults: Any):
        super().__init__(groups, projected=False, **defaults)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """One step along the direction of the rule on R, taken back."""
        with multiplying(group.get("products", "full") if group["projected"] else "full", gradient.device):
            self._step(parameter, gradient, state, group)

    def _step(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        t = count_step(state)
        basis = self._basis(state, gradient, group, t)
        if group["rule"] == "adafactor":
            _adafactor(parameter, gradient, state, group, t, basis)
            return
        bits, released = (8, False) if group["rule"] == "adamw8bit" else (None, True)
        if basis is None:
            adam_step(
                parameter, gradient, state, t, group["betas"], group["eps"], group["lr"], group["weight_decay"],
                released=released, bits=bits,
            )  # fmt: skip
            return
        R = basis.into(gradient)
        N, factor = adam_direction(state, R, t, group["betas"], group["eps"], released=released, bits=bits)
        add_back(parameter, basis, N, -group["lr"] * factor * group["scale"])
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])

    def _basis(self, state: dict[str, Any], gradient: Tensor, group: Group, t: int) -> Basis | Modes | None:
        """The subspace of this step, found anew where it is time; None where nothing is projected."""
        if not group["projected"]:
            return None
        old = _read(state, gradient.dim())
        if (t - 1) % group["refresh"]:
            return old
        draw = Draw(group["seed"], f"{self.name}:subspace:{t}")
        if gradient.dim() > 2:
            modes = find_modes(gradient, group["rank"], group["subspace"], old, draw)  # type: ignore[arg-type]
            state |= {f"U{i}": part for i, part in enumerate(modes.factors) if part is not None}
            return modes
        found = find_basis(gradient, group["rank"], group["side"], group["subspace"], old, draw)  # type: ignore[arg-type]
        state |= {name: part for name, part in zip("PQ", found, strict=True) if part is not None}
        return found


def _read(state: dict[str, Any], dimensions: int) -> Basis | Modes | None:
    """The basis in the state, None where there is none yet; where every mode is left as it is there never is one."""
    if dimensions > 2:
        return Modes(tuple(state.get(f"U{i}") for i in range(dimensions)))
    return Basis(state.get("P"), state.get("Q")) if "P" in state or "Q" in state else None


def _adafactor(
    parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group, t: int, basis: Basis | Modes | None
) -> None:
    R = gradient if basis is None else basis.into(gradient)
    step = adafactor_step(
        state, R, t, group["lr"], eps=group["eps"], clip=group["clip_threshold"], decay=group["decay_rate"],
        beta1=group["beta1"] or None,
    )  # fmt: skip
    if group["weight_decay"]:
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
    if basis is None:
        parameter.sub_(step)
    else:
        add_back(parameter, basis, step, -group["scale"])
