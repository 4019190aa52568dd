"""The interface of video readers: they return exactly the frames of a file with the given numbers.

Not here: the readers themselves (each is a plugin), and the choice of the frames of a clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from hpdm_core.base.errors import TroubleError

__all__ = ["ReadError", "VideoInfo", "VideoReader", "check_frames", "reason_of"]


class ReadError(TroubleError):
    """The file at ``path`` cannot be read, for ``reason`` (one line, without the path)."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> Any:
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class VideoInfo:
    """A video stream: its ``frames``, ``height`` and ``width`` in pixels, ``fps`` the average frame rate."""

    frames: int
    height: int
    width: int
    fps: float


@runtime_checkable
class VideoReader(Protocol):
    """Reads frames of video files. Holds no open file, and is safe to call from several threads."""

    def probe(self, path: Path) -> VideoInfo:
        """Return the file's size without decoding it. Raises ReadError.

        The number of frames may be taken from the container's header, which can be wrong.
        """

    def read(self, path: Path, frames: Sequence[int], *, short_side: int | None = None) -> Tensor:
        """Return the frames with the given numbers, in the given order: uint8 [F, H, W, 3], RGB.

        Frames are numbered from 0 in presentation order. ``short_side``: the shorter side is resized to this
        many pixels (`hpdm_core.data.frames.resize`); None keeps the size. Raises ReadError for a file that is
        unreadable or damaged, or has fewer frames than asked for.
        """

    def describe(self) -> dict[str, Any]:
        """Return the reader's name and the versions of its decoders, as JSON."""


def check_frames(path: Path, frames: Sequence[int], available: int) -> None:
    """Raise ReadError if one of the frame numbers ``frames`` is not in [0, ``available``)."""
    if frames and (max(frames) >= available or min(frames) < 0):
        asked = max(frames) if max(frames) >= available else min(frames)
        raise ReadError(path, f"has {available} frames; frame number {asked} was asked for")


def reason_of(error: Exception) -> str:
    """Return the message of the system or a decoder as one line, without the file's name where possible."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(said).split())
