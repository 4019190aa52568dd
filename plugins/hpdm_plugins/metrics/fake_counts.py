"""The metric `fake_counts`: how a distance falls over training, at several numbers of fakes (the paper's Figure 8)."""

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
    """Frechet distance on ``extractor`` at ``counts`` fakes, of every checkpoint that ``training.keep`` names.

    ``substitute`` is used while the extractor's weights are missing; ``dimensions`` as for frechet.
    """
    return FakeCounts(counts=counts, extractor=extractor, substitute=substitute, dimensions=dimensions)


@hookimpl
def register_metrics(register: Register) -> None:
    """Register fake_counts."""
    register(
        "fake_counts", fake_counts, source="HPDM, Figure 8: FVD against the number of fakes over training"
    )
