"""Init: where the factors of a change start. A subclass is registered with `@init` and writes `start`.

    a pair      scale * B A          A (rank, in),  B (out, rank)                                     `factors` 2
    a triple    scale * B C A        and a core C (rank, rank); what of the three is trained, the delta says    3

An initialiser says which of the two it fills (`fills`); one that fills triples returns a core with its factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from rankworks.core.draw import Draw
from rankworks.core.evidence import Evidence, Need
from rankworks.core.fields import HasSettings
from rankworks.core.registry import MethodSpec
from rankworks.core.site import Shape

if TYPE_CHECKING:
    from rankworks.core.site import Site


class Start(NamedTuple):
    """Where the factors start: A (rank, in), B (out, rank); `from_base` when the product is taken out of the weight.

    `core` (rank, rank) stands between them in a triple, and must be given there.
    """

    A: Tensor
    B: Tensor
    from_base: bool = False
    core: Tensor | None = None


def balanced(u: Tensor, s: Tensor, vh: Tensor, scale: float, from_base: bool = False) -> Start:
    """Return the start with scale B A = U diag(s) Vh and B^T B = A A^T = diag(s) / scale."""
    root = (s / scale).sqrt()  # (r,)
    return Start(A=root.unsqueeze(1) * vh, B=u * root, from_base=from_base)


@dataclass(frozen=True)
class Place:
    """What an initialiser knows of the change it starts."""

    weight: Tensor  # (out, in), float32 or wider
    rank: int
    scale: float  # the change is scale * B A, or scale * B C A
    draw: Draw
    kind: str = "linear"
    factors: int = 2
    evidence: Mapping[str, Tensor] = field(default_factory=dict)


class Init(HasSettings):
    """An initialiser of two or three factors."""

    Spec: ClassVar[Any]
    spec: Any
    fills: ClassVar[tuple[int, ...]] = (2,)  # how many factors the change may have: 2, 3
    unchanged: ClassVar[bool] = True  # the adapted model starts as its base
    from_base: ClassVar[bool] = False  # the start's product is taken out of the weight (`Start.from_base`)
    scale_free: ClassVar[bool] = False  # the start's product scale * B A is the same for every alpha
    kinds: ClassVar[tuple[str, ...] | None] = None  # the kinds of site it starts a change at; None: any
    grouped: ClassVar[bool] = True  # also at a grouped convolution, whose groups read inputs of their own

    def __init__(self, spec: Any):
        self.spec, self.key = spec, spec.key
        for name in type(spec).model_fields:
            if name != "init":
                setattr(self, name, getattr(spec, name))

    def start(self, place: Place) -> Start:
        """Return the factors."""
        raise TypeError(f"{type(self).__name__} must define start(place)")

    def takes_out(self) -> bool:
        """Return whether the start's product is taken out of the weight, where that depends on the settings."""
        return self.from_base

    def problems(self, shape: Shape, rank: int) -> list[str]:
        """Return why it cannot start a rank-`rank` change at a weight of this shape."""
        return []

    def allocate(
        self, resolved: Sequence[tuple[Site, MethodSpec]], evidence: Evidence
    ) -> Mapping[str, Mapping[str, Any]]:
        """Return settings to change before the start, {site name: {"rank": 5, "alpha": 2.5}}; often none."""
        return {}

    @classmethod
    def needs(cls, spec: Any) -> tuple[str | Need, ...]:
        """Return what must be measured on data before the start."""
        return ()

    @classmethod
    def needs_at(cls, spec: Any, settings: MethodSpec, shape: Shape) -> tuple[str | Need, ...]:
        """Return what must be measured at one site, where it is measured with options that its settings decide."""
        return cls.needs(spec)

    @classmethod
    def starts_unchanged(cls, spec: Any) -> bool:
        """Return whether the adapted model starts as its base, where that depends on the settings."""
        return cls.unchanged


def begin(init: Init, place: Place) -> Start:
    """Return where the factors start; on the meta device, which has no numbers to start from, their shapes."""
    (out, in_), r = place.weight.shape, place.rank
    if place.weight.is_meta:
        A, B, core = (place.weight.new_empty(shape) for shape in ((r, in_), (out, r), (r, r)))
        return Start(A, B, init.takes_out(), core if place.factors == 3 else None)
    start = init.start(place)
    if start.from_base != init.takes_out():
        raise TypeError(f"{type(init).__name__}: from_base is {start.from_base} in its start, and declared otherwise")
    return start
