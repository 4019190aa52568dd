"""The argument parser of all commands: a wrong command line prints one line on standard error, as other wrong input."""

import argparse
from typing import NoReturn

from hpdm_core.base.errors import InputError

__all__ = ["CommandParser"]


class CommandParser(argparse.ArgumentParser):
    """A parser that raises `InputError` for a wrong command line and does not print the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise `InputError` with ``message`` and a pointer to ``--help``."""
        raise InputError(f"{message} (see {self.prog} --help)")
