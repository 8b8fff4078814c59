"""Layers that read the same input do what belongs to it once: q, k and v of an attention, gate and up of an MLP.

Which layers may be such siblings is told by their names, in `SIBLINGS`; whether they are is seen in every call. The
first sibling that is called makes the low-rank products of the input for all of them and leaves them for the others,
who take theirs if they are called with that very tensor, unchanged, in the same mode, and with factors that are still
the same. So a wrong guess (q of a cross-attention reads something else than k) costs a small product and no more.

What is left is forgotten when the last sibling has taken its part, or when the input itself is gone. The names, and
not what an earlier call showed, decide, so that a resumed run computes what the uninterrupted one did, bit for bit.
Siblings drop the same coordinates of their input: each sees dropout's law, and the mask is drawn once. Where neither
gradients nor dropout are wanted, as in generation, each reads alone, which is then the faster way.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rankworks.core.delta import Delta
from rankworks.core.kernels import Reading, read
from rankworks.core.kernels.mode import compute_dtype

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""Names, within one module, of layers that as a rule read one input."""


class SharedInput:
    """The low-rank deltas (`lowrank.Factored`) of layers that may read one input."""

    def __init__(self, deltas: Sequence[Any]):
        self.deltas = tuple(deltas)
        self._last: _Taken | None = None

    def take(self, delta: Delta, x: Tensor) -> tuple[Reading, int, Tensor] | None:
        """Return the reading of x (..., in), the place in it of `delta` and its B; None where it must read alone."""
        place = next((i for i, d in enumerate(self.deltas) if d is delta), None)
        rates = {d.dropout if d.training else 0.0 for d in self.deltas}
        if place is None or len(rates) > 1 or x.is_inference():
            return None
        taken = self._last
        if taken is None or not taken.serves(place, delta, x):
            factors = [d.acting_factors() for d in self.deltas]
            reading = read(x, [f.A for f in factors], rates.pop())
            taken = self._last = _Taken(x, reading, [f.B for f in factors], self)
        taken.left.discard(place)
        if not taken.left:
            self._last = None
        return taken.reading, place, taken.B[place]

    def forget(self, reference: weakref.ref) -> None:
        """Drop what is left of a reading whose input is gone."""
        if self._last is not None and self._last.x is reference:
            self._last = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start with nothing left."""
        return {"deltas": self.deltas, "_last": None}


class _Taken:
    """A reading, of what it was made, and which siblings have not taken their part."""

    def __init__(self, x: Tensor, reading: Reading, B: list[Tensor], owner: SharedInput):
        self.x = weakref.ref(x, owner.forget)
        self.reading, self.B = reading, B
        self.left = set(range(len(B)))
        self.mode = _mode(x)
        self.stamps = [_stamp(d) for d in owner.deltas]

    def serves(self, place: int, delta: Delta, x: Tensor) -> bool:
        """Whether this is the reading that the delta at `place` would make of x now."""
        same = self.x() is x and place in self.left and self.mode == _mode(x)
        return same and self.stamps[place] == _stamp(delta)


def _mode(x: Tensor) -> tuple[Any, ...]:
    return x._version, x.requires_grad, torch.is_grad_enabled(), compute_dtype(x)


def _stamp(delta: Delta) -> tuple[Any, ...]:
    """What changes when a tensor of the delta is changed, exchanged or frozen."""
    within = delta.modules() if delta._modules else (delta,)
    tensors = [t for m in within for t in (*m._parameters.values(), *m._buffers.values())]
    tensors += delta.shared.parameters() if delta.shared is not None else []  # a trained bank
    return delta.training, *((t.data_ptr(), t._version, t.requires_grad) for t in tensors if t is not None)


def link(hosts: Iterable[Any]) -> None:
    """Let the layers among `hosts` that are siblings by name share their input, and all others not.

    A host is an adapted layer with `_active`, its (site, delta) pairs. Only one that carries a single delta over its
    whole weight, with a `reader`, can share.
    """
    families: dict[tuple[str, tuple[str, ...], int], list[tuple[Any, Delta]]] = {}
    for host in hosts:
        host.__dict__.pop("_shared", None)
        if len(host._active) != 1:
            continue
        site, delta = host._active[0]
        parent, _, name = site.path.rpartition(".")
        names = next((s for s in SIBLINGS if name in s), None)
        reader = delta.reader
        if names is not None and reader is not None and site.kind in ("linear", "conv1d_hf"):
            families.setdefault((parent, names, site.shape.in_), []).append((host, reader))
    for members in families.values():
        if len(members) > 1:
            shared = SharedInput([reader for _, reader in members])
            for host, _ in members:
                host.__dict__["_shared"] = shared
