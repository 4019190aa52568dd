"""The learning rate at its corners."""

import pytest

from hpdm_core.training.optimizer.schedule import default_ema_halflife, learning_rate


@pytest.mark.parametrize(
    ("done", "expected"),
    [(0, 0.0), (1, 0.0005), (5, 0.0025), (10, 0.005), (30, 0.0025), (50, 0.0)],
)
def test_warmup_then_cosine(done: int, expected: float) -> None:
    assert learning_rate(done, peak=0.005, warmup=10, steps=50) == pytest.approx(expected, abs=1e-12)


def test_without_warmup_the_first_update_has_the_peak_and_none_is_wasted() -> None:
    assert learning_rate(0, peak=0.1, warmup=0, steps=1) == 0.1
    assert all(learning_rate(done, peak=0.1, warmup=0, steps=7) > 0 for done in range(7))


def test_a_warmup_as_long_as_the_run_or_longer() -> None:
    assert learning_rate(7, peak=0.1, warmup=8, steps=8) == pytest.approx(0.0875)
    assert learning_rate(8, peak=0.1, warmup=8, steps=8) == 0.1
    assert learning_rate(4, peak=0.1, warmup=16, steps=8) == pytest.approx(0.025)


def test_it_never_rises_after_the_warmup() -> None:
    rates = [learning_rate(done, peak=1.0, warmup=4, steps=20) for done in range(21)]
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize(("steps", "expected"), [(250, 15.0), (100_000, 6000.0), (65_000, 3900.0)])
def test_halflife_of_the_average(steps: int, expected: float) -> None:
    assert default_ema_halflife(steps) == pytest.approx(expected)
