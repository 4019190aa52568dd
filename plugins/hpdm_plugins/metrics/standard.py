"""Metrics: distances on features, the sensitivity of these distances, the held-out loss, and the cost of training."""

from typing import Annotated, Literal

from pydantic import Field

from hpdm_core.config.schema import Later, Part
from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.metrics.distances.frechet import frechet_distance
from hpdm_core.metrics.distances.kernel import kernel_distance
from hpdm_core.metrics.distances.metric import CorruptionCheck, FeatureDistance
from hpdm_core.metrics.efficiency import Efficiency
from hpdm_core.metrics.held_out_loss import SIGMAS, HeldOutLoss
from hpdm_core.metrics.interface import Features
from hpdm_core.metrics.throughput import Throughput

__all__ = ["register_metrics"]

Extractor = Annotated[Part, "feature_extractors"]
Limit = Annotated[int, Field(gt=0)] | None
Controls = Annotated[bool, Later()]
"""Whether the distances of corrupted training clips are reported too."""
RANDOM3D = Part(use="random3d")
FEW_DIMENSIONS = 24


def frechet(
    *,
    extractor: Extractor = RANDOM3D,
    dimensions: Limit = FEW_DIMENSIONS,
    ddof: Literal[0, 1] = 0,
    controls: Controls = False,
) -> FeatureDistance:
    """Return the Frechet distance on ``extractor``.

    ``dimensions``: limit on the number of principal components when clips are few; ``controls``: also report the
    distances of corrupted training clips.
    """

    def measure(first: Features, second: Features) -> float:
        return frechet_distance(first, second, ddof=ddof)

    return FeatureDistance(
        "frechet",
        measure,
        extractor=extractor,
        dimensions=dimensions,
        settings={"ddof": ddof},
        controls=controls,
    )


def kvd(
    *, extractor: Extractor = RANDOM3D, dimensions: Limit = None, controls: Controls = False
) -> FeatureDistance:
    """Return the unbiased kernel distance on ``extractor``.

    It uses all dimensions unless ``dimensions`` is given, because a small number of clips does not bias it.
    ``controls``: also report the distances of corrupted training clips.
    """
    return FeatureDistance(
        "kvd",
        kernel_distance,
        extractor=extractor,
        dimensions=dimensions,
        settings={"kernel": "(x.y/d + 1)^3"},
        unbiased=True,
        controls=controls,
    )


def sensitivity(
    *, distance: Literal["frechet", "kvd"] = "frechet", extractor: Extractor = RANDOM3D
) -> CorruptionCheck:
    """Return the metric: ``distance`` of corrupted real clips on ``extractor``, computed once per study.

    Its unit is the floor (frechet) or the spread of the floor (kvd).
    """
    return CorruptionCheck(
        frechet(extractor=extractor) if distance == "frechet" else kvd(extractor=extractor)
    )


def held_out_loss(
    *,
    patches: Annotated[int, Field(gt=0)] = 64,
    split: Literal["held_out", "train"] = "held_out",
    sigmas: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = SIGMAS,
    self_conditioning: bool = True,
) -> HeldOutLoss:
    """Return the metric: squared error of the denoised estimate on fixed real patches, in data units."""
    return HeldOutLoss(patches=patches, split=split, sigmas=sigmas, self_conditioning=self_conditioning)


def efficiency(
    *,
    memory: Annotated[float, Field(gt=0)] | None = None,
    most: Annotated[int, Field(gt=0)] = 256,
    steps: Annotated[int, Field(gt=0)] = 3,
) -> Efficiency:
    """Return the metric: parameters, FLOPs, memory and speed of a training step; ``memory``: limit in GiB."""
    return Efficiency(memory=memory, most=most, steps=steps)


@hookimpl
def register_metrics(register: Register) -> None:
    """Register the built-in metrics."""
    register(
        "held_out_loss", held_out_loss, source="HPDM: denoising error at fixed sigma_eff on fixed patches"
    )
    register("frechet", frechet, source="Heusel et al. 2017 (1706.08500), on features named in brackets")
    register("kvd", kvd, source="Unterthiner et al. 2018 (1812.01717); Binkowski et al. 2018 (1801.01401)")
    register("sensitivity", sensitivity, source="HPDM: corruptions of real clips, in units of the floor")
    register("throughput", Throughput, source="HPDM: speed, memory, parameters and FLOPs of training")
    register(
        "efficiency", efficiency, source="HPDM, Table 1: memory at batch 1, and speed at the largest batch"
    )
