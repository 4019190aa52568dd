"""Tables of costs: those measured by the metric `efficiency`, and predicted against real costs of trained cells.

Out of memory is written OOM. The paper's Table 1 is shown in separate columns beside ours, as ratios to full
resolution.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

import pandas as pd

from hpdm_core.report.frame import StudyResults
from hpdm_core.report.text import HOLE, Table, number, protocol_text

__all__ = ["PREFIX", "cost_table", "efficiency_tables", "paper_table1"]

PREFIX = "efficiency."
OOM = "OOM"
UNITS = {"training_flops": (1e9, "training GFLOP/video"), "sampling_flops": (1e9, "sampling GFLOP/video")}
MIB, GIB = 2**20, 2**30


def paper_table1() -> dict[str, Any]:
    """Return the paper's Table 1: ``source``, and ``rows`` by the names of arms in table1_efficiency.yaml."""
    text = (resources.files("hpdm_core.report") / "data" / "table1.json").read_text(encoding="utf-8")
    made: dict[str, Any] = json.loads(text)
    return made


def efficiency_tables(results: StudyResults) -> list[Table]:
    """Return a table of the metric `efficiency` and one of its ratios beside the paper's; none without the metric."""
    frame = results.frame
    rows = frame[frame["metric"].str.startswith(PREFIX)]
    if rows.empty:
        return []
    found = {str(arm): _figures(part) for arm, part in rows.groupby("arm", sort=False)}
    return [_measured(results, found, rows["protocol"]), _ratios(results, found)]


def _figures(rows: pd.DataFrame) -> dict[str, float | str]:
    """Return figure -> its mean over seeds, or OOM."""
    made: dict[str, float | str] = {}
    for metric, part in rows.groupby("metric", sort=False):
        name = str(metric).removeprefix(PREFIX)
        made[name] = OOM if (part["outcome"] == OOM).any() else float(part["value"].mean())
    return made


def _measured(results: StudyResults, found: Mapping[str, Mapping[str, Any]], protocols: pd.Series) -> Table:
    cells = {}
    for arm in results.arms:
        figures = found.get(arm, {})
        cells[arm] = {
            "tokens": _shown(figures.get("tokens"), lambda value: f"{value:,.0f}"),
            "parameters": _shown(figures.get("parameters"), lambda value: f"{value:,.0f}"),
            **{
                title: _shown(figures.get(name), lambda value, unit=unit: number(value / unit))
                for name, (unit, title) in UNITS.items()
            },
            "memory, batch 1 (MiB)": _shown(
                figures.get("peak_memory_bytes"), lambda value: f"{value / MIB:,.0f}"
            ),
            "largest batch": _shown(figures.get("batch"), lambda value: f"{value:,.0f}"),
            "videos/s": _shown(figures.get("videos_per_second"), number),
        }
    holes = [arm for arm in results.arms if arm not in found]
    return Table(
        title="What training costs",
        first=f"{len(holes)} of {len(results.arms)} arms missing: {', '.join(holes)}." if holes else "",
        cells=_frame(cells),
        caption=f"{OOM}: out of memory. " + _brief(protocols),
    )


def _ratios(results: StudyResults, found: Mapping[str, Mapping[str, Any]]) -> Table:
    paper = paper_table1()
    cells = {}
    for arm in results.arms:
        reference = paper["rows"].get(arm, {}).get("full", results.baseline)
        ours, full = found.get(arm, {}), found.get(reference, {})
        theirs, their_full = paper["rows"].get(arm, {}), paper["rows"].get(reference, {})
        known = bool(theirs)
        cells[arm] = {
            "ours: memory / full": _ratio(ours.get("peak_memory_bytes"), full.get("peak_memory_bytes")),
            "ours: videos/s / full": _ratio(ours.get("videos_per_second"), full.get("videos_per_second")),
            "ours: FLOPs / full": _ratio(ours.get("training_flops"), full.get("training_flops")),
            "paper: memory / full": _paper(theirs, their_full, "memory_gb") if known else HOLE,
            "paper: videos/s / full": _paper(theirs, their_full, "videos_per_second") if known else HOLE,
        }
    return Table(
        title="Against full resolution, beside the paper's Table 1",
        first="",
        cells=_frame(cells),
        caption=(
            "Each row over the full-resolution network of the same video size. Columns marked paper are the "
            f"paper's own numbers, not measured here: {paper['source']}. A row or its reference that ran out of "
            f"memory is {OOM}. Sizes and machines differ: compare the ratios only."
        ),
    )


