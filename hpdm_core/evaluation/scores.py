"""Compute a protocol's number from features, with its uncertainty and with warnings about its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.evaluation.extraction import Extracted
from hpdm_core.metrics.distances.frechet import distance_between, fit_gaussian, frechet_distance
from hpdm_core.metrics.distances.inception_score import InceptionScore, inception_score
from hpdm_core.metrics.distances.kernel import kernel_distance
from hpdm_core.metrics.distances.uncertainty import GROUPS, bootstrap, default_counts, extrapolate
from hpdm_core.metrics.interface import Features
from hpdm_core.metrics.protocols.records import ProtocolRecord

__all__ = ["distance_of", "measured", "warnings_about"]

DARK = 64
"""If the brightest value of a side is below this (of 255), its value range is probably wrong."""


def distance_of(record: ProtocolRecord) -> Callable[[Features, Features], float]:
    """Return the function (reals, fakes) -> distance of a record with a distance."""
    if record.measure == "kernel":
        return kernel_distance
    return lambda reals, fakes: frechet_distance(reals, fakes, ddof=record.ddof)


def measured(
    record: ProtocolRecord, reals: Features | None, fakes: Features, *, replicates: int
) -> dict[str, Any]:
    """Return ``value`` and its uncertainty, as JSON.

    ``interval``: a bootstrap interval over the clips of both sides, None with ``replicates`` below 2; ``unlimited``:
    the Frechet distance extrapolated to infinitely many fakes, with its points; ``spread``: for an Inception Score, the
    standard deviation over splits or repeats.
    """
    if record.score is not None:
        return _score(record, fakes, replicates)
    assert reals is not None, "a distance has reals"
    distance = distance_of(record)
    value = distance(reals, fakes)
    made: dict[str, Any] = {"value": value, "interval": None, "unlimited": None}
    if replicates >= 2:
        made["interval"] = asdict(
            bootstrap(distance, reals, fakes, value=value, replicates=replicates, seed=record.seed)
        )
    counts = [count for count in default_counts(len(fakes)) if count > 1 + record.ddof]
    if record.measure == "frechet" and len(set(counts)) >= 3 and len(fakes) >= 2 * GROUPS:
        reference = fit_gaussian(reals, ddof=record.ddof)  # once, not for every subset of the fakes

        def fitted(some: Features) -> float:
            return distance_between(reference, fit_gaussian(some, ddof=record.ddof))

        found = extrapolate(fitted, fakes, counts=counts, seed=record.seed)
        made["unlimited"] = {
            **asdict(found),
            "points": {str(count): point for count, point in found.points.items()},
            "line_is_straight": len(fakes) // 4 > fakes.shape[1],
        }
    return made


def _score(record: ProtocolRecord, logits: Features, replicates: int) -> dict[str, Any]:
    rule = record.score
    assert rule is not None, "asked for above"

    def scores_of(some: Features) -> list[InceptionScore]:
        return [
            inception_score(
                part, splits=rule.splits, shuffle=rule.shuffle == "numpy_42", epsilon=rule.epsilon
            )
            for part in np.array_split(some, rule.repeats)
        ]

    def mean(some: Features) -> float:
        return float(np.mean([score.mean for score in scores_of(some)]))

    scores = scores_of(logits)
    value = float(np.mean([score.mean for score in scores]))
    repeated = len(scores) > 1
    made: dict[str, Any] = {
        "value": value,
        "interval": None,
        "unlimited": None,
        "spread": float(np.std([score.mean for score in scores])) if repeated else scores[0].std,
        "spread_over": f"{len(scores)} repeats" if repeated else f"{rule.splits} splits",
    }
    if replicates >= 2:
        made["interval"] = asdict(
            bootstrap(mean, logits, value=value, replicates=replicates, seed=record.seed)
        )
    return made


def warnings_about(
    record: ProtocolRecord, sides: dict[str, Extracted], *, jpeg: dict[str, bool]
) -> list[str]:
    """Return warnings about a number, one sentence each. ``jpeg``: side -> whether its frames are JPEG files.

    Raises InputError for a side whose values are all 0 or 1, TroubleError for features that are not finite.
    """
    said = []
    for name, made in sides.items():
        width = made.features.shape[1] if made.features.ndim == 2 else 0
        if record.measure == "frechet" and len(made.features) <= width:
            said.append(
                f"{len(made.features)} {name} for {width} features: their covariance is singular, and the value "
                "is unreliable"
            )
        said += _seen(name, made)
    if len(sides) == 2:
        sizes = {
            name: {(each.made_height, each.made_width) for each in made.facts} for name, made in sides.items()
        }
        if sizes["reals"] != sizes["fakes"]:
            said.append(
                f"reals come as {_sizes(sizes['reals'])}, fakes as {_sizes(sizes['fakes'])}: the distance also "
                "measures the difference in sharpness"
            )
        coded = record.fakes.prepare.jpeg_quality is not None
        if len(set(jpeg.values())) > 1 and not coded:
            side = next(name for name, is_jpeg in jpeg.items() if is_jpeg)
            said.append(f"only the {side} are JPEG files: the distance also measures JPEG artefacts")
    return said


def _seen(name: str, made: Extracted) -> list[str]:
    said = []
    most, least = max(each.most for each in made.facts), min(each.least for each in made.facts)
    if most <= 1:
        raise InputError(
            f"{name}: all values of all clips are 0 or 1 after conversion to bytes: videos in [0, 1] were "
            "probably stored as integers; store 0..255, or floats with --value-range"
        )
    if most < DARK:
        said.append(f"{name}: no value is above {most} of 255: is the value range right?")
    if least > 255 - DARK:
        said.append(f"{name}: no value is below {least} of 255: is the value range right?")
    still = sum(each.still for each in made.facts)
    if still:
        said.append(f"{name}: {still} of {len(made.facts)} clips do not move: all of their frames are equal")
    if len({row.tobytes() for row in made.features}) < len(made.features):
        distinct = len({row.tobytes() for row in made.features})
        said.append(f"{name}: only {distinct} of {len(made.features)} clips are different")
    if not np.isfinite(made.features).all():
        raise TroubleError(f"{name}: the detector gave values that are not finite")
    return said


def _sizes(sizes: Sequence[tuple[int, int]] | set[tuple[int, int]]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
