"""What commands have in common: a wrong command line is one line on standard error, like every other wrong input."""

import argparse
from typing import NoReturn

from hpdm_core.base.errors import InputError

__all__ = ["CommandParser"]


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are `InputError`, without the usage above them."""

    def error(self, message: str) -> NoReturn:
        """Raise `InputError` with ``message`` and where help is found."""
        raise InputError(f"{message} (see {self.prog} --help)")
