"""Delta: a trainable change of one site's weight. A method subclasses it and writes only its mathematics.

A subclass declares its settings (`rank: int = Rank(16)`), allocates its tensors in `setup`, and gives at least
`branch` (the change applied to an input) and `dense` (the change as a matrix). Everything else (wrapping, merging,
saving, counting, exporting, the command line, the documentation, the conformance checks) follows.

`branch` is a pure function of its input and the delta's tensors: no state, no look at the base. A method that
multiplies the weight (DoRA, Bone's bat form) sets `additive = False` and overrides `forward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rankworks.core.bank import Bank
from rankworks.core.draw import Draw
from rankworks.core.errors import ConfigError, MergeError
from rankworks.core.evidence import Need
from rankworks.core.fields import HasSettings
from rankworks.core.inputs import Input
from rankworks.core.registry import MethodSpec
from rankworks.core.site import KINDS, Shape, Site

if TYPE_CHECKING:
    from rankworks.core.block import FFN, Replacement
    from rankworks.core.hooks import Hook


class Factors(NamedTuple):
    """An exact low-rank form of a change, B A with every scale folded in: B (out, k), A (k, in)."""

    B: Tensor
    A: Tensor


class Entries(NamedTuple):
    """An exact sparse form of a change with every scale folded in: `values` (K,) at `index` (K,), zero elsewhere.

    `index` holds distinct row-major numbers of entries of the weight (out, in): row * in + column, in any order.
    """

    index: Tensor
    values: Tensor


class Base(Protocol):
    """The frozen layer as a delta sees it: `base(x)` is its output (..., out), channels last, bias included."""

    def __call__(self, x: Input) -> Tensor:
        """Apply the frozen layer."""
        ...

    @property
    def weight(self) -> Tensor:
        """The frozen weight (out, in)."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias (out,), or None."""
        ...

    @property
    def ffn(self) -> FFN:
        """The parts of the block, for a delta beside a feed-forward block."""
        ...

    @property
    def linear(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) where `base(x)` is exactly F.linear(x, weight, bias), so that a kernel may fuse it."""
        ...

    @property
    def shared(self) -> Any:
        """The `SharedInput` of layers that read the same input, or None."""
        ...


class Delta(HasSettings, nn.Module):
    """The trainable change of one weight (out, in). See the module's text; `deltas/lora.py` is an example."""

    Spec: ClassVar[type[MethodSpec]]
    additive: ClassVar[bool] = True  # y = base(x) + branch(x)
    unchanged_at_init: ClassVar[bool] = True  # the adapted model starts as the base model, exactly
    kinds: ClassVar[tuple[str, ...]] = KINDS  # the kinds of site the method takes
    mergeable: ClassVar[bool] = True  # merge() has something to put it into
    weightless: ClassVar[bool] = False  # stands beside a block (core/block.py) and changes no weight: no dense()
    grouped: ClassVar[bool] = True  # takes grouped convolutions, as a change of the kernel (out, in/groups * kernel)

    given: bool = False  # `reset` will fill the factors from another initialiser than the default one

    spec: Any  # a `Spec` of the class; its settings are attributes of the delta too
    shape: Shape
    kind: str
    draw: Draw
    shared: Bank | None  # the tensors that all sites share
    evidence: Mapping[str, Tensor]  # what `needs` named, during `setup` of a new adapter; empty when one is loaded
    one_for_all: ClassVar[tuple[str, ...]] = ()  # settings that no pattern may change: what all sites share has them

    def __init__(
        self,
        spec: MethodSpec,
        shape: Shape,
        draw: Draw,
        bank: Bank | None = None,
        kind: str = "linear",
        evidence: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        self.spec = spec
        for name in type(spec).model_fields:
            if name != spec.method.tag:
                setattr(self, name, getattr(spec, name))
        self.shape, self.kind = shape, kind
        self.draw = draw
        self.evidence = evidence or {}
        object.__setattr__(self, "shared", bank)  # not a submodule: a bank belongs to the model, not to the site

    # ---- what a method writes -------------------------------------------------------------------------------------

    def setup(self, weight: Tensor) -> None:
        """Allocate the tensors for a weight (out, in), with `trainable`, `frozen` and `stored`."""
        raise TypeError(f"{type(self).__name__} must define setup(weight)")

    def branch(self, x: Input) -> Tensor:
        """Return the change applied to x: (..., in) -> (..., out). Written with `linear` from `core.inputs`."""
        raise TypeError(f"{type(self).__name__} must define branch(x), or override forward(x, base)")

    def forward(self, x: Input, base: Base) -> Tensor:
        """Return the adapted output (..., out)."""
        return base(x) + self.branch(x)

    def dense(self, weight: Tensor) -> Tensor:
        """Return the change of `weight` as a matrix (out, in). By default the product of `factors`."""
        factors = self.factors()
        if factors is None:
            raise TypeError(f"{type(self).__name__} must define dense(weight) or factors()")
        return factors.B @ factors.A

    def acting_factors(self) -> Factors | None:
        """Return the factors as a forward pass uses them now."""
        return self.factors()

    def acting_dense(self, weight: Tensor) -> Tensor:
        """Return the change as a matrix, as a forward pass uses it now where it is applied so."""
        return self.dense(weight)

    def factors(self) -> Factors | None:
        """Return exact factors of the change, or None where no useful low rank exists."""
        return None

    def factors_on(self, weight: Tensor) -> Factors | None:
        """Return exact factors of the change of `weight`, for a method whose factors depend on the base."""
        return self.factors()

    def entries(self) -> Entries | None:
        """Return the change as pairs of place and value where it is sparse, or None."""
        return None

    def bias_change(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return the change of the layer's bias (out,), where the method changes it too, else None."""
        return None

    def fused(self, site: Site) -> list[Replacement]:
        """Return what merging a `weightless` delta puts in the place of what: (object, attribute, new value)."""
        raise MergeError(
            f"{site.name}: {self.spec.key} changes no weight and cannot be merged into any: keep the adapter beside "
            "the base."
        )

    @classmethod
    def changes_bias(cls, spec: Any) -> bool:
        """Return whether it trains a bias of its own, which merging needs a bias of the layer to put into."""
        return False

    @property
    def reader(self) -> Delta | None:
        """The delta with `factors` and `dropout` whose A reads the layer's own input, where siblings may share that."""
        return None

    @property
    def pair(self) -> Delta | None:
        """The delta, itself or one inside, whose trained B A (core/forms/lowrank.py) a rank schedule may cut."""
        return None

    @property
    def empty(self) -> bool:
        """Whether no rank of it acts, so that it changes nothing and an export may leave it out."""
        return type(self).factored_rank(self.spec) == 0

    def gated(self, gate: Tensor) -> Factors:
        """Return the factors B diag(gate) A of the change, where it has factors; `gate` (k,) scales its k ranks."""
        factors = self.factors()
        if factors is None:
            raise TypeError(f"{type(self).__name__} has no factors to put a gate between")
        return Factors(factors.B, gate.to(factors.A.dtype).unsqueeze(1) * factors.A)

    def current_spec(self) -> MethodSpec:
        """Return the settings as they are now: a schedule changes a site's rank in training."""
        return self.spec

    def adopt(self, spec: MethodSpec) -> None:
        """Take the settings of a saved state, whose tensors may then be of another shape, and make room for them."""
        self.spec = spec

    def reset(self, weight: Tensor, init: Any) -> None:
        """Start from the initialiser `init`; a delta without a factor pair starts in `setup`."""

    @classmethod
    def needs(cls, spec: Any) -> tuple[str | Need, ...]:
        """Return what must be measured on data before the start: names of `evidence`, such as "gradient" (out, in)."""
        return ()

    @classmethod
    def common(cls, spec: Any) -> dict[str, Any]:
        """Return the settings that must be equal at all sites, by name: those of `one_for_all`."""
        return {name: getattr(spec, name) for name in cls.one_for_all}

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """Return the number of trainable parameters at a site of this shape, as a formula."""
        raise TypeError(f"{cls.__name__} must define count(spec, shape)")

    @classmethod
    def problems(cls, spec: Any, shape: Shape) -> list[str]:
        """Return why this method cannot take a weight of this shape: sentences, empty where it can."""
        rank = getattr(spec, "rank", 1)
        return [] if rank >= 1 else ["rank 0 leaves nothing to train: give a rank of at least 1, or exclude the site"]

    @classmethod
    def route(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Sort a flat mapping of settings; a delta that wraps another passes the inner one's settings on to it."""
        return values

    @classmethod
    def accepted(cls, values: Mapping[str, Any]) -> list[str]:
        """Return the settings the flat form may name."""
        return list(cls.Spec.model_fields)

    @classmethod
    def portable(cls, spec: Any) -> bool:
        """Return whether no tensor depends on the weight it stands at, so that sites of one shape may share one."""
        return False

    @classmethod
    def factored_rank(cls, spec: Any) -> int | None:
        """Return the rank of the factors that an initialiser fills, or None where there are no such factors."""
        return None

    @classmethod
    def factor_count(cls, spec: Any) -> int:
        """Return how many factors an initialiser fills: 2 for B A, 3 for B C A with a core C."""
        return 2

    @classmethod
    def pair_rank(cls, spec: Any, shape: Shape) -> int | None:
        """Return the rank of the trained `pair`, or None where there is none."""
        return None

    @classmethod
    def inner_rank(cls, spec: Any, shape: Shape) -> int | None:
        """Return how many ranks the `factors` have between them, where gates may stand there, else None."""
        return None

    @classmethod
    def exact_gradient(cls, spec: Any) -> bool:
        """Return whether backward is the derivative of forward: false where a part is held constant on purpose."""
        return True

    @classmethod
    def starts_unchanged(cls, spec: Any) -> bool:
        """Return whether the adapted model starts as the base, where that depends on the settings."""
        return cls.unchanged_at_init

    @classmethod
    def training_hook(cls, spec: Any, deltas: Mapping[str, Delta]) -> Hook | None:
        """Return what the method does during training, on all of an adapter's deltas by site name, or None."""
        return None

    def rates(self) -> Mapping[str, float]:
        """Return factors on the learning rate of its own parameters, by name; those left out have 1."""
        return {}

    def expect(self, names: set[str]) -> None:
        """Allocate the stored tensors that only some starts have, given the names a file holds for this delta."""

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Allocate what `expect` does, given also the shapes a file holds: for tensors whose size training decides."""
        self.expect(set(shapes))

    @classmethod
    def bank(cls, spec: Any, shapes: Sequence[Shape], draw: Draw) -> dict[str, Tensor]:
        """Return the tensors shared by all sites, read as `self.shared["A"]`: frozen, or trained as `nn.Parameter`s."""
        return {}

    @classmethod
    def bank_size(cls, shapes: Sequence[Shape]) -> list[Any]:
        """Return all that a bank depends on in the sites' shapes: by default the largest sides."""
        return [max(s.out for s in shapes), max(s.in_ for s in shapes)]

    @classmethod
    def count_shared(cls, spec: Any, shapes: Sequence[Shape]) -> int:
        """Return the number of trained parameters in the bank for sites of these shapes, as a formula."""
        return 0

    # ---- what a method uses ---------------------------------------------------------------------------------------

    def trainable(self, *shape: int, std: float = 0.0, bound: float = 0.0, fill: float = 0.0) -> nn.Parameter:
        """A trained tensor: N(0, std^2), U(-bound, bound), or constant."""
        if std:
            return nn.Parameter(self.draw.normal(*shape, std=std))
        if bound:
            return nn.Parameter(self.draw.uniform(*shape, bound=bound))
        return nn.Parameter(torch.full(shape, fill, device=self.draw.device, dtype=self.draw.dtype))

    def frozen(self, tensor: Tensor) -> nn.Buffer:
        """A tensor that is rebuilt from the base weight or the seed, and never written to a file."""
        return nn.Buffer(tensor.to(device=self.draw.device), persistent=False)

    def stored(self, tensor: Tensor) -> nn.Buffer:
        """A tensor that is not trained but belongs in the adapter file."""
        return nn.Buffer(tensor.to(device=self.draw.device))

    def child(self, spec: MethodSpec, weight: Tensor) -> Delta:
        """Build another delta for the same site, for methods that wrap one; it shares this one's randomness."""
        cls: type[Delta] = spec.method.cls
        if cls.weightless:
            raise ConfigError(
                f"{self.spec.key} wraps a change of the weight, and {spec.key} changes none: choose lora, ..."
            )
        if cls.changes_bias(spec):
            raise ConfigError(
                f"{self.spec.key} wraps a change of the weight, and this {spec.key} has a bias of its own: set bias to "
                f"False in the inner {spec.key}."
            )
        inner = cls(spec, self.shape, self.draw, self.shared, self.kind, self.evidence)
        inner.given = self.given
        inner.setup(weight)
        return inner

    def row_norms(self, weight: Tensor) -> Tensor:
        """Return the norm of every row of (weight + change), (out,), in at least float32: a change is small."""
        change = self.dense(weight)
        wide = torch.promote_types(change.dtype, torch.float32)
        return torch.linalg.vector_norm(weight.to(wide) + change.to(wide), dim=1)

    def extra_repr(self) -> str:
        """Key and settings, for print(model)."""
        shown = ", ".join(f"{k}={v!r}" for k, v in self.spec.model_dump(exclude_defaults=True).items())
        return f"{self.spec.key}" + (f", {shown}" if shown else "")
