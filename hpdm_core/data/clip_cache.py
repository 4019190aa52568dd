"""Decoded, resized frames on disk, shared by all processes that train on the same files.

A reader around another one: it decodes runs of `RUN` frames, keeps them as they are (uint8, no loss) and maps
them in when they are asked for again. A run is named by the content of its file, what decodes it, the size and
its number, so that nothing is ever out of date; what was used longest ago goes when the folder is full. Files
appear whole or not at all, and may vanish at any time: then they are decoded again.
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
"""Frames that are kept in one file."""
LOOK_SHARE = 1 / 64
"""The folder is looked through whenever this share of its limit has been written."""
FILL = 0.9
"""How full it is left."""
FRESH_SECONDS = 60.0
"""A file's time of use is noted at most this often."""
HALF_SECONDS = 3600.0
"""Nobody writes one file for longer."""

log = logging.getLogger(__name__)


class CachedReader:
    """``reader``, with what it decodes kept in ``folder``, up to about ``limit`` bytes in all.

    Several processes and threads may share the folder. Where it cannot be written, or the disk is full,
    frames are decoded each time, and the log says so once.
    """

    def __init__(self, reader: VideoReader, folder: Path, *, limit: int) -> None:
        self._reader = reader
        self._folder = folder.expanduser()
        self._limit = limit
        self._unlooked = limit  # bytes written since the folder was looked through: the first write looks
        self._contents: dict[tuple[Path, int, int], str] = {}
        self._lock = threading.Lock()
        self._off = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"runtime.clip_cache: '{folder}' cannot be made ({error.strerror}); allowed is a folder that may be "
                "written to"
            ) from error

    def probe(self, path: Path) -> VideoInfo:
        """See `VideoReader.probe`."""
        return self._reader.probe(path)

    def describe(self) -> dict[str, Any]:
        """Return what the reader inside says: the frames are the same."""
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
            # The header promised more frames than there are: what is asked for may still be among them.
            return self._reader.read(path, frames, short_side=short_side)
        picked = [(runs[frame // RUN], frame % RUN) for frame in frames]
        short = next(
            (frame for frame, (run, place) in zip(frames, picked, strict=True) if place >= len(run)), None
        )
        if short is not None:
            return self._reader.read(path, frames, short_side=short_side)  # says what is wrong
        return torch.from_numpy(np.stack([run[place] for run, place in picked]))

    def _decode(
        self,
        path: Path,
        short_side: int | None,
        missing: Sequence[int],
        names: dict[int, Path],
        runs: dict[int, Any],
    ) -> bool:
        """Decode and keep the ``missing`` runs; False where they do not decode whole."""
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
        """Return the frames in the file ``name``, mapped; None where there is none that is whole."""
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
        """Delete what was used longest ago, if the folder is over its limit. One process at a time does."""
        with _alone(self._folder / ".lock") as mine:
            if not mine:
                return
            for name in self._folder.glob("??/.*.tmp"):  # halves that killed processes left
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
    """Hold the file ``lock`` if nobody else does; yields whether it is held."""
    try:
        import fcntl
    except ImportError:  # Windows: two that make room at once delete more than they must, no harm done
        yield True
        return
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
