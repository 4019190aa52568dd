"""Errors that a user sees as one line each, and the exit codes that go with them.

Every message says what was given, what is allowed, where it stands (``file:line``), and the nearest valid name.
`report_errors` prints them as lines on standard error; only a bug in this project prints a traceback.
"""

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence

__all__ = ["DivergedError", "HpdmError", "InputError", "TroubleError", "did_you_mean", "report_errors"]


class HpdmError(Exception):
    """Base of every error that is reported without a traceback. ``messages`` holds one line per problem."""

    exit_code = 1

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages: tuple[str, ...] = messages

    def __reduce__(self) -> tuple[type["HpdmError"], tuple[str, ...]]:
        return type(self), self.messages


class InputError(HpdmError):
    """The user's input is wrong; nothing was run and nothing was written. Exit code 2."""

    exit_code = 2


class TroubleError(HpdmError):
    """Something went wrong while running; the work done so far is kept. Exit code 1."""

    exit_code = 1


class DivergedError(TroubleError):
    """A loss, a gradient or a weight is not finite. A second run of the same cell would diverge as well."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return `` - did you mean 'x'?`` for the nearest of the ``allowed`` names, or an empty string."""
    nearest = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f" - did you mean '{nearest[0]}'?" if nearest else ""


def report_errors(main: Callable[[Sequence[str] | None], int], arguments: Sequence[str] | None = None) -> int:
    """Run a command's ``main`` and return its exit code, printing one line per reported error.

    Ctrl-C gives 130. Other exceptions are bugs of this project and propagate with their traceback.
    """
    try:
        return main(arguments)
    except HpdmError as error:
        for message in error.messages:
            print(f"error: {message}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
