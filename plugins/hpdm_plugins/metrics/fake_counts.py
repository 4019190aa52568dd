"""The metric `fake_counts`: a distance over the course of training, at several numbers of fakes (paper, Figure 8)."""

from typing import Annotated

from pydantic import Field

from hpdm_core.config.schema import Part
from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.metrics.fake_counts import FakeCounts

__all__ = ["fake_counts", "register_metrics"]

Extractor = Annotated[Part, "feature_extractors"]
Count = Annotated[int, Field(ge=2)]
RANDOM3D = Part(use="random3d")


def fake_counts(
    *,
    counts: Annotated[tuple[Count, ...], Field(min_length=1)],
    extractor: Extractor = RANDOM3D,
    substitute: Extractor = RANDOM3D,
    dimensions: Annotated[int, Field(gt=0)] | None = None,
) -> FakeCounts:
    """Return the metric: Frechet distance on ``extractor`` at ``counts`` fakes, per checkpoint in ``training.keep``.

    ``substitute``: the extractor that is used while the weights of ``extractor`` are missing; ``dimensions``: as for
    `frechet`.
    """
    return FakeCounts(counts=counts, extractor=extractor, substitute=substitute, dimensions=dimensions)


@hookimpl
def register_metrics(register: Register) -> None:
    """Register fake_counts."""
    register(
        "fake_counts", fake_counts, source="HPDM, Figure 8: FVD against the number of fakes over training"
    )
