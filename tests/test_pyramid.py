import itertools

import pytest
import torch
import torch.nn.functional as F

from hpdm_core import pyramid as pyramid_module
from hpdm_core.base.errors import InputError
from hpdm_core.data.frames import to_pixels, to_video
from hpdm_core.pyramid import DOWNSAMPLINGS, Pyramid, crop, downsample, level_patch

SMALL = Pyramid(video=(8, 24, 40), patch=(2, 6, 10), token=(1, 3, 5), levels=3)
UCF = Pyramid(video=(64, 256, 256), patch=(16, 64, 64), token=(1, 4, 4), levels=3)
MIXED = Pyramid(video=(6, 36, 40), patch=(6, 4, 10), token=(2, 1, 5), levels=3)  # ratios 1, 3, 2


def clip(size=SMALL.video, *, seed=0):
    return torch.randn(3, *size, generator=torch.Generator().manual_seed(seed))


def lattice(pyramid, level):
    axes = [range(size - patch + 1) for size, patch in zip(pyramid.size(level), pyramid.patch, strict=True)]
    return itertools.product(*axes)


def test_sizes_pitches_and_scales_per_axis():
    assert MIXED.ratio == (1, 3, 2)
    assert [MIXED.size(level) for level in range(3)] == [(6, 4, 10), (6, 12, 20), (6, 36, 40)]
    assert [MIXED.pitch(level) for level in range(3)] == [(1, 9, 4), (1, 3, 2), (1, 1, 1)]
    assert MIXED.scale(2) == (1.0, 1 / 9, 1 / 4)
    assert MIXED.grid == (3, 4, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"video": (9, 24, 40)}, "f = 9 is not a multiple of patch 2"),
        ({"patch": (2, 8, 10)}, "h = 8 is not a multiple of token 3"),
        ({"video": (8, 24, 60)}, "w = 60 is 6 times patch 10"),
        ({"levels": 1}, "with 1 level"),
        ({"levels": 0}, "1 or more"),
        ({"token": (1, 0, 5)}, "all must be 1 or more"),
    ],
)
def test_sizes_that_make_no_pyramid_are_refused(change, said):
    fields = {"video": (8, 24, 40), "patch": (2, 6, 10), "token": (1, 3, 5), "levels": 3} | change
    with pytest.raises(InputError, match=said):
        Pyramid(**fields)


def test_one_level_is_the_whole_video():
    single = Pyramid(video=(2, 6, 10), patch=(2, 6, 10), token=(1, 3, 5), levels=1)
    assert single.ratio == (1, 1, 1)
    assert single.tiles(0, "fhw") == [(0, 0, 0)]


@pytest.mark.parametrize(("overlap", "level1", "level2"), [("hw", 18, 196), ("fhw", 27, 343), ("", 8, 64)])
def test_number_of_tiles_is_the_papers(overlap, level1, level2):
    assert [len(UCF.tiles(level, overlap)) for level in range(3)] == [1, level1, level2]


def test_tiles_are_row_major_and_cover_every_pixel():
    tiles = SMALL.tiles(2, ["w"])
    assert tiles == sorted(tiles)
    covered = torch.zeros(SMALL.size(2), dtype=torch.int64)
    for f, h, w in tiles:
        covered[f : f + 2, h : h + 6, w : w + 10] += 1
    assert covered[0, 0].tolist() == [1] * 5 + [2] * 30 + [1] * 5


def test_half_a_patch_must_be_whole():
    odd = Pyramid(video=(12, 6, 10), patch=(3, 6, 10), token=(1, 3, 5), levels=3)
    with pytest.raises(InputError, match="f: half of patch 3"):
        odd.tiles(1, "f")
    with pytest.raises(InputError, match="allowed are f, h, w"):
        odd.tiles(1, ["t"])
    assert len(odd.tiles(1, "hw")) == 2  # axes with one patch have nothing to overlap


@pytest.mark.parametrize("pyramid", [SMALL, MIXED, Pyramid((4, 8, 27), (1, 2, 3), (1, 1, 1), 3)])
def test_a_parent_contains_its_child_and_lies_in_the_video(pyramid):
    for level in (1, 2):
        for child in lattice(pyramid, level):
            parent = pyramid.parent(level, child)
            for start, above, patch, q, size in zip(
                child, parent, pyramid.patch, pyramid.ratio, pyramid.size(level - 1), strict=True
            ):
                assert 0 <= above <= size - patch
                assert above * q <= start
                assert start + patch <= (above + patch) * q


