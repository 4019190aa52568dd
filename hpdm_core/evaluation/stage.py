"""The evaluate stage: one metric on one cell, its rows and its protocol as JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpdm_core.config.schema import Part
from hpdm_core.evaluation.context import CellContext
from hpdm_core.metrics.interface import resolution

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.metrics.interface import Metric

__all__ = ["evaluate_metric"]


def evaluate_metric(
    assembly: Assembly,
    part: Part,
    *,
    model_path: Path | None = None,
    samples_folder: Path | None = None,
    train_result: Mapping[str, Any] | None = None,
    store_folder: Path | None = None,
) -> dict[str, Any]:
    """Measure the metric ``part`` and return its result, as JSON.

    ``store_folder``: the evaluation's own folder in the store, evaluations/<key>/; features of real clips are stored in
    features/ of the store. The result holds ``metric``, ``needs``, ``rows`` (each with ``metric``, ``level``,
    ``resolution``, ``value`` and its own columns), ``protocol`` (everything that the values depend on, and facts found
    while measuring) and, if the metric gives any, ``details`` of this cell.
    """
    started = time.monotonic()
    metric: Metric = assembly.make("metrics", part)
    context = CellContext(
        assembly,
        model_path=model_path,
        samples_folder=samples_folder,
        train_result=train_result,
        cache=None if store_folder is None else store_folder.parent.parent / "features",
    )
    sizes = [resolution(assembly.pyramid.size(level)) for level in range(assembly.pyramid.levels)]
    rows = []
    for row in metric.evaluate(context):
        level, value = row.get("level"), row["value"]
        finite = value is not None and math.isfinite(value)
        rows.append(
            {**row, "value": value if finite else None, "resolution": None if level is None else sizes[level]}
        )
    return {
        "metric": metric.name,
        "needs": metric.needs,
        "part": part.model_dump(mode="json"),
        "rows": rows,
        "protocol": {**metric.protocol(assembly), "levels": sizes, **context.facts},
        **({"details": context.details} if context.details else {}),
        "seconds": time.monotonic() - started,
    }