def _paper(row: Mapping[str, Any], full: Mapping[str, Any], name: str) -> str:
    return _ratio(*(OOM if each.get(name) is None else each[name] for each in (row, full)))


def _ratio(value: Any, reference: Any) -> str:
    if value is None or reference is None:
        return HOLE
    if OOM in (value, reference):
        return OOM if value == OOM else f"full is {OOM}"
    return HOLE if not reference or math.isnan(value) else f"{value / reference:.3f}"


def _shown(value: Any, text: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return HOLE
    return OOM if value == OOM else str(text(value))


def _brief(protocols: pd.Series) -> str:
    """Return the protocols as text, without probes and levels, which are in the results."""
    kept = []
    for text in protocols.unique():
        facts = json.loads(text)
        kept.append(
            json.dumps({name: value for name, value in facts.items() if name not in ("probes", "levels")})
        )
    return protocol_text(kept)


def cost_table(results: StudyResults) -> Table | None:
    """Return a table of predicted and real costs of training; None if there are no predictions."""
    cells: dict[str, dict[str, str]] = {}
    rates: set[str] = set()
    started = False
    for arm in results.arms:
        trained = [cell.train for cell in results.of_arm(arm) if cell.train and cell.train.get("predicted")]
        if not trained:
            continue
        predicted = [result["predicted"] for result in trained]
        started |= any(_before(result, "flops") > 0 for result in trained)
        rates |= {f"{each['flops_per_second'] / 1e12:.4g} TFLOP/s" for each in predicted}
        devices = sorted({str(result.get("device", "unknown")) for result in trained})
        cells[arm] = {
            "predicted GPU memory (GiB)": _mean(each["memory_bytes"] / GIB for each in predicted),
            "real memory (GiB)": _mean(_value(result, "peak_memory_bytes") / GIB for result in trained),
            "predicted GPU-hours": _mean(_predicted_seconds(result) / 3600 for result in trained),
            "real device-hours": _mean(
                (_value(result, "seconds") + _before(result, "seconds")) * result.get("processes", 1) / 3600
                for result in trained
            ),
            "device": ", ".join(devices),
        }
    if not cells:
        return None
    return Table(
        title="What training was predicted to cost, and what it did cost",
        first="",
        cells=_frame(cells),
        caption=(
            f"Means over seeds. Predicted for one GPU that does {', '.join(sorted(rates))} "
            "(runtime.utilisation of runtime.peak_tflops); real on the device named, in one process's memory: "
            "on a CPU the whole process's, with Python and libraries."
            + (" Hours are with those of the models that an arm started from." if started else "")
        ),
    )


def _predicted_seconds(result: Mapping[str, Any]) -> float:
    predicted = result["predicted"]
    return float(predicted["train_seconds"] + _before(result, "flops") / predicted["flops_per_second"])


def _before(result: Mapping[str, Any], name: str) -> float:
    """Return the cost ``name`` of the models that this one started from."""
    return float(result.get("started_from", {}).get(name, 0.0))


def _value(result: Mapping[str, Any], name: str) -> float:
    value = result.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def _mean(values: Any) -> str:
    found = [value for value in values if not math.isnan(value)]
    return f"{sum(found) / len(found):.3g}" if found else HOLE


def _frame(cells: Mapping[str, Mapping[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(list(cells.values()), index=pd.Index(list(cells), name="arm")).fillna("")