def test_a_parent_is_centred_where_the_video_allows():
    # own pixels of level 1: child at 32 of 64-pixel patches, centre 64 / 2 = 32 = parent's centre at 0 + 32
    assert UCF.parent(2, (16, 64, 96)) == (4, 16, 32)
    assert UCF.parent(2, (0, 0, 192)) == (0, 0, 64)
    assert UCF.parent(1, (16, 32, 0)) == (0, 0, 0)


def test_context_passes_of_the_papers_setup():
    parents = {UCF.parent(2, tile) for tile in UCF.tiles(2, "hw")}
    assert len(parents) == 100  # 4 x 5 x 5, against 196 tiles


def test_a_chain_is_each_ones_parent():
    child = (5, 17, 23)
    parent = SMALL.parent(2, child)
    assert SMALL.chain(2, child) == (SMALL.parent(1, parent), parent)
    assert SMALL.chain(0, (0, 0, 0)) == ()


@pytest.mark.parametrize("pyramid", [SMALL, MIXED, Pyramid((4, 8, 27), (1, 2, 3), (1, 1, 1), 3)])
def test_containing_lists_exactly_the_patches_that_contain_a_child(pyramid):
    for child in itertools.islice(lattice(pyramid, 2), 0, None, 7):
        expected = {
            above
            for above in lattice(pyramid, 1)
            if all(
                a * q <= c and c + patch <= (a + patch) * q
                for a, c, q, patch in zip(above, child, pyramid.ratio, pyramid.patch, strict=True)
            )
        }
        bounds = pyramid.containing(2, child)
        assert set(itertools.product(*(range(a, b + 1) for a, b in bounds))) == expected


def test_coords_are_fractions_and_centres_are_row_major():
    coords = SMALL.coords(2, torch.tensor([[6, 9, 30], [0, 0, 0]]))
    torch.testing.assert_close(coords.offset[0], torch.tensor([6 / 8, 9 / 24, 30 / 40]))
    torch.testing.assert_close(coords.scale, torch.tensor([2 / 8, 6 / 24, 10 / 40]))
    centres = coords.centres((2, 3, 5))
    assert centres.shape == (2, 3, 30)
    for cell, (f, h, w) in enumerate(itertools.product(range(2), range(3), range(5))):
        place = [6 / 8 + (f + 0.5) / 8, 9 / 24 + (h + 0.5) / 12, 30 / 40 + (w + 0.5) / 20]
        torch.testing.assert_close(centres[0, :, cell], 2 * torch.tensor(place) - 1)


def test_within_is_the_place_in_the_others_frame():
    child = SMALL.coords(2, torch.tensor([[3, 9, 15]]))
    parent = SMALL.coords(1, torch.tensor([[1, 3, 5]]))
    f, h, w = child.within(parent, (2, 3, 5))
    # frames: level 1 has 4; child covers its pixels 1.5..2.5, the parent 1..3
    torch.testing.assert_close(f, torch.tensor([[(1.75 - 1) / 2, (2.25 - 1) / 2]]))
    torch.testing.assert_close(h, (4.5 + 3 * (torch.arange(3) + 0.5) / 3 - 3)[None] / 6)
    torch.testing.assert_close(w, (7.5 + 5 * (torch.arange(5) + 0.5) / 5 - 5)[None] / 10)


def test_coords_rows_can_be_taken_twice():
    coords = SMALL.coords(1, torch.tensor([[0, 1, 2], [2, 6, 10]]))
    taken = coords.take(torch.tensor([1, 1, 0]))
    assert torch.equal(taken.offset, coords.offset[[1, 1, 0]])
    assert torch.equal(taken.scale, coords.scale)


def test_a_centre_frame_lies_where_the_coordinates_say():
    """A video whose frames hold their own centre's position shows, downsampled, its coordinates."""
    pyramid = Pyramid(video=(12, 24, 40), patch=(3, 6, 10), token=(1, 3, 5), levels=3)
    frames = (torch.arange(12) + 0.5) / 12
    video = (2 * frames - 1)[None, :, None, None].expand(1, 12, 24, 40)
    for level in range(3):
        offset = (0, 0, 0) if level == 0 else (2, 1, 3)
        patch = level_patch(video, pyramid, level, offset, "centre_frame")
        coords = pyramid.coords(level, torch.tensor([offset]), downsampling="centre_frame")
        torch.testing.assert_close(patch.reshape(-1), coords.centres(pyramid.patch)[0, 0])
    odd = Pyramid(video=(27, 6, 10), patch=(3, 6, 10), token=(1, 3, 5), levels=3)
    shifted = odd.coords(0, torch.zeros(1, 3, dtype=torch.int64), downsampling="centre_frame")
    assert shifted.offset.tolist() == [[0, 0, 0]]  # the middle frame of an odd group is its centre


