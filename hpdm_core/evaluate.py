"""``python -m hpdm_core.evaluate``: measure two folders of videos by a protocol, or one trained cell."""

import sys

from hpdm_core.errors import report_errors
from hpdm_core.evaluator.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(report_errors(main))
