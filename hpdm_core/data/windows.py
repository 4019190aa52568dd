"""Which windows of a clip may be drawn: shots, what is held out of a clip or a shot, and the starts that remain
(pure functions).

A window is F frames, ``stride`` apart; its span is the number of consecutive frames from its first to its
last. Ranges are Python ranges of frame numbers.
"""

import itertools
import math
from collections.abc import Sequence

from hpdm_core.data.dataset import Split

__all__ = ["Windows", "shots", "span", "split_end", "split_inside", "spread"]


def span(frames: int, stride: int = 1) -> int:
    """Return how many consecutive frames a window of ``frames`` frames, ``stride`` apart, reaches over."""
    return (frames - 1) * stride + 1


def shots(frames: range, cuts: Sequence[int]) -> list[range]:
    """Cut ``frames`` after each frame number in ``cuts`` (the last frame of a shot); empty shots are left
    out.
    """
    edges = [
        frames.start,
        *(cut + 1 for cut in sorted(cuts) if frames.start <= cut < frames.stop),
        frames.stop,
    ]
    return [range(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]


def split_end(frames: int, *, held_out: float, gap: int) -> dict[Split, range]:
    """Hold out the last share ``held_out`` of a clip's ``frames`` (rounded up); the ``gap`` frames before go
    unused.

    The gap keeps what training sees a window's length away from what is held out.
    """
    # Rounded first, or 0.07 * 100 = 7.000000000000001 would hold out eight frames.
    boundary = frames - math.ceil(round(frames * held_out, 6))
    return {"train": range(max(boundary - gap, 0)), "held_out": range(boundary, frames)}


def split_inside(shot: range, *, held_out: float, span: int) -> dict[Split, list[range]]:
    """Hold out a share ``held_out`` of a ``shot`` from its middle, at least ``span`` frames; what lies before and
    after it trains.

    So what is held out is seen in training from both sides, and no frame is in both splits. A shot without room
    for a window of ``span`` frames in each of the three parts trains as a whole.
    """
    frames = max(span, math.ceil(round(len(shot) * held_out, 6)))
    first = shot.start + (len(shot) - frames) // 2
    before, after = range(shot.start, first), range(first + frames, shot.stop)
    if min(len(before), len(after)) < span:
        return {"train": [shot], "held_out": []}
    return {"train": [before, after], "held_out": [range(first, first + frames)]}


def spread(number: int, available: int) -> list[int]:
    """Return ``number`` different integers in [0, ``available``), evenly spread: middles of equal parts."""
    if number > available:
        raise ValueError(f"cannot spread {number} over {available}")
    return [(2 * index + 1) * available // (2 * number) for index in range(number)]


class Windows:
    """The windows of span ``span`` that lie wholly within one of the ranges ``shots``: a sequence of first
    frames.
    """

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
