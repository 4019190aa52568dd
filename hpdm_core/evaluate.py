"""``python -m hpdm_core.evaluate``: measure two folders of videos by a protocol, or one trained cell."""

import sys

from hpdm_core.base.errors import report_errors
from hpdm_core.evaluation.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(report_errors(main))
