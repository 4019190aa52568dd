"""The Inception Score, ``exp(mean_n KL(p_n || mean_n p_n))``, from log-probabilities in float64.

The mean of the probabilities is computed from logarithms, so nothing under- or overflows; a probability of 0
contributes 0. The score lies between 1 (all predictions alike) and the number of classes. The protocol sets the splits,
the shuffling, and the constant that some tools add inside the logarithm.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import RandomState

from hpdm_core.base.errors import TroubleError
from hpdm_core.metrics.interface import Features

__all__ = ["SHUFFLE_SEED", "InceptionScore", "inception_score", "log_softmax"]

SHUFFLE_SEED = 42
"""Seed of numpy's legacy RandomState with which StyleGAN-V shuffles the predictions before it splits them."""


@dataclass(frozen=True)
class InceptionScore:
    """``mean`` and population standard deviation ``std`` over the ``scores`` of the splits."""

    mean: float
    std: float
    scores: tuple[float, ...]


def log_softmax(logits: Any) -> Features:
    """Return the log-probabilities [n, c] of ``logits`` [n, c]; log-probabilities are returned unchanged."""
    values = np.asarray(logits, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise TroubleError(
            f"inception score: predictions of shape {list(values.shape)}; wanted is [n, classes]"
        )
    if np.isnan(values).any() or np.isposinf(values).any() or np.isneginf(values).all(axis=1).any():
        raise TroubleError("inception score: predictions with NaN or infinity")
    shifted = values - values.max(axis=1, keepdims=True)
    made: Features = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return made


def inception_score(
    logits: Any, *, splits: int = 1, shuffle: bool = False, epsilon: float = 0.0
) -> InceptionScore:
    """Return the score of predictions ``logits`` [n, c], logits or log-probabilities.

    Split i holds the predictions i n // splits to (i + 1) n // splits, if ``shuffle`` is set after a shuffle by
    ``RandomState(42)`` (StyleGAN-V: 10 splits, shuffled). ``epsilon`` is added inside both logarithms (TGAN 1e-7,
    TGAN2 1e-20). Raises TroubleError for fewer predictions than splits, and for a wrong shape, NaN or infinity.
    """
    logs = log_softmax(logits)
    if not 1 <= splits <= len(logs):
        raise TroubleError(f"inception score: {splits} splits of {len(logs)} predictions")
    if shuffle:
        order = np.arange(len(logs))
        RandomState(SHUFFLE_SEED).shuffle(order)
        logs = logs[order]
    edges = [index * len(logs) // splits for index in range(splits + 1)]
    scores = [_score(logs[start:end], epsilon) for start, end in itertools.pairwise(edges)]
    return InceptionScore(mean=float(np.mean(scores)), std=float(np.std(scores)), scores=tuple(scores))


def _score(logs: Features, epsilon: float) -> float:
    probabilities = np.exp(logs)
    if epsilon:
        gap = np.log(probabilities + epsilon) - np.log(probabilities.mean(axis=0) + epsilon)
    else:
        top = logs.max(axis=0)
        top = np.where(np.isneginf(top), 0.0, top)
        with np.errstate(divide="ignore"):
            together = top + np.log(np.exp(logs - top).mean(axis=0))
        # 0 log 0 counts as 0; where all predictions are 0, their mean is 0 too
        gap = np.where(np.isneginf(logs), 0.0, logs) - np.where(np.isneginf(together), 0.0, together)
    return float(np.exp((probabilities * gap).sum(axis=1).mean()))
