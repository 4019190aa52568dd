"""An input scale that grows by the same step from level to level."""

from typing import Annotated

from pydantic import Field

from hpdm_core import hookimpl

Positive = Annotated[float, Field(gt=0)]


def linear_scale(levels: int, *, first: Positive = 1.0, last: Positive = 4.0):
    step = (last - first) / max(levels - 1, 1)
    return [first + step * level for level in range(levels)]


@hookimpl
def register_noise_scalings(register):
    register("linear_scale", linear_scale, source="an example: docs/examples.md")
