import math

import numpy as np
import pytest
from scipy import stats

from hpdm_core.report.statistics import pair, summarise


def test_spread_is_the_sample_standard_deviation() -> None:
    found = summarise({0: 1.0, 1: 2.0, 2: 6.0})
    assert (found.mean, found.n) == (3.0, 3)
    assert found.spread == pytest.approx(np.std([1, 2, 6], ddof=1))


def test_one_value_has_no_spread_and_none_has_nothing() -> None:
    assert math.isnan(summarise({0: 1.0}).spread)
    assert (summarise({}).n, math.isnan(summarise({}).mean)) == (0, True)
    assert summarise({0: 1.0, 1: math.nan}).n == 1


def test_differences_are_paired_by_seed() -> None:
    found = pair({0: 1.5, 1: 2.4, 2: 9.0}, {2: 8.0, 1: 2.0, 0: 1.0, 3: 77.0})
    assert found.each == {0: 0.5, 1: pytest.approx(0.4), 2: 1.0}
    assert found.exceeds_spread


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    arm, baseline = [1.5, 2.4, 9.0], [1.0, 2.0, 8.0]
    wanted = stats.ttest_rel(arm, baseline).confidence_interval(0.95)
    found = pair(dict(enumerate(arm)), dict(enumerate(baseline)))
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_a_difference_below_its_spread_does_not_exceed_it() -> None:
    assert not pair({0: 1.0, 1: -0.9}, {0: 0.0, 1: 0.0}).exceeds_spread
    assert not pair({0: 5.0}, {0: 0.0}).exceeds_spread
