"""LaMDA++: give every weight a rank out of a small set by the spectrum it was pretrained with; no data, no gradient.

    e_m = sum_{i<=r} s_i^2 / sum_i s_i^2 of the weight W_m        r the mean rank, s_i its singular values

Energies are divided by the mean of their module type (q_proj, k_proj, ...), the weights sorted by the result and cut
into equal groups, one for each of `candidates` (by default r/2, r, 3r/2, whose mean is r); what does not divide goes
to the group nearest the mean, so that the ranks sum to r per weight. Equal energies go by the order of the modules.

The paper says "normalised energy score" and no more; its repository has no allocation at all. Chosen here: the energy
at the mean rank; by type, since depth and not type is what the scores of one type tell apart (`within="model"` compares
all with each other; types with a single weight are compared as one); and that a flat spectrum gets more ranks. LaMDA's
projections span the r leading directions, so the share of W outside them is what limits a weight, and e_m = 1, a weight
spanned already, must not ask for more: `flat_gets_more=False` turns it round. The scale alpha/r stays by default.
Sites whose settings give them another rank share a budget with those of that rank alone. A plan, which sees shapes and
no weights, counts every site at its mean.
Source: arXiv:2406.12832, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rankworks.core.evidence import Evidence
from rankworks.core.fields import Setting
from rankworks.core.forms.lowrank import alpha_of, scale_of
from rankworks.core.progress import track
from rankworks.core.ranks.schedule import RankSchedule
from rankworks.core.registry import MethodSpec, rank
from rankworks.core.site import Shape, Site
from rankworks.linalg.energy import leading_energy

DIGITS = 12  # to which energies are compared: what differs by rounding is equal


@rank("lamda++", title="LaMDA++", year=2024, paper="arXiv:2406.12832")
class LaMDAPlus(RankSchedule):
    """Ranks from the pretrained spectrum, before training."""

    candidates: list[int] | None = Setting(None, "the ranks to give, with mean r; None: r/2, r, 3r/2")
    flat_gets_more: bool = Setting(True, "larger ranks where the leading directions hold less of the weight")
    within: Literal["type", "model"] = Setting("type", "what a weight's energy is compared with")
    keep_scale: bool = Setting(True, "alpha follows the rank, so that the scale is the same everywhere")

    def ranks_for(self, mean: int) -> list[int]:
        """Return the candidates for a mean rank, ascending."""
        half = mean // 2
        return sorted(set(self.candidates or (mean - half, mean, mean + half)))

    def problems(self, settings: MethodSpec, shape: Shape) -> list[str]:
        """There must be a rank, the candidates must have it as their mean, and the weight must have room for each."""
        ranked = _ranked(settings)
        if ranked is None or "rank" in settings.method.cls.common(settings):  # type: ignore[attr-defined]
            what = "has none" if ranked is None else "has one for all sites together"
            return [f"lamda++ gives every site a rank of its own, and {settings.key} {what}: choose lora, lamda, ..."]
        ranks = self.ranks_for(ranked.rank)
        if min(ranks) < 1 or sum(ranks) != ranked.rank * len(ranks):
            return [
                f"lamda++ spreads a mean rank, {ranked.rank} here, over candidates of that mean, and "
                f"{self.candidates} has another: give candidates whose mean is the rank, or leave them out"
            ]
        if ranks[-1] > min(shape):
            return [
                f"lamda++ may give a site rank {ranks[-1]}, and a change of this weight has at most rank {min(shape)}: "
                "lower the rank, give closer candidates, or exclude the site"
            ]
        return settings.method.cls.problems(settings.replace(rank=ranks[-1]), shape)  # type: ignore[attr-defined]

    def allocate(
        self, resolved: Sequence[tuple[Site, MethodSpec]], evidence: Evidence
    ) -> Mapping[str, Mapping[str, Any]]:
        """Return every site's rank, and the alpha that keeps its scale."""
        budgets: dict[int, list[tuple[Site, MethodSpec]]] = {}
        for site, settings in resolved:
            budgets.setdefault(_ranked(settings).rank, []).append((site, settings))
        changes: dict[str, dict[str, Any]] = {}
        for mean, members in budgets.items():
            energies = [leading_energy(s.weight, mean) for s, _ in track(members, "lamda++: spectra of the weights")]
            types = [_type_of(site) for site, _ in members]
            scores = energies if self.within == "model" else by_type(energies, types)
            for (site, settings), new in zip(members, self.spread(scores, mean), strict=True):
                changes[site.name] = {"rank": new, **self._alpha(_ranked(settings), new)}
        return changes

    def spread(self, scores: Sequence[float], mean: int) -> list[int]:
        """Return a rank for every score: equal groups in their order, the rest to the candidate nearest the mean."""
        ranks = self.ranks_for(mean)
        sizes = [len(scores) // len(ranks)] * len(ranks)
        sizes[min(range(len(ranks)), key=lambda i: abs(ranks[i] - mean))] += len(scores) % len(ranks)
        sign = 1 if self.flat_gets_more else -1
        order = sorted(range(len(scores)), key=lambda i: (sign * round(scores[i], DIGITS), i))
        dealt = [r for r, size in zip(reversed(ranks), reversed(sizes), strict=True) for _ in range(size)]
        given = dict(zip(order, dealt, strict=True))
        return [given[i] for i in range(len(scores))]

    def _alpha(self, settings: Any, new: int) -> dict[str, float]:
        alpha = getattr(settings, "alpha", None)
        if not self.keep_scale or alpha is None:
            return {}
        scaling = getattr(settings, "scaling", "standard")
        return {"alpha": alpha_of(scale_of(alpha, settings.rank, scaling), new, scaling)}


def by_type(energies: Sequence[float], types: Sequence[str]) -> list[float]:
    """Return energies over the mean of their type; weights that are alone in theirs count as one type."""
    pooled = [t if types.count(t) > 1 else "" for t in types]
    means = {t: [e for e, of in zip(energies, pooled, strict=True) if of == t] for t in set(pooled)}
    return [e * len(means[t]) / sum(means[t]) for e, t in zip(energies, pooled, strict=True)]


def _ranked(settings: MethodSpec) -> Any:
    """Return the settings that have the rank, these or those of a delta inside; None where none has."""
    found: Any = settings
    while isinstance(found, MethodSpec) and not isinstance(getattr(found, "rank", None), int):
        found = getattr(found, "inner", None)
    return found


def _type_of(site: Site) -> str:
    """The last part of the module's name, with the part of the weight: q_proj, c_attn[0:768], experts.down_proj."""
    name = site.path.rpartition(".")[2]
    if site.expert is not None:
        return f"{name}.{site.param}"
    return name if site.rows is None else f"{name}[{site.rows[0]}:{site.rows[1]}]"
