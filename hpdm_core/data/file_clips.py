"""Clips from a list of video files, decoded when they are drawn. The folder datasets are built on it.

Not here: the choice of files, classes and splits (the plugin of each dataset).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.data.dataset import NO_LABEL, Clip, ClipShape, Split, pick
from hpdm_core.data.files import Skipped, SourceFile, fingerprint
from hpdm_core.data.frames import covering_short_side, crop_offsets, scaled_size, to_pixels
from hpdm_core.data.readers import ReadError, VideoInfo, VideoReader
from hpdm_core.data.windows import span

__all__ = ["Crop", "FileClips", "FrameCache"]

Crop = Literal["random", "centre"]

CACHE_BYTES = 2**28
"""Bytes of decoded frames that a dataset keeps in memory. A small folder fits and is decoded only once."""

MOST_FAILURES = 100
"""Consecutive draws that may fail because a file cannot be decoded."""


class FrameCache:
    """A cache of the most recently used frames, by file, size and number; at most ``limit`` bytes. Thread-safe."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._limit = limit
        self._frames: OrderedDict[tuple[Path, int, int], Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def read(
        self, reader: VideoReader, path: Path, frames: Sequence[int], *, short_side: int
    ) -> list[Tensor]:
        """Return the frames, uint8 [H, W, 3] each; ``reader`` decodes those that are not in the cache."""
        with self._lock:
            found = {number: self._frames.get((path, short_side, number)) for number in frames}
        missing = [number for number, frame in found.items() if frame is None]
        if missing:
            decoded = reader.read(path, missing, short_side=short_side)
            # Cloned: a view of one frame would keep the memory of the whole window.
            found.update((number, frame.clone()) for number, frame in zip(missing, decoded, strict=True))
        kept = {number: frame for number, frame in found.items() if frame is not None}
        with self._lock:
            for number, frame in kept.items():
                self._keep((path, short_side, number), frame)
        return [kept[number] for number in frames]

    def _keep(self, key: tuple[Path, int, int], frame: Tensor) -> None:
        if key not in self._frames:
            self._frames[key] = frame
            self._bytes += frame.nbytes
        self._frames.move_to_end(key)
        while self._bytes > self._limit and len(self._frames) > 1:
            self._bytes -= self._frames.popitem(last=False)[1].nbytes


class FileClips:
    """A dataset of video files, listed per split in ``files``.

    A draw chooses a file uniformly, then a window of it, then a crop, then (in training, with ``flip``)
    whether to mirror it. Frames are resized to the smallest size that covers a clip. A file that cannot be
    decoded is logged once, and the draw continues with the next random numbers of the same generator.
    ``labels`` False hides the classes.
    """

    def __init__(
        self,
        clip: ClipShape,
        reader: VideoReader,
        *,
        name: str,
        root: Path,
        files: Mapping[Split, Sequence[tuple[SourceFile, VideoInfo]]],
        classes: Sequence[str],
        labels: bool,
        skipped: Skipped,
        stride: int,
        crop: Crop,
        flip: bool,
    ) -> None:
        self.classes = tuple(classes) if labels else ()
        self._labels = labels
        self._clip = clip
        self._reader = reader
        self._name = name
        self._root = root
        self._files = {split: tuple(listed) for split, listed in files.items()}
        self._skipped = skipped
        self._stride = stride
        self._crop = crop
        self._flip = flip
        self._cache = FrameCache()

    def draw(self, split: Split, generator: torch.Generator) -> Clip:
        """Return one random clip of ``split``; see `ClipDataset.draw`."""
        files = self._files[split]
        if not files:
            raise InputError(
                f"data.dataset '{self._name}': no file is in the split '{split}' of '{self._root}'"
            )
        failure: ReadError | None = None
        for _ in range(MOST_FAILURES):
            file, info = files[pick(len(files), generator)]
            start = pick(self._windows(info), generator)
            try:
                return self._read(file, info, start, split, generator)
            except ReadError as error:
                if not self._root.is_dir():
                    raise TroubleError(
                        f"data.dataset '{self._name}': the folder '{self._root}' has vanished while running"
                    ) from error
                # The file stays in the list: if it were removed, a draw would depend on the draws before it.
                self._skipped.add(file.name, error.reason)
                failure = error
        raise TroubleError(
            f"data.dataset '{self._name}': {MOST_FAILURES} draws in a row from '{self._root}' hit files that "
            f"cannot be decoded; the last one is {failure}"
        )

    def _read(
        self, file: SourceFile, info: VideoInfo, start: int, split: Split, generator: torch.Generator
    ) -> Clip:
        shape = self._clip
        need = (shape.height, shape.width)
        short_side = covering_short_side(info.height, info.width, *need)
        numbers = range(start, start + span(shape.frames, self._stride), self._stride)
        frames = self._cache.read(self._reader, file.path, numbers, short_side=short_side)
        expected = scaled_size(info.height, info.width, short_side)
        for frame in frames:
            if tuple(frame.shape[:2]) != expected:
                raise ReadError(
                    file.path, "its frames change size, or are not of the size that its header claims"
                )
        top, left = crop_offsets(expected, need, generator if self._crop == "random" else None)
        window = torch.stack([frame[top : top + need[0], left : left + need[1]] for frame in frames])
        mirrored = self._flip and split == "train" and pick(2, generator) == 1
        return Clip(to_pixels(window, flip=mirrored), file.label if self._labels else NO_LABEL)

    def _windows(self, info: VideoInfo) -> int:
        return info.frames - span(self._clip.frames, self._stride) + 1

    def files(self, split: Split) -> tuple[tuple[SourceFile, VideoInfo], ...]:
        """Return the usable files of ``split``, for metrics that choose clips by their own rule."""
        return self._files[split]

    @property
    def reader(self) -> VideoReader:
        """The reader that decodes the files."""
        return self._reader

    def distinct(self, split: Split) -> list[Clip] | None:
        """Return None, because windows and crops vary."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return the files with their fingerprints, counts per split, and the files skipped so far."""
        return {
            "name": self._name,
            "classes": list(self.classes),
            "stride": self._stride,
            "crop": self._crop,
            "flip": self._flip,
            "reader": self._reader.describe(),
            "splits": {
                split: {"clips": len(files), "windows": sum(self._windows(info) for _, info in files)}
                for split, files in self._files.items()
            },
            "files": {
                split: fingerprint([file for file, _ in files]) for split, files in self._files.items()
            },
            "skipped": self._skipped.describe(),
        }
