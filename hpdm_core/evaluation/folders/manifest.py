"""The manifest of a run: the clips used, their frames and the hashes of their content, to repeat the run exactly.

It is JSON, with a list of clips for each protocol and side. The content of a video is identified by the SHA-256 of its
file, or of its pictures that were used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from hpdm_core.base.errors import InputError
from hpdm_core.config.schema import Frozen
from hpdm_core.evaluation.folders.selection import Choice
from hpdm_core.evaluation.folders.sources import Video

__all__ = ["Entry", "Manifest", "chosen_again", "entry_of", "read_manifest"]


class Entry(Frozen):
    """One clip: the video's name, first frame, frames read, stride, and the SHA-256 of its content."""

    video: str
    first: int
    frames: int
    stride: int
    sha256: str


class SideEntries(Frozen):
    """The clips of one side, in the order of the features, and its folder as given."""

    folder: str
    clips: tuple[Entry, ...]


class ProtocolEntries(Frozen):
    """The sides of one protocol. ``record``: the identity of the record that chose them; ``passed_over``: what was
    missing of sides of which the protocol takes all clips.
    """

    protocol: str
    record: str
    sides: dict[str, SideEntries]
    passed_over: dict[str, dict[str, int]] = Field(default_factory=dict)


class Manifest(Frozen):
    """The manifest that ``--out FILE.json`` writes beside it as FILE.manifest.json, and ``--manifest`` reads."""

    format: int = 1
    protocols: tuple[ProtocolEntries, ...]

    def of(self, protocol: str, record: str) -> ProtocolEntries:
        """Return the entries of ``protocol``. Raises InputError when they are missing or of another record."""
        names = [each.protocol for each in self.protocols]
        if protocol not in names:
            raise InputError(
                f"--manifest: holds no clips of protocol '{protocol}'; it has {', '.join(names) or 'none'}"
            )
        found = self.protocols[names.index(protocol)]
        if found.record != record:
            raise InputError(
                f"--manifest: its clips were chosen by record {found.record} of '{protocol}', which now is "
                f"{record}; repeat the run with the options and versions that made the manifest"
            )
        return found


def entry_of(choice: Choice, sha256: str) -> Entry:
    """Return the manifest's entry for ``choice``."""
    frames = choice.frames
    return Entry(
        video=choice.video.name,
        first=frames.start,
        frames=len(frames),
        stride=frames.step,
        sha256=sha256,
    )


def chosen_again(entries: Sequence[Entry], videos: Mapping[str, Video], *, option: str) -> list[Choice]:
    """Return a manifest's clips from ``videos``, found by name. Raises InputError if videos are missing."""
    gone = [entry.video for entry in entries if entry.video not in videos]
    if gone:
        raise InputError(
            f"--manifest: {len(gone)} of {len(entries)} videos are not in {option}, such as '{gone[0]}'"
        )
    return [
        Choice(
            videos[entry.video],
            range(entry.first, entry.first + (entry.frames - 1) * entry.stride + 1, entry.stride),
        )
        for entry in entries
    ]


def read_manifest(path: Path) -> Manifest:
    """Return the manifest in ``path``. Raises InputError when it is not a manifest."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        return Manifest.model_validate(data)
    except OSError as error:
        raise InputError(f"--manifest {path}: cannot be read: {error.strerror}") from error
    except (ValueError, ValidationError) as error:
        said = str(error).splitlines()[0]
        raise InputError(f"--manifest {path}: is not a manifest of an evaluation ({said})") from error
