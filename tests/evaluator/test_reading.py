"""From stored videos to prepared clips: every form, every rule, what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpdm_core.base.errors import InputError
from hpdm_core.config.schema import Part
from hpdm_core.data.readers import ReadError
from hpdm_core.evaluation.folders.reading import prepared, read_clip
from hpdm_core.evaluation.folders.selection import Choice
from hpdm_core.evaluation.folders.sources import Video, list_videos, probe
from hpdm_core.metrics.protocols.records import Preparation
from hpdm_core.plugins import build_plugins

READER = build_plugins().make("video_readers", Part(use="pyav"))
AS_IT_IS = Preparation()


def picture(index: int, height: int = 6, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), index, np.uint8)


def frame_folder(folder: Path, numbers: range, suffix: str = "png", **size: int) -> Path:
    folder.mkdir(parents=True)
    for number in numbers:
        Image.fromarray(picture(number, **size)).save(folder / f"frame{number}.{suffix}")
    return folder


def clip(video: Video, frames: range, rule: Preparation = AS_IT_IS, **more: object):
    return read_clip(Choice(video, frames), rule, reader=READER, **more)


def test_every_form_is_found_in_class_folders_or_not(tmp_path, video_writer):
    frame_folder(tmp_path / "a" / "one", range(3))
    np.save(tmp_path / "a" / "two.npy", np.zeros((3, 6, 8, 3), np.uint8))
    np.save(tmp_path / "many.npy", np.zeros((11, 3, 6, 8, 3), np.uint8))
    video_writer(tmp_path / "b" / "c" / "three.avi", np.zeros((3, 16, 16, 3), np.uint8))
    (tmp_path / ".hidden").mkdir()
    np.save(tmp_path / ".hidden" / "no.npy", np.zeros((3, 6, 8, 3), np.uint8))
    (tmp_path / "notes.txt").write_text("no video")
    found = list_videos(tmp_path, option="--fake")
    many = [f"many.npy#{index:02d}" for index in range(11)]
    assert [video.name for video in found] == ["a/one", "a/two.npy", "b/c/three.avi", *many]
    assert [probe(video, READER).frames for video in found] == [3] * 14


def test_frames_stand_in_natural_order(tmp_path):
    (video,) = list_videos(frame_folder(tmp_path / "x" / "v", range(8, 13)).parent, option="--real")
    made, facts = clip(video, range(0, 5))
    assert made[:, 0, 0, 0].tolist() == [8, 9, 10, 11, 12]
    assert (facts.height, facts.width, facts.least, facts.most, facts.still) == (6, 8, 8, 12, False)
    assert clip(video, range(1, 5, 2))[0][:, 0, 0, 0].tolist() == [9, 11]


def test_grey_pictures_and_arrays_become_three_channels(tmp_path):
    folder = tmp_path / "x" / "v"
    folder.mkdir(parents=True)
    for index in range(2):
        Image.fromarray(picture(index)[..., 0]).save(folder / f"{index}.png")
    np.save(tmp_path / "x" / "w.npy", np.ones((2, 6, 8, 1), np.uint8))
    for video in list_videos(tmp_path / "x", option="--real"):
        assert tuple(clip(video, range(2))[0].shape) == (2, 6, 8, 3)


def test_frames_of_two_sizes_or_broken_ones_are_read_errors(tmp_path):
    frame_folder(tmp_path / "x" / "v", range(2))
    Image.fromarray(picture(2, height=7)).save(tmp_path / "x" / "v" / "frame2.png")
    frame_folder(tmp_path / "x" / "w", range(3))
    broken = tmp_path / "x" / "w" / "frame1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    sizes, cut = list_videos(tmp_path / "x", option="--real")
    with pytest.raises(ReadError, match="change size"):
        clip(sizes, range(3))
    with pytest.raises(ReadError, match=r"frame1\.png"):
        clip(cut, range(3))
    with pytest.raises(ReadError, match="frame number 3"):
        clip(cut, range(4))


@pytest.mark.parametrize(
    ("values", "low", "high"), [("0..1", 0.0, 1.0), ("-1..1", -1.0, 1.0), ("0..255", 0.0, 255.0)]
)
@pytest.mark.parametrize("quantise", ["round", "truncate"])
def test_floats_of_a_named_range_become_bytes(tmp_path, values, low, high, quantise):
    bytes_ = np.arange(256).reshape(1, 16, 16, 1).repeat(3, -1)
    exact = low + bytes_ / 255 * (high - low)
    np.save(tmp_path / "exact.npy", exact)
    np.save(tmp_path / "above.npy", np.minimum(low + (bytes_ + 0.6) / 255 * (high - low), high))
    above, whole = list_videos(tmp_path, option="--fake")
    rule = Preparation(quantise=quantise)
    assert np.array_equal(clip(whole, range(1), rule, values=values)[0].numpy(), bytes_)
    expected = np.minimum(bytes_ + (quantise == "round"), 255)
    assert np.array_equal(clip(above, range(1), rule, values=values)[0].numpy(), expected)


@pytest.mark.parametrize(
    ("array", "values", "said"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), None, "whose range is not known"),
        (np.full((2, 4, 4, 3), 1.01), "0..1", "outside --value-range 0..1"),
        (np.full((2, 4, 4, 3), np.nan), "0..1", "outside --value-range"),
        (np.zeros((2, 4, 4, 3), np.int64), "0..255", "holds int64"),
    ],
)
def test_other_values_are_wrong_input(tmp_path, array, values, said):
    np.save(tmp_path / "v.npy", array)
    (video,) = list_videos(tmp_path, option="--fake")
    with pytest.raises(InputError, match=said):
        clip(video, range(2), values=values)


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_averages_are_block_means():
    frames = noise(4, 6, 8, 3)
    rule = Preparation(average=(2, 3, 2))
    blocks = frames.double().reshape(2, 2, 2, 3, 4, 2, 3).mean(dim=(1, 3, 5))
    assert torch.equal(prepared(frames, rule), blocks.round().to(torch.uint8))
    down = prepared(frames, rule.model_copy(update={"quantise": "truncate"}))
    assert torch.equal(down, blocks.floor().to(torch.uint8))
    with pytest.raises(InputError, match="cannot be averaged over 4x2"):
        prepared(frames, Preparation(average=(2, 4, 2)))


def test_lanczos_is_pillows_and_the_centre_is_cut():
    frames = noise(2, 20, 30, 3)
    made = prepared(frames, Preparation(size=(10, 10), resize="lanczos"))
    whole = Image.fromarray(frames[1].numpy()).resize((15, 10), Image.Resampling.LANCZOS)
    assert np.array_equal(made[1].numpy(), np.asarray(whole)[:, 2:12])


@pytest.mark.parametrize("resize", ["bilinear", "bilinear_antialias", "area"])
def test_squashing_keeps_all_of_the_frame(resize):
    frames = noise(1, 12, 20, 3)
    made = prepared(frames, Preparation(size=(6, 5), resize=resize, crop="squash"))
    assert tuple(made.shape) == (1, 6, 5, 3)
    kind = {"bilinear": {"mode": "bilinear"}, "bilinear_antialias": {"mode": "bilinear", "antialias": True}}
    arguments = kind.get(resize, {"mode": "area"})
    wanted = torch.nn.functional.interpolate(frames.permute(0, 3, 1, 2).double(), size=(6, 5), **arguments)
    assert torch.equal(made, wanted.permute(0, 2, 3, 1).round().clamp(0, 255).to(torch.uint8))
    if resize == "area":
        assert torch.equal(made[0, 0, 0], frames[0, :2, :4].double().mean(dim=(0, 1)).round().to(torch.uint8))


def test_frames_of_the_right_size_are_left_alone():
    frames = noise(2, 10, 10, 3)
    assert torch.equal(prepared(frames, Preparation(size=(10, 10))), frames)


def test_jpeg_is_what_a_keyword_that_pillow_ignores_gives(tmp_path):
    """The published call is save(file, q=95): quality 75, chroma at half size. Files are not coded twice."""
    frames = torch.from_numpy(np.kron(noise(1, 5, 5, 3).numpy(), np.ones((1, 4, 4, 1), np.uint8)))
    buffer = io.BytesIO()
    Image.fromarray(frames[0].numpy()).save(buffer, format="JPEG", q=95)
    published = np.asarray(Image.open(buffer))
    rule = Preparation(jpeg_quality=75)
    assert np.array_equal(prepared(frames, rule)[0].numpy(), published)
    folder = tmp_path / "x" / "v"
    folder.mkdir(parents=True)
    (folder / "0.jpg").write_bytes(buffer.getvalue())
    (video,) = list_videos(tmp_path / "x", option="--real")
    assert video.jpeg and np.array_equal(clip(video, range(1), rule)[0][0].numpy(), published)
    # What a resize has made of them is no JPEG file any more, on neither side.
    smaller = rule.model_copy(update={"size": (10, 10)})
    assert torch.equal(prepared(frames, smaller, jpeg=True), prepared(frames, smaller))
    uncoded = smaller.model_copy(update={"jpeg_quality": None})
    assert not torch.equal(prepared(frames, smaller, jpeg=True), prepared(frames, uncoded))
