"""The reader `skvideo`: scikit-video, which calls the ffmpeg program. Optional; `pyav` needs neither of them.

It is slow, because it cannot seek: every read decodes from the start. Versions before 1.1.12 use names that numpy
has removed; these names are restored only while scikit-video runs.
"""

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpdm_core.base.errors import InputError
from hpdm_core.data.frames import resize
from hpdm_core.data.readers import ReadError, VideoInfo, check_frames, reason_of
from hpdm_core.hookspecs import Register, hookimpl

__all__ = ["SkvideoReader", "needs_aliases", "register_video_readers"]

REPAIRED = (1, 1, 12)
"""The first version of scikit-video that does not use numpy's removed names."""

ALIASES: dict[str, type] = {"float": float, "int": int}

_aliasing = threading.RLock()


def needs_aliases(version: str) -> bool:
    """Return whether scikit-video ``version`` uses numpy's removed names."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < REPAIRED


@contextmanager
def _aliases(version: str) -> Iterator[None]:
    """Restore numpy's removed names within the block, one thread at a time, if ``version`` needs them."""
    if not needs_aliases(version):
        yield
        return
    with _aliasing:
        missing = [name for name in ALIASES if name not in vars(np)]
        for name in missing:
            setattr(np, name, ALIASES[name])
        try:
            yield
        finally:
            for name in missing:
                delattr(np, name)


class SkvideoReader:
    """Reads RGB frames with scikit-video. Raises InputError when it, ffmpeg or ffprobe is missing."""

    def __init__(self) -> None:
        try:
            self._version = metadata.version("scikit-video")
        except metadata.PackageNotFoundError as error:
            raise InputError(
                "data.reader 'skvideo': the package scikit-video is not installed; install it, or use 'pyav'"
            ) from error
        for program in ("ffmpeg", "ffprobe"):
            if shutil.which(program) is None:
                raise InputError(
                    f"data.reader 'skvideo': the program '{program}' is not on PATH; install FFmpeg, or use "
                    f"'pyav', which brings its own"
                )

    @cached_property
    def _io(self) -> ModuleType:
        with _aliases(self._version):
            import skvideo.io
        return skvideo.io  # type: ignore[no-any-return]  # the package has no types

    def probe(self, path: Path) -> VideoInfo:
        """Return the file's size from ffprobe; frames are counted if the header does not give their number."""
        with self._opened(path, 0) as reader:
            frames, height, width, _ = reader.getShape()
            return VideoInfo(frames=int(frames), height=height, width=width, fps=float(reader.inputfps))

    def read(self, path: Path, frames: Sequence[int], *, short_side: int | None = None) -> Tensor:
        """Return the frames with the given numbers, uint8 [F, H, W, 3]; see `VideoReader.read`."""
        wanted = set(frames)
        found: dict[int, Tensor] = {}
        decoded = 0
        with self._opened(path, max(wanted) + 1) as reader:
            for number, frame in enumerate(reader.nextFrame()):
                decoded = number + 1
                if number in wanted:
                    # Copied, because the reader returns a view of a buffer that must not be written.
                    found[number] = resize(torch.from_numpy(np.array(frame)), short_side)
                if len(found) == len(wanted):
                    break
        check_frames(path, frames, decoded)
        return torch.stack([found[number] for number in frames])

    @contextmanager
    def _opened(self, path: Path, frames: int) -> Iterator[Any]:
        """Open a file; ffmpeg stops after ``frames`` frames (0: no limit)."""
        options = {**self._every_frame, **({"-vframes": str(frames)} if frames else {})}
        with _aliases(self._version):
            try:
                reader = self._io.FFmpegReader(str(path), outputdict=options)
            except (OSError, ValueError, KeyError, AssertionError, subprocess.SubprocessError) as error:
                raise ReadError(path, reason_of(error)) from error
            try:
                yield reader
            except (OSError, ValueError, RuntimeError) as error:
                raise ReadError(path, reason_of(error)) from error
            finally:
                reader.close()

    @cached_property
    def _ffmpeg(self) -> str:
        """The version line of ffmpeg: "ffmpeg version 7.1 ..."."""
        said = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True).stdout
        return said.splitlines()[0] if said else "ffmpeg version unknown"

    @cached_property
    def _every_frame(self) -> dict[str, str]:
        """The option for one output frame per input frame; by default ffmpeg may repeat and drop frames."""
        old = re.match(r"ffmpeg version n?([0-5])\.", self._ffmpeg)
        return {"-vsync": "0"} if old else {"-fps_mode": "passthrough"}

    def describe(self) -> dict[str, Any]:
        """Return the versions of scikit-video and of the ffmpeg program."""
        return {"name": "skvideo", "scikit-video": self._version, "ffmpeg": self._ffmpeg}


@hookimpl
def register_video_readers(register: Register) -> None:
    """Add skvideo."""
    register("skvideo", SkvideoReader, source="scikit-video, http://www.scikit-video.org")
