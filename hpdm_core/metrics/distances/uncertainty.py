"""The uncertainty of a number measured on finitely many clips, and its extrapolation to infinitely many.

All functions take features with one row per clip and use keyed random streams: the same clips give the same intervals,
whatever the batches were. A distance has two errors. `bootstrap` estimates its scatter. A Frechet distance is also
biased upwards by about c / N; only `extrapolate` removes this, and neither the bootstrap nor more precise arithmetic
does. So distances at different N never compare.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import generator
from hpdm_core.metrics.interface import Features

__all__ = ["Extrapolation", "Interval", "at_counts", "bootstrap", "default_counts", "extrapolate"]

Measure = Callable[[Features], float]
"""A function from the features [n, d] of fakes to a number; it holds the reals."""

GROUPS = 10
LEAST_COUNTS = 3


@dataclass(frozen=True)
class Interval:
    """``value`` with the bounds of a confidence interval and the standard error."""

    value: float
    low: float
    high: float
    standard_error: float
    level: float
    replicates: int


@dataclass(frozen=True)
class Extrapolation:
    """``value`` at N = infinity, its standard error and its interval (normal, ``level``).

    ``slope``: the fitted c of value + c / N; ``bend``: how far the value changes with another choice of points (see
    `extrapolate`), which is part of the standard error; ``points``: number of fakes -> measured value, averaged over
    disjoint subsets.
    """

    value: float
    standard_error: float
    low: float
    high: float
    level: float
    slope: float
    bend: float
    points: Mapping[int, float]


def bootstrap(
    measure: Callable[..., float],
    *sets: Features,
    value: float | None = None,
    replicates: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return ``measure(*sets)`` with a bootstrap interval over the choice of clips.

    The rows of each set are resampled with replacement ``replicates`` times. A resampled set repeats clips, which
    increases a Frechet distance. So the interval is placed around the value itself, by the replicates' deviations from
    their mean. It is for a fixed number of clips: it says where the same measurement on other clips of the same kind
    would fall. With few clips per feature it is too wide rather than too narrow: for 100 features of equal variance, 6
    times at 128 clips, 2.4 at 512, 1.6 at 1024; for variances that fall like 1 / k^2, 1.1 to 1.6 throughout.
    ``value``: measure(*sets) if it is known.
    """
    if replicates < 2 or not 0 < level < 1:
        raise InputError(
            f"bootstrap: {replicates} replicates at level {level}; allowed are 2 or more, in (0, 1)"
        )
    found = measure(*sets) if value is None else value
    made = np.empty(replicates)
    for replicate in range(replicates):
        drawn = []
        for which, features in enumerate(sets):
            stream = generator(seed, "bootstrap", replicate, which)
            rows = torch.randint(len(features), (len(features),), generator=stream).numpy()
            drawn.append(features[rows])
        made[replicate] = measure(*drawn)
    deviations = made - made.mean()
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(deviations, [tail, 100 - tail])
    return Interval(
        value=found,
        low=float(found + low),
        high=float(found + high),
        standard_error=float(made.std(ddof=1)),
        level=level,
        replicates=replicates,
    )


def at_counts(
    measure: Measure, fakes: Features, counts: Sequence[int], *, seed: int = 0
) -> dict[int, Interval]:
    """Return number of fakes -> value, for each of ``counts``.

    For each n, the fakes, shuffled once (keyed), are cut into as many disjoint subsets of n as possible. The value is
    the mean over the subsets, with the standard error of this mean (NaN for a single subset) and normal bounds at 95 %.
    """
    shuffled = fakes[_order(len(fakes), seed)]
    made = {}
    for count in _checked(counts, len(fakes)):
        values = [measure(part) for part in _subsets(shuffled, count)]
        mean = float(np.mean(values))
        error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
        made[count] = Interval(
            value=mean,
            low=mean - 1.96 * error,
            high=mean + 1.96 * error,
            standard_error=error,
            level=0.95,
            replicates=len(values),
        )
    return made


