"""The dataset `ucf101`: UCF-101 in its official layout, with its official train and test lists (25 fps).

    ROOT/UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi ...
    ROOT/ucfTrainTestlist/{classInd,trainlist01,testlist01,...}.txt

Clips of one group (g01) are near-duplicates, so a random split would put near-duplicates in both splits; the
official lists do not split groups.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hpdm_core.base.errors import InputError
from hpdm_core.config.content import Content, fingerprint_files
from hpdm_core.data.dataset import ClipShape, Split, require_rgb
from hpdm_core.data.file_clips import Crop, FileClips
from hpdm_core.data.files import Skipped, SourceFile, existing_folder, probe_all
from hpdm_core.data.readers import VideoInfo, VideoReader
from hpdm_core.data.windows import span
from hpdm_core.hookspecs import Register, hookimpl

__all__ = ["register_datasets", "ucf101"]

NAME = "ucf101"
VIDEOS = "UCF-101"
LISTS = "ucfTrainTestlist"
LISTED: dict[Split, str] = {"train": "trainlist", "held_out": "testlist"}


def content(root: Path) -> str:
    """Return the fingerprint of the lists and of all files in class folders, by name and content."""
    files = [*(root / LISTS).glob("*.txt"), *(root / VIDEOS).glob("*/*")]
    return fingerprint_files((file.relative_to(root).as_posix(), file) for file in files)


def ucf101(
    clip: ClipShape,
    reader: VideoReader,
    *,
    root: Annotated[Path, Content(content)],
    fold: Literal[1, 2, 3] = 1,
    stride: Annotated[int, Field(gt=0)] = 1,
    crop: Crop = "random",
    flip: bool = True,
    labels: bool = True,
) -> FileClips:
    """Return the clips of UCF-101: training on train list ``fold``, held out is test list ``fold``.

    A draw chooses files uniformly (see `FileClips`), so the frequency of a class is its share of the files. Labels
    are the numbers of classInd.txt minus one. Options as in `video_folder`. A listed file that is missing, does not
    open or is too short is skipped and logged. Raises InputError for another layout, and if no file is usable.
    """
    require_rgb(NAME, clip)
    folder = existing_folder(NAME, root)
    for part in (VIDEOS, LISTS):
        if not (folder / part).is_dir():
            raise InputError(
                f"data.dataset '{NAME}', option root: '{root}' has no folder '{part}'; the official layout "
                f"is {VIDEOS}/CLASS/v_CLASS_g01_c01.avi beside {LISTS}/classInd.txt and trainlist01.txt"
            )
    classes = _classes(folder / LISTS / "classInd.txt")
    skipped = Skipped(NAME)
    files: dict[Split, list[tuple[SourceFile, VideoInfo]]] = {}
    for split, stem in LISTED.items():
        listing = folder / LISTS / f"{stem}{fold:02d}.txt"
        listed = _listed(folder, listing, classes)
        files[split] = probe_all(listed, reader, span=span(clip.frames, stride), skipped=skipped)
        if not files[split]:
            raise InputError(
                f"data.dataset '{NAME}': no file of {listing} can be used for clips of {clip.frames} frames, "
                f"{stride} apart: {'; '.join(skipped.lines()) or 'the list is empty'}"
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


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, words) of the lines that are not empty. Raises InputError when the file cannot be
    read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.dataset '{NAME}': {path} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.split()


def _classes(path: Path) -> tuple[str, ...]:
    """Read classInd.txt: lines such as "1 ApplyEyeMakeup", numbered from 1 without gaps."""
    classes: list[str] = []
    for number, words in _lines(path):
        if len(words) != 2 or words[0] != str(len(classes) + 1):
            raise InputError(
                f"{path}:{number}: '{' '.join(words)}' was read; expected is '{len(classes) + 1} CLASSNAME'"
            )
        classes.append(words[1])
    return tuple(classes)


def _listed(folder: Path, listing: Path, classes: tuple[str, ...]) -> list[SourceFile]:
    """Read a train or test list: lines "CLASS/FILE.avi", in train lists followed by the number of the class."""
    files = []
    for number, words in _lines(listing):
        name, _, file = words[0].partition("/")
        if not file or len(words) > 2 or name not in classes:
            raise InputError(
                f"{listing}:{number}: '{' '.join(words)}' was read; expected is 'CLASS/FILE.avi', with a "
                f"class of classInd.txt"
            )
        label = classes.index(name)
        if len(words) == 2 and words[1] != str(label + 1):
            raise InputError(
                f"{listing}:{number}: '{' '.join(words)}' was read; classInd.txt gives "
                f"{name} the number {label + 1}"
            )
        files.append(SourceFile(folder / VIDEOS / name / file, words[0], label))
    return files


@hookimpl
def register_datasets(register: Register) -> None:
    """Add ucf101."""
    register(NAME, ucf101, source="Soomro, Zamir & Shah 2012, arXiv 1212.0402")
