"""Samples as files: lossless, whole or absent, in batches that do not depend on history; videos that play."""

import os

import av
import numpy as np
import pytest
import torch
from PIL import Image

from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.sampling import files


def a_sample(seed=0, channels=3):
    drawn = torch.Generator().manual_seed(seed)
    return [torch.rand(channels, *size, generator=drawn) * 2 - 1 for size in ((2, 4, 6), (4, 8, 12))]


def test_uint8_round_trip_and_clipping():
    video = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0]).view(1, 1, 2, 3)
    coded = files.to_uint8(video)
    assert coded.shape == (1, 2, 3, 1)
    assert coded.flatten().tolist() == [0, 0, 128, 191, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    assert torch.equal(files.to_uint8(files.from_uint8(every)), every)


def test_a_sample_is_stored_and_read(tmp_path):
    levels = a_sample()
    path = files.write_sample(tmp_path, 7, levels, label=2)
    assert path == tmp_path / "000007.safetensors"
    read = files.read_sample(tmp_path, 7)
    for level in range(2):
        assert read[level].dtype == torch.uint8
        assert torch.equal(
            read[level], ((levels[level] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
        )
    assert files.read_label(tmp_path, 7) == 2
    files.write_sample(tmp_path, 9, a_sample(1), label=-1)
    both = files.read_level(tmp_path, [9, 7], 1)
    assert both.shape == (2, 4, 8, 12, 3)
    assert torch.equal(both[1], read[1])
    assert files.list_samples(tmp_path) == [7, 9]
    assert files.missing_samples(tmp_path, 10) == [0, 1, 2, 3, 4, 5, 6, 8]


def test_half_written_files_are_not_samples(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TroubleError, match=r"000000.safetensors: could not be written: No space left"):
        files.write_sample(tmp_path, 0, a_sample(), label=-1)
    video = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    for write in (
        lambda: files.write_mp4(tmp_path / "a", video),
        lambda: files.contact_sheet(tmp_path / "a", [[video]]),
    ):
        with pytest.raises(TroubleError, match="a: could not be written: No space left"):
            write()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".000001.safetensors.deadbeef.tmp").write_bytes(b"half")
    assert files.list_samples(tmp_path) == []
    assert files.list_samples(tmp_path / "nowhere") == []


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "000003.safetensors").write_bytes(b"rubbish")
    for read in (files.read_sample, files.read_label):
        with pytest.raises(TroubleError, match=r"sample 3 cannot be read from .*000003"):
            read(tmp_path, 3)
    with pytest.raises(TroubleError, match=r"level 0 of sample 4 cannot be read"):
        files.read_level(tmp_path, [4], 0)
    with pytest.raises(TroubleError, match="no samples"):
        files.read_level(tmp_path, [], 0)


def test_batches_do_not_depend_on_what_is_missing():
    everything = files.batches_to_sample(range(10), 10, 4)
    assert everything == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert files.batches_to_sample([5, 9], 10, 4) == everything[1:]
    assert files.batches_to_sample([], 10, 4) == []


@pytest.mark.parametrize(
    ("size", "shown"), [((8, 12), (256, 384)), ((85, 35), (340, 140)), ((257, 301), (258, 302))]
)
def test_mp4_plays_in_a_browser_and_is_large_enough(size, shown, tmp_path):
    height, width = size
    ramp = torch.linspace(0, 255, 5 * height * width * 3).view(5, height, width, 3)
    path = files.write_mp4(tmp_path / "a.mp4", ramp.to(torch.uint8), fps=12.5)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == pytest.approx(12.5)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 5 and frames[0].shape == (*shown, 3)
    factor = shown[0] // height
    wanted = ramp[3].numpy().repeat(factor, 0).repeat(factor, 1)
    assert np.abs(frames[3][: factor * height, : factor * width].mean() - wanted.mean()) < 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


def test_mp4_of_other_channels_is_grey(tmp_path):
    video = torch.stack([torch.full((2, 16, 16), 100), torch.full((2, 16, 16), 140)], dim=-1).to(torch.uint8)
    with av.open(str(files.write_mp4(tmp_path / "b.mp4", video))) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(frame.astype(int) - 120).max() <= 4


def test_mp4_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"shape \(0, 8, 8, 3\)"):
        files.write_mp4(tmp_path / "c.mp4", torch.zeros(0, 8, 8, 3, dtype=torch.uint8))
    assert list(tmp_path.iterdir()) == []


def test_contact_sheet_shows_every_sample_and_level(tmp_path):
    """Two samples of two levels: 2 + 4 frames in a row, each of one colour that tells where it belongs."""

    def coloured(row):
        sizes = ((2, 16, 16), (6, 32, 32))
        return [
            torch.stack(
                [torch.full((*size[1:], 3), 40 * level + 20 * f + 5 * row) for f in range(size[0])]
            ).to(torch.uint8)
            for level, size in enumerate(sizes)
        ]

    path = files.contact_sheet(tmp_path / "sheet.png", [coloured(0), coloured(1)], frames=4)
    with Image.open(path) as image:
        sheet = np.asarray(image)
    side, gap, header = 64, 4, 14  # the finest level's 32 px enlarged to 64
    assert sheet.shape == (header + 2 * (side + gap), 6 * (side + 1) + 2 * gap, 3)
    for row in range(2):
        top = header + row * (side + gap) + side // 2
        lefts = [i * (side + 1) for i in range(2)] + [gap + i * (side + 1) for i in range(2, 6)]
        seen = [int(sheet[top, left + side // 2, 0]) for left in lefts]
        assert seen == [value + 5 * row for value in (0, 20, 40, 80, 100, 140)]  # frames 0 1; 0 2 3 5
    assert (sheet[:header] < 100).any()  # the levels' names
    with pytest.raises(InputError, match="no samples"):
        files.contact_sheet(tmp_path / "none.png", [])
