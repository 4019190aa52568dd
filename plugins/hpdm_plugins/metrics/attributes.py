"""The metric `attributes`: measures shape, colour, direction and position in videos of the dataset `shapes`.

Each frame is correlated with templates: every shape at every position of a grid, drawn at full size and downsampled
like the data. For each colour, the frame is projected on the difference between this colour and the background. A
clip's shape and colour are those with the best match over all frames; its direction is that of the straight line
fitted to its positions.

All values are errors; 0 is perfect. Each is reported with the same value of real held-out clips (``.floor``), and
with ``spread``, the standard deviation by chance of the difference between two sets of real clips of these sizes. A
value more than three spreads above the floor is worse than real clips.

Shapes: n clips, F frames, C = 3 channels, K colours, S shapes, Q positions; positions in short sides of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from hpdm_core.base.errors import InputError
from hpdm_core.data.shapes import (
    ATTRIBUTES,
    CLASSES,
    COLOURS,
    DIRECTIONS,
    GROUND,
    MARGIN,
    SHAPES,
    TRAVEL,
    coverage,
    frame_times,
    path,
    sides,
)
from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.pyramid import Pyramid, Triple, downsample
from hpdm_core.sampling.cascade import label_of
from hpdm_core.sampling.files import from_uint8

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.metrics.interface import EvaluationContext, Need, Row

__all__ = ["ReadBack", "Reader", "Reading", "figures", "register_metrics", "spread"]

BATCH = 16  # clips that are processed together
STEP = 1 / 32
"""Distance between template positions, in short sides; a fitted parabola gives positions between them."""
SHARES = ("wrong", "wrong_shape", "wrong_colour", "wrong_direction", "unsteady", "disagree")
"""The errors that are shares of clips or frames, each of which is right or wrong."""

_NAMES = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), "direction": tuple(DIRECTIONS)}
_CONTRASTS = torch.tensor(list(COLOURS.values())) - GROUND  # [K, C]


@dataclass(frozen=True)
class Reading:
    """The measured attributes of n clips of one level.

    ``shape``, ``colour`` and ``direction`` [n] are indices into `SHAPES`, `COLOURS` and `DIRECTIONS`; the direction
    is -1 if the shape moves less than half of `TRAVEL`. ``steady`` [n]: share of frames whose own best match is the
    clip's shape and colour. ``places`` [n, F, 2]: the position in each frame. ``off_path`` [n]: root mean square
    distance of the positions from the fitted line. ``residual`` [n]: root mean square difference between the clip and
    a clip drawn with these attributes on a uniform background, divided by the colour's contrast.
    """

    shape: Tensor
    colour: Tensor
    direction: Tensor
    steady: Tensor
    places: Tensor
    off_path: Tensor
    residual: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Reading]) -> Reading:
        """Return the readings of all ``parts``, one after the other."""
        return cls(
            *(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True))
        )

    @property
    def labels(self) -> Tensor:
        """Return [n, 3]: shape, colour and direction."""
        return torch.stack([self.shape, self.colour, self.direction], dim=1)


class Reader:
    """Measures attributes of clips of ``level`` of ``pyramid``, made by ``downsampling``."""

    def __init__(self, pyramid: Pyramid, level: int, downsampling: str) -> None:
        self._full: Triple = pyramid.video
        self._pitch = pyramid.pitch(level)
        self._downsampling = downsampling
        lengths = sides(self._full[1:])
        rows, columns = (MARGIN + STEP * torch.arange(_steps(length) + 1) for length in lengths)
        self._rows, self._columns = len(rows), len(columns)
        self._lattice = torch.cartesian_prod(rows, columns)  # [Q, 2]
        templates = [
            self._small(coverage(shape, self._lattice, self._full[1:])).flatten(1) for shape in SHAPES
        ]
        self._templates = torch.cat(templates)  # [S Q, pixels]
        self._templates /= self._templates.norm(dim=1, keepdim=True)

    def _small(self, pictures: Tensor) -> Tensor:
        """Downsample [N, H, W] in height and width."""
        return downsample(pictures[:, None], (1, *self._pitch[1:]), self._downsampling)[:, 0]

    def read(self, videos: Tensor) -> Reading:
        """Return the attributes of ``videos``, float32 [n, C, F, H, W] in [-1, 1]."""
        matches = self._match(videos)  # [n, F, K, S, Q]
        best = matches.amax(dim=-1)
        seen = best.sum(dim=1).flatten(1).argmax(dim=1)  # [n], joint index of colour and shape
        steady = (best.flatten(2).argmax(dim=2) == seen[:, None]).float().mean(dim=1)
        colour, shape = seen // len(SHAPES), seen % len(SHAPES)
        here = matches.flatten(2, 3)[torch.arange(len(seen)), :, seen]  # [n, F, Q]
        places = self._places(here)
        middle, travel = _line(places)
        away = places - path(middle, travel, places.shape[1])
        return Reading(
            shape=shape,
            colour=colour,
            direction=_direction(travel),
            steady=steady,
            places=places,
            off_path=away.square().sum(dim=2).mean(dim=1).sqrt(),
            residual=self._residual(videos, shape, colour, middle, travel),
        )

    def _match(self, videos: Tensor) -> Tensor:
        """Correlate with all templates, [n, F, K, S, Q]. The best match does not depend on the shape's contrast.

        The background of a frame is its median in each channel, because a shape covers less than half of the frame.
        """
        pixels = rearrange(videos, "n c f h w -> n f (h w) c")
        above = pixels - pixels.median(dim=2, keepdim=True).values
        towards = _CONTRASTS / _CONTRASTS.norm(dim=1, keepdim=True)
        along = rearrange(above @ towards.T, "n f p k -> n f k p")
        found = along @ self._templates.T
        return found.unflatten(-1, (len(SHAPES), len(self._lattice)))

    def _places(self, matches: Tensor) -> Tensor:
        """Return the positions [n, F, 2] of the best of ``matches`` [n, F, Q], refined by a parabola per axis."""
        best = matches.argmax(dim=-1)
        places = self._lattice[best]
        row, column = best // self._columns, best % self._columns
        peak = matches.gather(-1, best[..., None])[..., 0]
        moves = []
        for at, stride, last in ((row, self._columns, self._rows - 1), (column, 1, self._columns - 1)):
            inside = (at > 0) & (at < last)
            before, after = (
                matches.gather(-1, (best + torch.where(inside, sign * stride, 0))[..., None])[..., 0]
                for sign in (-1, 1)
            )
            bend = (2 * peak - before - after).clamp(min=1e-9)
            moves.append(torch.where(inside, (after - before) / (2 * bend), 0.0).clamp(-0.5, 0.5))
        return places + STEP * torch.stack(moves, dim=-1)

    def _residual(
        self, videos: Tensor, shape: Tensor, colour: Tensor, middle: Tensor, travel: Tensor
    ) -> Tensor:
        """Compare with the clip that has these attributes on a uniform background, downsampled like the data."""
        frames = self._full[0]
        places = path(middle, travel, frames)
        covered = torch.stack(
            [
                coverage(tuple(SHAPES)[index], where, self._full[1:])
                for index, where in zip(shape.tolist(), places, strict=True)
            ]
        )
        covered = downsample(covered, self._pitch, self._downsampling)[:, None]  # [n, 1, F, H, W]
        contrast = _CONTRASTS[colour]
        wanted = GROUND + contrast[:, :, None, None, None] * covered
        error = reduce((videos - wanted).square(), "n c f h w -> n", "mean").sqrt()
        return error / contrast.square().mean(dim=1).sqrt()


def _steps(length: float) -> int:
    """Return how many steps of the template grid fit along a side of ``length``."""
    return math.floor((length - 2 * MARGIN) / STEP + 1e-6)


def _line(places: Tensor) -> tuple[Tensor, Tensor]:
    """Fit uniform motions to positions ``places`` [n, F, 2] by least squares; return midpoints and travels [n, 2]."""
    times = frame_times(places.shape[1]) - 0.5
    middle = places.mean(dim=1)
    travel = torch.einsum("f,nfa->na", times, places) / times.square().sum().clamp(min=1e-9)
    return middle, travel


def _direction(travel: Tensor) -> Tensor:
    """Return the index in `DIRECTIONS` that is nearest to the travels [n, 2]; -1 for less than half of `TRAVEL`."""
    along = travel @ torch.tensor(list(DIRECTIONS.values()), dtype=travel.dtype).T
    far, direction = along.max(dim=1)
    return torch.where(far >= TRAVEL / 2, direction, -1)


def figures(
    readings: Sequence[Reading], labels: Sequence[int] | None, short_side: int
) -> list[dict[str, Tensor]]:
    """Return the errors of each level, coarsest first: name -> value of every clip [n].

    ``labels``: the classes that the clips should show; None leaves out the ``wrong`` values. ``short_side``: in pixels
    of the finest level, for distances, which are given in these pixels.
    """
    found = []
    for level, reading in enumerate(readings):
        here: dict[str, Tensor] = {}
        if labels is not None:
            misread = reading.labels != _positions(labels)
            here["wrong"] = misread.any(dim=1).float()
            here |= {f"wrong_{name}": misread[:, index].float() for index, name in enumerate(_NAMES)}
        here["unsteady"] = 1 - reading.steady
        here["off_path"] = short_side * reading.off_path
        here["residual"] = reading.residual
        if level:
            coarser = readings[level - 1]
            here["disagree"] = (reading.labels != coarser.labels).any(dim=1).float()
            frames = coarser.places.shape[1]
            places = reduce(reading.places, "n (f p) a -> n f a", "mean", f=frames)
            apart = (places - coarser.places).square().sum(dim=2).mean(dim=1).sqrt()
            here["apart"] = short_side * apart
        found.append(here)
    return found


def _positions(labels: Sequence[int]) -> Tensor:
    """Return [n, 3]: shape, colour and direction of each label."""
    wanted = [ATTRIBUTES[label] for label in labels]
    return torch.tensor(
        [[names.index(getattr(each, name)) for name, names in _NAMES.items()] for each in wanted]
    )


def spread(name: str, real: Tensor, clips: int) -> float:
    """Return the standard deviation by chance of: mean of ``name`` over ``clips`` clips, minus its mean over ``real``.

    For a share, this is the standard deviation of a Bernoulli variable with probability (wrong + 1) / (clips + 2)
    (Laplace's rule), so that it is not 0 if no real clip has an error. For other values of a single clip it is NaN.
    """
    if name in SHARES:
        chance = float(real.sum() + 1) / (len(real) + 2)
        deviation = math.sqrt(chance * (1 - chance))
    else:
        deviation = float(real.double().std()) if len(real) > 1 else math.nan
    return deviation * math.sqrt(1 / clips + 1 / len(real))


class ReadBack:
    """The metric; ``dataset`` is the name of the dataset that it can measure."""

    name = "attributes"
    needs: Need = "samples"
    dataset = "shapes"

    def protocol(self, assembly: Assembly) -> dict[str, Any]:
        """See `hpdm_core.metrics.interface.Metric`."""
        if assembly.config.model.classes not in (0, len(CLASSES)):
            raise InputError(
                f"metric attributes: model.classes is {assembly.config.model.classes}; it reads clips of data.dataset "
                f"'shapes', and allowed is {len(CLASSES)}, or 0 for a model without labels"
            )
        samples = assembly.config.evaluation.samples
        return {
            "metric": self.name,
            "reading": f"normalised correlation with every shape at places {STEP} of the short side apart",
            "direction": f"of the line fitted to the places; none below half of {TRAVEL} short sides",
            "residual": "root mean square over the colour's contrast, to the same clip on an even ground",
            "off_path and apart": "root mean square, in pixels of the finest level",
            "disagree and apart": "with the next coarser level",
            "samples": samples,
            "floor": f"{samples} real clips of the held-out split",
            "floor_spread": "standard deviation by chance of the difference of two real sets of these sizes",
            "downsampling": assembly.config.data.downsampling,
        }

    def evaluate(self, context: EvaluationContext) -> list[Row]:
        """Return the mean of every error per level, and its ``.floor`` with ``spread``."""
        assembly = context.assembly
        if tuple(assembly.dataset.classes) != CLASSES:
            raise InputError(
                f"metric attributes: data.dataset '{assembly.config.data.dataset.use}' has no attributes to read; "
                "allowed is 'shapes', or one with its classes"
            )
        count, classes = assembly.config.evaluation.samples, assembly.config.model.classes
        pyramid = assembly.pyramid
        readers = [
            Reader(pyramid, level, assembly.config.data.downsampling) for level in range(pyramid.levels)
        ]
        batches = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
        short_side = min(pyramid.video[1:])
        wanted = [label_of(index, classes) for index in range(count)] if classes else None
        made = ([context.samples(level, batch) for level in range(pyramid.levels)] for batch in batches)
        samples = figures(_read(readers, made), wanted, short_side)
        drawn = [context.reals("held_out", batch) for batch in batches]
        shown = [label for _, labels in drawn for label in labels]
        reals = figures(
            _read(readers, (levels for levels, _ in drawn)), shown if classes else None, short_side
        )
        return list(self._rows(samples, reals))

    def _rows(
        self, samples: Sequence[Mapping[str, Tensor]], reals: Sequence[Mapping[str, Tensor]]
    ) -> Iterator[Row]:
        for level, (found, real) in enumerate(zip(samples, reals, strict=True)):
            for name, values in found.items():
                yield {"metric": f"{self.name}.{name}", "level": level, "value": float(values.mean())}
                yield {
                    "metric": f"{self.name}.{name}.floor",
                    "level": level,
                    "value": float(real[name].mean()),
                    "spread": spread(name, real[name], len(values)),
                }


def _read(readers: Sequence[Reader], batches: Iterator[list[Tensor]]) -> list[Reading]:
    """Measure ``batches`` of clips, uint8 [n, F, H, W, C] per level; return one `Reading` per level."""
    parts: list[list[Reading]] = [[] for _ in readers]
    for levels in batches:
        for reader, videos, read in zip(readers, levels, parts, strict=True):
            read.append(reader.read(from_uint8(videos)))
    return [Reading.joined(read) for read in parts]


def attributes() -> ReadBack:
    """Return the metric of shape, colour, direction and position in videos of the dataset `shapes`."""
    return ReadBack()


@hookimpl
def register_metrics(register: Register) -> None:
    """Add attributes."""
    register("attributes", attributes, source="ours: template matching where the truth is known")
