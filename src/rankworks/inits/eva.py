"""EVA: A is the principal directions of what the layer reads on the data, and rank goes where they explain most.

    X (tokens, in) the layer's inputs        A = V_r^T (r, in), the right singular vectors of X - mean(X)        B = 0

measured by an incremental SVD of k = round(rho r) directions (`input_svd`), batch by batch until they stand still.
Ranks: the directions of all sites are pooled and the `sum of r` that explain the largest part of their layer's variance
win; a site gets as many ranks as it holds of them, from 0 to k, and its alpha such that the scale stays
(`adjust_scaling`). With rho = 1 every site keeps its rank.

With G = dL/dW the first step moves B by s G A^T, so A that holds the most of X's variance gives the largest gradient.
`whiten` divides direction i by the square root of its singular value (the paper's code; for vision).
Of three factors (LoRA-XS) the directions are A, and B = W A^T (out, r) what the base makes of them: then B A is W
restricted to the directions that its inputs have, as LoRA-XS's own B A is W restricted to its largest; the core starts
at zero in place of the trained factor. B takes the directions unwhitened.

Choices: the data are centred, as in both released implementations. `iterations` = 4 is their randomised SVD (a tenth of
the exact one's time), 0 the exact. `label_mask` leaves out tokens whose own label is ignored, where there is a label
per token. It is off, unlike in the released code: where an answer is a word or two it leaves fewer tokens than there
are directions (16 in a batch of 8 BBC News articles), and not the positions that predict it. Data are gone through at
most `passes` times; the released code goes on until all stand still, on small data many times.
An `alpha` under rslora follows the root of the rank, where the released code multiplies by the ratio of ranks and so
changes the scale; for alpha/r both are the same.
Source: arXiv:2410.07170, section 3, and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from rankworks.core.errors import ConfigError
from rankworks.core.evidence import Evidence, Need
from rankworks.core.fields import Setting
from rankworks.core.forms.lowrank import alpha_of, scale_of
from rankworks.core.forms.wrapper import factored_settings
from rankworks.core.registry import MethodSpec, init
from rankworks.core.site import Shape, Site
from rankworks.core.start import Init, Place, Start
from rankworks.linalg.incremental import share_out, worth


@init("eva", title="EVA", year=2024, paper="arXiv:2410.07170")
class EVA(Init):
    """Principal directions of the inputs, ranks by explained variance."""

    fills: ClassVar[tuple[int, ...]] = (2, 3)
    kinds: ClassVar[tuple[str, ...] | None] = ("linear", "conv1d_hf", "conv", "rows")
    grouped: ClassVar[bool] = False

    rho: float = Setting(2.0, "a site's rank is at most rho times its own; 1 keeps all ranks", ge=1)
    tau: float = Setting(0.99, "|cos| to a batch ago at which a direction stands still", gt=0, le=1)
    whiten: bool = Setting(False, "divide each direction by the square root of its singular value")
    metric: Literal["ratio", "variance", "sum", "max"] = Setting(
        "ratio", "what is compared across sites: explained variance by the total, raw, by the tracked sum or maximum"
    )
    label_mask: bool = Setting(False, "leave out tokens that are not learned, besides padding")
    adjust_scaling: bool = Setting(True, "keep every site's scale when its rank changes")
    iterations: int = Setting(4, "power iterations of the randomised SVD; 0 for the exact SVD", ge=0)
    passes: int = Setting(1, "how often the data are gone through at most, until all directions stand still", ge=1)

    @classmethod
    def needs_at(cls, spec: Any, settings: MethodSpec, shape: Shape) -> tuple[str | Need, ...]:
        """The principal directions of the inputs, as many as the site may win."""
        rank = settings.method.cls.factored_rank(settings)
        if rank is None:
            return ()
        options = {
            "rank": rank,
            "limit": _limit(spec.rho, settings, shape),
            "tau": spec.tau,
            "metric": spec.metric,
            "iterations": spec.iterations,
            "tokens": "labelled" if spec.label_mask else "attended",
            "passes": spec.passes,
        }
        return (Need("input_svd", options),)

    def allocate(
        self, resolved: Sequence[tuple[Site, MethodSpec]], evidence: Evidence
    ) -> Mapping[str, Mapping[str, Any]]:
        """Give every site as many ranks as it holds of the directions that explain most."""
        worths = {
            site.name: self._worth(site, evidence[site.name], _limit(self.rho, settings, site.shape))
            for site, settings in resolved
        }
        ranks = share_out(worths, sum(_rank(settings) for _, settings in resolved))
        changes: dict[str, dict[str, Any]] = {}
        for site, settings in resolved:
            old, new = _rank(settings), ranks[site.name]
            if new != old:
                changes[site.name] = {"rank": new}
                if self.adjust_scaling and new:
                    inner = factored_settings(settings)
                    scaling = getattr(inner, "scaling", "standard")
                    changes[site.name]["alpha"] = alpha_of(scale_of(inner.alpha, old, scaling), new, scaling)
        return changes

    def start(self, place: Place) -> Start:
        """Return the factors for a weight (out, in)."""
        rank = place.rank
        A = directions = place.evidence["input_svd.components"][:rank].to(place.weight)  # (rank, in)
        if self.whiten:
            A = directions / place.evidence["input_svd.values"][:rank].to(place.weight).sqrt().unsqueeze(1)
        if place.factors == 2:
            return Start(A=A, B=place.weight.new_zeros(place.weight.shape[0], rank))
        return Start(A=A, B=place.weight @ directions.t(), core=place.weight.new_zeros(rank, rank))

    def problems(self, shape: Shape, rank: int) -> list[str]:
        """Inputs of `in` features have as many directions and no more."""
        if rank <= shape.in_:
            return []
        return [f"eva takes at most in = {shape.in_} directions of the inputs and rank is {rank}: lower it there"]

    def _worth(self, site: Site, known: Mapping[str, Tensor], limit: int) -> Tensor:
        """What each of the site's `limit` directions explains. Raises `ConfigError` where fewer were measured."""
        values = known["input_svd.values"]
        if len(values) < limit:
            raise ConfigError(
                f"the evidence for eva holds {len(values)} directions of what {site.name} reads, and {limit} are "
                "wanted: measure it with this adapter's own spec, rankworks.calibrate(model, data, spec)."
            )
        return worth(self.metric, values, known["input_svd.spread"], int(known["input_svd.count"]))[:limit]


def _rank(settings: MethodSpec) -> int:
    """The rank of the factors that are filled."""
    rank = settings.method.cls.factored_rank(settings)  # type: ignore[attr-defined]
    assert rank is not None  # refused before
    return rank


def _limit(rho: float, settings: MethodSpec, shape: Shape) -> int:
    """The most ranks a site may win: round(rho r), as many as there are, and for a core what a core may have."""
    most = shape.in_ if settings.method.cls.factor_count(settings) == 2 else min(shape)  # type: ignore[attr-defined]
    return min(round(rho * _rank(settings)), most)
