"""The default reader: the right frames, bit for bit, however they are asked for; and plain words for bad
files.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import av
import pytest
import torch

from hpdm_core.data.frames import resize
from hpdm_core.data.readers import ReadError, VideoReader
from hpdm_plugins.data import readers_pyav


def sequential(path):
    with av.open(str(path)) as container:
        return torch.stack(
            [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        )


def test_is_a_video_reader(pyav):
    assert isinstance(pyav, VideoReader)
    assert pyav.describe()["av"] == av.__version__


def test_lossless_frames_come_back_exactly(tmp_path, frames, write, pyav):
    made = frames(7, 12, 20)
    path = write(tmp_path / "clip.mkv", made)
    assert torch.equal(pyav.read(path, range(7)), made)
    assert torch.equal(pyav.read(path, [5, 2, 2, 6]), made[[5, 2, 2, 6]])


def test_probe_gives_size_and_rate(tmp_path, frames, write, pyav):
    path = write(tmp_path / "clip.mkv", frames(7, 12, 20))
    info = pyav.probe(path)
    assert (info.frames, info.height, info.width, info.fps) == (7, 12, 20, 25.0)


H264 = {
    "codec": "libx264",
    "pix_fmt": "yuv420p",
    "options": {"x264-params": "keyint=8:scenecut=0:bframes=3:b-adapt=0:open-gop=1"},
}
MPEG4 = {
    "codec": "mpeg4",
    "pix_fmt": "yuv420p",
    "options": {"g": "5", "bf": "2", "sc_threshold": "1000000000"},
}


@pytest.mark.parametrize(
    ("name", "coding"),
    [
        ("a.mp4", H264),
        ("a.mkv", H264),
        ("a.ts", H264),
        ("a.avi", H264),
        ("a.wmv", H264),
        ("a.avi", MPEG4),
        ("a.mp4", MPEG4),
        ("a.mpg", {**MPEG4, "options": {"g": "5", "bf": "0"}}),
        ("a.avi", {**MPEG4, "options": {"g": "5", "bf": "0", "sc_threshold": "1000000000"}}),
        ("a.h264", H264),
    ],
    ids=[
        "h264-mp4",
        "h264-mkv",
        "h264-ts",
        "h264-avi",
        "h264-asf",
        "mpeg4-avi",
        "mpeg4-mp4",
        "mpeg4-mpg",
        "mpeg4-in-order-avi",
        "h264-without-times",
    ],
)
def test_any_frame_equals_decoding_in_order(tmp_path, frames, write, pyav, name, coding):
    path = write(tmp_path / name, frames(30, 32, 48), **coding)
    expected = sequential(path)
    assert pyav.probe(path).frames == len(expected) == 30
    for start in range(0, 28):
        assert torch.equal(pyav.read(path, range(start, start + 3)), expected[start : start + 3]), start


def test_uneven_times_do_not_move_frames(tmp_path, frames, write, pyav):
    made = frames(6)
    path = write(tmp_path / "clip.mkv", made, times=[0, 1, 7, 8, 30, 31])
    assert torch.equal(pyav.read(path, [2, 4, 5]), made[[2, 4, 5]])


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("clip.mkv", "libx264", {"x264-params": "keyint=5:scenecut=0"}),
        ("clip.avi", "mpeg4", {"g": "5", "bf": "0", "sc_threshold": "1000000000"}),
    ],
)
def test_seeks_instead_of_decoding_from_the_start(
    tmp_path, frames, write, pyav, monkeypatch, name, codec, options
):
    path = write(tmp_path / name, frames(40, 32, 48), codec=codec, pix_fmt="yuv420p", options=options)
    decoded = []
    opened = readers_pyav._opened

    class Spy:
        def __init__(self, container):
            self.seek = container.seek
            self.demux = container.demux
            self.format = container.format
            self.container = container

        def decode(self, stream):
            for frame in self.container.decode(stream):
                decoded.append(frame.pts)
                yield frame

    @contextmanager
    def spied(path):
        with opened(path) as (container, stream):
            yield Spy(container), stream

    monkeypatch.setattr(readers_pyav, "_opened", spied)
    pyav.read(path, [33, 34])
    assert 2 <= len(decoded) <= 5


def test_a_damaged_frame_is_refused(tmp_path):
    frame = SimpleNamespace(is_corrupt=True, time=1.5)
    with pytest.raises(ReadError, match=r"clip\.mp4: is damaged at 1\.50 s"):
        readers_pyav._pixels(tmp_path / "clip.mp4", frame, None)


def test_frames_are_not_stored_in_the_order_they_are_shown(tmp_path, frames, write):
    """What makes the tests above worth something."""
    path = write(tmp_path / "a.mp4", frames(30, 32, 48), **H264)
    with av.open(str(path)) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert times != sorted(times)


def test_counts_where_times_are_missing(tmp_path, frames, write, pyav, monkeypatch):
    made = frames(6)
    path = write(tmp_path / "clip.mkv", made)
    monkeypatch.setattr(pyav, "_index", lambda path: (None,) * 6)
    assert torch.equal(pyav.read(path, [4, 1]), made[[4, 1]])


def test_counts_where_seeking_does_not_give_what_the_times_promise(
    tmp_path, frames, write, pyav, monkeypatch
):
    """As in AVI: the times of packets are all there and in order, and those of frames are not."""
    path = write(tmp_path / "clip.avi", frames(30, 32, 48), **H264)
    monkeypatch.setattr(readers_pyav, "_has_times", lambda container, stream: True)
    expected = sequential(path)
    assert None not in pyav._index(path)
    for start in range(28):
        assert torch.equal(pyav.read(path, range(start, start + 3)), expected[start : start + 3]), start


def test_resizes_each_frame(tmp_path, frames, write, pyav):
    made = frames(3, 12, 20)
    path = write(tmp_path / "clip.mkv", made)
    read = pyav.read(path, [1], short_side=6)
    assert read.shape == (1, 6, 10, 3)
    assert torch.equal(read[0], resize(made[1], 6))


def test_a_frame_beyond_the_end_is_named(tmp_path, frames, write, pyav):
    path = write(tmp_path / "clip.mkv", frames(4))
    with pytest.raises(ReadError, match=r"clip\.mkv: has 4 frames; frame number 4 was asked for"):
        pyav.read(path, range(1, 5))


def test_bad_files_give_one_line(tmp_path, pyav):
    (tmp_path / "text.mp4").write_text("not a video")
    for name, reason in [("text.mp4", "Invalid data"), ("none.mp4", "No such file")]:
        with pytest.raises(ReadError, match=reason) as caught:
            pyav.probe(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name not in caught.value.reason
        with pytest.raises(ReadError, match=reason):
            pyav.read(tmp_path / name, [0])


def test_a_sound_file_has_no_video_stream(tmp_path, pyav):
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame(format="s16", layout="mono", samples=80)
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
    with pytest.raises(ReadError, match="has no video stream"):
        pyav.probe(tmp_path / "sound.mkv")


def test_a_cut_off_file_fails_at_its_missing_end_only(tmp_path, frames, write, pyav):
    made = frames(12, 32, 48)
    path = write(tmp_path / "clip.mkv", made)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    assert torch.equal(pyav.read(path, [0, 1, 2]), made[:3])
    with pytest.raises(ReadError):
        pyav.read(path, [10])
