"""What is noise: intervals, p-values, corrections, and the set of arms that may be the best.

An arm's scores are a table x (seeds, records), and a comparison of two arms is the table of their paired differences:
the same seed gives both the same order of the data, and both are measured on the same records. The mean over the table
is estimated; seeds AND records are drawn at random from all that could have been, so both make it uncertain:

    x_se = m + a_s + b_e + c_se                     seed, record, and what is left
    MS_a, MS_b, MS_c                                mean squares of the two-way layout without repetition
    V = max(MS_a + MS_b - MS_c, MS_a, MS_b) / (S N) unbiased variance of the mean, never below either part

Records are many and are resampled with replacement (the bootstrap). Seeds are few: three of them resampled give ten
different sets and spread too little, so their part is drawn from Student's t with S - 1 degrees of freedom instead,
which is what normal seed effects give; for differences MS_a is steadied by what all arms show, which adds degrees of
freedom (moderation.py). The spread of the sum of both parts is brought to V, since what seed and record share would
count twice. With one seed only the records are uncertain, and the interval says so.
Coverage and error rates under the null are held by simulation in tests/compare/test_compare_statistics.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rankworks.compare.moderation import SeedPrior, seed_prior

DRAWS = 4000

METHOD = (
    "Every mean is over seeds and test records. Intervals: bootstrap over the test records ({draws} resamples, the "
    "same for all arms), plus Student's t for the seeds, which are too few to be resampled; both together have the "
    "variance of the two-way layout (seed x record). Differences to the baseline are paired by seed and record, and "
    "their variance over seeds is steadied by that of all pairs of arms (moderated t); their p-values are two-sided "
    "and corrected by Holm over all arms. Rank 1 is shared by all arms that may be the best: with {confidence:.0%} "
    "confidence the best is among them (one-sided tests of all pairs, Bonferroni). The settings that tuning chose are "
    "taken as given: its luck is in no interval."
)


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval, the two-sided p-value of being 0, and the one-sided one of being 0 or above."""

    mean: float
    low: float
    high: float
    p: float
    p_below: float


class Resampler:
    """Estimates means of tables (seeds, records) over the same resampled records, so that arms are treated alike.

    records: how many; confidence: of the intervals; weights: how much each record counts, None for alike.
    """

    def __init__(
        self,
        records: int,
        confidence: float = 0.95,
        weights: ArrayLike | None = None,
        draws: int = DRAWS,
        seed: int = 0,
    ):
        self.confidence, self.draws = confidence, draws
        generator = np.random.default_rng(seed)
        counts = generator.multinomial(records, np.full(records, 1 / records), size=draws)
        self._drift = counts.astype(np.float64) / records - 1 / records  # (draws, records), rows sum to 0
        self._levels = (np.arange(draws) + 0.5) / draws
        generator.shuffle(self._levels)  # Student's quantiles in an order of their own: strata instead of chance
        self.weights = None if weights is None else np.asarray(weights, np.float64)

    def prior(self, tables: Sequence[ArrayLike]) -> SeedPrior | None:
        """Return what the arms' tables show of how much differences vary over seeds; None where they are too few."""
        arrays = [np.asarray(table, np.float64) for table in tables]
        return seed_prior([np.average(x, axis=1, weights=self.weights) for x in arrays])

    def estimate(self, table: ArrayLike, prior: SeedPrior | None = None) -> Estimate:
        """Return the mean of a table (seeds, records) with its uncertainty.

        prior: of a difference, what is usual of the variance over seeds.
        """
        x = np.asarray(table, np.float64)
        if self.weights is not None:  # a ratio of sums, linearised: deviations count by weight
            w = self.weights / self.weights.mean()
            mean = float((x * w).mean())
            x = mean + (x - mean) * w
        mean = float(x.mean())
        parts = _parts(x)
        seeds, df = parts.seeds, x.shape[0] - 1.0
        if prior is not None and df > 0 and x.any():  # a table of zeros is an arm beside itself
            variance, df = prior.moderated(x.shape[0] * seeds, df)
            seeds = variance / x.shape[0]
        spread = parts.spread(seeds)
        boot = spread * (self._drift @ x.mean(0))  # (draws,) the records' part
        if df == 0 or seeds == 0:
            return _from_normal(mean, boot, self.confidence)
        width = spread * np.sqrt(seeds)
        total = boot + width * stats.t.ppf(self._levels, df)
        tail = 100 * (1 - self.confidence) / 2
        low, high = np.percentile(total, [tail, 100 - tail])
        # The chance of t alone is known exactly: averaged over the resampled records it has no floor of 1 / draws.
        above = float(stats.t.sf((abs(mean) - boot) / width, df).mean())
        beyond = float(stats.t.sf((abs(mean) + boot) / width, df).mean())
        below = above if mean < 0 else 1 - above
        return Estimate(mean, mean - float(high), mean - float(low), min(1.0, above + beyond), below)


