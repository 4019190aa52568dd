import numpy as np
import pytest

from hpdm_core.base.errors import TroubleError
from hpdm_core.metrics.distances.inception_score import inception_score, log_softmax

RNG = np.random.default_rng(3)


def by_definition(probabilities: np.ndarray) -> float:
    """exp of the mean divergence of each prediction from their mean, with 0 log 0 = 0."""
    mean = probabilities.mean(axis=0)
    total = 0.0
    for row in probabilities:
        total += sum(p * np.log(p / q) for p, q in zip(row, mean, strict=True) if p > 0)
    return float(np.exp(total / len(probabilities)))


def test_uniform_predictions_score_one() -> None:
    assert inception_score(np.zeros((50, 101))).mean == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("logit", [60.0, 1e3, 1e30])
def test_certain_and_balanced_predictions_score_the_number_of_classes(logit: float) -> None:
    """Also where every other probability underflows to 0."""
    made = inception_score(np.tile(np.eye(101) * logit, (3, 1)))
    assert made.mean == pytest.approx(101.0, rel=1e-12)
    assert made.std == 0.0


def test_certain_predictions_of_some_classes_score_their_number() -> None:
    assert inception_score(np.eye(101)[[4, 4, 9, 9, 70, 70]] * 1e4).mean == pytest.approx(3.0, rel=1e-12)


def test_equal_predictions_score_one_whatever_they_are() -> None:
    row = RNG.normal(size=(1, 20)) * 300
    assert inception_score(np.repeat(row, 7, axis=0)).mean == pytest.approx(1.0, rel=1e-12)


def test_any_predictions_are_as_defined() -> None:
    logits = RNG.normal(size=(40, 11)) * 3
    probabilities = np.exp(log_softmax(logits))
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(40))
    assert inception_score(logits).mean == pytest.approx(by_definition(probabilities), rel=1e-12)
    assert inception_score(logits + 500).mean == pytest.approx(by_definition(probabilities), rel=1e-12)


def test_probabilities_that_are_zero_give_no_nan() -> None:
    with np.errstate(divide="ignore"):
        logs = np.log(np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    assert inception_score(logs).mean == pytest.approx(by_definition(np.exp(logs)), rel=1e-12)
    extreme = np.array([[0.0, -800.0, -1e5], [-900.0, 0.0, -2.0], [0.0, -1.0, -1e300]])
    assert np.isfinite(inception_score(extreme).mean)


def test_splits_are_cut_as_published() -> None:
    logits = RNG.normal(size=(23, 5)) * 2
    made = inception_score(logits, splits=4)
    edges = [(0, 5), (5, 11), (11, 17), (17, 23)]
    wanted = [inception_score(logits[start:end]).mean for start, end in edges]
    assert made.scores == pytest.approx(wanted, rel=1e-14)
    assert (made.mean, made.std) == pytest.approx((np.mean(wanted), np.std(wanted)))


def test_the_shuffle_is_that_of_the_published_code() -> None:
    """RandomState(42).shuffle on the array of predictions itself."""
    logits = RNG.normal(size=(60, 5)) * 2
    shuffled = logits.copy()
    np.random.RandomState(42).shuffle(shuffled)
    made = inception_score(logits, splits=10, shuffle=True)
    assert made.scores == inception_score(shuffled, splits=10).scores
    assert made.scores != inception_score(logits, splits=10).scores


@pytest.mark.parametrize("epsilon", [1e-7, 1e-20])
def test_constants_inside_the_logarithm_are_the_protocols(epsilon: float) -> None:
    logits = RNG.normal(size=(30, 7)) * 8
    p = np.exp(log_softmax(logits))
    wanted = np.exp((p * (np.log(p + epsilon) - np.log(p.mean(axis=0) + epsilon))).sum(axis=1).mean())
    made = inception_score(logits, epsilon=epsilon).mean
    assert made == pytest.approx(wanted, rel=1e-12)
    apart = abs(made / inception_score(logits).mean - 1)
    assert (apart > 1e-10) == (epsilon == 1e-7)


def test_what_is_no_prediction_is_refused() -> None:
    with pytest.raises(TroubleError, match="shape"):
        inception_score(np.zeros(5))
    with pytest.raises(TroubleError, match="NaN"):
        inception_score([[0.0, np.nan]])
    with pytest.raises(TroubleError, match="NaN or infinity"):
        inception_score([[-np.inf, -np.inf]])
    with pytest.raises(TroubleError, match="10 splits of 4 predictions"):
        inception_score(np.zeros((4, 3)), splits=10)
