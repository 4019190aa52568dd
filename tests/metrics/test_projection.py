import numpy as np
import pytest

from hpdm_core.metrics.distances.projection import dimensions_used, fit_projection

RNG = np.random.default_rng(3)
MIX = RNG.normal(size=(5, 5)) * np.array([1.0, 10.0, 100.0, 0.1, 1.0])


def reference() -> np.ndarray:
    return RNG.normal(size=(400, 5)) @ MIX + np.arange(5.0)


def test_features_are_standardised_on_the_reference_alone() -> None:
    real = reference()
    project = fit_projection(real, scaling="features", dimensions=5)
    assert np.allclose(project(real).mean(0), 0, atol=1e-12)
    assert np.allclose(project(real).std(0), 1)
    assert np.allclose(project(real + real.std(0)).mean(0), 1)


def test_directions_are_whitened() -> None:
    real = reference()
    made = fit_projection(real, scaling="directions", dimensions=5)(real)
    assert np.allclose(np.cov(made.T, ddof=0), np.eye(5), atol=1e-9)


def test_no_scaling_leaves_features_as_they_are() -> None:
    real = reference()
    assert np.array_equal(fit_projection(real, scaling="none", dimensions=5)(real), real)


def test_the_leading_directions_are_kept() -> None:
    base = RNG.normal(size=(300, 1))
    real = np.concatenate([base + 0.01 * RNG.normal(size=(300, 3)), RNG.normal(size=(300, 1))], axis=1)
    made = fit_projection(real, scaling="features", dimensions=1)(real)
    assert made.shape == (300, 1)
    assert abs(np.corrcoef(made[:, 0], base[:, 0])[0, 1]) > 0.99


def test_a_constant_feature_keeps_its_unit() -> None:
    real = reference()
    real[:, 2] = 0.1 + 0.2
    moved = real.copy()
    moved[:, 2] += 1.0
    project = fit_projection(real, scaling="features", dimensions=5)
    assert np.allclose((project(moved) - project(real))[:, 2], 1.0)


@pytest.mark.parametrize(
    ("width", "fakes", "reals", "limit", "kept"),
    [(272, 64, 256, 24, 24), (18, 64, 256, 24, 18), (272, 2720, 3000, 24, 272), (272, 64, 256, None, 272)],
)
def test_dimensions_are_limited_when_clips_are_few(
    width: int, fakes: int, reals: int, limit: int | None, kept: int
) -> None:
    assert dimensions_used(width, fakes=fakes, reals=reals, limit=limit, scaling="features") == kept


@pytest.mark.parametrize(("reals", "kept"), [(256, 18), (71, 17), (8, 2), (3, 1)])
def test_whitening_keeps_four_reference_clips_per_direction(reals: int, kept: int) -> None:
    assert dimensions_used(18, fakes=64, reals=reals, limit=24, scaling="directions") == kept
    assert dimensions_used(18, fakes=64, reals=reals, limit=24, scaling="features") == 18
