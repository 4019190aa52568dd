"""The interface of datasets: short windows of video, drawn one at a time from a given random generator.

Not here: batches, levels and patches (training), and datasets made of files (`hpdm_core.data.file_clips`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import generator
from hpdm_core.pyramid import unit_range

__all__ = ["NO_LABEL", "Clip", "ClipDataset", "ClipShape", "Split", "fixed_clips", "pick", "require_rgb"]

Split = Literal["train", "held_out"]

NO_LABEL = -1
"""The label of a clip without a class; the model's null condition."""


@dataclass(frozen=True)
class ClipShape:
    """The size of every clip of a dataset: frames, height and width in pixels, colour channels."""

    frames: int
    height: int
    width: int
    channels: int = 3


class Clip:
    """One window of video [C, F, H, W]: float32 in [-1, 1], or uint8, 0 to 255, as decoded.

    uint8 takes a quarter of the memory, and training converts only the pixels that it uses to float32.
    ``label``: a class index, or -1 for none.
    """

    def __init__(self, video: Tensor, label: int = NO_LABEL) -> None:
        self.pixels = video
        """The video as given to the constructor: float32 or uint8."""
        self.label = label

    @cached_property
    def video(self) -> Tensor:
        """The whole window, float32 [C, F, H, W] in [-1, 1]."""
        if self.pixels.dtype != torch.uint8:
            return self.pixels
        return unit_range(self.pixels.contiguous())


@runtime_checkable
class ClipDataset(Protocol):
    """A source of clips of one shape, in two splits that share no frame. Several threads may call it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label; empty when clips have no label."""

    def draw(self, split: Split, generator: torch.Generator) -> Clip:
        """Return one random clip of ``split``.

        The result depends on the state of ``generator`` alone, not on earlier draws, so that a resumed run
        continues exactly. Raises TroubleError when the clips no longer exist.
        """

    def distinct(self, split: Split) -> list[Clip] | None:
        """Return every clip of ``split`` if it is a small fixed set, else None (crops and windows vary)."""

    def describe(self) -> dict[str, Any]:
        """Return where the clips come from, as JSON.

        ``name``; ``splits``: per split the numbers of clips and windows; ``files``: names with a fingerprint
        of their content; ``skipped``: files that cannot be used, each with the reason; ``stride``: the step
        between the frames of a clip, given where it is not 1.
        """


def pick(count: int, generator: torch.Generator) -> int:
    """Return a uniform random integer in [0, ``count``)."""
    return int(torch.randint(count, (), generator=generator))


def fixed_clips(dataset: ClipDataset, split: Split, number: int, stream: str) -> list[Clip]:
    """Return ``number`` clips of ``split`` that are the same in every run, arm and seed.

    Clip ``i`` is drawn from the stream ("evaluation", ``stream``, ``split``, i): a larger number extends the
    list.
    """
    return [dataset.draw(split, generator("evaluation", stream, split, index)) for index in range(number)]


def require_rgb(name: str, clip: ClipShape) -> None:
    """Raise InputError unless ``clip`` asks for the three channels that the dataset ``name`` has."""
    if clip.channels != 3:
        raise InputError(
            f"model.channels: {clip.channels} was given; the dataset '{name}' has 3 (red, green, blue)"
        )
