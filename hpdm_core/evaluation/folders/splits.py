"""The splits of UCF-101 by its official lists, which are found beside the videos or given by ``--lists``.

    ROOT/UCF-101/CLASS/v_CLASS_g01_c01.avi    ROOT/ucfTrainTestlist/{trainlist01,testlist01}.txt

Clips of one group (g01) are near-duplicates, so a random split would leak; the lists keep groups whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpdm_core.base.errors import InputError, did_you_mean
from hpdm_core.evaluation.folders.sources import Video

__all__ = ["FOLD", "SPLITS", "check_split", "find_lists", "of_split", "videos_root"]

VIDEOS = "UCF-101"
LISTS = "ucfTrainTestlist"
FOLD = 1
"""Number of the official train/test split, of three; papers on generation use the first."""

SPLITS = {"train": ("trainlist",), "test": ("testlist",), "train+test": ("trainlist", "testlist")}


def find_lists(folder: Path, given: Path | None) -> Path | None:
    """Return the folder of lists: ``given``, or the one in or beside ``folder``; None when there is none."""
    if given is not None:
        if not list(given.glob("trainlist*.txt")):
            raise InputError(
                f"--lists {given}: holds no train list; allowed is UCF-101's folder of lists, with "
                f"trainlist{FOLD:02d}.txt and testlist{FOLD:02d}.txt"
            )
        return given
    for place in (folder / LISTS, folder.resolve().parent / LISTS):
        if place.is_dir():
            return place
    return None


def videos_root(folder: Path) -> Path:
    """Return the folder to which the lists are relative: ROOT/UCF-101 if ``folder`` is ROOT, else ``folder``."""
    inside = folder / VIDEOS
    return inside if inside.is_dir() else folder


def check_split(split: str) -> None:
    """Raise InputError if ``split`` is not the name of a split."""
    if split not in SPLITS:
        raise InputError(
            f"--split {split}: no such split{did_you_mean(split, SPLITS)}; allowed: {', '.join(SPLITS)}"
        )


def of_split(videos: Sequence[Video], split: str, lists: Path) -> tuple[list[Video], list[str]]:
    """Return the listed ``videos`` of ``split``, and the listed names that are missing.

    A listed ``A/v.avi`` is also found as the frame folder or array ``A/v``. Raises InputError for an unknown split, an
    unreadable list, and if no listed video exists.
    """
    check_split(split)
    by_stem: dict[str, list[Video]] = {}
    for video in videos:
        name = video.name.partition("#")[0]
        by_stem.setdefault(name if video.kind == "frames" else name.rpartition(".")[0], []).append(video)
    chosen: list[Video] = []
    absent: list[str] = []
    for stem in SPLITS[split]:
        for name in _names(lists / f"{stem}{FOLD:02d}.txt"):
            found = by_stem.get(name.rpartition(".")[0], [])
            chosen += found
            if not found:
                absent.append(name)
    if not chosen:
        raise InputError(
            f"--split {split}: none of the {len(absent)} videos that {lists} lists is there, such as "
            f"{absent[0] if absent else '(the list is empty)'}; allowed is the folder of UCF-101's classes"
        )
    return sorted(chosen, key=lambda video: video.name), absent


def _names(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); it is one of UCF-101's lists") from error
    return [line.split()[0] for line in lines if line.strip()]
