import mpmath
import numpy as np
import pytest
import scipy.linalg

from hpdm_core.base.errors import TroubleError
from hpdm_core.metrics.distances.frechet import frechet_distance
from hpdm_core.metrics.distances.kernel import kernel_distance

RNG = np.random.default_rng(7)


def with_covariance(root: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return points whose mean and covariance (divisor N) are exactly ``mean`` and root root^T."""
    d = len(mean)
    corners = np.concatenate([np.eye(d), -np.eye(d)]) * np.sqrt(d)
    return corners @ root.T + mean


def by_eigenvalues(a: np.ndarray, b: np.ndarray, ddof: int) -> float:
    """The textbook form with eigh in float64."""
    sa, sb = np.cov(a.T, ddof=ddof), np.cov(b.T, ddof=ddof)
    values, vectors = np.linalg.eigh(sa)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ sb @ root), 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sa) + np.trace(sb) - 2 * cross)


def test_diagonal_gaussians_have_the_closed_form() -> None:
    s, t, m = np.array([1.0, 2.0, 5.0]), np.array([3.0, 2.0, 0.5]), np.array([1.0, -2.0, 0.5])
    a, b = with_covariance(np.diag(s), np.zeros(3)), with_covariance(np.diag(t), m)
    assert frechet_distance(a, b) == pytest.approx((m**2).sum() + ((s - t) ** 2).sum(), rel=1e-12)


def test_covariances_that_do_not_commute_agree_with_scipy() -> None:
    a, b = RNG.normal(size=(300, 6)) @ RNG.normal(size=(6, 6)), RNG.normal(size=(200, 6)) + 0.3
    cross = scipy.linalg.sqrtm(np.cov(a.T, ddof=1) @ np.cov(b.T, ddof=1)).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum()
    wanted += np.trace(np.cov(a.T, ddof=1) + np.cov(b.T, ddof=1) - 2 * cross)
    assert frechet_distance(a, b, ddof=1) == pytest.approx(wanted, rel=1e-9)


def test_fewer_samples_than_features_agrees_with_fifty_digits() -> None:
    a, b = RNG.normal(size=(4, 7)), 3 * RNG.normal(size=(5, 7)) + 1
    with mpmath.workdps(60):
        means, covariances = [], []
        for x in (a, b):
            rows = mpmath.matrix(x.tolist())
            n, d = rows.rows, rows.cols
            mean = [mpmath.fsum(rows[i, j] for i in range(n)) / n for j in range(d)]
            centred = mpmath.matrix(n, d)
            for i in range(n):
                for j in range(d):
                    centred[i, j] = rows[i, j] - mean[j]
            means.append(mean)
            covariances.append(centred.T * centred / n)
        # By definition: the square roots of the eigenvalues of the product, most of which are 0.
        roots = mpmath.eig(covariances[0] * covariances[1], left=False, right=False)
        cross = mpmath.fsum(mpmath.sqrt(max(mpmath.re(value), 0)) for value in roots)
        shift = mpmath.fsum((x - y) ** 2 for x, y in zip(*means, strict=True))
        traces = mpmath.fsum(covariance[j, j] for covariance in covariances for j in range(7))
        wanted = float(shift + traces - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("ddof", [0, 1])
def test_ddof_scales_the_covariance_only(ddof: int) -> None:
    a, b = RNG.normal(size=(16, 3)), RNG.normal(size=(20, 3)) @ np.diag([1.0, 2.0, 3.0])
    assert frechet_distance(a, b, ddof=ddof) == pytest.approx(by_eigenvalues(a, b, ddof), rel=1e-8)


def test_equal_inputs_are_exactly_zero_apart() -> None:
    for _ in range(20):  # rounding has either sign
        a = RNG.normal(size=(10, 400)) * 1e3
        assert frechet_distance(a, a.copy()) == 0.0
    assert 0.0 <= frechet_distance(a, a[::-1]) < 1e-6


def test_it_is_symmetric() -> None:
    a, b = RNG.normal(size=(9, 4)), RNG.normal(size=(30, 4)) * 2
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_features_that_are_not_finite_are_refused_with_their_number() -> None:
    a = RNG.normal(size=(5, 2))
    broken = a.copy()
    broken[3, 1] = np.nan
    with pytest.raises(TroubleError, match="1 of 5 feature vectors"):
        frechet_distance(a, broken)


def test_kernel_distance_equals_the_double_sum() -> None:
    x, y = RNG.normal(size=(5, 3)), RNG.normal(size=(4, 3)) + 1

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    within_x = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    within_y = sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    between = sum(k(a, b) for a in x for b in y) / 20
    assert kernel_distance(x, y) == pytest.approx(within_x + within_y - 2 * between, rel=1e-12)


def test_kernel_distance_has_no_bias_of_few_samples() -> None:
    values = [kernel_distance(RNG.normal(size=(6, 2)), RNG.normal(size=(6, 2))) for _ in range(4000)]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    assert min(values) < 0


def test_kernel_distance_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = RNG.normal(size=(11, 3)), RNG.normal(size=(7, 3))
    whole = kernel_distance(x, y)
    monkeypatch.setattr("hpdm_core.metrics.distances.kernel._ROWS", 4)
    assert kernel_distance(x, y) == pytest.approx(whole, rel=1e-12)


def test_one_clip_is_too_few_for_a_kernel_distance() -> None:
    with pytest.raises(TroubleError, match="at least 2 rows"):
        kernel_distance(np.zeros((1, 3)), np.zeros((4, 3)))