@pytest.mark.parametrize("mode", DOWNSAMPLINGS)
def test_a_crop_of_the_downsampled_video_is_the_downsampled_crop(mode):
    video = clip()
    for level in range(3):
        small = downsample(video, SMALL.pitch(level), mode)
        assert small.shape == (3, *SMALL.size(level))
        offset = (0, 0, 0) if level == 0 else (1, 3, 7)
        patch = level_patch(video, SMALL, level, offset, mode)
        expected = crop(small[None], torch.tensor([offset]), SMALL.patch)[0]
        assert torch.equal(patch, expected)


def test_the_finest_patch_is_the_videos_own_pixels():
    video = clip()
    patch = level_patch(video, SMALL, 2, (5, 17, 29), "area")
    assert torch.equal(patch, video[:, 5:7, 17:23, 29:39])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("mode", DOWNSAMPLINGS)
@pytest.mark.parametrize("pyramid", [SMALL, MIXED], ids=["small", "mixed"])
def test_patches_of_bytes_are_those_of_the_whole_clip_in_float32_bit_by_bit(pyramid, mode, flip):
    start = torch.Generator().manual_seed(3)
    frames = torch.randint(256, (*pyramid.video, 3), dtype=torch.uint8, generator=start)
    whole, pixels = to_video(frames, flip=flip), to_pixels(frames, flip=flip)
    for level in range(3):
        last = [size - patch for size, patch in zip(pyramid.size(level), pyramid.patch, strict=True)]
        for offset in ((0, 0, 0), tuple(last), tuple(room // 2 for room in last)):
            made = level_patch(pixels, pyramid, level, offset, mode)
            assert made.dtype == torch.float32 and made.is_contiguous()
            assert torch.equal(made, level_patch(whole, pyramid, level, offset, mode))


def test_only_what_is_cut_out_is_brought_to_float32(monkeypatch):
    brought = []

    def noted(pixels, real=pyramid_module.unit_range):
        brought.append(pixels.numel() if pixels.dtype == torch.uint8 else 0)
        return real(pixels)

    monkeypatch.setattr(pyramid_module, "unit_range", noted)
    video = torch.zeros(3, *SMALL.video, dtype=torch.uint8)
    level_patch(video, SMALL, 2, (1, 2, 3), "area")
    assert sum(brought) == 3 * 2 * 6 * 10
    brought.clear()
    level_patch(video, SMALL, 0, (0, 0, 0), "centre_frame")  # one frame of four
    assert sum(brought) == video.numel() // 4


def test_downsampling_agrees_with_the_library():
    video = clip((12, 12, 20))
    torch.testing.assert_close(downsample(video, (2, 4, 5), "area"), F.avg_pool3d(video[None], (2, 4, 5))[0])
    resized = F.interpolate(video[None], size=(6, 3, 4), mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(downsample(video, (2, 4, 5), "trilinear"), resized)
    strided = F.avg_pool3d(video[None, :, 2::4], (1, 4, 5))[0]
    torch.testing.assert_close(downsample(video, (4, 4, 5), "centre_frame"), strided)


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="leaves the video"):
        level_patch(clip(), SMALL, 2, (7, 0, 0), "area")
    with pytest.raises(ValueError, match="not a multiple of pitch"):
        downsample(clip(), (3, 1, 1), "area")
    with pytest.raises(ValueError, match="allowed are area"):
        downsample(clip(), (1, 1, 1), "bicubic")
    with pytest.raises(ValueError, match="1 offsets for 2 videos"):
        crop(clip().expand(2, -1, -1, -1, -1), torch.zeros(1, 3, dtype=torch.int64), (1, 1, 1))


def test_each_row_is_cropped_at_its_own_offset():
    videos = torch.stack([clip(seed=1), clip(seed=2)])
    cut = crop(videos, torch.tensor([[0, 1, 2], [5, 4, 3]]), (3, 4, 5))
    assert torch.equal(cut[1], videos[1, :, 5:8, 4:8, 3:8])
    assert torch.equal(cut[0], videos[0, :, 0:3, 1:5, 2:7])
