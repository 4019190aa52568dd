"""Choose clips from a list of videos by the rule of a protocol.

A rule gives a sequence of candidates in a fixed order; the first ``count`` readable ones are used. So a damaged clip is
replaced by the next candidate, and no other choice changes, whichever process finds the damage. Randomness is keyed by
the record's seed and the video's name.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from hpdm_core.base.randomness import generator
from hpdm_core.data.readers import VideoInfo
from hpdm_core.evaluation.folders.sources import Video, natural
from hpdm_core.metrics.protocols.records import SideRule

__all__ = ["Choice", "Probe", "candidates", "needed_frames", "reach"]

Probe = Callable[[Video], VideoInfo | None]
"""Returns frames and size of a video, or None to skip a video that cannot be used."""


@dataclass(frozen=True)
class Choice:
    """One clip: its video and the numbers of the frames that are read, in order."""

    video: Video
    frames: range


def read_frames(rule: SideRule, frames: int) -> int:
    """Return how many frames are read for a clip of ``frames`` (more when frames are averaged)."""
    return frames * rule.prepare.average[0]


def reach(rule: SideRule, frames: int) -> int:
    """Return how many consecutive frames a clip covers."""
    return (read_frames(rule, frames) - 1) * rule.stride + 1


def needed_frames(rule: SideRule, frames: int) -> int:
    """Return how many frames a video must have."""
    whole = read_frames(rule, frames) * rule.stride
    least = whole if rule.reach == "frames_times_stride" else reach(rule, frames)
    return max(least, rule.window or 0)


def candidates(
    rule: SideRule, frames: int, videos: Sequence[Video], probe: Probe, *, seed: int
) -> Iterator[Choice]:
    """Yield the clips of ``videos`` in the order in which ``rule`` takes them, probing as few as needed.

    ``probe`` gives None for videos that are too short (`needed_frames`) or cannot be opened.
    """
    if rule.order == "natural":
        ordered = sorted(videos, key=lambda video: natural(video.name))
    else:
        ordered = sorted(videos, key=lambda video: video.name)
    if rule.choose == "random_windows":
        yield from _windows(rule, frames, ordered, probe, seed)
        return
    if rule.choose == "random":
        # Sorted by hashes of names, so that adding or removing a video does not reorder the others.
        ordered = sorted(ordered, key=lambda video: _hash(seed, video.name))
    for video in ordered:
        info = probe(video)
        if info is None:
            continue
        start = 0
        if rule.offset == "random":
            stream = generator("evaluator", seed, "offset", video.name)
            start = int(torch.randint(_starts(rule, frames, info), (), generator=stream))
        yield _choice(rule, frames, video, start)


def _windows(
    rule: SideRule, frames: int, videos: Sequence[Video], probe: Probe, seed: int
) -> Iterator[Choice]:
    """Yield every window of every video once, in random order."""
    usable = [(video, info) for video in videos if (info := probe(video)) is not None]
    ends = list(itertools.accumulate(_starts(rule, frames, info) for _, info in usable))
    if not ends:
        return
    for number in torch.randperm(ends[-1], generator=generator("evaluator", seed, "windows")).tolist():
        place = bisect.bisect_right(ends, number)
        start = number - (ends[place - 1] if place else 0)
        yield _choice(rule, frames, usable[place][0], start)


def _starts(rule: SideRule, frames: int, info: VideoInfo) -> int:
    """Return at how many frames a clip may begin."""
    covered = reach(rule, frames)
    return info.frames - max(covered, rule.window or covered) + 1


def _choice(rule: SideRule, frames: int, video: Video, start: int) -> Choice:
    return Choice(video, range(start, start + reach(rule, frames), rule.stride))


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"evaluator:{seed}:{name}".encode()).digest()
