"""Tables and figure of a search, from search.json in the study's folder: budgets, best proposals, the Pareto set."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hpdm_core.base.files import read_json
from hpdm_core.report.text import HOLE, Table, number

__all__ = ["pareto_figure", "pareto_set", "search_tables"]

Proposal = Mapping[str, Any]


def search_tables(folder: Path) -> list[Table]:
    """Return the tables of the search of the study in ``folder``; none when it has no search."""
    search = read_json(folder / "search.json")
    if search is None or not search.get("arms"):
        return []
    tables = [_best_of_arms(search)]
    if len(search["objectives"]) > 1:
        tables.append(_pareto(search))
    return tables


def _best_of_arms(search: Mapping[str, Any]) -> Table:
    first = search["objectives"][0]
    rows: dict[str, dict[str, str]] = {}
    for arm, proposals in search["arms"].items():
        best = _best(proposals, first["direction"])
        states = [each["state"] for each in proposals]
        rows[arm] = {
            "proposals": f"{len(proposals)} of {search['budget']}",
            "done": str(states.count("done")),
            "given up": str(states.count("pruned")),
            "failed": str(states.count("failed")),
            "steps": f"{sum(each.get('steps', 0) for each in proposals):,}",
            "hours": number(sum(each.get("seconds", 0.0) for each in proposals) / 3600),
            first["name"]: HOLE if best is None else number(best["objectives"][0]),
            **{key: HOLE if best is None else _value(best["values"][key]) for key in search["space"]},
        }
    return Table(
        title="Search: the best proposal of each arm",
        first=_warnings(search),
        cells=_frame(rows),
        caption=(
            f"Each arm was tuned on its own with sampler {search['sampler']['use']} and pruner "
            f"{search['pruner']['use']}, {search['budget']} proposals allowed, those given up or failed among them. "
            f"{first['name']} ({first['direction']}d) is the mean over seeds {_listed(search['seeds'])}. The best of "
            "many proposals is biased by its selection, so do not compare arms by this column. "
            f"{_compared(search)} Hours are those of finished stages."
        ),
    )


def _compared(search: Mapping[str, Any]) -> str:
    final, tuned = search["final_seeds"], set(search["seeds"])
    text = f"The arms are compared by their best proposals run with seeds {_listed(final)}"
    shared = [seed for seed in final if seed in tuned]
    if not shared:
        return f"{text}, none of which the search used."
    return f"{text}; the search used {_listed(shared)} of these too, so results on them are optimistic."


def _warnings(search: Mapping[str, Any]) -> str:
    parts = []
    used = {arm: len(proposals) for arm, proposals in search["arms"].items()}
    if len(set(used.values())) > 1:
        parts.append(
            f"The arms have not had the same budget: {', '.join(f'{a} {n}' for a, n in used.items())}."
        )
    unfinished = [
        arm
        for arm, proposals in search["arms"].items()
        if len(proposals) < search["budget"] or any(each["state"] == "running" for each in proposals)
    ]
    if unfinished:
        parts.append(f"The search of {', '.join(unfinished)} has not ended.")
    for arm, proposals in search["arms"].items():
        best = _best(proposals, search["objectives"][0]["direction"])
        if best is None:
            parts.append(f"No proposal of {arm} is done.")
            continue
        edges = [key for key, axis in search["space"].items() if _at_edge(best["values"][key], axis)]
        if edges:
            parts.append(
                f"The best of {arm} lies at the edge of {', '.join(edges)}: better ones may lie beyond."
            )
    return " ".join(parts)


def _at_edge(value: Any, axis: Mapping[str, Any]) -> bool:
    """Whether a number lies within a hundredth of an end of its axis."""
    bounds = axis.get("float") or axis.get("int")
    if bounds is None:
        return False
    low, high, at = (math.log(each) if axis.get("log") else float(each) for each in (*bounds, value))
    return min(at - low, high - at) <= 0.01 * (high - low)


def _pareto(search: Mapping[str, Any]) -> Table:
    names = [each["name"] for each in search["objectives"]]
    members = pareto_set(search)
    rows = {
        f"{arm}#{proposal['number']}": {
            **{name: number(value) for name, value in zip(names, proposal["objectives"], strict=True)},
            **{key: _value(value) for key, value in proposal["values"].items()},
        }
        for arm, proposal in members
    }
    done = sum(each["state"] == "done" for proposals in search["arms"].values() for each in proposals)
    goals = ", ".join(f"{each['name']} {each['direction']}d" for each in search["objectives"])
    return Table(
        title="Search: the Pareto set",
        first="" if rows else "No proposal is done.",
        cells=_frame(rows),
        caption=(
            f"Of {done} proposals of all arms, those that no other proposal dominates: none is at least as good in "
            f"every objective and better in one ({goals}). Values are means over seeds {_listed(search['seeds'])}, "
            "without uncertainty: other seeds may give another set. The arms are compared by their best in "
            f"{names[0]}."
        ),
    )


def pareto_set(search: Mapping[str, Any]) -> list[tuple[str, Proposal]]:
    """Return (arm, proposal) for each proposal that no other dominates, sorted by the first objective."""
    signs = [-1.0 if each["direction"] == "maximize" else 1.0 for each in search["objectives"]]
    done = [
        (arm, each, [sign * value for sign, value in zip(signs, each["objectives"], strict=True)])
        for arm, proposals in search["arms"].items()
        for each in proposals
        if each["state"] == "done"
    ]
    found = [
        (costs, arm, each)
        for arm, each, costs in done
        if not any(
            all(a <= b for a, b in zip(other, costs, strict=True)) and other != costs for _, _, other in done
        )
    ]
    return [(arm, each) for _, arm, each in sorted(found, key=lambda item: item[0])]


def pareto_figure(folder: Path) -> bytes | None:
    """Return a PNG of the first two objectives of every proposal, the Pareto set connected; None for one objective."""
    search = read_json(folder / "search.json")
    if search is None or len(search.get("objectives", ())) < 2:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for arm, proposals in search["arms"].items():
        points = [each["objectives"] for each in proposals if each["state"] == "done"]
        axes.scatter([point[0] for point in points], [point[1] for point in points], label=arm, s=16)
    members = [each["objectives"] for _, each in pareto_set(search)]
    if len(search["objectives"]) == 2:
        axes.plot([at[0] for at in members], [at[1] for at in members], "k-", linewidth=0.8, zorder=0)
    named = [f"{each['name']} ({each['direction']}d)" for each in search["objectives"]]
    axes.set_xlabel(named[0], fontsize=9)
    axes.set_ylabel(named[1], fontsize=9)
    axes.legend(fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _best(proposals: Sequence[Proposal], direction: str) -> Proposal | None:
    sign = -1.0 if direction == "maximize" else 1.0
    done = [each for each in proposals if each["state"] == "done"]
    return min(done, key=lambda each: (sign * each["objectives"][0], each["number"]), default=None)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _frame(rows: Mapping[str, Mapping[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows.values()), index=pd.Index(list(rows), name="arm")).fillna("")
