"""Contracts of datasets and video readers."""

from __future__ import annotations

import io
import math
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import av
import numpy as np
import torch
from av.video.stream import VideoStream
from torch import Tensor

from hpdm_core.base.randomness import generator
from hpdm_core.config.content import marked
from hpdm_core.config.problems import check
from hpdm_core.config.schema import DataConfig, Part
from hpdm_core.data.dataset import NO_LABEL, ClipShape, Split
from hpdm_core.data.readers import ReadError
from hpdm_core.testing.case import Case, expect, expect_json, leaves_global_rng_alone

if TYPE_CHECKING:
    from hpdm_core.data.dataset import Clip, ClipDataset
    from hpdm_core.data.readers import VideoReader

__all__ = ["DatasetCases", "VideoReaderCases", "write_clip"]

SPLITS: tuple[Split, ...] = get_args(Split)


def write_clip(
    path: Path, *, frames: int, height: int, width: int, fps: int = 25, codec: str = "libx264"
) -> Tensor:
    """Write a small clip (yuv420p, high quality) and return its frames, uint8 [F, H, W, 3].

    The clip is smooth, so that chroma subsampling changes little. Every frame has a different brightness and
    every side a different colour, so that a wrong frame, flipped axes or swapped channels are detected. libx264
    stores the frames in another order than the presentation order.
    """
    rows = np.linspace(0, 90, height)[None, :, None]
    columns = np.linspace(0, 70, width)[None, None, :]
    times = (np.arange(frames) * 37 % 81)[:, None, None]  # neighbours differ by 37 or 44
    planes = [rows + times + 0 * columns, columns + times + 0 * rows + 40, 150 - times + 0 * (rows + columns)]
    video = np.stack(planes, axis=-1).round().astype(np.uint8)  # [F, H, W, 3]
    with av.open(str(path), "w") as container:
        options = {"qmin": "1", "qmax": "1"}
        if codec == "libx264":
            reordered = "keyint=8:scenecut=0:bframes=3:b-adapt=0:open-gop=1"
            options = {"crf": "1", "preset": "veryfast", "x264-params": reordered}
        stream = container.add_stream(codec, rate=Fraction(fps), options=options)
        if not isinstance(stream, VideoStream):
            raise ValueError(f"{codec} is not a video codec")
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return torch.from_numpy(video)


class VideoReaderCases(Case):
    """``factory(*, ...) -> VideoReader``: returns the frames of a file by their numbers."""

    family: ClassVar[str] = "video_readers"
    frames = 24
    height = 48
    width = 80
    tolerance = 8
    """Allowed difference of a pixel's value, out of 255, because the clip is compressed."""

    @contextmanager
    def _clip(self, suffix: str = ".mp4") -> Iterator[tuple[Path, Tensor]]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"a clip{suffix}"
            video = write_clip(path, frames=self.frames, height=self.height, width=self.width)
            yield path, video

    def test_probe(self) -> None:
        """probe() returns the file's number of frames, height, width and frame rate."""
        reader: VideoReader = self.make()
        with self._clip() as (path, _):
            info = reader.probe(path)
        given = (info.frames, info.height, info.width)
        wanted = (self.frames, self.height, self.width)
        expect(given == wanted, f"probe: frames, height, width {given}, wanted {wanted}")
        expect(math.isclose(info.fps, 25, rel_tol=1e-3), f"probe: {info.fps} frames per second, wanted 25")

    def test_reads_the_frames_asked_for(self) -> None:
        """read() returns uint8 [F, H, W, 3] RGB of the given numbers in the given order, also backwards or repeated."""
        reader: VideoReader = self.make()
        with self._clip() as (path, video):
            for numbers in ([0, 1, 2], [self.frames - 1], [17, 3, 3, 9]):
                made = reader.read(path, numbers)
                expect(made.dtype == torch.uint8, f"read: {made.dtype}, wanted uint8")
                shape = [len(numbers), self.height, self.width, 3]
                expect(list(made.shape) == shape, f"read: shape {list(made.shape)}, wanted {shape}")
                worst = (made.double() - video[numbers].double()).abs().mean((1, 2, 3)).max().item()
                what = f"read frames {numbers}: a frame is {worst:.1f} of 255 away from what was written"
                expect(worst <= self.tolerance, f"{what} (wrong frame, order, axis or colour?)")

    def test_frames_of_a_container_without_their_times(self) -> None:
        """AVI has no presentation times; frames are still numbered in presentation order."""
        reader: VideoReader = self.make()
        with self._clip(".avi") as (path, video):
            for number in range(self.frames):
                made = reader.read(path, [number])[0].double()
                worst = (made - video[number].double()).abs().mean().item()
                what = (
                    f"read frame {number} of an AVI file: it is {worst:.1f} of 255 away from what was written"
                )
                expect(worst <= self.tolerance, f"{what} (wrong frame?)")

    def test_short_side(self) -> None:
        """short_side resizes the shorter side and keeps the aspect ratio."""
        reader: VideoReader = self.make()
        with self._clip() as (path, video):
            made = reader.read(path, [5], short_side=24)
        expect(
            list(made.shape) == [1, 24, 40, 3],
            f"short_side 24 of 48x80: {list(made.shape)}, wanted [1, 24, 40, 3]",
        )
        worst = (made[0, ::23, ::39].double() - video[5, ::47, ::79].double()).abs().max().item()
        expect(
            worst <= 2 * self.tolerance, f"short_side: corners are {worst:.1f} of 255 away from the picture's"
        )

    def test_unreadable_files(self) -> None:
        """A damaged file, a missing file and a frame past the end raise ReadError with a one-line reason."""
        reader: VideoReader = self.make()
        with self._clip() as (path, _):
            garbage = path.with_name("garbage.mp4")
            garbage.write_bytes(bytes(range(256)) * 8)
            cases = {
                "garbage": (garbage, [0]),
                "a missing file": (path.with_name("missing.mp4"), [0]),
                "a frame past the end": (path, [self.frames]),
            }
            for what, (file, numbers) in cases.items():
                try:
                    reader.read(file, numbers)
                except ReadError as error:
                    reason = str(error)
                    expect(
                        bool(error.reason.strip()) and "\n" not in reason, f"{what}: the reason is {reason!r}"
                    )
                else:
                    raise AssertionError(f"{what}: read() returns frames, wanted ReadError")

    def test_describe(self) -> None:
        """describe() is JSON."""
        reader: VideoReader = self.make()
        expect_json(reader.describe(), "describe")


