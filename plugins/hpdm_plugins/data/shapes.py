"""The dataset `shapes`: one coloured shape that moves one way over a dark textured ground, of which everything
is known.

A clip's class says shape, colour and direction (`hpdm_core.data.shapes`); where its path lies, and the phases
of the ground's waves, are free. The metric `attributes` reads all of it back.
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
"""Cycles per short side of the ground's waves, lowest and highest."""
AMPLITUDE = 0.04
"""Of each wave: the ground has a standard deviation of 0.07 and stays within 0.24 of its mean."""
LANES = 16
"""Lanes per short side, by which clips are held out: every third, from the first."""


def is_held_out(position: float) -> bool:
    """Return whether ``position``, in short sides along either axis, lies in a held-out lane."""
    return math.floor(position * LANES) % 3 == 0


class Shapes:
    """Circles, triangles and crosses in red, green and blue, moving left, right, up and down: 36 classes.

    Held out are whole paths. A path is a line, across or down the picture, and the place of its middle. The
    picture is cut into lanes, 16 per short side on either axis. No training clip's line lies in a lane that is
    held out. A held-out clip's does, and the middle of its path lies in such a lane of the other axis too: so
    no training clip takes its path, and none, whichever way it moves, ever has its shape at that middle.

    Options: ``seed`` fixes the directions and frequencies of the ground's waves, whose phases each clip draws;
    ``hold_out`` names classes that training clips never show. Held-out clips show all 36.
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
                    f"data.dataset 'shapes', option hold_out: '{name}' is no class; allowed are COLOUR SHAPE moving "
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
        """Draw the middle of a path, uniformly among those of ``split`` that keep the shape inside."""
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
        """Return None: no two clips are alike."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return the recipe; there is no file, and no end of clips."""
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
