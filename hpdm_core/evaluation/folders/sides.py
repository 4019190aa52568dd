"""One side of a comparison, real or fake: its videos, which are probed on demand, and the problems found in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpdm_core.base.errors import InputError
from hpdm_core.data.readers import ReadError, VideoInfo, VideoReader
from hpdm_core.evaluation.folders.manifest import Entry, chosen_again
from hpdm_core.evaluation.folders.selection import Choice, candidates, needed_frames
from hpdm_core.evaluation.folders.sources import Video, probe
from hpdm_core.metrics.protocols.records import ProtocolRecord, SideRule

__all__ = ["Side", "VideoSet"]

NAMED = 5  # most files that a message names


@dataclass(frozen=True)
class VideoSet:
    """The videos of a folder, or of a split of it; ``option``: its option in messages, ``--real`` or ``--fake``."""

    option: str
    folder: Path
    videos: Sequence[Video]
    split: str | None = None
    """The split by lists; None for all videos in the folder."""
    absent: Sequence[str] = ()
    """Videos that are listed and missing."""


@dataclass
class Side:
    """A video set under one protocol's rule. `choices` runs on the main process."""

    name: str
    found: VideoSet
    rule: SideRule
    record: ProtocolRecord
    reader: VideoReader
    infos: dict[str, VideoInfo | None]
    """Video -> result of probing it, shared by the protocols of a run; None for unreadable ones."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Video -> why it cannot be read."""
    short: list[str] = field(default_factory=list)
    sizes: dict[tuple[int, int], str] = field(default_factory=dict)
    """Height and width -> the first video with them."""

    def choices(self, entries: Sequence[Entry] | None = None) -> Iterator[Choice]:
        """Yield the clips that the rule chooses, in order; with ``entries``, those of a manifest.

        Raises InputError for a video that is too short if the rule refuses such videos, and for mixed sizes if the
        protocol uses stored sizes.
        """
        if entries is not None:
            by_name = {video.name: video for video in self.found.videos}
            yield from chosen_again(entries, by_name, option=f"{self.found.option} {self.found.folder}")
            return
        yield from candidates(
            self.rule, self.record.frames, self.found.videos, self._probe, seed=self.record.seed
        )

    def _probe(self, video: Video) -> VideoInfo | None:
        if video.name not in self.infos:
            try:
                self.infos[video.name] = probe(video, self.reader)
            except ReadError as error:
                self.infos[video.name] = None
                self.unreadable[video.name] = error.reason
        info = self.infos[video.name]
        if info is None:
            self.unreadable.setdefault(video.name, "cannot be opened")
            return None
        needed = needed_frames(self.rule, self.record.frames)
        if info.frames < needed:
            if self.rule.short == "refuse":
                raise InputError(
                    f"{self.found.option} {self.found.folder}: '{video.name}' has {info.frames} frames; "
                    f"protocol '{self.record.name}' takes clips from {self.name} of at least {needed}"
                )
            self.short.append(video.name)
            return None
        self._note_size(video, info)
        return info

    def _note_size(self, video: Video, info: VideoInfo) -> None:
        self.sizes.setdefault((info.height, info.width), video.name)
        if self.rule.prepare.size == "stored" and len(self.sizes) > 1:
            (first, one), (second, other) = list(self.sizes.items())[:2]
            raise InputError(
                f"{self.found.option} {self.found.folder}: mixed sizes: '{one}' is {first[0]}x{first[1]} and "
                f"'{other}' {second[0]}x{second[1]}; protocol '{self.record.name}' takes {self.name} as they "
                "are stored: bring them to one size"
            )

    def check_count(self, have: int) -> None:
        """Raise InputError when ``have`` clips are too few for the rule, or for any distance."""
        if have < 2:
            raise InputError(
                f"{self.found.option} {self.found.folder}: {have} clip{'' if have == 1 else 's'} can be used; "
                f"a number needs at least two{self._amiss()}"
            )
        if self.rule.count == "all" or have >= self.rule.count or self.rule.fewer == "use_all":
            return
        raise InputError(
            f"{self.found.option} {self.found.folder}: {have} clips can be used; protocol "
            f"'{self.record.name}' takes {self.rule.count} {self.name}{self._amiss()}; give more, or say "
            f"--num-{self.name} {have}, which marks the number as modified"
        )

    def _amiss(self) -> str:
        parts = []
        if self.unreadable:
            first = [f"{name} ({reason})" for name, reason in list(self.unreadable.items())[:NAMED]]
            more = f" and {len(self.unreadable) - NAMED} more" if len(self.unreadable) > NAMED else ""
            parts.append(f"unreadable: {', '.join(first)}{more}")
        if self.short:
            parts.append(f"{len(self.short)} are too short, such as {self.short[0]}")
        if self.found.absent:
            parts.append(f"{len(self.found.absent)} listed videos are missing")
        return f" ({'; '.join(parts)})" if parts else ""

    def describe(self) -> dict[str, Any]:
        """Return what was found, as JSON, with the names of missing and unreadable videos."""
        return {
            "folder": str(self.found.folder),
            "videos": len(self.found.videos),
            "split": self.found.split,
            "listed_and_absent": list(self.found.absent),
            "too_short": len(self.short),
            "unreadable": [
                {"video": name, "reason": reason} for name, reason in sorted(self.unreadable.items())
            ],
        }
