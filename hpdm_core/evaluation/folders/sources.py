"""Find the videos in a folder: video files, folders of frames, and numpy arrays.

Class folders may be nested to any depth; hidden files are ignored. A folder of pictures is one video. A ``.npy`` holds
one video, [frames, height, width, channels], or many, [videos, frames, ...]. Only headers are decoded here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hpdm_core.base.errors import InputError
from hpdm_core.data.files import SUFFIXES, sha256
from hpdm_core.data.readers import ReadError, VideoInfo, VideoReader, reason_of
from hpdm_core.sampling.files import CONTACT_SHEET

__all__ = ["PICTURES", "Video", "content_hash", "list_videos", "natural", "probe", "read_array"]

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
JPEGS = (".jpeg", ".jpg")
ARRAY = ".npy"


@dataclass(frozen=True)
class Video:
    """One video. ``name``: its path relative to the side's folder, with ``#i`` appended in an array of many; ``index``:
    that i; ``kind``: "video", "frames" or "array".
    """

    path: Path
    name: str
    kind: str
    index: int | None = None

    @cached_property
    def pictures(self) -> list[Path]:
        """The frames of a folder of frames, in natural order."""
        return sorted(_pictures(self.path), key=lambda path: natural(path.name))

    @property
    def jpeg(self) -> bool:
        """Whether the video is a folder of JPEG files."""
        return self.kind == "frames" and self.pictures[0].suffix.lower() in JPEGS


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts ``a2`` before ``a10``."""
    return [
        (0, int(part), part) if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]


def list_videos(folder: Path, *, option: str) -> list[Video]:
    """Return all videos under ``folder``, sorted by name. Raises InputError, naming ``option``, if there are none."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{option} {folder}: {what}; allowed is a folder of videos, frame folders or .npy")
    if _pictures(folder):
        raise InputError(
            f"{option} {folder}: holds pictures, so it is one video; allowed is a folder of at least two "
            "videos, each a file or a folder of frames"
        )
    found = sorted(_walk(folder, folder, option), key=lambda video: video.name)
    if not found:
        raise InputError(
            f"{option} {folder}: holds no video; allowed are video files ({' '.join(SUFFIXES)}), folders of "
            f"frames ({' '.join(PICTURES)}) and .npy arrays, in class folders or not"
        )
    return found


def _walk(folder: Path, root: Path, option: str) -> Iterator[Video]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            if _pictures(path):
                other = [each for each in path.iterdir() if each.suffix.lower() in (*SUFFIXES, ARRAY)]
                if other:  # otherwise the videos beside the pictures would be ignored
                    raise InputError(
                        f"{option}: {path} holds pictures and videos ({other[0].name}); allowed is a folder of frames, "
                        "or one of videos"
                    )
                yield Video(path, name, "frames")
            else:
                yield from _walk(path, root, option)
        elif path.suffix.lower() in SUFFIXES:
            yield Video(path, name, "video")
        elif path.suffix.lower() == ARRAY:
            yield from _arrays(path, name, option)


def _pictures(folder: Path) -> list[Path]:
    """Return the pictures in ``folder``, except the contact sheet that ``hpdm_core.sample`` writes beside videos."""
    return [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in PICTURES
        and not path.name.startswith(".")
        and path.name != CONTACT_SHEET
        and path.is_file()
    ]


def _arrays(path: Path, name: str, option: str) -> Iterator[Video]:
    try:
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    except (OSError, ValueError, EOFError):
        yield Video(path, name, "array")  # damaged: reported as unreadable when it is probed
        return
    if len(shape) not in (4, 5) or shape[-1] not in (1, 3):
        raise InputError(
            f"{option}: {path} has the shape {list(shape)}; allowed is [frames, height, width, channels], or "
            "[videos, frames, height, width, channels], with 1 or 3 channels"
        )
    if len(shape) == 4:
        yield Video(path, name, "array")
    else:
        width = len(str(max(shape[0] - 1, 0)))  # so that names sort as numbers do
        yield from (Video(path, f"{name}#{index:0{width}d}", "array", index) for index in range(shape[0]))


def read_array(video: Video) -> NDArray[np.generic]:
    """Return the array of ``video`` [F, H, W, C], memory-mapped. Raises ReadError."""
    try:
        array: NDArray[np.generic] = np.load(video.path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ReadError(video.path, f"is not a complete .npy file ({reason_of(error)})") from error
    return array if video.index is None else array[video.index]


def probe(video: Video, reader: VideoReader) -> VideoInfo:
    """Return frames, height and width, decoding a header only. Raises ReadError."""
    if video.kind == "video":
        return reader.probe(video.path)
    if video.kind == "array":
        frames, height, width = read_array(video).shape[:3]
        return VideoInfo(frames, height, width, 0.0)
    first = video.pictures[0]
    try:
        with Image.open(first) as picture:
            width, height = picture.size
    except (OSError, UnidentifiedImageError) as error:
        raise ReadError(first, reason_of(error)) from error
    return VideoInfo(len(video.pictures), height, width, 0.0)


def content_hash(video: Video, frames: Sequence[int]) -> str:
    """Return the SHA-256 of the file of ``video``, or of its pictures ``frames``.

    Whole files are hashed: a cache keyed by names or times could return outdated features. Raises ReadError.
    """
    try:
        if video.kind != "frames":
            return sha256(video.path)
        digest = hashlib.sha256()
        for frame in frames:
            digest.update(sha256(video.pictures[frame]).encode())
        return digest.hexdigest()
    except OSError as error:
        raise ReadError(Path(error.filename or video.path), reason_of(error)) from error
    except IndexError as error:
        raise ReadError(video.path, f"has {len(video.pictures)} frames, fewer than were asked for") from error
