"""``python -m hpdm_core.sample``: draw videos from a trained cell to look at."""

import sys

from hpdm_core.base.errors import report_errors
from hpdm_core.sampling.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(report_errors(main))
