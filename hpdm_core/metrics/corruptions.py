"""Corruptions of a real clip that a person sees at once. A distance that hardly changes under one is blind to it.

Each takes one uint8 clip [F, H, W, C] and a generator, and returns a new clip of the same shape.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Generator, Tensor
from torch.nn import functional

__all__ = ["COARSEST", "CORRUPTIONS", "Corruption", "enlarged"]

Corruption = Callable[[Tensor, Generator], Tensor]
COARSEST = "coarsest_level_upsampled"
"""Name of the corruption `enlarged`, which needs the clip's coarsest level besides the clip."""


def blur(clip: Tensor, generator: Generator) -> Tensor:
    """Average 2x2 pixels and enlarge again bilinearly, which removes the finest octave."""
    frames = rearrange(clip, "f h w c -> f c h w").float()
    small = functional.avg_pool2d(frames, 2, ceil_mode=True)
    large = functional.interpolate(small, size=tuple(clip.shape[1:3]), mode="bilinear", align_corners=False)
    return _to_uint8(rearrange(large, "f c h w -> f h w c"))


def noise(clip: Tensor, generator: Generator) -> Tensor:
    """Add white noise of standard deviation 0.1 in units of [-1, 1]."""
    return _to_uint8(clip.float() + 12.75 * torch.randn(clip.shape, generator=generator))


def shuffle(clip: Tensor, generator: Generator) -> Tensor:
    """Put the frames into a random order that differs from the given one."""
    order = torch.randperm(len(clip), generator=generator)
    if len(clip) > 1 and torch.equal(order, torch.arange(len(clip))):
        order = order.roll(1)
    return clip[order]


def freeze(clip: Tensor, generator: Generator) -> Tensor:
    """Repeat one random frame."""
    frame = int(torch.randint(len(clip), (), generator=generator))
    return clip[frame : frame + 1].expand_as(clip).clone()


def swap_tiles(clip: Tensor, generator: Generator) -> Tensor:
    """Exchange two random quarters (in height and width) of the picture in all frames: new edges, the same pixels."""
    height, width = clip.shape[1] // 2, clip.shape[2] // 2
    first, second = torch.randperm(4, generator=generator)[:2].tolist()
    spoiled = clip.clone()
    for target, source in ((first, second), (second, first)):
        spoiled[:, *_quarter(target, height, width)] = clip[:, *_quarter(source, height, width)]
    return spoiled


def enlarged(coarse: Tensor, clip: Tensor) -> Tensor:
    """Enlarge ``coarse`` [f, h, w, C], a clip's coarsest level, to the size of ``clip`` by trilinear interpolation.

    This is the output of a model with a perfect level 0 whose other levels add nothing. On level 0 it is the clip
    itself.
    """
    volume = rearrange(coarse, "f h w c -> 1 c f h w").float()
    size = tuple(clip.shape[:3])
    made = functional.interpolate(volume, size=size, mode="trilinear", align_corners=False)
    return _to_uint8(rearrange(made[0], "c f h w -> f h w c"))


CORRUPTIONS: dict[str, Corruption] = {
    "blur": blur,
    "noise": noise,
    "shuffle": shuffle,
    "freeze": freeze,
    "swap_tiles": swap_tiles,
}


def _quarter(index: int, height: int, width: int) -> tuple[slice, slice]:
    row, column = divmod(index, 2)
    return slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)


def _to_uint8(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)
