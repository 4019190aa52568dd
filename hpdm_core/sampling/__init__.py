"""Sampling: the tiled cascade over the levels, cached contexts, and samples as files."""

from hpdm_core.sampling.cascade import sample
from hpdm_core.solver import Solver

__all__ = ["Solver", "sample"]