class DatasetCases(Case):
    """``factory(clip, reader, *, ...) -> ClipDataset``: draws short windows of video."""

    family: ClassVar[str] = "datasets"
    clip = ClipShape(frames=4, height=16, width=24)
    reader: VideoReader | None = None
    """The reader that the factory gets; None for the default of data.reader, from ``plugins``."""
    draws = 6
    copied_bytes = 2**26
    """Largest content of a marked option, in bytes, that is copied to check that its fingerprint shows changes."""

    def _dataset(self, *, seed: int = 0) -> ClipDataset:
        """Return a dataset; it is opened once per seed, because opening may decode every file."""
        opened: dict[int, ClipDataset] = self.__dict__.setdefault("_opened", {})
        if seed not in opened:
            opened[seed] = self._open(seed)
        return opened[seed]

    def _open(self, seed: int) -> ClipDataset:
        reader = self.reader
        if reader is None and self.plugins is not None:
            default: Part = DataConfig.model_fields["reader"].default
            reader = self.plugins.make("video_readers", default)
        made: ClipDataset = self.make(self.clip, reader, seed=seed)
        return made

    def _places(self) -> dict[str, tuple[Any, Path]]:
        """Return option -> (mark, path) for the marked options whose value is a single existing path."""
        model = self._model()
        made, _ = check(model, dict(self.options))
        found = {
            name: (mark, getattr(made, name)) for name, mark in marked(model).items() if made is not None
        }
        return {
            name: (mark, path)
            for name, (mark, path) in found.items()
            if isinstance(path, Path) and path.exists()
        }

    @staticmethod
    def _same(one: Clip, other: Clip) -> bool:
        return one.label == other.label and torch.equal(one.video, other.video)

    def test_clips(self) -> None:
        """Clips of both splits are float32 [C, F, H, W] in [-1, 1] of the given size, with a class's label or -1."""
        dataset = self._dataset()
        expect(
            isinstance(dataset.classes, tuple), f"classes: {type(dataset.classes).__name__}, wanted a tuple"
        )
        classes = len(dataset.classes)
        shape = [self.clip.channels, self.clip.frames, self.clip.height, self.clip.width]
        for split in SPLITS:
            for index in range(self.draws):
                clip = dataset.draw(split, generator(0, "clip", index))
                video = clip.video
                expect(list(video.shape) == shape, f"{split}: shape {list(video.shape)}, wanted {shape}")
                expect(video.dtype == torch.float32, f"{split}: {video.dtype}, wanted float32")
                low, high = video.min().item(), video.max().item()
                expect(
                    -1 <= low <= high <= 1, f"{split}: values from {low:.4g} to {high:.4g}, wanted -1 to 1"
                )
                wanted = range(classes) if classes else (NO_LABEL,)
                expect(
                    clip.label in wanted,
                    f"{split}: label {clip.label} with {classes} classes, wanted {wanted}",
                )

    def test_keyed(self) -> None:
        """A clip depends on the generator alone: not on the order of draws or on the dataset object."""
        dataset, other = self._dataset(seed=0), self._dataset(seed=1)
        for split in SPLITS:
            with leaves_global_rng_alone("draw"):
                first = [dataset.draw(split, generator(0, "clip", index)) for index in range(self.draws)]
                again = [
                    other.draw(split, generator(0, "clip", index)) for index in reversed(range(self.draws))
                ]
            same = all(self._same(one, two) for one, two in zip(first, reversed(again), strict=True))
            expect(same, f"{split}: the same generator gives another clip")
            fixed = dataset.distinct(split)
            if fixed is None or len(fixed) > 1:
                varied = any(not self._same(first[0], clip) for clip in first[1:])
                expect(varied, f"{split}: {self.draws} generators give one and the same clip")

    def test_distinct(self) -> None:
        """distinct() is None, or the list of every clip that can be drawn."""
        dataset = self._dataset()
        for split in SPLITS:
            fixed = dataset.distinct(split)
            if fixed is None:
                continue
            expect(len(fixed) > 0, f"{split}: distinct() is empty, wanted None or clips")
            for index in range(self.draws):
                clip = dataset.draw(split, generator(0, "clip", index))
                known = any(self._same(clip, each) for each in fixed)
                expect(known, f"{split}: a clip was drawn that distinct() does not list")

    def test_splits_differ(self) -> None:
        """No clip appears in both splits; otherwise held-out clips would have been trained on."""
        dataset = self._dataset()
        drawn = [[dataset.draw(split, generator(split, i)) for i in range(self.draws)] for split in SPLITS]
        if all(dataset.distinct(split) is not None for split in SPLITS):
            return  # a fixed set of clips, meant to be memorised, may be the same in both splits
        shared = any(torch.equal(one.video, two.video) for one in drawn[0] for two in drawn[1])
        expect(not shared, f"a clip appears in {SPLITS[0]} and in {SPLITS[1]}")

    def test_threads(self) -> None:
        """Clips drawn from several threads at once equal those drawn from one thread."""
        dataset = self._dataset()
        alone = [dataset.draw("train", generator(1, "clip", index)) for index in range(self.draws)]
        with ThreadPoolExecutor(4) as pool:
            together = list(
                pool.map(lambda index: dataset.draw("train", generator(1, "clip", index)), range(self.draws))
            )
        same = all(self._same(one, two) for one, two in zip(alone, together, strict=True))
        expect(same, "drawn from four threads, a clip differs from the same one drawn alone")

    def test_describe(self) -> None:
        """describe() is JSON, equal for equal datasets, and not changed by drawing."""
        dataset = self._dataset()
        before = expect_json(dataset.describe(), "describe")
        for split in SPLITS:
            dataset.draw(split, generator(0, "clip", 0))
        expect(expect_json(dataset.describe(), "describe") == before, "describe changes by drawing")
        expect(
            expect_json(self._dataset(seed=1).describe(), "describe") == before,
            "describe differs for an equal dataset",
        )

    def test_elsewhere(self) -> None:
        """Fingerprint, clips and description do not depend on the path in a marked option, only on its content."""
        for name, (mark, path) in self._places().items():
            here = mark.fingerprint(path)
            expect(
                isinstance(here, str), f"fingerprint of option {name}: {type(here).__name__}, wanted a text"
            )
            with tempfile.TemporaryDirectory() as folder:
                elsewhere = Path(folder) / "elsewhere"
                elsewhere.symlink_to(path.absolute(), target_is_directory=path.is_dir())
                same = mark.fingerprint(elsewhere) == here
                expect(same, f"fingerprint of option {name}: differs for the same content at another place")
                given = self.options
                try:
                    self.options = {**given, name: str(elsewhere)}
                    moved = self._open(seed=0)
                finally:
                    self.options = given
                for split in SPLITS:
                    one, two = (
                        dataset.draw(split, generator(0, "clip", 0)) for dataset in (self._dataset(), moved)
                    )
                    expect(
                        self._same(one, two), f"{split}: option {name} at another place gives another clip"
                    )
                told = [expect_json(dataset.describe(), "describe") for dataset in (self._dataset(), moved)]
                expect(told[0] == told[1], f"describe: depends on the path in option {name}, not its content")

    def test_changes_show(self) -> None:
        """The fingerprint of a marked option changes when its files change or are missing."""
        for name, (mark, path) in self._places().items():
            files = [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
            if sum(file.stat().st_size for file in files) > self.copied_bytes:
                continue
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / path.name
                shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
                here = mark.fingerprint(path)
                expect(mark.fingerprint(copy) == here, f"fingerprint of option {name}: differs for a copy")
                copies = [copy / file.relative_to(path) for file in files]
                for file in copies:
                    data = bytearray(file.read_bytes())
                    if data:
                        data[-1] ^= 1
                    file.write_bytes(data)
                changed = mark.fingerprint(copy) != here
                expect(changed, f"fingerprint of option {name}: the same when every file there has changed")
                if not path.is_dir():
                    continue
                for file in copies:
                    file.unlink()
                expect(
                    mark.fingerprint(copy) != here,
                    f"fingerprint of option {name}: the same when every file there is gone",
                )

    def test_clips_are_the_callers(self) -> None:
        """Changing a clip in place does not change later draws, and a clip can be pickled."""
        dataset = self._dataset()
        first = dataset.draw("train", generator(0, "clip", 0))
        kept = first.video.clone()
        for held in (first.video, first.pixels):
            held.zero_()
        again = dataset.draw("train", generator(0, "clip", 0))
        expect(torch.equal(again.video, kept), "changing a drawn clip in place changes the dataset")
        torch.save(first.video, io.BytesIO())
