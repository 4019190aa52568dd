"""What a video reader promises: the frames of one file by their number, exactly.

Not here: the readers themselves (each is a plugin), and which frames make a clip.
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
        """Return the file's size without decoding it. The number of frames may be the container's claim.

        Raises ReadError.
        """

    def read(self, path: Path, frames: Sequence[int], *, short_side: int | None = None) -> Tensor:
        """Return the frames with the given numbers (0 = first shown), in the given order: uint8 [F, H, W, 3],
        RGB.

        ``short_side``: the pixels that the shorter side is resized to (`hpdm_core.data.frames.resize`); None
        keeps the size. Raises ReadError: unreadable, damaged, or fewer frames than asked for.
        """

    def describe(self) -> dict[str, Any]:
        """Return the reader's name and the versions of what decodes, as JSON."""


def check_frames(path: Path, frames: Sequence[int], available: int) -> None:
    """Raise ReadError when one of the numbers ``frames`` is not among the ``available`` first."""
    if frames and (max(frames) >= available or min(frames) < 0):
        asked = max(frames) if max(frames) >= available else min(frames)
        raise ReadError(path, f"has {available} frames; frame number {asked} was asked for")


def reason_of(error: Exception) -> str:
    """Return what the system or a decoder says, as one line, without the file's name where it can be told."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(said).split())
