"""``python -m hpdm_core.metrics protocols``: show the known protocols side by side, or one in full."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from tabulate import tabulate

from hpdm_core.base.command_line import CommandParser
from hpdm_core.config.loader import load_yaml
from hpdm_core.metrics.protocols.records import (
    ProtocolRecord,
    SideRule,
    known_protocols,
    load_record,
    record_from,
)
from hpdm_core.plugins import Plugins, build_plugins

__all__ = ["known_records", "main", "side_by_side"]


def known_records(plugins: Plugins) -> list[ProtocolRecord]:
    """Return every protocol that plugins ship."""
    return [record_from(load_yaml(file), plugins) for file in known_protocols(plugins).values()]


def side_by_side(records: Iterable[ProtocolRecord]) -> str:
    """Return a Markdown table with a row per protocol and its main properties."""
    rows = [
        {
            "protocol": f"`{record.name}`",
            "number": record.title,
            "detector": _detector(record),
            "frames": str(record.frames),
            "reals": "–" if record.reals is None else _side(record.reals),
            "fakes": _side(record.fakes),
            "size, codec": _prepared(record),
            "N -": str(record.ddof) if record.measure == "frechet" else "–",
        }
        for record in records
    ]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _detector(record: ProtocolRecord) -> str:
    options = record.detector.options
    words = [record.detector.use]
    if "weights" in options:
        words.append(Path(str(options["weights"])).name)
    if "epsilon" in options and not str(options["weights"]).endswith("torchscript.pt"):
        words.append(f"eps {options['epsilon']:g}")
    if "resize" in options:
        words.append(str(options["resize"]))
    if record.score is not None:
        words.append(f"{record.score.splits} splits")
    return ", ".join(words)


def _side(rule: SideRule) -> str:
    words = [
        str(rule.count),
        {"first": "", "random": "random", "random_windows": "random windows"}[rule.choose],
    ]
    if rule.count != "all" and rule.choose == "first":
        words[0] = f"first {rule.count}"
    if rule.split is not None:
        words.append(f"of {rule.split}")
    if rule.choose != "random_windows":
        words.append("at a random frame" if rule.offset == "random" else "from frame 0")
    if rule.stride > 1:
        words.append(f"stride {rule.stride}")
    return " ".join(filter(None, words))


def _prepared(record: ProtocolRecord) -> str:
    rule = (record.reals or record.fakes).prepare
    size = {"stored": "as stored", "as_fakes": "as the fakes"}.get(str(rule.size))
    words = [size or "x".join(map(str, rule.size))]
    if rule.size != "stored":
        words.append(rule.resize)
    if rule.average != (1, 1, 1):
        words.append(f"mean of {'x'.join(map(str, rule.average))}")
    if rule.jpeg_quality is not None:
        words.append(f"JPEG {rule.jpeg_quality}")
    return ", ".join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = CommandParser(
        prog="python -m hpdm_core.metrics protocols",
        description="Show the known protocols side by side, or one in full.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a protocol's name, or a file")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE", dest="plugins", help="use a plugin"
    )
    given = parser.parse_args(arguments)
    plugins = build_plugins(given.plugins)
    if given.name is None:
        print(side_by_side(known_records(plugins)))
    else:
        record = load_record(given.name, plugins)
        print(
            yaml.safe_dump(record.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110),
            end="",
        )
    return 0
