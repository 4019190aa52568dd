"""The learning rate over a run: linear warm-up from 0 to the peak, then a cosine to 0 (paper, table 8)."""

import math

__all__ = ["default_ema_halflife", "learning_rate"]


def learning_rate(done: int, *, peak: float, warmup: int, steps: int) -> float:
    """Return the learning rate after ``done`` of ``steps`` updates; update k uses ``done = k - 1``.

    ``learning_rate(0)`` is 0 with a warm-up and ``peak`` without, ``learning_rate(warmup)`` is ``peak``,
    ``learning_rate(steps)`` is 0. A warm-up longer than the run never reaches the peak.
    """
    if done < warmup:
        return peak * done / warmup
    if done >= steps:
        return 0.0 if steps > warmup else peak
    return peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (steps - warmup)))


def default_ema_halflife(steps: int) -> float:
    """Return the half-life of the weight average in steps: 6000 (Snap Video), at most 0.06 of a short run."""
    return min(6000.0, 0.06 * steps)
