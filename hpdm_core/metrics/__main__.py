"""``python -m hpdm_core.metrics COMMAND``: information about weights and protocols; measures nothing."""

import importlib
import sys
from collections.abc import Callable, Sequence

from hpdm_core.base.errors import InputError, did_you_mean, report_errors

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "weights": (
        "hpdm_core.metrics.networks.weights_command",
        "list the known weight files and which of them are missing",
    ),
    "protocols": ("hpdm_core.evaluation.catalogue", "show the known protocols side by side, or one in full"),
    "compare": ("hpdm_core.evaluation.compare", "check whether the numbers in result files are comparable"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in ("-h", "--help"):
        print("usage: python -m hpdm_core.metrics COMMAND ...\n")
        print("\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()))
        return 0
    if not given or given[0] not in COMMANDS:
        named = (
            f"no command '{given[0]}'{did_you_mean(given[0], COMMANDS)}" if given else "no command was given"
        )
        raise InputError(f"{named}; commands: {', '.join(COMMANDS)}")
    command: Callable[[Sequence[str] | None], int] = importlib.import_module(COMMANDS[given[0]][0]).main
    return command(given[1:])


if __name__ == "__main__":
    sys.exit(report_errors(main))
