"""The dataset `video_folder`: any folder of video files, flat or with one folder per class.

Shot cuts in such files are not known, so a window may contain one.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from hpdm_core.base.errors import InputError
from hpdm_core.config.content import Content, fingerprint_files
from hpdm_core.data.dataset import NO_LABEL, ClipShape, Split, require_rgb
from hpdm_core.data.file_clips import Crop, FileClips
from hpdm_core.data.files import SUFFIXES, Skipped, SourceFile, existing_folder, probe_all, video_files
from hpdm_core.data.readers import VideoInfo, VideoReader
from hpdm_core.data.windows import span
from hpdm_core.hookspecs import Register, hookimpl

__all__ = ["register_datasets", "video_folder"]

NAME = "video_folder"


def content(root: Path) -> str:
    """Return the fingerprint, by name and content, of the video files in ``root`` and in its immediate subfolders."""
    places = [root, *(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else []
    files = [
        file
        for place in places
        if not place.name.startswith(".") or place == root
        for file in video_files(place)
    ]
    return fingerprint_files((file.relative_to(root).as_posix(), file) for file in files)


def video_folder(
    clip: ClipShape,
    reader: VideoReader,
    *,
    root: Annotated[Path, Content(content)],
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2,
    stride: Annotated[int, Field(gt=0)] = 1,
    crop: Crop = "random",
    flip: bool = True,
    labels: bool = True,
) -> FileClips:
    """Return the clips of the video files in ``root``; a draw chooses files uniformly (see `FileClips`).

    Either ``root`` contains the files, and clips have no label, or it contains one folder per class, named after
    it; classes are numbered in the order of their names.

    Options:
        held_out: share of each class's files that is held out, at least one file; files are chosen by a hash of
            their names.
        stride: a clip takes every ``stride``-th frame.
        crop: position of a clip in the frame, random or centred.
        flip: mirror left-right with probability 1/2, in training only.
        labels: False hides the classes.

    A file that does not open, or has fewer frames than a clip spans, is skipped and logged. Raises InputError if
    no file is usable.
    """
    require_rgb(NAME, clip)
    folder = existing_folder(NAME, root)
    classes, listed = _listed(folder, root)
    if not listed:
        raise InputError(
            f"data.dataset '{NAME}', option root: '{root}' and its immediate subfolders contain no video file; "
            f"allowed file suffixes are {' '.join(SUFFIXES)}"
        )
    skipped = Skipped(NAME)
    usable = probe_all(listed, reader, span=span(clip.frames, stride), skipped=skipped)
    if not usable:
        raise InputError(
            f"data.dataset '{NAME}': no file in '{root}' can be used for clips of {clip.frames} frames, "
            f"{stride} apart: {'; '.join(skipped.lines())}"
        )
    files = _split(usable, held_out)
    trained = {file.label for file, _ in files["train"]}
    empty = [name for label, name in enumerate(classes) if labels and label not in trained]
    if empty:
        raise InputError(
            f"data.dataset '{NAME}': class '{empty[0]}' in '{root}' has no usable file for training"
            + (f"; skipped were {'; '.join(skipped.lines())}" if len(skipped) else "")
        )
    if held_out and not files["held_out"]:
        raise InputError(
            f"data.dataset '{NAME}': '{root}' has one usable file per class, so none can be held out; add "
            f"files, or set held_out: 0 to train without a held-out split"
        )
    return FileClips(
        clip,
        reader,
        name=NAME,
        root=folder,
        files=files,
        classes=classes,
        labels=labels,
        skipped=skipped,
        stride=stride,
        crop=crop,
        flip=flip,
    )


def _listed(folder: Path, root: Path) -> tuple[tuple[str, ...], list[SourceFile]]:
    """Return the classes and all video files with labels. Raises InputError if both layouts are mixed."""
    flat = video_files(folder)
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    by_class = {path.name: files for path in folders if (files := video_files(path))}
    if flat and by_class:
        raise InputError(
            f"data.dataset '{NAME}', option root: '{root}' holds video files ('{flat[0].name}') beside "
            f"folders of video files ('{next(iter(by_class))}'); allowed is one or the other"
        )
    if flat:
        return (), [SourceFile(path, path.name, NO_LABEL) for path in flat]
    listed = [
        SourceFile(path, f"{name}/{path.name}", label)
        for label, (name, files) in enumerate(by_class.items())
        for path in files
    ]
    return tuple(by_class), listed


def _split(
    usable: Sequence[tuple[SourceFile, VideoInfo]], held_out: float
) -> dict[Split, list[tuple[SourceFile, VideoInfo]]]:
    """Hold out files: per class the share ``held_out``, at least one file, but never the only file of a class."""
    files: dict[Split, list[tuple[SourceFile, VideoInfo]]] = {"train": [], "held_out": []}
    for label in sorted({file.label for file, _ in usable}):
        # Sorted by a hash of the name: sorted by name, files of one series would end up in the same split.
        ordered = sorted(
            (item for item in usable if item[0].label == label),
            key=lambda item: hashlib.sha256(f"held_out:{item[0].name}".encode()).digest(),
        )
        number = min(math.ceil(round(held_out * len(ordered), 6)), len(ordered) - 1)
        files["held_out"] += ordered[:number]
        files["train"] += ordered[number:]
    return {split: sorted(part, key=lambda item: item[0].name) for split, part in files.items()}


@hookimpl
def register_datasets(register: Register) -> None:
    """Add video_folder."""
    register(NAME, video_folder, source="the user's own files")
