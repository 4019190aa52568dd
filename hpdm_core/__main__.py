"""The console script: ``hpdm COMMAND ...`` is ``python -m hpdm_core.COMMAND ...``."""

import importlib
import sys
from collections.abc import Callable, Sequence

from hpdm_core.base.errors import InputError, did_you_mean, report_errors

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "study": ("hpdm_core.study.__main__", "run a study file: train, sample, evaluate, report"),
    "plugins": ("hpdm_core.plugins.__main__", "list plugins, say where a part comes from, check one"),
    "sample": ("hpdm_core.sample", "draw videos from a trained cell"),
    "export": ("hpdm_core.export", "write a trained cell as one file to give away"),
    "evaluate": ("hpdm_core.evaluate", "measure a folder of videos, or a trained cell"),
    "metrics": ("hpdm_core.metrics.__main__", "protocols side by side, results compared, known weights"),
    "weights": (
        "hpdm_core.metrics.networks.weights_command",
        "list the known weight files and which of them are missing",
    ),
    "report": ("hpdm_core.report.__main__", "rebuild the report of a study"),
}


def _usage() -> str:
    lines = ["usage: hpdm COMMAND ...   (hpdm COMMAND --help says more)", ""]
    lines += [f"  {name:<10}{help_text}" for name, (_, help_text) in COMMANDS.items()]
    return "\n".join(lines)


def _dispatch(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0
    name, *rest = given
    if name not in COMMANDS:
        raise InputError(
            f"no command '{name}'{did_you_mean(name, COMMANDS)}; commands: {', '.join(COMMANDS)}"
        )
    command: Callable[[Sequence[str] | None], int] = importlib.import_module(COMMANDS[name][0]).main
    return command(rest)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 trouble, 2 wrong input, 130 interrupted."""
    return report_errors(_dispatch, arguments)


if __name__ == "__main__":
    sys.exit(main())
