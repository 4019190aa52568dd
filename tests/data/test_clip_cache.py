"""Frames kept on disk are the frames that are decoded, whatever happens to the files."""

import errno
import os
import threading

import pytest
import torch

from hpdm_core.base.errors import InputError
from hpdm_core.data.clip_cache import RUN, CachedReader
from hpdm_core.data.readers import ReadError
from hpdm_core.testing.data import write_clip
from hpdm_plugins.data.readers_pyav import PyAVReader

LARGE = 2**30


class Counting(PyAVReader):
    """Notes how many frames were decoded."""

    def __init__(self):
        super().__init__()
        self.decoded = 0

    def read(self, path, frames, *, short_side=None):
        self.decoded += len(frames)
        return super().read(path, frames, short_side=short_side)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(path, frames=80, height=24, width=48)
    return path


@pytest.fixture
def cached(tmp_path):
    def make(limit=LARGE):
        inner = Counting()
        return CachedReader(inner, tmp_path / "cache", limit=limit), inner

    return make


def kept(tmp_path):
    return sorted((tmp_path / "cache").glob("??/*.npy"))


@pytest.mark.parametrize("frames", [[0], [31, 32, 33], [79, 3, 3, 40], list(range(5, 70, 2))])
@pytest.mark.parametrize("short_side", [None, 12])
def test_frames_are_those_of_the_reader(frames, short_side, clip, cached):
    expected = PyAVReader().read(clip, frames, short_side=short_side)
    reader, inner = cached()
    for _ in range(2):
        assert torch.equal(reader.read(clip, frames, short_side=short_side), expected)
    assert inner.decoded <= 80
    other, second = cached()
    assert torch.equal(other.read(clip, frames, short_side=short_side), expected)
    assert second.decoded == 0


def test_a_copy_of_a_file_is_known_and_another_content_is_not(clip, cached, tmp_path):
    reader, inner = cached()
    reader.read(clip, [0])
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    reader.read(copy, [0])
    assert inner.decoded == RUN
    write_clip(copy, frames=80, height=24, width=50)
    assert reader.read(copy, [0]).shape == (1, 24, 50, 3)
    assert inner.decoded == 2 * RUN


def test_what_is_not_there_is_the_readers_error(clip, cached, tmp_path):
    reader, _ = cached()
    with pytest.raises(ReadError, match="has 80 frames; frame number 80 was asked for"):
        reader.read(clip, [79, 80])
    with pytest.raises(ReadError, match="frame number 500"):
        reader.read(clip, [500])
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(ReadError):
        reader.read(broken, [0])


def test_a_damaged_file_is_made_again(clip, cached, tmp_path):
    reader, _ = cached()
    expected = reader.read(clip, [0])
    (file,) = kept(tmp_path)
    for damage in (b"", b"no array", file.read_bytes()[:-1]):
        file.write_bytes(damage)
        assert torch.equal(reader.read(clip, [0]), expected)
        assert len(file.read_bytes()) > RUN * 24 * 48 * 3


def test_the_folder_keeps_to_its_limit_and_drops_what_was_used_longest_ago(cached, tmp_path):
    size = RUN * 24 * 48 * 3
    reader, inner = cached(limit=6 * size)
    for number in range(9):
        path = tmp_path / f"{number}.mp4"
        write_clip(path, frames=RUN, height=24, width=48, fps=10 + number)
        reader.read(path, [0])
        for age, file in enumerate(sorted(kept(tmp_path), key=lambda each: each.stat().st_mtime_ns)):
            os.utime(file, (1000 + age, 1000 + age))  # as if a while lay between them
        reader.read(tmp_path / "0.mp4", [0])  # in use all the time
        if number == 0:
            halves = [kept(tmp_path)[0].with_name(f".{age}.npy.0.tmp") for age in ("old", "new")]
            for half in halves:
                half.write_bytes(b"half")
            os.utime(halves[0], (1000, 1000))
    assert [half.exists() for half in halves] == [False, True]  # a killed process left the one
    files = kept(tmp_path)
    assert sum(file.stat().st_size for file in files) <= 6.2 * size
    assert inner.decoded == 9 * RUN  # the one in use was never dropped


def test_a_full_disk_is_said_once_and_stops_nothing(clip, cached, monkeypatch, caplog):
    reader, _ = cached()

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hpdm_core.data.clip_cache.np.save", full)
    expected = PyAVReader().read(clip, [0, 40])
    for _ in range(2):
        assert torch.equal(reader.read(clip, [0, 40]), expected)
    assert caplog.text.count("No space left on device") == 1


def test_readers_that_share_a_folder_do_not_disturb_one_another(clip, cached):
    expected = PyAVReader().read(clip, range(80))
    readers = [cached(limit=3 * RUN * 24 * 48 * 3)[0] for _ in range(4)]
    wrong = []

    def use(reader):
        for start in range(0, 60, 7):
            if not torch.equal(reader.read(clip, range(start, start + 20)), expected[start : start + 20]):
                wrong.append(start)

    threads = [threading.Thread(target=use, args=(reader,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"runtime\.clip_cache: .*file/cache' cannot be made"):
        CachedReader(PyAVReader(), tmp_path / "file" / "cache", limit=1)
