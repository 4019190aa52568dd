"""Results of evaluations: the result file, its text, and the comparison of several files.

A number is shown under its protocol and the identity of its record. Two numbers share a column only if their records
are equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from hpdm_core.base.errors import InputError
from hpdm_core.evaluation.run import Evaluation
from hpdm_core.metrics.protocols.records import differences, leaves

__all__ = ["FORMAT", "comparison", "name_of", "read_results", "table", "text_of", "to_json"]

FORMAT = 1


def to_json(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the content of the file that ``--out`` writes."""
    return {"format": FORMAT, "results": [each.result for each in evaluations]}


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the results in the file ``path``. Raises InputError when it is not a result file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from error
    results = data.get("results") if isinstance(data, dict) else None
    fields = ("protocol", "record", "identity", "value")
    if not isinstance(results, list) or not all(
        isinstance(each, dict) and all(field in each for field in fields) for each in results
    ):
        raise InputError(f"{path}: holds no results of an evaluation; allowed is a file that --out wrote")
    return results


def name_of(result: Mapping[str, Any]) -> str:
    """Return the protocol's name, with its modifications if there are any."""
    modified = result.get("modified") or ()
    return f"{result['protocol']}, modified: {', '.join(modified)}" if modified else str(result["protocol"])


def column(result: Mapping[str, Any]) -> str:
    """Return the heading of a result's column: title, protocol and the identity of its record."""
    mark = " (modified)" if result.get("modified") else ""
    return f"{result.get('title', 'value')}\n{result['protocol']}{mark}\nrecord {result['identity']}"


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the numbers as a table with a column per protocol."""
    lines = [_lines(result) for result in results]
    names = dict.fromkeys(name for each in lines for name in each)
    rows = [[name, *(each.get(name, "") for each in lines)] for name in names]
    return tabulate(rows, headers=["", *map(column, results)], disable_numparse=True)


def _lines(result: Mapping[str, Any]) -> dict[str, str]:
    made = {"value": _number(result["value"])}
    interval, unlimited = result.get("interval"), result.get("unlimited")
    if interval:
        made[f"{interval['level']:.0%} interval (bootstrap over clips)"] = (
            f"{_number(interval['low'])} to {_number(interval['high'])}"
        )
    if unlimited:
        rough = "" if unlimited["line_is_straight"] else " (too few fakes for a straight line)"
        made["extrapolated to infinitely many fakes"] = (
            f"{_number(unlimited['value'])} ± {_number(unlimited['standard_error'])}{rough}"
        )
    if result.get("spread") is not None:
        made[f"standard deviation over {result['spread_over']}"] = _number(result["spread"])
    for name, side in result.get("sides", {}).items():
        made[f"clips of {name}"] = str(side["clips"])
    return made


def _number(value: float) -> str:
    return f"{value:.6g}"


def text_of(result: Mapping[str, Any]) -> str:
    """Return a number's warnings, quirks, choices and record as lines of text."""
    lines = [f"{name_of(result)} (record {result['identity']})"]
    lines += [f"  warning: {said}" for said in result.get("warnings", ())]
    record = result["record"]
    lines += [f"  quirk of the protocol: {said}" for said in record.get("quirks", ())]
    lines += [f"  left open by its source, chosen here: {said}" for said in record.get("choices", ())]
    lines += [f"  {field}: {_plain(value)}" for field, value in leaves(record) if field not in _TOLD]
    return "\n".join(lines)


_TOLD = ("quirks", "choices", "name", "format")


def comparison(files: Sequence[Path]) -> str:
    """Return the numbers of several result files, one column per record, and the fields in which records differ."""
    rows: dict[str, dict[str, str]] = {}
    heads: dict[str, Mapping[str, Any]] = {}
    for file in files:
        for result in read_results(file):
            heads.setdefault(str(result["identity"]), result)
            cells = rows.setdefault(str(file), {})
            again = cells.get(str(result["identity"]))
            cells[str(result["identity"])] = ", ".join(filter(None, (again, _number(result["value"]))))
    shown = [
        tabulate(
            [[name, *(cells.get(key, "") for key in heads)] for name, cells in rows.items()],
            headers=["", *(column(result) for result in heads.values())],
            disable_numparse=True,
        )
    ]
    results = list(heads.values())
    if len(results) == 1:
        shown.append("the records are equal: these numbers compare")
    for first, second in _pairs(results):
        shown.append(
            f"{name_of(first)} ({first['identity']}) and {name_of(second)} ({second['identity']}) do not compare; "
            "their records differ in:"
        )
        shown.append(
            "\n".join(
                f"  {field}: {_plain(a)} | {_plain(b)}"
                for field, a, b in differences(first["record"], second["record"])
            )
        )
    return "\n\n".join(shown)


def _pairs(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield the first result paired with each other one."""
    yield from ((results[0], other) for other in results[1:])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
