"""``python -m hpdm_core.plugins list | why FAMILY/KEY | check NAME [--plugin FILE]``."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpdm_core.base.command_line import CommandParser
from hpdm_core.base.errors import InputError, did_you_mean, report_errors
from hpdm_core.config.overrides import parse_set
from hpdm_core.config.problems import MISSING
from hpdm_core.config.schema import Part
from hpdm_core.plugins.families import FAMILIES
from hpdm_core.plugins.manager import PluginInfo, Plugins, Registration, build_plugins
from hpdm_core.plugins.options import described

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 when a check fails, 2 for wrong input."""
    return report_errors(_main, arguments)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="hpdm plugins",
        description="List plugins, show where a part comes from, check whether a plugin keeps its contract.",
    )
    shared = CommandParser(add_help=False)
    shared.add_argument(
        "--plugin",
        metavar="FILE",
        action="append",
        default=[],
        help="a file or module; may be repeated",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", parents=[shared], help="every plugin, its hooks and keys")
    why = commands.add_parser("why", parents=[shared], help="which plugin a part comes from, and its options")
    why.add_argument("part", metavar="FAMILY/KEY")
    check = commands.add_parser(
        "check", parents=[shared], help="the rules of registration and the checks of a part's family"
    )
    check.add_argument("name", metavar="NAME", help="a key, FAMILY/KEY, or a plugin's name")
    check.add_argument(
        "--option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of the part, needed for options without a default; may be repeated",
    )
    return parser


def _main(arguments: Sequence[str] | None) -> int:
    given = _parser().parse_args(arguments)
    plugins = build_plugins(given.plugin)
    match given.command:
        case "list":
            return _list(plugins)
        case "why":
            return _why(plugins, given.part)
        case _:
            return _check(plugins, given.name, given.option)


def _origin(info: PluginInfo | Registration) -> str:
    if info.sha256 is not None:
        return f"sha256:{info.sha256[:12]}"
    return info.version or "unknown"


def _list(plugins: Plugins) -> int:
    console = Console()
    if console.is_terminal:
        table = Table("plugin", "version", "hooks", "keys", show_lines=True)
        for info in plugins.infos:
            keys = f"skipped: {info.skipped}" if info.skipped else "\n".join(info.keys)
            table.add_row(*(Text(cell) for cell in (info.name, _origin(info), "\n".join(info.hooks), keys)))
        console.print(table)
        return 0
    for info in plugins.infos:
        what = f"skipped: {info.skipped}" if info.skipped else " ".join((*info.hooks, *info.keys))
        print(f"{info.name}\t{_origin(info)}\t{what}")
    return 0


def _split(plugins: Plugins, text: str) -> Registration:
    family, slash, key = text.partition("/")
    if not slash:
        matches = [f"{each}/{text}" for each in FAMILIES if text in plugins.keys(each)]
        hint = f" - did you mean '{matches[0]}'?" if matches else f"; families: {', '.join(FAMILIES)}"
        raise InputError(f"'{text}' should be FAMILY/KEY{hint}")
    return plugins.get(family, key)


def _why(plugins: Plugins, text: str) -> int:
    part = _split(plugins, text)
    print(f"{part.family}/{part.name}")
    print(f"  plugin   {part.plugin} ({_origin(part)})")
    print(f"  file     {part.file or 'unknown'}")
    print(f"  source   {part.source}")
    print(f"  place    {FAMILIES[part.family].path} in a study file")
    rows = described(part.options)
    print("  options" + ("  none" if not rows else ""))
    width = max((len(name) for name, _, _ in rows), default=0)
    for name, kind, default in rows:
        given = "required" if default == "required" else f"default {default}"
        print(f"    {name:<{width}}  {kind}, {given}")
    return 0


def _meant(plugins: Plugins, name: str) -> tuple[list[Registration], list[PluginInfo]]:
    """Return the parts and plugins that NAME means."""
    if "/" in name:
        return [_split(plugins, name)], []
    infos = [info for info in plugins.infos if info.name == name]
    texts = [key for info in infos for key in info.keys]
    if not infos:
        texts = [f"{family}/{name}" for family in FAMILIES if name in plugins.keys(family)]
    if not infos and not texts:
        known = [key for family in FAMILIES for key in plugins.keys(family)]
        known += [info.name for info in plugins.infos]
        raise InputError(f"no part and no plugin is called '{name}'{did_you_mean(name, known)}")
    return [_split(plugins, text) for text in texts], infos


def _refuse_wrong(plugins: Plugins, parts: Sequence[Registration], options: Mapping[str, Any]) -> None:
    """Raise InputError for unknown options and wrong values. Missing options are reported as a failed check instead."""
    lines = []
    for part in parts:
        _, problems = plugins.check(part.family, Part(use=part.name, options=dict(options)), ())
        wrong = [problem for problem in problems if not problem.message.startswith(MISSING)]
        lines += [f"--option {problem}" for problem in wrong]
    if lines:
        raise InputError(*lines)


def _check(plugins: Plugins, name: str, options: Sequence[str]) -> int:
    from hpdm_core.testing import run_conformance

    parts, infos = _meant(plugins, name)
    overrides = [parse_set(text, flag="--option") for text in options]
    values = {".".join(str(step) for step in each.path): each.value for each in overrides}
    _refuse_wrong(plugins, parts, values)
    failed = 0
    for info in infos:
        if info.skipped:
            print(f"{info.name}: skipped: {info.skipped}")
            failed += 1
        else:
            print(f"{info.name}: registration ok; hooks: {', '.join(info.hooks)}")
    for part in parts:
        print(f"{part.family}/{part.name} from plugin '{part.plugin}' ({part.file or 'no file'})")
        print("  ok      registration")
        for check, error in run_conformance(plugins, part.family, part.name, values):
            failed += error is not None
            print(f"  ok      {check}" if error is None else f"  FAILED  {check}: {error}", flush=True)
    print(f"{failed} failed" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
