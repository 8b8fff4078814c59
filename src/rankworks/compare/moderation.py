"""The variance over seeds of one difference, steadied by that of all differences (moderated t; Smyth 2004).

Three seeds estimate a variance s^2 with d = 2 degrees of freedom: by chance it is near 0 for some differences, the more
so where scores come in steps (shares of records), and Student's t with 2 degrees of freedom must be wide for all of
them. But every pair of arms has such a variance, and how much they differ among themselves says what is usual:

    s_ij^2 | v_ij ~ v_ij chi^2_d / d,   1 / v_ij ~ chi^2_d0 / (d0 s0^2)        the law of the variances, (s0^2, d0)
    trigamma(d0 / 2) = var log s_ij^2 - trigamma(d / 2)                        by moments of log s^2 over all pairs
    log s0^2 = mean log s_ij^2 - psi(d / 2) + log(d / 2) + psi(d0 / 2) - log(d0 / 2)
    m^2 = (d0 s0^2 + d s^2) / (d0 + d),   t with d0 + d degrees of freedom     what is expected of v_ij after seeing s^2

d0 + d is never above the (arms - 1) d degrees of freedom that all arms have together, so that with two arms this is
Student's t. Two departures make it safe for an arm that is far noisier than the others: the larger of s^2 and m^2 is
used, and of the d0 degrees only the share m^2 / max(s^2, m^2) is added. Held by simulation in
tests/compare/test_moderation.py, for equal and unlike noise, for scores in steps and for seed effects that arms share.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special


@dataclass(frozen=True)
class SeedPrior:
    """What is usual of the seeds' variance: s0^2, of a difference's mean at one seed, as good as `df` observations."""

    variance: float
    df: float

    def moderated(self, variance: float, df: float) -> tuple[float, float]:
        """Return the variance to use for an observed one, and its degrees of freedom."""
        expected = (self.df * self.variance + df * variance) / (self.df + df)
        used = max(variance, expected)
        return used, df + self.df * (expected / used if used > 0 else 0.0)


def seed_prior(means: ArrayLike) -> SeedPrior | None:
    """Return the law of the differences' variances from the arms' means (arms, seeds); None where it cannot be known.

    It takes three arms and two seeds, and a difference that varies at all.
    """
    y = np.asarray(means, np.float64)
    arms, seeds = y.shape
    if arms < 3 or seeds < 2:
        return None
    df = seeds - 1
    seen = np.array([(y[i] - y[j]).var(ddof=1) for i, j in combinations(range(arms), 2)])
    if not seen.any():
        return None
    # Differences alike at all seeds are scores that come in steps: below the least step, and above nothing.
    logs = np.log(np.maximum(seen, seen[seen > 0].min() / 2)) - special.digamma(df / 2) + np.log(df / 2)
    most = float((arms - 2) * df)
    excess = float(logs.var(ddof=1) - special.polygamma(1, df / 2))
    found = most if excess <= special.polygamma(1, most / 2) else 2 * _inverse_trigamma(excess)
    if found >= most:  # no more unlike than chance makes them: one variance for all
        return SeedPrior(float(seen.mean()), most)
    return SeedPrior(float(np.exp(logs.mean() + special.digamma(found / 2) - np.log(found / 2))), found)


def _inverse_trigamma(value: float) -> float:
    """Return x > 0 with trigamma(x) = value, which falls from infinity to 0."""
    found = optimize.root_scalar(lambda z: special.polygamma(1, np.exp(z)) - value, bracket=(-20.0, 20.0), xtol=1e-12)
    return float(np.exp(found.root))
