"""Draws clips of moving shapes on a dark background, at any size. The dataset `shapes` and the metric
`attributes` use it.

A clip shows one shape of one colour that moves in one direction at a constant speed. All lengths are in units
of the picture's short side, and time runs from 0 to 1 over the clip, so that the same clip can be drawn at any
resolution. A pixel's value is weighted by the share of it that the shape covers: exactly for axis-aligned
edges, to first order for slanted and curved ones.

Shapes: N pictures, F frames, H height, W width; positions are (down, right) of the shape's centre.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

__all__ = [
    "ATTRIBUTES",
    "CLASSES",
    "COLOURS",
    "DIRECTIONS",
    "GROUND",
    "MARGIN",
    "RADIUS",
    "SHAPES",
    "TRAVEL",
    "Attributes",
    "coverage",
    "frame_times",
    "path",
    "sides",
]

RADIUS = 0.2
"""Half the side of the square that bounds every shape, in short sides: 6.4 of 32 pixels, 1.6 of 8."""
TRAVEL = 0.3
"""How far a shape moves in a clip, in short sides."""
MARGIN = RADIUS + 0.01
"""The smallest distance of a shape's centre from the picture's border, in short sides, at any time."""
GROUND = -0.7
"""The mean value of the background, in every channel."""
COLOURS = {
    "red": (0.9, -0.5, -0.5),
    "green": (-0.5, 0.8, -0.5),
    "blue": (-0.4, -0.2, 0.9),
}
"""Red, green, blue in [-1, 1]. Their differences from the background are nearly orthogonal."""
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""The motion, as signs of (down, right)."""

_ARM = 0.35  # half the width of a cross's arms, in radii


def _circle(down: Tensor, right: Tensor, radius: float) -> Tensor:
    return (radius - (down.square() + right.square()).sqrt() + 0.5).clamp(0, 1)


def _triangle(down: Tensor, right: Tensor, radius: float) -> Tensor:
    """A triangle as wide and as high as the square, tip up; at a corner the coverages of two edges are multiplied."""
    height = down + radius
    left, other = (((height + sign * 2 * right) / 5**0.5 + 0.5).clamp(0, 1) for sign in (1, -1))
    return left * other * (radius - down + 0.5).clamp(0, 1)


def _cross(down: Tensor, right: Tensor, radius: float) -> Tensor:
    long_down, short_down, long_right, short_right = (
        (half - axis.abs() + 0.5).clamp(0, 1) for axis in (down, right) for half in (radius, _ARM * radius)
    )
    return long_down * short_right + short_down * (long_right - short_right)


SHAPES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "circle": _circle,
    "triangle": _triangle,
    "cross": _cross,
}
"""Covered share of pixels that lie ``down`` and ``right`` of the centre, all in pixels. There is no square,
because at 3 pixels it cannot be told from a circle."""


@dataclass(frozen=True)
class Attributes:
    """A clip's attributes: one key each of `SHAPES`, `COLOURS` and `DIRECTIONS`."""

    shape: str
    colour: str
    direction: str

    @property
    def name(self) -> str:
        """The class, such as "red circle moving left"."""
        return f"{self.colour} {self.shape} moving {self.direction}"

    @property
    def caption(self) -> str:
        """The class in a sentence."""
        return f"a {self.name} on a dark ground"

    def video(self, middle: tuple[float, float], ground: Tensor, size: tuple[int, int, int]) -> Tensor:
        """Return the clip [3, F, H, W] of ``size`` (F, H, W), values in [-1, 1].

        ``ground``: the background, which is broadcast to the clip. ``middle``: the shape's position at half
        time, in short sides; its path is centred there.
        """
        frames, height, width = size
        places = path(torch.tensor([middle]), torch.tensor([DIRECTIONS[self.direction]]) * TRAVEL, frames)[0]
        covered = coverage(self.shape, places, (height, width))
        colour = torch.tensor(COLOURS[self.colour])[:, None, None, None]
        return ground + covered * (colour - ground)


ATTRIBUTES = tuple(Attributes(*picked) for picked in product(SHAPES, COLOURS, DIRECTIONS))
"""All combinations, by label."""
CLASSES = tuple(attributes.name for attributes in ATTRIBUTES)


def sides(size: tuple[int, int]) -> tuple[float, float]:
    """Return height and width of a picture of ``size`` (H, W) in short sides: the shorter one is 1."""
    return size[0] / min(size), size[1] / min(size)


def frame_times(frames: int) -> Tensor:
    """Return the time of each frame, [F]: the midpoints of equal parts of a clip that lasts from 0 to 1."""
    return (torch.arange(frames) + 0.5) / frames


def path(middle: Tensor, travel: Tensor, frames: int) -> Tensor:
    """Return positions [N, F, 2] of uniform motions by ``travel`` [N, 2] that are at ``middle`` [N, 2] at half time."""
    return middle[:, None] + (frame_times(frames)[:, None] - 0.5) * travel[:, None]


def coverage(shape: str, places: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the share of each pixel [N, H, W] that ``shape`` covers in pictures of ``size`` (H, W).

    ``places`` [N, 2]: positions of the shape's centre, in short sides.
    """
    unit = min(size)
    down, right = (
        torch.arange(length) + 0.5 - unit * places[:, axis, None] for axis, length in enumerate(size)
    )
    return SHAPES[shape](down[:, :, None], right[:, None, :], unit * RADIUS)
