"""The distance against fifty digits, by definition: no step of the implementation is used."""

import mpmath
import numpy as np
import pytest

from hpdm_core.base.errors import TroubleError
from hpdm_core.metrics.distances.frechet import (
    distance_between,
    fit_gaussian,
    frechet_distance,
    frechet_from_moments,
)

WIDTH = 400


def to_fifty_digits(a: np.ndarray, b: np.ndarray, *, ddof: int = 0) -> float:
    """Return the distance of features [n, d] and [m, d] with divisor n - ddof.

    The eigenvalues of S_a S_b other than 0 are those of M M^T with M = A B^T, for centred A and B.
    """
    with mpmath.workdps(50):
        centred, shift = [], [mpmath.mpf(0)] * a.shape[1]
        traces = mpmath.mpf(0)
        for sign, rows in ((1, a), (-1, b)):
            exact = [[mpmath.mpf(float(value)) for value in row] for row in rows]
            means = [mpmath.fsum(column) / len(exact) for column in zip(*exact, strict=True)]
            shift = [total + sign * mean for total, mean in zip(shift, means, strict=True)]
            root = mpmath.sqrt(len(exact) - ddof)
            made = [[(value - mean) / root for value, mean in zip(row, means, strict=True)] for row in exact]
            traces += mpmath.fsum(value * value for row in made for value in row)
            centred.append(made)
        left, right = centred
        product = mpmath.matrix([[mpmath.fdot(row, other) for other in right] for row in left])
        gram = product * product.T if product.rows <= product.cols else product.T * product
        values = mpmath.eigsy(gram, eigvals_only=True)
        cross = mpmath.fsum(mpmath.sqrt(value) for value in values if value > 0)
        return float(mpmath.fsum(value * value for value in shift) + traces - 2 * cross)


def features(rank: int, *, seed: int, condition: float = 1.0, count: int | None = None) -> np.ndarray:
    """Return ``rank`` + 1 (or ``count``) rows that span ``rank`` directions of decreasing size around a mean."""
    random = np.random.default_rng(seed)
    count = rank + 1 if count is None else count
    scales = np.geomspace(1.0, 1.0 / condition, rank)
    directions = np.linalg.qr(random.normal(size=(WIDTH, rank)))[0].T
    return random.normal(size=(count, rank)) * scales @ directions * 20 + random.normal(size=WIDTH)


CASES = {
    "rank 1 and 1": (features(1, seed=1), features(1, seed=2)),
    "rank 3 and 40": (features(3, seed=3), features(40, seed=4)),
    "rank 20, condition 1e6": (features(20, seed=5, condition=1e6), features(20, seed=6, condition=1e6)),
    "rank 25, condition 1e12": (features(25, seed=7, condition=1e12), features(12, seed=8, condition=1e3)),
    "fewer directions than rows": (features(4, seed=9, count=16), features(7, seed=10, count=12)),
    "nearly equal": (features(12, seed=11), features(12, seed=11) * (1 + 1e-5)),
    "large mean": (features(8, seed=12) + 1e4, features(8, seed=13) + 1e4),
}


@pytest.mark.parametrize("case", CASES)
def test_the_distance_has_nine_right_digits(case: str) -> None:
    a, b = CASES[case]
    assert frechet_distance(a, b) == pytest.approx(to_fifty_digits(a, b), rel=1e-9)


def test_rank_forty_on_both_sides_with_the_other_divisor() -> None:
    a, b = features(40, seed=14, condition=1e4), features(40, seed=15, condition=1e2)
    assert frechet_distance(a, b, ddof=1) == pytest.approx(to_fifty_digits(a, b, ddof=1), rel=1e-9)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("nearly equal", "large mean")])
def test_from_moments_six_digits_are_right(case: str) -> None:
    a, b = CASES[case]
    moments = [part for rows in (a, b) for part in (rows.mean(axis=0), np.cov(rows.T, ddof=0))]
    assert frechet_from_moments(*moments) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_sets_that_differ_by_rounding_are_still_told_apart_from_equal_ones() -> None:
    a = features(30, seed=16)
    moved = a + 1e-7 * np.random.default_rng(0).normal(size=a.shape)
    assert frechet_distance(a, moved) == pytest.approx(to_fifty_digits(a, moved), rel=1e-6)


def test_gaussians_have_the_closed_form() -> None:
    """Covariances that commute: |m|^2 + sum (s - t)^2."""
    random = np.random.default_rng(17)
    corners = np.concatenate([np.eye(40), -np.eye(40)]) * np.sqrt(40)
    rotation = np.linalg.qr(random.normal(size=(40, 40)))[0]
    s, t, shift = random.uniform(0, 3, 40), random.uniform(0, 3, 40), random.normal(size=40)
    a, b = corners * s @ rotation.T, corners * t @ rotation.T + shift
    wanted = (shift**2).sum() + ((s - t) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-12)
    cov = [(rotation * scale**2) @ rotation.T for scale in (s, t)]
    assert frechet_from_moments(np.zeros(40), cov[0], shift, cov[1]) == pytest.approx(wanted, rel=1e-9)


def test_equal_is_zero_to_the_last_bit() -> None:
    a = features(40, seed=18, condition=1e8)
    assert frechet_distance(a, a.copy()) == 0.0
    assert distance_between(fit_gaussian(a), fit_gaussian(a.copy())) == 0.0
    mean, cov = a.mean(axis=0), np.cov(a.T)
    assert frechet_from_moments(mean, cov, mean.copy(), cov.copy()) == 0.0
    assert 0.0 <= frechet_distance(a, a[::-1]) < 1e-16 * (a**2).sum()


def test_fitted_once_or_twice_is_the_same_bits() -> None:
    a, b = CASES["rank 3 and 40"]
    reference = fit_gaussian(a)
    assert distance_between(reference, fit_gaussian(b)) == frechet_distance(a, b)
    assert np.allclose(reference.covariance, np.cov(a.T, ddof=0), atol=1e-10)


def test_clips_that_are_all_alike_leave_the_means() -> None:
    a, b = np.tile(np.arange(5.0), (8, 1)), np.tile(np.arange(5.0) + 2, (8, 1))
    assert frechet_distance(a, b) == pytest.approx(20.0, rel=1e-12)


def test_what_does_not_fit_together_is_one_sentence() -> None:
    with pytest.raises(TroubleError, match="width 4 against features of width 5"):
        frechet_distance(np.zeros((3, 4)), np.ones((3, 5)))
    with pytest.raises(TroubleError, match="covariance of shape"):
        frechet_from_moments(np.zeros(3), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(TroubleError, match="not symmetric"):
        frechet_from_moments(np.zeros(2), [[1, 2], [0, 1]], np.zeros(2), np.eye(2))
    with pytest.raises(TroubleError, match="NaN"):
        frechet_from_moments([np.nan, 0], np.eye(2), np.zeros(2), np.eye(2))
