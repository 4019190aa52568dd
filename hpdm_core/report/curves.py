"""``fakes.png``: a distance over training, one curve per number of fakes, one panel per arm and level."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpdm_core.report.frame import CellRecord, StudyResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "curves_figure", "curves_of"]

PALETTE = ("#c6dbef", "#9ecae1", "#6baed6", "#3182bd", "#08519c", "#08306b")
"""Colours from pale to dark, for few to many fakes."""


@dataclass(frozen=True)
class Curve:
    """The values of one arm, level and number of fakes: step -> mean over the seeds that have it."""

    distance: str
    arm: str
    level: int
    fakes: int
    values: Mapping[int, float]
    seeds: int


def curves_of(results: StudyResults) -> list[Curve]:
    """Return the curves from the metrics' details, by arm, level and number of fakes."""
    found: dict[tuple[str, str, int, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in results.cells:
        for distance, point in _points(cell):
            key = (distance, cell.arm, int(point["level"]), int(point["fakes"]))
            found[key][int(point["step"])].append(float(point["value"]))
    order = {arm: place for place, arm in enumerate(results.arms)}
    return [
        Curve(
            *key,
            values={step: sum(values) / len(values) for step, values in sorted(steps.items())},
            seeds=max(len(values) for values in steps.values()),
        )
        for key, steps in sorted(
            found.items(), key=lambda item: (item[0][0], order[item[0][1]], *item[0][2:])
        )
    ]


def _points(cell: CellRecord) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for result in cell.evaluations.values():
        curves = (result.get("details") or {}).get("curves")
        if isinstance(curves, Mapping):
            yield from ((str(curves.get("distance")), point) for point in curves.get("points", ()))


def curves_figure(results: StudyResults) -> bytes | None:
    """Return the PNG, or None when no metric recorded curves. Panels of one level share their y axis."""
    curves = curves_of(results)
    if not curves:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys((curve.distance, curve.arm) for curve in curves))
    levels = sorted({curve.level for curve in curves})
    names = dict(results.levels)
    figure = Figure(
        figsize=(3.4 * len(levels) + 0.8, 2.9 * len(rows) + 0.9),
        dpi=110,
        facecolor="white",
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(levels), squeeze=False, sharex=True, sharey="col")
    counts = sorted({curve.fakes for curve in curves})
    wide = {level: _wide([curve for curve in curves if curve.level == level]) for level in levels}
    for row, (distance, arm) in enumerate(rows):
        for column, level in enumerate(levels):
            axes = grid[row][column]
            for curve in curves:
                if (curve.distance, curve.arm, curve.level) == (distance, arm, level):
                    _draw(axes, curve, counts)
            if wide[level]:
                axes.set_yscale("log")
            axes.grid(alpha=0.3)
            if row == 0:
                axes.set_title(names.get(level, f"level {level}"), fontsize=10)
            if column == 0:
                axes.set_ylabel(f"{distance}\n{arm}" if len(results.arms) > 1 else distance, fontsize=9)
            if row == len(rows) - 1:
                axes.set_xlabel("training step", fontsize=9)
            axes.tick_params(labelsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, title="fakes", title_fontsize=8)
    seeds = max(curve.seeds for curve in curves)
    figure.suptitle(
        f"{results.study}: distances at different numbers of fakes do not compare; compare within a curve only"
        + (f" (mean of {seeds} seeds)" if seeds > 1 else ""),
        fontsize=10,
    )
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _wide(curves: list[Curve]) -> bool:
    """Whether the values need a logarithmic axis: all positive, over more than a factor of 10."""
    values = [value for curve in curves for value in curve.values.values()]
    return min(values) > 0 and max(values) > 10 * min(values)


def _draw(axes: Axes, curve: Curve, counts: list[int]) -> None:
    place = counts.index(curve.fakes) / max(len(counts) - 1, 1)
    colour = PALETTE[round(place * (len(PALETTE) - 1))]
    steps = list(curve.values)
    axes.plot(
        steps,
        [curve.values[step] for step in steps],
        marker="o",
        markersize=3,
        color=colour,
        label=f"{curve.fakes:,}",
    )
