"""One cell: a configuration, trained once, sampled, evaluated."""

from hpdm_core.cell.cell import Cell, Step
from hpdm_core.cell.keys import Keys

__all__ = ["Cell", "Keys", "Step"]
