"""The finest level runs in the last blocks only; every block runs all other levels."""

from typing import Annotated

from pydantic import Field

from hpdm_core import hookimpl


def late_levels(blocks, levels, *, last: Annotated[int, Field(gt=0)] = 1):
    early = max(blocks - last, 0)
    return [max(levels - 1, 1)] * early + [levels] * (blocks - early)


@hookimpl
def register_computation_allocations(register):
    register("late_levels", late_levels, source="an example: docs/examples.md")
