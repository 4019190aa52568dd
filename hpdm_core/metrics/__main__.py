"""``python -m hpdm_core.metrics COMMAND``: what there is to say about metrics without measuring anything."""

import importlib
import sys
from collections.abc import Callable, Sequence

from hpdm_core.base.errors import InputError, did_you_mean, report_errors

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "weights": (
        "hpdm_core.metrics.networks.weights_command",
        "which files of weights are known, and what is here",
    ),
    "protocols": ("hpdm_core.evaluation.catalogue", "the known protocols side by side, or one whole"),
    "compare": ("hpdm_core.evaluation.compare", "may the numbers of these result files stand in one column?"),
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
