"""LIFT: train the weight's entries that its own low-rank part makes large, and choose them anew now and then.

    W' = W + S        S (out, in) zero but for k = min(rank (in + out), in out) entries of value v (k,), trained,
                      at the k largest of |W_q|,  W_q = U_q S_q V_q^T the rank-`filter_rank` part of the present W'

Every `every` steps W_q is taken again and the k places with it. Entries that were trained and are no longer chosen stay
as they became (`past`, over the union of all choices); one that is chosen again goes on from there. The optimizer's
moments move along: kept where the choices overlap, zero for new entries; its step count runs on. As in the released
code a choice for step t + 1 is made at the end of step t when t + 1 is a multiple of `every`; the last step makes none.

- The released configurations name a mask that selects the SMALLEST entries, by a flag string that lacks the word
  "largest"; the paper says, and its figure shows, the largest. `order="smallest"` reproduces the released numbers.
- The released Adam adds epsilon to sqrt(v) before the bias correction; torch's adds it after. The two differ by
  epsilon's size alone. Its decay shrinks W's entries; a decay of v here shrinks their change (the default is none).
- `filter="random"` is a randomised SVD with 2 q test vectors, as the released "rand" masks.

Source: arXiv:2506.00772, section 3. No data are needed, and with filter_rank >= min(in, out) it is magnitude selection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from rankworks.core.delta import Delta, Entries
from rankworks.core.fields import Rank, Setting
from rankworks.core.forms.sparse import SparseDelta
from rankworks.core.hooks import Hook, Moment
from rankworks.core.merge import original
from rankworks.core.progress import track
from rankworks.core.registry import delta
from rankworks.core.site import Shape
from rankworks.core.state import state_of
from rankworks.linalg.select import top_entries
from rankworks.linalg.svd import randomised_svd, truncated_svd

PAST = ("past_index", "past_values")


def _count(spec: Any, shape: Shape) -> int:
    """k, the number of trained entries."""
    return min(spec.rank * (shape.in_ + shape.out), shape.in_ * shape.out)


@delta("lift", title="LIFT", year=2025, paper="arXiv:2506.00772")
class LIFT(SparseDelta):
    """Trained values at places that follow the weight."""

    rank: int = Rank(128, "k = rank (in + out) entries, as many as LoRA of this rank trains, at most all")
    filter_rank: int = Setting(128, "rank q of the part of the weight whose largest entries are trained", ge=1)
    every: int = Setting(400, "steps between choices; 0 keeps the first", ge=0)
    order: Literal["largest", "smallest"] = Setting(
        "largest", "which entries of the low-rank part: largest, or smallest as released"
    )
    filter: Literal["exact", "random"] = Setting("exact", "SVD of the low-rank part: exact, or random with 2 q vectors")

    past_index: Tensor | None
    past_values: Tensor | None

    def setup(self, weight: Tensor) -> None:
        """Choose the entries by the base weight and start their values at zero."""
        self.place(weight, self.choose(weight))
        for name in PAST:
            self.register_buffer(name, None)

    @torch.no_grad()
    def choose(self, weight: Tensor) -> Tensor:
        """Return the k chosen row-major numbers, ascending, for a weight (out, in)."""
        q = min(self.filter_rank, *self.shape)
        if weight.is_meta:
            scores = weight
        elif q == min(self.shape):
            scores = weight.abs()  # the weight is its own rank-q part
        else:
            u, s, vh = truncated_svd(weight, q) if self.filter == "exact" else randomised_svd(weight, q, 2, q)
            scores = ((u * s) @ vh).abs()  # (out, in)
        return top_entries(scores if self.order == "largest" else -scores, _count(self, self.shape))

    def placed(self) -> Entries:
        """The entries of the present choice, and those of earlier ones."""
        if self.past_index is None or self.past_values is None:
            return Entries(self.index, self.values)
        return Entries(torch.cat([self.index, self.past_index]), torch.cat([self.values, self.past_values]))

    @torch.no_grad()
    def move_to(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Train the entries `chosen` (k,) from now on; every entry keeps its change.

        Returns (k,) each: where in the earlier choice an entry stood, and whether it stood there.
        """
        chosen = chosen.to(self.index.dtype)
        places, changes = (t.detach() for t in self.placed())
        places, order = places.sort()
        changes = changes[order]  # a copy
        at, known = _find(places, chosen)
        left = torch.ones_like(places, dtype=torch.bool)
        left[at[known]] = False
        left &= changes != 0  # an entry that never moved is nothing to remember
        earlier = _find(self.index, chosen)
        self.values.copy_(torch.where(known, changes[at], 0))
        self.index.copy_(chosen)
        self.past_index, self.past_values = places[left], changes[left]
        return earlier

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Allocate the entries of earlier choices, as many as the file holds."""
        if set(PAST) <= set(shapes):
            self.past_index = self.index.new_zeros(shapes["past_index"])
            self.past_values = self.values.detach().new_zeros(shapes["past_values"])

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        held = {name: state_dict[prefix + name] for name in PAST if prefix + name in state_dict}
        self.make_room({name: tuple(tensor.shape) for name, tensor in held.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def training_hook(cls, spec: Any, deltas: Mapping[str, Delta]) -> Hook | None:
        """The refresh of the choices."""
        return Refresh({name: d for name, d in deltas.items() if isinstance(d, LIFT)})

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """k."""
        return _count(spec, shape)


def _find(numbers: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return where in the ascending `numbers` each of `wanted` stands, and whether it does."""
    at = torch.searchsorted(numbers, wanted).clamp_max(len(numbers) - 1)
    return at, numbers[at] == wanted


class Refresh(Hook):
    """Chooses the entries of all sites anew when it is time."""

    def __init__(self, deltas: Mapping[str, LIFT]):
        self.deltas = deltas

    def after_step(self, moment: Moment) -> None:
        """Choose by the weights as they are now, and take the optimizer's moments along."""
        if moment.step >= moment.steps:
            return
        due = [name for name, d in self.deltas.items() if d.every and (moment.step + 1) % d.every == 0]
        sites = _sites(moment) if due else {}
        for name in track(due, "LIFT: choosing entries"):
            delta = self.deltas[name]
            weight = sites[name].weight
            with torch.no_grad():
                present = weight + delta.dense(weight).to(torch.promote_types(weight.dtype, torch.float32))
            earlier = delta.move_to(delta.choose(present))
            rearrange(moment.optimizer.state.get(delta.values, {}), delta.values, earlier)

    def state_dict(self) -> dict[str, Any]:
        """How many entries of earlier choices there are, by site: the tensors themselves stand with the adapter."""
        return {name: len(d.past_index) for name, d in self.deltas.items() if d.past_index is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make room for them, before they are read."""
        for name, size in state.items():
            self.deltas[name].make_room(dict.fromkeys(PAST, (size,)))


@torch.no_grad()
def rearrange(state: Mapping[str, Any], values: Tensor, earlier: tuple[Tensor, Tensor]) -> None:
    """Move an optimizer's moments to the new entries, in place: kept where they were trained before, else zero.

    Every tensor of the state that has a number per entry moves (Adam's exp_avg, exp_avg_sq, max_exp_avg_sq, ...).
    """
    at, known = earlier
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and key != "step" and tensor.shape == values.shape:
            tensor.copy_(torch.where(known, tensor[at], 0))


def _sites(moment: Moment) -> dict[str, Any]:
    """Return the model's adapted sites by name, on the base's own weights."""
    state = state_of(moment.model)
    return {k: original(state, s) for a in state.adapters_by_name.values() for k, s in a.sites.items()}
