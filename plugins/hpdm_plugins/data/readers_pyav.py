"""The reader `pyav`: exact frames with PyAV, which includes FFmpeg. The default reader.

A frame's number is its position in presentation order, from 0. If a file's presentation times are reliable, the
reader seeks to the key frame before the first requested frame, and checks the times of the frames that it
decodes. For all other files it decodes from the start.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hpdm_core.data.frames import resize
from hpdm_core.data.readers import ReadError, VideoInfo, check_frames, reason_of
from hpdm_core.hookspecs import Register, hookimpl

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = ["PyAVReader", "register_video_readers"]

TIMED_CONTAINERS = {"mov", "mp4", "matroska", "webm", "mpegts"}
"""Containers that store a presentation time with every frame."""
REORDERING_CODECS = {"h264", "hevc", "vvc", "av1", "vp9"}
"""Codecs that may store frames in another order than the presentation order without saying so in the header."""
MOST_INDEXES = 4096
"""Number of files whose presentation times are cached."""


class PyAVReader:
    """Reads RGB frames with PyAV. Thread-safe, because every call opens the file again."""

    def __init__(self) -> None:
        self._indexes: OrderedDict[tuple[Path, int, int], tuple[int | None, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def probe(self, path: Path) -> VideoInfo:
        """Return the file's size; the number of frames is that of the header, or that of packets if it has none."""
        with _opened(path) as (_, stream):
            rate = stream.average_rate or stream.guessed_rate
            height, width, frames = stream.height, stream.width, stream.frames
        return VideoInfo(
            frames=frames or len(self._index(path)),
            height=height,
            width=width,
            fps=float(rate) if rate else 0.0,
        )

    def read(self, path: Path, frames: Sequence[int], *, short_side: int | None = None) -> Tensor:
        """Return the frames with the given numbers, uint8 [F, H, W, 3]; see `VideoReader.read`."""
        index = self._index(path)
        check_frames(path, frames, len(index))
        wanted = sorted(set(frames))
        found = self._by_time(path, wanted, index, short_side)
        if len(found) < len(wanted):
            found = self._by_counting(path, wanted, short_side)
        if len(found) < len(wanted):
            lost = next(number for number in wanted if number not in found)
            raise ReadError(path, f"frame {lost} of {len(index)} cannot be decoded")
        if len({frame.shape for frame in found.values()}) > 1:
            raise ReadError(path, "its frames change size")
        return torch.stack([found[number] for number in frames])

    def describe(self) -> dict[str, Any]:
        """Return the versions of PyAV and of the libraries that it includes."""
        import av

        libraries = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}
        return {"name": "pyav", "av": av.__version__, **libraries}

    def _index(self, path: Path) -> tuple[int | None, ...]:
        """Return the presentation times of the frames, sorted; all None if they are not reliable."""
        try:
            status = path.stat()
        except OSError as error:
            raise ReadError(path, reason_of(error)) from error
        key = (path, status.st_size, status.st_mtime_ns)
        with self._lock:
            if key in self._indexes:
                self._indexes.move_to_end(key)
                return self._indexes[key]
        with _opened(path) as (container, stream):
            reliable = _has_times(container, stream)
            times = [
                packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard
            ]
        known = [time for time in times if time is not None]
        index: tuple[int | None, ...]
        if reliable and len(set(known)) == len(times):
            index = tuple(sorted(known))
        else:
            index = (None,) * len(times)
        with self._lock:
            self._indexes[key] = index
            while len(self._indexes) > MOST_INDEXES:
                self._indexes.popitem(last=False)
        return index

    def _by_time(
        self, path: Path, wanted: Sequence[int], index: Sequence[int | None], short_side: int | None
    ) -> dict[int, Tensor]:
        """Return the frames found by seeking, as number -> pixels.

        There are fewer than wanted if the decoded frames do not have the expected times: those of every frame from
        the first wanted one on, in order.
        """
        numbers = {index[number]: number for number in wanted}
        if not wanted or None in numbers:
            return {}
        first, last = index[wanted[0]], index[wanted[-1]]
        assert first is not None and last is not None, "excluded above"
        found: dict[int, Tensor] = {}
        expected = iter(range(wanted[0], wanted[-1] + 1))
        with _opened(path) as (container, stream):
            if wanted[0] > 0:
                container.seek(first, stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts is None:
                    return {}
                if frame.pts < first and not found:
                    continue  # between the key frame and the first wanted frame
                if frame.pts != index[next(expected)]:
                    return {}
                if frame.pts in numbers:
                    found[numbers[frame.pts]] = _pixels(path, frame, short_side)
                if frame.pts >= last:
                    break
        return found

    def _by_counting(self, path: Path, wanted: Sequence[int], short_side: int | None) -> dict[int, Tensor]:
        """Return the frames found by decoding from the start."""
        found: dict[int, Tensor] = {}
        if not wanted:
            return found
        with _opened(path) as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    found[number] = _pixels(path, frame, short_side)
                if number >= wanted[-1]:
                    break
        return found


def _has_times(container: InputContainer, stream: VideoStream) -> bool:
    """Whether the times of packets are the presentation times of frames.

    AVI, ASF and program streams do not store a time for every frame, and the times that FFmpeg computes are wrong
    if frames are not stored in presentation order. In most AVI files they are stored in this order; then the times
    follow correctly from the frame numbers.
    """
    formats = set(container.format.name.split(","))
    codec = stream.codec_context
    reordered = codec.has_b_frames or codec.name in REORDERING_CODECS
    return bool(formats & TIMED_CONTAINERS) or ("avi" in formats and not reordered)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its first video stream; an error of FFmpeg within the block becomes a ReadError."""
    import av  # slow to load: only where it is used
    import av.error

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ReadError(path, "has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ReadError(path, "is coded in a format for which there is no decoder")
            # Frame threading adds latency to every seek; slice threading does not, and is faster on few cores.
            stream.thread_type = "SLICE"
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        raise ReadError(path, reason_of(error)) from error


def _pixels(path: Path, frame: av.VideoFrame, short_side: int | None) -> Tensor:
    if frame.is_corrupt:
        raise ReadError(path, f"is damaged at {frame.time:.2f} s" if frame.time is not None else "is damaged")
    return resize(torch.from_numpy(frame.to_ndarray(format="rgb24")), short_side)


@hookimpl
def register_video_readers(register: Register) -> None:
    """Add pyav."""
    register("pyav", PyAVReader, source="PyAV, https://pyav.basswood-io.com")
