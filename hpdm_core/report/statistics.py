"""Mean and spread over seeds, and differences paired by seed, with intervals by Student's t, since seeds are few."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = ["CONFIDENCE", "Paired", "Summary", "pair", "summarise"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """``mean`` (NaN for no values) and ``spread`` (standard deviation, ddof 1; NaN below two) of ``n`` values."""

    mean: float
    spread: float
    n: int


@dataclass(frozen=True)
class Paired:
    """Differences arm - baseline over the ``n`` seeds that both have, with the ends of a confidence interval.

    ``each``: seed -> difference. Spread and interval are NaN below two seeds.
    """

    each: dict[int, float]
    mean: float
    spread: float
    low: float
    high: float

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.each)

    @property
    def exceeds_spread(self) -> bool:
        """Whether the mean difference is larger than the differences' spread over seeds; False below two seeds."""
        return self.n >= 2 and abs(self.mean) > self.spread


def summarise(values: Mapping[int, float]) -> Summary:
    """Summarise seed -> value; values that are NaN count as missing."""
    found = np.array([value for value in values.values() if not math.isnan(value)], dtype=np.float64)
    return Summary(
        mean=float(found.mean()) if len(found) else math.nan,
        spread=float(found.std(ddof=1)) if len(found) > 1 else math.nan,
        n=len(found),
    )


def pair(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Paired:
    """Pair seed -> value of an arm with that of the baseline."""
    each = {
        seed: arm[seed] - baseline[seed]
        for seed in sorted(set(arm) & set(baseline))
        if not math.isnan(arm[seed] - baseline[seed])
    }
    summary = summarise(each)
    half = math.nan
    if summary.n >= 2:
        quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, summary.n - 1))
        half = quantile * summary.spread / math.sqrt(summary.n)
    return Paired(
        each=each,
        mean=summary.mean,
        spread=summary.spread,
        low=summary.mean - half,
        high=summary.mean + half,
    )