def default_counts(count: int) -> tuple[int, ...]:
    """Return the numbers of fakes for `extrapolate`: five from count / 2 to count, evenly spaced in 1 / N, and a third
    and a quarter of count to test whether the points lie on a line.
    """
    return tuple(sorted({max(1, int(count / share)) for share in (4, 3, 2, 1.75, 1.5, 1.25, 1)}))


def extrapolate(
    measure: Measure,
    fakes: Features,
    *,
    counts: Sequence[int] | None = None,
    groups: int = GROUPS,
    level: float = 0.95,
    seed: int = 0,
) -> Extrapolation:
    """Return the value for infinitely many fakes: the intercept of a straight line in 1 / N fitted to the values at
    ``counts`` (`default_counts`).

    Chong and Forsyth 2020 (1911.07023). The line is fitted to the counts that are at least half of the largest (to all,
    if that leaves fewer than 3). ``bend`` is the change of the intercept when all counts are used, or, if they already
    are, all but the smallest. Below about two fakes per feature the points do not lie on a line, and ``bend`` is large.
    The standard error combines ``bend`` with a delete-a-group jackknife of the whole procedure, which accounts for
    clips shared between subsets. The reals are fixed: the bias from their number stays. Raises InputError for fewer
    than 3 different counts or fewer than 2 ``groups`` fakes.
    """
    shuffled = fakes[_order(len(fakes), seed)]
    wanted = _checked(default_counts(len(fakes)) if counts is None else counts, len(fakes))
    if len(wanted) < LEAST_COUNTS or len(fakes) < 2 * groups:
        raise InputError(
            f"extrapolation: {len(wanted)} different counts of {len(fakes)} fakes; needed are {LEAST_COUNTS} counts "
            f"and {2 * groups} fakes"
        )
    used = [count for count in wanted if 2 * count >= wanted[-1]]
    if len(used) < LEAST_COUNTS:
        used = wanted
    points = _points(measure, shuffled, wanted)
    intercept, slope = _line({count: points[count] for count in used})
    others = wanted if len(used) < len(wanted) else wanted[1:]
    bend = abs(_line({count: points[count] for count in others})[0] - intercept)
    replicates = []
    for group in range(groups):
        kept = np.delete(shuffled, np.s_[group::groups], axis=0)
        share = len(kept) / len(shuffled)
        replicates.append(_line(_points(measure, kept, [max(1, int(n * share)) for n in used]))[0])
    spread = np.asarray(replicates) - np.mean(replicates)
    error = float(np.sqrt((groups - 1) / groups * (spread**2).sum() + bend**2))
    reach = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))) * error
    return Extrapolation(
        value=intercept,
        standard_error=error,
        low=intercept - reach,
        high=intercept + reach,
        level=level,
        slope=slope,
        bend=bend,
        points=points,
    )


def _points(measure: Measure, shuffled: Features, counts: Sequence[int]) -> dict[int, float]:
    return {n: float(np.mean([measure(part) for part in _subsets(shuffled, n)])) for n in counts}


def _line(points: Mapping[int, float]) -> tuple[float, float]:
    """Return intercept and slope of value = intercept + slope / n, by least squares."""
    counts, values = np.asarray(list(points)), np.asarray(list(points.values()))
    design = np.stack([np.ones(len(counts)), 1.0 / counts], axis=1)
    (intercept, slope), *_ = np.linalg.lstsq(design, values, rcond=None)
    return float(intercept), float(slope)


def _subsets(shuffled: Features, count: int) -> list[Features]:
    return [shuffled[start : start + count] for start in range(0, len(shuffled) - count + 1, count)]


def _order(count: int, seed: int) -> np.ndarray:
    return torch.randperm(count, generator=generator(seed, "uncertainty", "order")).numpy()


def _checked(counts: Sequence[int], available: int) -> list[int]:
    wanted = sorted(set(counts))
    if not wanted or wanted[0] < 1 or wanted[-1] > available:
        raise InputError(f"counts of fakes {wanted}; allowed are 1 to {available}, as many as there are")
    return wanted
