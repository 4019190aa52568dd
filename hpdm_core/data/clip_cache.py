"""A cache of decoded, resized frames on disk, shared by all processes that train on the same files.

`CachedReader` wraps another reader. It decodes runs of `RUN` frames, stores them losslessly (uint8) and
memory-maps them when they are asked for again. The name of a stored run is a hash of the video's content, the
reader, the size and the run's number, so a stored run is never out of date. When the folder is full, the
least recently used runs are deleted. Files are written atomically; one that was deleted is decoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpdm_core.base.errors import InputError
from hpdm_core.base.files import whole_or_absent
from hpdm_core.data.files import SourceFile, fingerprint
from hpdm_core.data.readers import ReadError, VideoInfo, VideoReader

__all__ = ["CachedReader"]

FORMAT = 1
RUN = 32
"""Frames per stored file."""
LOOK_SHARE = 1 / 64
"""The size of the folder is checked each time that this share of its limit has been written."""
FILL = 0.9
"""When it is too full, files are deleted down to this share of its limit."""
FRESH_SECONDS = 60.0
"""A file's time of last use is updated at most this often."""
HALF_SECONDS = 3600.0
"""A temporary file older than this was left by a killed process."""

log = logging.getLogger(__name__)


class CachedReader:
    """``reader`` with a cache of decoded frames in ``folder``, of about ``limit`` bytes at most.

    Several processes and threads may share the folder. If it cannot be written or the disk is full, frames
    are decoded each time, and the log says so once.
    """

    def __init__(self, reader: VideoReader, folder: Path, *, limit: int) -> None:
        self._reader = reader
        self._folder = folder.expanduser()
        self._limit = limit
        self._unlooked = limit  # bytes written since the folder's size was checked; the first write checks it
        self._contents: dict[tuple[Path, int, int], str] = {}
        self._lock = threading.Lock()
        self._off = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"runtime.clip_cache: '{folder}' cannot be made ({error.strerror}); allowed is a writable folder"
            ) from error

    def probe(self, path: Path) -> VideoInfo:
        """See `VideoReader.probe`."""
        return self._reader.probe(path)

    def describe(self) -> dict[str, Any]:
        """Return the description of the wrapped reader: the cache does not change the frames."""
        return self._reader.describe()

    def read(self, path: Path, frames: Sequence[int], *, short_side: int | None = None) -> Tensor:
        """See `VideoReader.read`."""
        if not frames or min(frames) < 0:
            return self._reader.read(path, frames, short_side=short_side)
        numbers = sorted({frame // RUN for frame in frames})
        names = {number: self._name(path, short_side, number) for number in numbers}
        runs = {number: found for number in numbers if (found := self._stored(names[number])) is not None}
        missing = [number for number in numbers if number not in runs]
        if missing and not self._decode(path, short_side, missing, names, runs):
            # The header claims more frames than the file has. The frames that are asked for may still exist.
            return self._reader.read(path, frames, short_side=short_side)
        picked = [(runs[frame // RUN], frame % RUN) for frame in frames]
        short = next(
            (frame for frame, (run, place) in zip(frames, picked, strict=True) if place >= len(run)), None
        )
        if short is not None:
            return self._reader.read(path, frames, short_side=short_side)  # raises the appropriate ReadError
        return torch.from_numpy(np.stack([run[place] for run, place in picked]))

    def _decode(
        self,
        path: Path,
        short_side: int | None,
        missing: Sequence[int],
        names: dict[int, Path],
        runs: dict[int, Any],
    ) -> bool:
        """Decode and store the ``missing`` runs; return False if any of them cannot be decoded completely."""
        total = self._reader.probe(path).frames
        wanted = [
            frame for number in missing for frame in range(number * RUN, min((number + 1) * RUN, total))
        ]
        if not wanted:
            return False
        try:
            decoded = self._reader.read(path, wanted, short_side=short_side)
        except ReadError:
            return False
        start = 0
        for number in missing:
            count = min((number + 1) * RUN, total) - number * RUN
            if count > 0:
                runs[number] = decoded[start : start + count].numpy()
                self._store(names[number], runs[number])
                start += count
        return all(number in runs for number in missing)

    def _name(self, path: Path, short_side: int | None, number: int) -> Path:
        facts = {
            "format": FORMAT,
            "content": self._content(path),
            "reader": self._reader.describe(),
            "short_side": short_side,
            "run": [number, RUN],
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest}.npy"

    def _content(self, path: Path) -> str:
        try:
            status = path.stat()
        except OSError:
            return "unreadable"
        key = (path, status.st_size, status.st_mtime_ns)
        with self._lock:
            found = self._contents.get(key)
        if found is None:
            found = fingerprint([SourceFile(path, path.name)])[path.name]
            with self._lock:
                self._contents[key] = found
        return found

    def _stored(self, name: Path) -> Any:
        """Return the frames in the file ``name``, memory-mapped; None if it is missing or damaged."""
        try:
            status = name.stat()
            if not status.st_size:
                return None
            found = np.load(name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            with contextlib.suppress(OSError):
                name.unlink()
            return None
        if time.time() - status.st_mtime > FRESH_SECONDS:
            with contextlib.suppress(OSError):
                os.utime(name)
        return found

    def _store(self, name: Path, frames: Any) -> None:
        if self._off or frames.nbytes > self._limit:
            return
        try:
            with self._lock:
                self._unlooked += frames.nbytes
                look = self._unlooked > LOOK_SHARE * self._limit
                if look:
                    self._unlooked = 0
            if look:
                self._make_room(frames.nbytes)
            name.parent.mkdir(exist_ok=True)
            with whole_or_absent(name, durable=False) as handle:
                np.save(handle, frames, allow_pickle=False)
        except OSError as error:
            self._off = True
            log.warning(
                "runtime.clip_cache: %s: %s; frames are decoded each time", self._folder, error.strerror
            )

    def _make_room(self, size: int) -> None:
        """Delete the least recently used files if the folder is over its limit; one process at a time does so."""
        with _alone(self._folder / ".lock") as mine:
            if not mine:
                return
            for name in self._folder.glob("??/.*.tmp"):  # left by killed processes
                with contextlib.suppress(OSError):
                    if time.time() - name.stat().st_mtime > HALF_SECONDS:
                        name.unlink()
            found = []
            for name in self._folder.glob("??/*.npy"):
                with contextlib.suppress(OSError):
                    status = name.stat()
                    found.append((status.st_mtime, status.st_size, name))
            total = sum(each for _, each, _ in found)
            if total + size + LOOK_SHARE * self._limit <= self._limit:
                return
            for _, each, name in sorted(found, key=lambda entry: entry[0]):
                if total + size <= FILL * self._limit:
                    break
                with contextlib.suppress(OSError):
                    name.unlink()
                    total -= each


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Acquire the file lock ``lock`` if it is free; yield whether it was acquired."""
    try:
        import fcntl
    except ImportError:  # Windows: without a lock two processes may delete too much, which is harmless
        yield True
        return
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
