import pytest
import torch

from hpdm_core.base.randomness import generator
from hpdm_core.data.frames import covering_short_side, crop_offsets, resize, scaled_size, to_video


def test_scaled_size_keeps_the_shape():
    assert scaled_size(720, 1280, 64) == (64, 114)
    assert scaled_size(1280, 720, 64) == (114, 64)


@pytest.mark.parametrize("size", [(720, 1280), (144, 176), (90, 31), (64, 64), (7, 300)])
@pytest.mark.parametrize("need", [(64, 64), (16, 48), (50, 9), (1, 1)])
def test_covering_short_side_is_the_smallest_that_covers(size, need):
    side = covering_short_side(*size, *need)
    covers = [
        all(have >= wanted for have, wanted in zip(scaled_size(*size, tried), need, strict=True))
        for tried in (side - 1, side)
        if tried
    ]
    assert covers[-1]
    assert not any(covers[:-1])


def test_resize_averages_when_shrinking():
    frame = torch.zeros(8, 12, 3, dtype=torch.uint8)
    frame[:, ::4] = frame[:, 3::4] = 200
    small = resize(frame, 2)
    assert small.shape == (2, 3, 3)
    assert small.dtype == torch.uint8
    # Without antialiasing the two middle columns of each four would be picked: 0 everywhere.
    assert (small.float() - 100).abs().max() <= 40


def test_resize_keeps_a_frame_of_the_right_size():
    frame = torch.zeros(4, 6, 3, dtype=torch.uint8)
    assert resize(frame, 4) is frame
    assert resize(frame, None) is frame


def test_crop_offsets_reach_both_edges_and_the_centre():
    stream = generator("test_crop")
    drawn = {crop_offsets((6, 9), (4, 8), stream) for _ in range(200)}
    assert drawn == {(top, left) for top in range(3) for left in range(2)}
    assert crop_offsets((6, 9), (4, 8), None) == (1, 0)


def test_to_video_maps_bytes_to_the_unit_range_and_back():
    frames = torch.arange(256, dtype=torch.uint8).reshape(2, 4, 32, 1).expand(2, 4, 32, 3)
    video = to_video(frames)
    assert video.shape == (3, 2, 4, 32)
    assert (video.min(), video.max()) == (-1, 1)
    assert torch.equal(((video + 1) * 127.5).round().to(torch.uint8)[0, 1, 2], frames[1, 2, :, 0])


def test_bytes_keep_their_bits_in_float32():
    """Models were trained on these numbers: x / 127.5 - 1 rounds otherwise than (x - 127.5) / 127.5."""
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 256, 1)
    assert torch.equal(to_video(frames).flatten(), torch.arange(256.0) / 127.5 - 1)


def test_flip_mirrors_left_and_right():
    frames = torch.arange(24, dtype=torch.uint8).reshape(1, 2, 4, 3)
    assert torch.equal(to_video(frames, flip=True)[:, 0], to_video(frames)[:, 0, :, [3, 2, 1, 0]])
