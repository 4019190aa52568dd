"""Format numbers, protocols and tables as text, Markdown and LaTeX."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hpdm_core.report.statistics import Paired, Summary

__all__ = ["HOLE", "MARK", "Table", "number", "protocol_text", "show", "show_pair", "to_latex", "to_markdown"]

HOLE = "–"
MARK = "†"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text cells; ``first`` is a warning under the title, "" if there is none."""

    title: str
    first: str
    cells: pd.DataFrame
    caption: str


def number(value: float, *, like: float | None = None) -> str:
    """Return ``value`` with four significant digits, or with as many decimals as ``like`` would have."""
    if math.isnan(value):
        return HOLE
    size = abs(value if like is None else like)
    decimals = 4 if size == 0 or not math.isfinite(size) else 3 - math.floor(math.log10(size))
    return f"{value:,.{min(max(decimals, 0), 6)}f}"


def show(summary: Summary, *, planned: int) -> str:
    """Return ``mean ± spread``, with n where it is less than ``planned``."""
    if not summary.n:
        return HOLE
    text = number(summary.mean)
    if summary.n > 1:
        text += f" ± {number(summary.spread, like=summary.mean)}"
    return text if summary.n == planned else f"{text} (n={summary.n})"


def show_pair(found: Paired) -> str:
    """Return ``mean ± spread [low, high] n=3``."""
    if not found.n:
        return HOLE
    sign = "+" if found.mean > 0 else ""
    text = sign + number(found.mean)
    if found.n > 1:
        low, high = number(found.low, like=found.mean), number(found.high, like=found.mean)
        text += f" ± {number(found.spread, like=found.mean)} [{low}, {high}]"
    return f"{text} n={found.n}"


def protocol_text(protocols: Iterable[str]) -> str:
    """Return a protocol as a sentence, with long hashes cut to 12 digits.

    If there are several protocols, the sentence says so and shows the first.
    """
    distinct = list(dict.fromkeys(protocols))
    if not distinct:
        return "Protocol: unknown."
    text = "; ".join(f"{name} {_plain(value)}" for name, value in json.loads(distinct[0]).items())
    if len(distinct) > 1:
        return f"Protocol: {len(distinct)} different ones in this table; the first is: {text}."
    return f"Protocol: {text}."


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_plain(item)}" for name, item in value.items()) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,}", value):
        return value[:12]
    return "none" if value is None else str(value)


def to_markdown(table: Table) -> str:
    """Return a table as Markdown."""
    body = table.cells.to_markdown(disable_numparse=True, stralign="left")
    return "\n\n".join(part for part in (f"## {table.title}", table.first, body, table.caption) if part)


def to_latex(table: Table) -> str:
    """Return a table as LaTeX with booktabs rules and special characters escaped."""
    style = table.cells.style.format(escape="latex").format_index(escape="latex", axis=0)
    style = style.format_index(escape="latex", axis=1)
    caption = _escape(" ".join(part for part in (f"{table.title}.", table.first, table.caption) if part))
    text = style.to_latex(
        hrules=True,
        caption=caption,
        column_format="l" + "r" * len(table.cells.columns),
        position_float="centering",
    )
    return _symbols(str(text))


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(sign, "\\" + sign if sign in "&%$#_{}" else sign) for sign in text)


def _symbols(text: str) -> str:
    for sign, command in (("±", r"$\pm$"), (HOLE, "--"), ("σ", r"$\sigma$"), (MARK, r"$^\dagger$")):
        text = text.replace(sign, command)
    return text
