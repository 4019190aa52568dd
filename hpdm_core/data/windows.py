"""Which windows of a clip may be drawn: shots, held-out parts of a clip or a shot, and possible first frames.

A window is F frames, ``stride`` apart; its span is the number of consecutive frames from its first to its
last. Ranges are Python ranges of frame numbers. All functions are pure.
"""

import itertools
import math
from collections.abc import Sequence

from hpdm_core.data.dataset import Split

__all__ = ["Windows", "shots", "span", "split_end", "split_inside", "spread"]


def span(frames: int, stride: int = 1) -> int:
    """Return how many consecutive frames a window of ``frames`` frames, ``stride`` apart, spans."""
    return (frames - 1) * stride + 1


def shots(frames: range, cuts: Sequence[int]) -> list[range]:
    """Split ``frames`` into shots; ``cuts`` are the last frames of shots. Empty shots are left out."""
    edges = [
        frames.start,
        *(cut + 1 for cut in sorted(cuts) if frames.start <= cut < frames.stop),
        frames.stop,
    ]
    return [range(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]


def split_end(frames: int, *, held_out: float, gap: int) -> dict[Split, range]:
    """Hold out the last share ``held_out`` of a clip's ``frames`` (rounded up).

    The ``gap`` frames before it are in neither split: they separate training frames from held-out frames.
    """
    # Rounded first: 0.07 * 100 = 7.000000000000001 would otherwise hold out eight frames.
    boundary = frames - math.ceil(round(frames * held_out, 6))
    return {"train": range(max(boundary - gap, 0)), "held_out": range(boundary, frames)}


def split_inside(shot: range, *, held_out: float, span: int) -> dict[Split, list[range]]:
    """Hold out a share ``held_out`` of a ``shot`` from its middle, at least ``span`` frames; the rest is for training.

    Training sees the frames before and after the held-out part, and no frame is in both splits. A shot that is too
    short for a window of ``span`` frames in each of the three parts is used for training as a whole.
    """
    frames = max(span, math.ceil(round(len(shot) * held_out, 6)))
    first = shot.start + (len(shot) - frames) // 2
    before, after = range(shot.start, first), range(first + frames, shot.stop)
    if min(len(before), len(after)) < span:
        return {"train": [shot], "held_out": []}
    return {"train": [before, after], "held_out": [range(first, first + frames)]}


def spread(number: int, available: int) -> list[int]:
    """Return ``number`` different integers in [0, ``available``), evenly spaced: the midpoints of equal parts."""
    if number > available:
        raise ValueError(f"cannot spread {number} over {available}")
    return [(2 * index + 1) * available // (2 * number) for index in range(number)]


class Windows:
    """A sequence of the first frames of all windows of span ``span`` that lie within one of the ranges ``shots``."""

    def __init__(self, shots: Sequence[range], span: int) -> None:
        self._starts = [range(shot.start, shot.stop - span + 1) for shot in shots if len(shot) >= span]
        self._count = sum(map(len, self._starts))
        self.longest: int = max(map(len, shots), default=0)
        """Frames of the longest shot."""

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._count:
            raise IndexError(f"window {index} of {self._count}")
        for starts in self._starts:
            if index < len(starts):
                break
            index -= len(starts)
        return starts[index]
