"""The dataset `shapes`: one coloured shape that moves in one direction over a dark textured background.

A clip's class determines shape, colour and direction (`hpdm_core.data.shapes`); the position of its path and the
phases of the background's waves are random. The metric `attributes` measures the attributes in generated videos.
"""

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hpdm_core.base.errors import InputError, did_you_mean
from hpdm_core.base.randomness import generator as keyed
from hpdm_core.data.dataset import Clip, ClipShape, Split, pick, require_rgb
from hpdm_core.data.readers import VideoReader
from hpdm_core.data.shapes import ATTRIBUTES, CLASSES, DIRECTIONS, GROUND, MARGIN, TRAVEL, sides
from hpdm_core.hookspecs import Register, hookimpl

__all__ = ["Shapes", "is_held_out", "register_datasets"]

WAVES = 6
FREQUENCIES = (1.0, 4.0)
"""Cycles per short side of the background's waves, lowest and highest."""
AMPLITUDE = 0.04
"""Of each wave: the background has a standard deviation of 0.07 and stays within 0.24 of its mean."""
LANES = 16
"""Lanes per short side. Every third lane, starting with the first, is held out."""


def is_held_out(position: float) -> bool:
    """Return whether ``position``, in short sides along either axis, lies in a held-out lane."""
    return math.floor(position * LANES) % 3 == 0


class Shapes:
    """Circles, triangles and crosses in red, green and blue, moving left, right, up and down: 36 classes.

    Whole paths are held out. A path is a horizontal or vertical line with a midpoint. Each axis is divided into lanes,
    16 per short side, and every third lane is held out. The line of a training clip never lies in a held-out lane. The
    line of a held-out clip does, and its midpoint lies in a held-out lane of the other axis as well. So no training
    clip has the same path, and no training clip, in any direction, ever has its shape at that midpoint.

    Options: ``seed`` fixes the directions and frequencies of the background's waves, whose phases are random in each
    clip; ``hold_out`` names classes that training clips never show. Held-out clips show all 36 classes.
    """

    classes = CLASSES
    captions = tuple(attributes.caption for attributes in ATTRIBUTES)
    """A sentence for each class, by label."""

    def __init__(
        self,
        clip: ClipShape,
        reader: VideoReader,
        *,
        seed: Annotated[int, Field(ge=0)] = 0,
        hold_out: tuple[str, ...] = (),
    ) -> None:
        require_rgb("shapes", clip)
        for name in hold_out:
            if name not in CLASSES:
                raise InputError(
                    f"data.dataset 'shapes', option hold_out: '{name}' is not a class; allowed are COLOUR SHAPE moving "
                    f"DIRECTION, such as '{CLASSES[0]}'{did_you_mean(name, CLASSES)}"
                )
        kept = [label for label, name in enumerate(CLASSES) if name not in hold_out]
        if not kept:
            raise InputError(
                f"data.dataset 'shapes', option hold_out: all {len(CLASSES)} classes were given, none is left to train"
            )
        self._labels: dict[Split, list[int]] = {"train": kept, "held_out": list(range(len(CLASSES)))}
        self._clip = clip
        self._seed = seed
        stream = keyed("shapes", seed)
        angle = 2 * math.pi * torch.rand(WAVES, generator=stream)
        low, high = FREQUENCIES
        frequency = 2 * math.pi * (low + (high - low) * torch.rand(WAVES, generator=stream))
        down, right = (
            torch.outer(frequency * along, (torch.arange(length) + 0.5) / min(clip.height, clip.width))
            for along, length in ((angle.sin(), clip.height), (angle.cos(), clip.width))
        )
        self._angles = down[:, :, None] + right[:, None, :]  # [WAVES, H, W], in radians

    def draw(self, split: Split, generator: torch.Generator) -> Clip:
        """Return one random clip: video [3, F, H, W] in [-1, 1] and its class."""
        labels, shape = self._labels[split], self._clip
        label = labels[pick(len(labels), generator)]
        middle = self._middle(split, ATTRIBUTES[label].direction, generator)
        phases = 2 * math.pi * torch.rand(WAVES, 1, 1, generator=generator)
        ground = GROUND + AMPLITUDE * (self._angles + phases).cos().sum(dim=0)
        video: Tensor = ATTRIBUTES[label].video(middle, ground, (shape.frames, shape.height, shape.width))
        return Clip(video, label)

    def _middle(self, split: Split, direction: str, generator: torch.Generator) -> tuple[float, float]:
        """Draw the midpoint of a path, uniformly among those of ``split`` that keep the shape inside the picture."""
        found = []
        for side, moves in zip(
            sides((self._clip.height, self._clip.width)), DIRECTIONS[direction], strict=True
        ):
            border = MARGIN + (TRAVEL / 2 if moves else 0)
            while True:
                place = border + (side - 2 * border) * float(torch.rand((), generator=generator))
                if is_held_out(place) if split == "held_out" else moves or not is_held_out(place):
                    break
            found.append(place)
        return found[0], found[1]

    def distinct(self, split: Split) -> list[Clip] | None:
        """Return None, because every clip is new."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return the parameters; there are no files, and the number of clips is infinite (null)."""
        return {
            "name": "shapes",
            "classes": list(self.classes),
            "seed": self._seed,
            "never_trained": [
                name for label, name in enumerate(CLASSES) if label not in self._labels["train"]
            ],
            "splits": {split: {"clips": None, "windows": None} for split in ("train", "held_out")},
            "held_out": f"paths in every third of {LANES} lanes per short side",
            "files": {},
            "skipped": [],
        }


@hookimpl
def register_datasets(register: Register) -> None:
    """Add shapes."""
    register("shapes", Shapes, source="this project: moving shapes whose attributes can be read back")
