import functools

import numpy as np
import pytest

from hpdm_core.base.errors import InputError
from hpdm_core.metrics.distances.frechet import distance_between, fit_gaussian, frechet_distance
from hpdm_core.metrics.distances.kernel import kernel_distance
from hpdm_core.metrics.distances.uncertainty import at_counts, bootstrap, default_counts, extrapolate

REALS = np.random.default_rng(0).normal(size=(4000, 6))


def fakes(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng([7, seed]).normal(size=(count, 6)) * 1.3 + 0.4


def measure():
    reference = fit_gaussian(REALS)
    return lambda features: distance_between(reference, fit_gaussian(features))


def test_the_interval_holds_what_other_clips_of_the_same_kind_give() -> None:
    """Around the expected distance at this number of clips, in about 95 of 100 cases."""
    distance = measure()
    values = [distance(fakes(60, 1000 + seed)) for seed in range(600)]
    expected = np.mean(values)
    made = [bootstrap(distance, fakes(60, seed), replicates=100) for seed in range(120)]
    share = np.mean([interval.low <= expected <= interval.high for interval in made])
    assert 0.85 <= share <= 1.0
    errors = np.mean([interval.standard_error for interval in made])
    assert errors == pytest.approx(np.std(values), rel=0.2)
    # Without taking the replicates' own mean off it would hold almost never: repeated clips move it up.
    shifted = np.mean([interval.value - interval.low for interval in made])
    assert shifted == pytest.approx(2 * errors, rel=0.25)


def test_intervals_are_the_same_each_time_and_follow_their_seed() -> None:
    distance, features = measure(), fakes(40, 0)
    first = bootstrap(distance, features, replicates=20)
    assert first == bootstrap(distance, features, replicates=20)
    assert first != bootstrap(distance, features, replicates=20, seed=1)
    assert first.value == distance(features)
    assert bootstrap(distance, features, replicates=20, value=first.value) == first
    longer = bootstrap(distance, features, replicates=40)
    assert longer.replicates == 40
    narrow = bootstrap(distance, features, replicates=40, level=0.5)
    assert longer.low < narrow.low < narrow.high < longer.high


def test_both_sides_may_be_drawn_again() -> None:
    a, b = fakes(50, 1), REALS[:50]
    both = bootstrap(functools.partial(frechet_distance, ddof=1), b, a, replicates=60)
    one = bootstrap(lambda x: frechet_distance(b, x, ddof=1), a, replicates=60)
    assert both.standard_error > one.standard_error
    assert both.value == one.value


def test_each_set_is_drawn_by_rows_of_its_own() -> None:
    seen = []
    bootstrap(
        lambda a, b: seen.append((a, b)) or 0.0,
        np.arange(30.0)[:, None],
        np.arange(30.0)[:, None],
        replicates=3,
    )
    drawn = seen[1:]
    assert len(drawn) == 3
    for a, b in drawn:
        assert len(a) == len(b) == 30
        assert len(np.unique(a)) < 30  # with replacement
        assert not np.array_equal(a, b)
    assert not np.array_equal(drawn[0][0], drawn[1][0])


def test_more_fakes_a_smaller_distance() -> None:
    """The bias is about c / N: disjoint subsets of each size, averaged."""
    made = at_counts(measure(), fakes(1600, 3), (25, 100, 400))
    values = [interval.value for interval in made.values()]
    assert values[0] > values[1] > values[2]
    assert [interval.replicates for interval in made.values()] == [64, 16, 4]
    truth = 6 * (0.4**2 + 0.3**2)
    assert (values[0] - truth) / (values[1] - truth) == pytest.approx(4, rel=0.5)
    alone = at_counts(measure(), fakes(1600, 3), (1600,))[1600]
    assert alone.value == pytest.approx(measure()(fakes(1600, 3)), rel=1e-9)
    assert np.isnan(alone.standard_error)


def test_the_value_at_infinity_is_the_true_one() -> None:
    """Of Gaussians whose distance is known; within its own error, which is of the right size."""
    many = np.random.default_rng(1).normal(size=(200_000, 24))
    distance = functools.partial(distance_between, fit_gaussian(many))
    truth = 24 * (0.1**2 + 0.3**2)
    made = []
    for seed in range(50):
        judged = np.random.default_rng([8, seed]).normal(size=(400, 24)) * 1.3 + 0.1
        made.append(extrapolate(lambda x: distance(fit_gaussian(x)), judged))
    values = np.array([each.value for each in made])
    errors = np.array([each.standard_error for each in made])
    raw = np.mean([each.points[400] for each in made])
    assert np.mean([each.points[100] for each in made]) > raw > truth + 0.2
    assert abs(values.mean() - truth) < (raw - truth) / 6
    assert errors.mean() == pytest.approx(values.std(), rel=0.35)
    assert np.mean([each.low <= truth <= each.high for each in made]) > 0.8
    assert np.mean([each.slope for each in made]) == pytest.approx(400 * (raw - truth), rel=0.2)


def test_an_unbiased_distance_is_left_where_it_is() -> None:
    judged = fakes(300, 2)
    made = extrapolate(lambda x: kernel_distance(REALS[:500], x), judged)
    assert made.value == pytest.approx(kernel_distance(REALS[:500], judged), abs=2 * made.standard_error)


def test_a_straight_line_is_found_exactly() -> None:
    made = extrapolate(lambda x: 5 + 12 / len(x), np.zeros((240, 1)), counts=(40, 60, 120, 240))
    assert (made.value, made.slope, made.bend) == pytest.approx((5.0, 12.0, 0.0), abs=1e-9)
    assert made.points == pytest.approx({40: 5.3, 60: 5.2, 120: 5.1, 240: 5.05})
    assert made.standard_error == pytest.approx(0.0, abs=1e-9)


def test_a_line_that_bends_is_not_trusted() -> None:
    """5 + 12 / n + 4000 / n^2: the error that the bend makes is within the standard error."""
    made = extrapolate(lambda x: 5 + 12 / len(x) + 4000 / len(x) ** 2, np.zeros((240, 1)))
    assert list(made.points) == [60, 80, 120, 137, 160, 192, 240]
    assert abs(made.value - 5) < made.bend <= made.standard_error < 5 * abs(made.value - 5)
    few = extrapolate(lambda x: 5 + 4000 / len(x) ** 2, np.zeros((240, 1)), counts=(20, 60, 240))
    assert few.bend > 1


def test_few_fakes_per_feature_widen_the_interval_to_the_truth() -> None:
    """Forty features: with 60 fakes the law is not straight, with 600 it is."""
    random = np.random.default_rng(2)
    distance = functools.partial(distance_between, fit_gaussian(random.normal(size=(20_000, 40))))
    truth = 40 * 0.3**2
    bends = {}
    for count in (60, 150, 600):
        made = [
            extrapolate(lambda x: distance(fit_gaussian(x)), random.normal(size=(count, 40)) * 1.3)
            for _ in range(8)
        ]
        assert sum(each.low < truth < each.high for each in made) >= 6
        bends[count] = np.mean([each.bend for each in made])
    assert bends[60] > 3 * bends[150] > 9 * bends[600]


def test_default_counts_reach_from_a_quarter_to_all() -> None:
    assert default_counts(2048) == (512, 682, 1024, 1170, 1365, 1638, 2048)
    assert default_counts(10) == (2, 3, 5, 6, 8, 10)


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(InputError, match="1 to 30"):
        at_counts(measure(), fakes(30, 0), (10, 40))
    with pytest.raises(InputError, match="needed are 3 counts"):
        extrapolate(measure(), fakes(30, 0), counts=(10, 30))
    with pytest.raises(InputError, match="needed are 3 counts and 20 fakes"):
        extrapolate(measure(), fakes(12, 0))
    with pytest.raises(InputError, match="1 replicates"):
        bootstrap(measure(), fakes(30, 0), replicates=1)