@dataclass(frozen=True)
class Parts:
    """Variances of a table's mean: what seeds, records and the rest alone suggest, MS / (S N) each."""

    seeds: float
    records: float
    rest: float

    def spread(self, seeds: float) -> float:
        """Return the factor that brings the spread of both parts together to V, with this variance of the seeds."""
        both = seeds + self.records
        return float(np.sqrt(max(both - self.rest, seeds, self.records) / both)) if both > 0 else 1.0


def _parts(x: NDArray[np.float64]) -> Parts:
    seeds, records = x.shape
    a = float(x.mean(1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    b = float(x.mean(0).var(ddof=1)) / records if records > 1 else 0.0
    if seeds == 1 or records == 1:
        return Parts(a, b, 0.0)
    rest = x - x.mean(1, keepdims=True) - x.mean(0, keepdims=True) + x.mean()
    return Parts(a, b, float((rest**2).sum()) / ((seeds - 1) * (records - 1)) / (seeds * records))


def _from_normal(mean: float, boot: NDArray[np.float64], confidence: float) -> Estimate:
    """Return the estimate where only records vary; p-values from the normal law of their mean."""
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(boot, [tail, 100 - tail])
    deviation = float(boot.std())
    if deviation == 0:
        same = mean == 0
        return Estimate(mean, mean, mean, float(same), 1.0 if mean > 0 else 0.5 if same else 0.0)
    z = mean / deviation
    two_sided, below = float(2 * stats.norm.sf(abs(z))), float(stats.norm.cdf(z))
    return Estimate(mean, mean - float(high), mean - float(low), two_sided, below)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected by Holm's step-down: the chance of any false claim is at most the level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = highest
    return corrected


def better(tables: Sequence[ArrayLike], resampler: Resampler, prior: SeedPrior | None = None) -> NDArray[np.bool_]:
    """Return beats[j, i]: whether arm j is shown to be better than arm i, larger scores being better.

    prior: what is usual of the variance of differences over seeds.

    Every arm is tested against each other one at (1 - confidence) / (arms - 1), one-sided. The best arm is then beaten
    by any other with a chance of at most 1 - confidence: the arms that nobody beats are a confidence set of the best.
    """
    arrays = [np.asarray(table, np.float64) for table in tables]
    count = len(arrays)
    beats = np.zeros((count, count), bool)
    level = (1 - resampler.confidence) / max(1, count - 1)
    means = [a.mean() for a in arrays]
    for i in range(count):
        for j in range(count):
            if means[j] > means[i]:
                beats[j, i] = resampler.estimate(arrays[i] - arrays[j], prior).p_below < level
    return beats


def ranks(beats: NDArray[np.bool_]) -> list[int]:
    """Return each arm's rank: one more than the number of arms that are shown to be better."""
    return [1 + int(column.sum()) for column in beats.T]
