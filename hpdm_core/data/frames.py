"""From decoded frames to a clip: size, antialiased resizing, cropping, and the range [-1, 1].

Frames are uint8 [..., H, W, 3] as readers give them; clips are uint8 or float32 [C, F, H, W].
"""

import itertools

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from hpdm_core.pyramid import unit_range

__all__ = ["covering_short_side", "crop_offsets", "resize", "scaled_size", "to_pixels", "to_video"]


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return the height and width, in pixels, of a frame whose shorter side is resized to ``short_side``."""
    short = min(height, width)
    return (2 * height * short_side + short) // (2 * short), (2 * width * short_side + short) // (2 * short)


def covering_short_side(height: int, width: int, need_height: int, need_width: int) -> int:
    """Return the smallest short side at which a frame covers ``need_height`` x ``need_width`` pixels."""
    short = min(height, width)
    # Because scaled_size rounds, a short side one pixel below this estimate can be enough.
    guess = max(short * need_height // height, short * need_width // width) - 1
    for side in itertools.count(max(1, guess)):
        resized = scaled_size(height, width, side)
        if resized[0] >= need_height and resized[1] >= need_width:
            break
    return side


def resize(frame: Tensor, short_side: int | None) -> Tensor:
    """Resize one frame, uint8 [H, W, 3], so that its shorter side has ``short_side`` pixels; None keeps it.

    Bilinear with antialiasing: when shrinking, every source pixel contributes, as in area averaging.
    """
    height, width = frame.shape[:2]
    if short_side is None or min(height, width) == short_side:
        return frame
    # Not in uint8: torch's uint8 resizing rounds twice and differs between processors.
    pixels = rearrange(frame, "h w c -> 1 c h w").float()
    size = scaled_size(height, width, short_side)
    resized = functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
    return rearrange(resized.round_().clamp_(0, 255).to(torch.uint8), "1 c h w -> h w c").contiguous()


def crop_offsets(
    size: tuple[int, int], need: tuple[int, int], generator: torch.Generator | None
) -> tuple[int, int]:
    """Return (top, left), in pixels, of a crop of ``need`` (height, width) in a frame of ``size``.

    Uniform over all positions, by two draws from ``generator``; centred when it is None.
    """
    room = [have - wanted for have, wanted in zip(size, need, strict=True)]
    if generator is None:
        return room[0] // 2, room[1] // 2
    top, left = (int(torch.randint(free + 1, (), generator=generator)) for free in room)
    return top, left


def to_pixels(frames: Tensor, *, flip: bool = False) -> Tensor:
    """Return frames, uint8 [F, H, W, C], as a clip, uint8 [C, F, H, W]; ``flip`` mirrors it left-right.

    Without ``flip`` the clip is a view of ``frames``.
    """
    return rearrange(frames.flip(-2) if flip else frames, "f h w c -> c f h w")


def to_video(frames: Tensor, *, flip: bool = False) -> Tensor:
    """Return frames, uint8 [F, H, W, C], as a clip, float32 [C, F, H, W] in [-1, 1]; see `to_pixels`."""
    return unit_range(to_pixels(frames, flip=flip).contiguous())
