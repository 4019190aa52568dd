"""Video files on disk: listing, probing, recording the files that are skipped, and fingerprints of content."""

import hashlib
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpdm_core.base.errors import InputError
from hpdm_core.data.dataset import NO_LABEL
from hpdm_core.data.readers import ReadError, VideoInfo, VideoReader

__all__ = [
    "SUFFIXES",
    "Skipped",
    "SourceFile",
    "existing_folder",
    "fingerprint",
    "probe_all",
    "sha256",
    "video_files",
]

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")
"""Suffixes of video files, in lower case."""

ENDS = 2**16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceFile:
    """A video file: ``name`` is its path relative to the dataset's root, with forward slashes."""

    path: Path
    name: str
    label: int = NO_LABEL


class Skipped:
    """Records the files that cannot be used. Each is logged once, as a warning, with the first reason."""

    def __init__(self, dataset: str) -> None:
        self._dataset = dataset
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Record and log that the file ``name`` is skipped; do nothing if it is recorded already."""
        with self._lock:
            if name in self._reasons:
                return
            self._reasons[name] = reason
        log.warning("%s: skipped %s: %s", self._dataset, name, reason)

    def __len__(self) -> int:
        return len(self._reasons)

    def lines(self, most: int = 5) -> list[str]:
        """Return "NAME: REASON" for the first ``most`` files, and how many more there are."""
        listed = [f"{name}: {reason}" for name, reason in list(self._reasons.items())[:most]]
        return [*listed, f"and {len(self) - most} more files"] if len(self) > most else listed

    def describe(self) -> list[dict[str, str]]:
        """Return the files and reasons as JSON, sorted by name."""
        with self._lock:
            return [{"file": name, "reason": reason} for name, reason in sorted(self._reasons.items())]


def existing_folder(dataset: str, root: Path) -> Path:
    """Return ``root`` with ``~`` resolved. Raises InputError when it is not a folder."""
    folder = root.expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(
            f"data.dataset '{dataset}', option root: '{root}' {what}; allowed is an existing folder"
        )
    return folder


def video_files(folder: Path) -> list[Path]:
    """Return the video files (by `SUFFIXES`) directly in ``folder``, sorted by name, without hidden files."""
    found = (
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    return sorted(path for path in found if path.is_file())


def probe_all(
    files: Iterable[SourceFile], reader: VideoReader, *, span: int, skipped: Skipped
) -> list[tuple[SourceFile, VideoInfo]]:
    """Return the files that open and have at least ``span`` frames, with their sizes; add the others to ``skipped``."""
    usable = []
    for file in files:
        try:
            info = reader.probe(file.path)
        except ReadError as error:
            skipped.add(file.name, error.reason)
            continue
        if info.frames < span:
            skipped.add(file.name, f"has {info.frames} frames; a window reaches over {span}")
        elif min(info.height, info.width) < 1:
            skipped.add(file.name, f"has frames of {info.height} x {info.width} pixels")
        else:
            usable.append((file, info))
    return usable


def sha256(path: Path) -> str:
    """Return the SHA-256 of a whole file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(files: Sequence[SourceFile]) -> dict[str, str]:
    """Return name -> fingerprint of each file's content: SHA-256 of its size and its first and last 64 KiB.

    Reading whole data sets would take too long. The fingerprint of a file that cannot be read is "unreadable".
    """
    made = {}
    for file in files:
        try:
            with file.path.open("rb") as stream:
                size = stream.seek(0, 2)
                stream.seek(0)
                digest = hashlib.sha256(f"{size}:".encode() + stream.read(ENDS))
                stream.seek(max(size - ENDS, min(size, ENDS)))
                digest.update(stream.read(ENDS))
            made[file.name] = digest.hexdigest()
        except OSError:
            made[file.name] = "unreadable"
    return made
