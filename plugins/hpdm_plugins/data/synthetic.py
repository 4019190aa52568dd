"""The dataset `synthetic`: moving textures, computed at any size without files. For tests and timings.

A texture is a sum of plane waves that drift together, with increased contrast, so that it has edges. A class
fixes the direction of the drift and the scale of the texture; phases, colours and speed are random in each clip.
"""

import math
from typing import Annotated, Any

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor

from hpdm_core.base.randomness import generator as keyed
from hpdm_core.data.dataset import Clip, ClipShape, Split, pick
from hpdm_core.data.readers import VideoReader
from hpdm_core.hookspecs import Register, hookimpl

__all__ = ["Synthetic", "register_datasets"]

WAVES = 6
CONTRAST = 2.0
FREQUENCIES = (1.5, 6.0)
"""Cycles per frame width of the coarsest and the finest class."""
SPEEDS = (0.25, 0.75)
"""Frame widths per clip."""


class Synthetic:
    """Drifting textures in ``classes`` classes, whose waves are fixed by ``seed``.

    A clip is a function of (t, y, x) in [0, 1], sampled at the centres of its frames and pixels, so that the same
    clip can be drawn at any resolution. A draw chooses a class uniformly. Held-out clips have the same distribution
    as training clips; no two draws are equal.
    """

    def __init__(
        self,
        clip: ClipShape,
        reader: VideoReader,
        *,
        classes: Annotated[int, Field(gt=0)] = 4,
        seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        self.classes = tuple(f"texture{index}" for index in range(classes))
        self._clip = clip
        self._seed = seed
        self._waves = [self._class_waves(index) for index in range(classes)]

    def _class_waves(self, index: int) -> Tensor:
        """Return the waves of a class, float32 [WAVES, 2]: cycles per frame height and width."""
        share = index / max(len(self.classes) - 1, 1)
        base = FREQUENCIES[0] * (FREQUENCIES[1] / FREQUENCIES[0]) ** share
        stream = keyed("synthetic", self._seed, index)
        angle = 2 * math.pi * torch.rand(WAVES, generator=stream)
        frequency = base * (0.5 + 1.5 * torch.rand(WAVES, generator=stream))
        return torch.stack([frequency * angle.sin(), frequency * angle.cos()], dim=1)

    def draw(self, split: Split, generator: torch.Generator) -> Clip:
        """Return one random clip: video [C, F, H, W] in [-1, 1] and its class."""
        label = pick(len(self.classes), generator)
        phase = torch.rand(WAVES, generator=generator)
        colour = 2 * torch.rand(self._clip.channels, WAVES, generator=generator) - 1
        low, high = SPEEDS
        speed = low + (high - low) * torch.rand((), generator=generator)
        return Clip(self._video(label, phase, colour, speed), label)

    def _video(self, label: int, phase: Tensor, colour: Tensor, speed: Tensor) -> Tensor:
        shape = self._clip
        waves = self._waves[label]
        direction = 2 * math.pi * label / len(self.classes)
        drift = waves @ torch.tensor(
            [math.sin(direction), math.cos(direction)]
        )  # [waves]: cycles per frame width
        t, y, x = ((torch.arange(size) + 0.5) / size for size in (shape.frames, shape.height, shape.width))
        along_t = phase - torch.outer(t, speed * drift)  # [F, waves], in cycles
        along_y = torch.outer(y, waves[:, 0])  # [H, waves]
        rows = 2 * math.pi * (rearrange(along_t, "f k -> f 1 k") + rearrange(along_y, "h k -> 1 h k"))
        columns = 2 * math.pi * torch.outer(x, waves[:, 1])
        # cos(a + b) = cos a cos b - sin a sin b: a matrix product over waves instead of a cosine per pixel.
        weights = rearrange(CONTRAST * colour, "c k -> c 1 1 k")
        left = torch.cat([weights * rows.cos(), -weights * rows.sin()], dim=-1)  # [C, F, H, 2 waves]
        right = torch.cat([columns.cos(), columns.sin()], dim=-1)  # [W, 2 waves]
        return (left @ rearrange(right, "w k -> k w")).tanh_()

    def distinct(self, split: Split) -> list[Clip] | None:
        """Return None, because every clip is new."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return the parameters; there are no files, and the number of clips is infinite (null)."""
        return {
            "name": "synthetic",
            "classes": list(self.classes),
            "seed": self._seed,
            "splits": {split: {"clips": None, "windows": None} for split in ("train", "held_out")},
            "files": {},
            "skipped": [],
        }


@hookimpl
def register_datasets(register: Register) -> None:
    """Add synthetic."""
    register("synthetic", Synthetic, source="this project: drifting sums of plane waves")
