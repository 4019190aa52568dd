"""Computation allocations: how many of the coarsest levels each block runs (HPDM, section 4.3, Table 8)."""

from __future__ import annotations

from hpdm_core.hookspecs import Register, hookimpl

__all__ = ["explicit", "full", "linear"]


def full(blocks: int, levels: int) -> tuple[int, ...]:
    """Return an allocation in which every block runs every level: no adaptive computation."""
    return (levels,) * blocks


def linear(blocks: int, levels: int) -> tuple[int, ...]:
    """Return an allocation that adds levels evenly: block b of B runs round(1 + (L-1) b / (B-1)) levels, ties to even.

    A single block runs all levels. 6 blocks give 1/1/2/2/3/3 for 3 levels and 1/2/2/3/3/4 for 4 levels, as in the
    paper's Table 8.
    """
    if blocks == 1:
        return (levels,)
    return tuple(round(1 + (levels - 1) * block / (blocks - 1)) for block in range(blocks))


def explicit(blocks: int, levels: int, *, levels_per_block: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``levels_per_block`` unchanged: one number per block (`Assembly.levels_per_block` checks it)."""
    return levels_per_block


@hookimpl
def register_computation_allocations(register: Register) -> None:
    """Add the built-in allocations."""
    register("full", full, source="HPDM, Table 3, no adaptive computation")
    register("linear", linear, source="HPDM, section 4.3 and Table 8; the closed form is ours")
    register("explicit", explicit, source="HPDM, Table 8 lists levels per block")
