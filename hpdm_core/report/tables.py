"""Tables of a study, one block per metric: arms as rows, levels as columns, mean and spread over seeds, and differences
paired by seed.

Holes (missing values) are shown and counted. A value near its floor is marked, and a line says so if no difference
exceeds its spread over seeds. Tables of values show their protocol.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hpdm_core.report.efficiency import PREFIX, cost_table, efficiency_tables
from hpdm_core.report.frame import COLUMNS, StudyResults, by_seed
from hpdm_core.report.statistics import CONFIDENCE, Paired, Summary, pair, summarise
from hpdm_core.report.text import HOLE, MARK, Table, number, protocol_text, show, show_pair

__all__ = ["FLOORS", "blind_spots", "headline", "metric_tables"]

FLOORS = 3
"""A distance below this many times its floor counts as not distinguishable from the floor, and a corruption below it as
unseen. If the floor has a ``spread`` (it may be 0 or negative), the limit is the floor plus this many spreads."""
_FLOOR, _CONTROL, _SENSITIVITY = ".floor", ".control", ".sensitivity"
_HEADLINE = "held_out_loss"
_NO_LEVEL = "value"


@dataclass(frozen=True, kw_only=True)
class _Block:
    """The rows of one metric and one variant of it, such as held_out_loss with clean parents."""

    name: str
    metric: str
    rows: pd.DataFrame


def metric_tables(results: StudyResults) -> list[Table]:
    """Return tables of each metric's values and of their differences to the baseline, then of the loss per noise level,
    of costs, and of what the distances see.
    """
    tables = []
    for block in _blocks(results):
        tables.append(_values(results, block))
        if len(results.arms) > 1:
            tables.append(_differences(results, block))
    tables += _per_sigma(results)
    tables += efficiency_tables(results)
    costs = cost_table(results)
    tables += [] if costs is None else [costs]
    sensitivity = _sensitivity(results)
    return tables if sensitivity is None else [*tables, sensitivity]


def headline(results: StudyResults) -> list[str]:
    """Return lines on the held-out loss at the finest level with clean parents: each arm against the baseline."""
    block = next((block for block in _blocks(results) if block.metric == _HEADLINE), None)
    if block is None or not results.levels:
        return []
    level, name = results.levels[-1]
    lines = [
        f"Held-out loss at {name} with clean parents, arm - {results.baseline}, per seed (above 0 = worse):"
    ]
    width = max(map(len, results.arms))
    for arm in results.arms:
        if arm == results.baseline:
            continue
        found = _paired(results, block.rows, arm, level)
        if not found.n:
            lines.append(f"  {arm:<{width}}  {HOLE} no seed that both have")
            continue
        each = "  ".join(f"{value:+.4f} (seed {seed})" for seed, value in found.each.items())
        tail = ""
        if found.n >= 2:
            side = sum(value > 0 for value in found.each.values())
            times = abs(found.mean) / found.spread if found.spread else math.inf
            tail = f"; worse in {side} of {found.n} seeds; mean = {times:.1f} x spread"
        lines.append(f"  {arm:<{width}}  {each}{tail}")
    return lines


def blind_spots(results: StudyResults) -> list[str]:
    """Return a line per distance: the corruptions that change it by less than `FLOORS` units, with the levels."""
    lines = []
    rows = results.frame[results.frame["metric"].str.endswith(_SENSITIVITY)]
    for metric, found in rows.groupby("metric", sort=False):
        distance = str(metric).removesuffix(_SENSITIVITY)
        names = []
        for corruption, moved in found.groupby("corruption", sort=False):
            means = moved.groupby("level")["value"].mean()
            unseen = [name for level, name in results.levels if level in means and not means[level] >= FLOORS]
            if unseen:
                where = "every level" if len(unseen) == len(means) else ", ".join(unseen)
                names.append(f"{corruption} ({where})")
        lines.append(
            f"{distance} is blind to: {'; '.join(names)}." if names else f"{distance} sees every corruption."
        )
    return lines


# Blocks


def _blocks(results: StudyResults) -> list[_Block]:
    frame = results.frame
    if frame.empty:
        return []
    extra = [name for name in frame.columns if name not in COLUMNS and name != "sigma_eff"]
    keep = ~frame["metric"].str.endswith((_FLOOR, _CONTROL, _SENSITIVITY)) & ~frame["metric"].str.startswith(
        ("throughput.", PREFIX)
    )
    if "sigma_eff" in frame:
        keep &= frame["sigma_eff"].isna()
    blocks = []
    for key, rows in frame[keep].groupby(["metric", *extra], sort=False, dropna=False):
        metric, *values = key if isinstance(key, tuple) else (key,)
        named = [f"{value} {name}" for name, value in zip(extra, values, strict=True) if value == value]
        name = ", ".join([str(metric), *named])
        # A metric may be asked for twice, with different options: then separate its rows by protocol.
        twice = rows.duplicated(["arm", "seed", "level"]).any()
        parts = [part for _, part in rows.groupby("protocol", sort=False)] if twice else [rows]
        for number_of, part in enumerate(parts, 1):
            title = name if number_of == 1 else f"{name} ({number_of})"
            blocks.append(_Block(name=title, metric=str(metric), rows=part))
    return sorted(blocks, key=lambda block: (block.metric != _HEADLINE, "noisy" in block.name))


def _columns(results: StudyResults, rows: pd.DataFrame) -> list[tuple[int | None, str]]:
    present = set(rows["level"].dropna().astype(int))
    columns: list[tuple[int | None, str]] = [pair for pair in results.levels if pair[0] in present]
    return [*columns, (None, _NO_LEVEL)] if rows["level"].isna().any() else columns


def _at(rows: pd.DataFrame, level: int | None) -> pd.DataFrame:
    return rows[rows["level"].isna() if level is None else (rows["level"] == level).fillna(False)]


def _summary(rows: pd.DataFrame, arm: str, level: int | None) -> Summary:
    return summarise(by_seed(_at(rows[rows["arm"] == arm], level)))


def _paired(results: StudyResults, rows: pd.DataFrame, arm: str, level: int | None) -> Paired:
    here = _at(rows, level)
    return pair(by_seed(here[here["arm"] == arm]), by_seed(here[here["arm"] == results.baseline]))


# Tables


def _values(results: StudyResults, block: _Block) -> Table:
    columns = _columns(results, block.rows)
    frame = results.frame
    floors = frame[
        (frame["metric"] == block.metric + _FLOOR) & frame["protocol"].isin(block.rows["protocol"].unique())
    ]
    floor = {
        level: float(_at(floors, level)["value"].mean()) for level, _ in columns if len(_at(floors, level))
    }
    spread = {level: _spread(_at(floors, level)) for level in floor}
    cells: dict[str, dict[str, str]] = {}
    marked = False
    for arm in results.arms:
        line = {}
        for level, name in columns:
            found = _summary(block.rows, arm, level)
            low = level in floor and found.n > 0 and _near(found.mean, floor[level], spread[level])
            marked |= low
            line[name] = show(found, planned=len(results.of_arm(arm))) + (MARK if low else "")
        cells[arm] = {**line, **_cost(results, arm)}
    if floor:
        line = {
            name: _floor_text(floor[level], spread[level]) if level in floor else HOLE
            for level, name in columns
        }
        cells["floor (real held-out clips)"] = {**line, "videos/s": "", "parameters": ""}
    cells |= _controls(results, block, columns)
    remarks = [
        f"Mean ± standard deviation over seeds {', '.join(map(str, results.seeds))}."
        if len(results.seeds) > 1
        else f"One seed ({results.seeds[0]}): no spread."
    ]
    if floor or block.metric == _HEADLINE:  # other metrics say in their documentation what is better
        remarks.append("Lower is nearer to the data.")
    if marked:
        limit = (
            f"{FLOORS} times the floor"
            if all(map(math.isnan, spread.values()))
            else f"the floor plus {FLOORS} times its spread (the number after its ±)"
        )
        remarks.append(f"{MARK} below {limit}: not distinguishable from the floor.")
    return Table(
        title=block.name,
        first=_first_line(results, block, columns),
        cells=_table(cells),
        caption=" ".join([*remarks, protocol_text(block.rows["protocol"])]),
    )


def _controls(
    results: StudyResults, block: _Block, columns: list[tuple[int | None, str]]
) -> dict[str, dict[str, str]]:
    """Return a row per control of a distance: the mean over cells for corrupted training clips, equal in all arms."""
    frame = results.frame
    rows = frame[
        (frame["metric"] == block.metric + _CONTROL) & frame["protocol"].isin(block.rows["protocol"].unique())
    ]
    if rows.empty:
        return {}
    cells = {}
    for control, found in rows.groupby("control", sort=False):
        means = {name: _at(found, level)["value"].mean() for level, name in columns}
        line = {name: HOLE if math.isnan(mean) else number(float(mean)) for name, mean in means.items()}
        cells[f"control: training clips, {control}"] = {**line, "videos/s": "", "parameters": ""}
    return cells


def _spread(floors: pd.DataFrame) -> float:
    return float(pd.to_numeric(floors["spread"]).mean()) if "spread" in floors else math.nan


def _near(value: float, floor: float, spread: float) -> bool:
    """Whether ``value`` is not distinguishable from ``floor``; ``spread`` NaN: compare in multiples of the floor."""
    return value < FLOORS * abs(floor) if math.isnan(spread) else value < floor + FLOORS * spread


def _floor_text(floor: float, spread: float) -> str:
    if math.isnan(spread):
        return number(floor)
    larger = max(abs(floor), spread)
    return f"{number(floor, like=larger)} ± {number(spread, like=larger)}"


def _differences(results: StudyResults, block: _Block) -> Table:
    columns = _columns(results, block.rows)
    cells = {
        arm: {name: show_pair(_paired(results, block.rows, arm, level)) for level, name in columns}
        for arm in results.arms
        if arm != results.baseline
    }
    degrees = max(len(results.seeds) - 1, 0)
    return Table(
        title=f"{block.name}: difference to {results.baseline}",
        first=_first_line(results, block, columns),
        cells=_table(cells),
        caption=(
            f"Arm minus {results.baseline}, paired by seed: mean ± standard deviation of the differences, "
            f"[{CONFIDENCE:.0%} interval by Student's t; {degrees} degrees of freedom with all seeds], "
            "n pairs. A paired rank test on three seeds cannot fall below p = 0.25: read the intervals."
        ),
    )


def _first_line(results: StudyResults, block: _Block, columns: list[tuple[int | None, str]]) -> str:
    """Return the warning above a table: missing values, and whether no difference exceeds its spread over seeds."""
    parts = []
    planned = len(results.cells) * len(columns)
    holes = planned - int(block.rows["value"].notna().sum())
    if holes > 0:
        parts.append(f"{holes} of {planned} values missing ({HOLE}, or n below {len(results.seeds)}).")
    others = [arm for arm in results.arms if arm != results.baseline]
    pairs = [_paired(results, block.rows, arm, level) for arm in others for level, _ in columns]
    if others and not any(found.n >= 2 for found in pairs):
        parts.append("Fewer than two seeds to compare: the uncertainty of the differences is unknown.")
    elif others and not any(found.exceeds_spread for found in pairs):
        parts.append(f"No difference to {results.baseline} exceeds its spread over seeds.")
    return " ".join(parts)


def _cost(results: StudyResults, arm: str) -> dict[str, str]:
    trained = [cell for cell in results.of_arm(arm) if cell.train is not None]
    speed = summarise({cell.seed: float(_number(cell.train, "videos_per_second")) for cell in trained})
    sizes = sorted(
        {int(value) for cell in trained if not math.isnan(value := _number(cell.train, "parameters"))}
    )
    return {
        "videos/s": show(speed, planned=len(results.of_arm(arm))),
        "parameters": ", ".join(f"{size:,}" for size in sizes) or HOLE,
    }


def _number(result: Mapping[str, Any] | None, name: str) -> float:
    value = (result or {}).get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def _per_sigma(results: StudyResults) -> list[Table]:
    frame = results.frame
    if "sigma_eff" not in frame or not results.levels:
        return []
    level, name = results.levels[-1]
    tables = []
    rows = frame[(frame["metric"] == _HEADLINE) & frame["sigma_eff"].notna()]
    for parents, found in _at(rows, level).groupby("parents", sort=False):
        cells: dict[str, dict[str, str]] = {}
        for arm in results.arms:
            cells[arm] = {}
            for sigma, part in found.groupby("sigma_eff"):
                summary = summarise(by_seed(part[part["arm"] == arm]))
                cells[arm][f"σ {sigma:g}"] = show(summary, planned=len(results.of_arm(arm)))
        tables.append(
            Table(
                title=f"{_HEADLINE} at {name} per noise level, {parents} parents",
                first="",
                cells=_table(cells),
                caption="σ is sigma_eff, the noise in data units. " + protocol_text(found["protocol"]),
            )
        )
    return tables


def _sensitivity(results: StudyResults) -> Table | None:
    rows = results.frame[results.frame["metric"].str.endswith(_SENSITIVITY)]
    if rows.empty:
        return None
    cells: dict[str, dict[str, str]] = {}
    for (metric, corruption), found in rows.groupby(["metric", "corruption"], sort=False):
        line = {}
        for level, name in results.levels:
            value = float(_at(found, level)["value"].mean())
            line[name] = HOLE if math.isnan(value) else f"{value:.1f}" + ("" if value >= FLOORS else MARK)
        cells[f"{str(metric).removesuffix(_SENSITIVITY)}, {corruption}"] = line
    return Table(
        title="What the distances see",
        first=f"{MARK} blind: changed by less than {FLOORS} units." if rows["value"].min() < FLOORS else "",
        cells=_table(cells),
        caption=(
            "Distance of corrupted real held-out clips from the real training clips. The floor is the "
            "distance of the same clips uncorrupted. A distance that cannot be negative is given in multiples of "
            "the floor; an unbiased one, whose floor may be near 0, as its difference to the floor in multiples of "
            "the floor's spread. See unit in the protocol. " + protocol_text(rows["protocol"])
        ),
    )


def _table(cells: Mapping[str, Mapping[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(list(cells.values()), index=pd.Index(list(cells), name="arm")).fillna("")
