"""Every rule against a loop over pixels, written from its description."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hpdm_core.base.errors import InputError
from hpdm_core.metrics.networks.preprocessing import (
    RESIZE_RULES,
    aligned_corners,
    cubic_then_crop,
    legacy_bilinear,
    pixels,
    short_side_then_crop,
    squash,
    unchanged,
)


def clip(frames: int, height: int, width: int) -> Tensor:
    return 255 * torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(height))


def linear(line: np.ndarray, place: float) -> float:
    """Read a line of pixels at a place between them; beyond the ends the last one is repeated."""
    place = min(max(place, 0.0), len(line) - 1)
    low = math.floor(place)
    high = min(low + 1, len(line) - 1)
    return float(line[low] * (1 - (place - low)) + line[high] * (place - low))


def cubic(line: np.ndarray, place: float) -> float:
    """Keys' kernel with a = -0.75 over four pixels."""
    a = -0.75

    def weight(distance: float) -> float:
        x = abs(distance)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    low = math.floor(place)
    taps = range(low - 1, low + 3)
    return sum(float(line[min(max(tap, 0), len(line) - 1)]) * weight(place - tap) for tap in taps)


def by_loop(frame: np.ndarray, size: tuple[int, int], read, places) -> np.ndarray:
    """Rows first, then columns; ``places(index, length, wanted)`` says where an output pixel reads."""
    height, width = size
    rows = np.stack(
        [
            [read(frame[:, column], places(row, frame.shape[0], height)) for column in range(frame.shape[1])]
            for row in range(height)
        ]
    )
    return np.stack(
        [
            [read(rows[row], places(column, frame.shape[1], width)) for column in range(width)]
            for row in range(height)
        ]
    )


def halves(index: int, length: int, wanted: int) -> float:
    return (index + 0.5) * length / wanted - 0.5


def from_the_corner(index: int, length: int, wanted: int) -> float:
    return index * length / wanted


def corners(index: int, length: int, wanted: int) -> float:
    return index * (length - 1) / (wanted - 1)


SIZES = [(5, 7), (16, 24), (9, 4), (30, 8), (6, 11)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("rule", "places"),
    [(squash, halves), (legacy_bilinear, from_the_corner), (aligned_corners, corners)],
    ids=["squash", "legacy", "corners"],
)
def test_the_linear_rules(rule, places, size: tuple[int, int]) -> None:
    videos = clip(2, *size)
    made = rule(videos, 11)
    assert made.shape == (1, 3, 2, 11, 11)
    for frame in range(2):
        wanted = by_loop(videos[0, 1, frame].double().numpy(), (11, 11), linear, places)
        assert np.allclose(made[0, 1, frame].numpy(), wanted, atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_short_side_then_the_middle(size: tuple[int, int]) -> None:
    videos = clip(1, *size)
    height, width = size
    scale = 10 / min(size)
    large = (10, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), 10)
    wanted = by_loop(videos[0, 2, 0].double().numpy(), large, linear, halves)
    top, left = (large[0] - 10) // 2, (large[1] - 10) // 2
    made = short_side_then_crop(videos, 10)
    assert np.allclose(made[0, 2, 0].numpy(), wanted[top : top + 10, left : left + 10], atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_cubic_then_the_middle(size: tuple[int, int]) -> None:
    videos = clip(1, *size)
    wanted = by_loop(videos[0, 0, 0].double().numpy(), (16, 16), cubic, halves)
    made = cubic_then_crop(videos, 14)
    assert np.allclose(made[0, 0, 0].numpy(), wanted[1:15, 1:15], atol=1e-3)


def test_tgan_sizes() -> None:
    assert cubic_then_crop(clip(1, 64, 64), 112).shape == (1, 3, 1, 112, 112)


@pytest.mark.parametrize("name", [name for name in RESIZE_RULES if name != "none"])
def test_time_and_constant_pictures_stay(name: str) -> None:
    """Frames do not mix, and a flat frame keeps its value: weights add up to one."""
    videos = torch.arange(5.0).reshape(1, 1, 5, 1, 1).expand(2, 3, 5, 9, 13) * 50
    made = RESIZE_RULES[name](videos, 28)
    assert made.shape == (2, 3, 5, 28, 28)
    assert torch.allclose(made, videos[..., :1, :1].expand_as(made), atol=1e-3)


@pytest.mark.parametrize("name", [name for name in RESIZE_RULES if name not in ("none", "cubic_then_crop")])
def test_the_right_size_is_left_alone(name: str) -> None:
    videos = clip(2, 12, 12)
    assert torch.allclose(RESIZE_RULES[name](videos, 12), videos, atol=1e-4)


def test_trilinear_with_kept_frames_is_the_same_as_by_frame() -> None:
    """What the published TorchScript file is taken to do."""
    videos = clip(9, 20, 30)
    whole = torch.nn.functional.interpolate(videos, (9, 24, 24), mode="trilinear", align_corners=False)
    assert torch.allclose(squash(videos, 24), whole, atol=1e-3)


def test_none_wants_the_size_itself() -> None:
    videos = clip(1, 12, 12)
    assert unchanged(videos, 12) is videos
    with pytest.raises(InputError, match="frames of 12x12; allowed is 14x14"):
        unchanged(videos, 14)


def test_pixels_are_uint8_and_keep_their_scale() -> None:
    given = torch.randint(0, 256, (2, 3, 4, 5, 3), dtype=torch.uint8)
    made = pixels(given)
    assert made.dtype == torch.float32
    assert torch.equal(made[1, 2, 0], given[1, 0, ..., 2].float())
    with pytest.raises(InputError, match=r"torch.float32; allowed is uint8"):
        pixels(given.float())
