"""One cell: a configuration that is trained once, sampled and evaluated."""

from hpdm_core.cell.cell import Cell, Step
from hpdm_core.cell.keys import Keys

__all__ = ["Cell", "Keys", "Step"]
