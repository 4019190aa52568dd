"""The metric `protocol`: FVD, KVD and Inception Score by a protocol record, with its weights or a substitute."""

from typing import Annotated

from pydantic import Field

from hpdm_core.config.schema import Part
from hpdm_core.evaluation.study_metric import ProtocolMetric
from hpdm_core.hookspecs import Register, hookimpl

__all__ = ["protocol", "register_metrics"]

SUBSTITUTES = (
    Part(use="frechet", options={"extractor": {"use": "random3d"}}),
    Part(use="frechet", options={"extractor": {"use": "statistics"}}),
)


def protocol(
    *,
    name: str,
    level: Annotated[int, Field(ge=0)] | None = None,
    bootstrap: Annotated[int, Field(ge=0)] = 100,
) -> ProtocolMetric:
    """Return the metric for the protocol ``name``, a known one or a file, on ``level`` (null: the level that fits it).

    ``bootstrap``: number of bootstrap replicates for its interval, 0 for none.
    """
    return ProtocolMetric(name, level=level, replicates=bootstrap, substitutes=SUBSTITUTES)


@hookimpl
def register_metrics(register: Register) -> None:
    """Register protocol."""
    register("protocol", protocol, source="published evaluation protocols; see each record's own source")
