"""Compute the features of chosen clips, with a few clips in memory at a time, on one or many processes.

Rows are in the order of the choices. The detector gets one clip at a time, and each process a few clips at a time. So a
row's bits depend on its clip alone, whatever the number of processes and the other clips. A clip that cannot be read is
replaced by the next choice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL
import torch
from torch import Tensor

from hpdm_core.base import distributed
from hpdm_core.base.errors import InputError
from hpdm_core.base.files import whole_or_absent
from hpdm_core.data.readers import ReadError, VideoReader
from hpdm_core.evaluation.folders.manifest import Entry, entry_of
from hpdm_core.evaluation.folders.reading import ClipFacts, ValueRange, read_clip
from hpdm_core.evaluation.folders.selection import Choice
from hpdm_core.evaluation.folders.sources import content_hash
from hpdm_core.metrics.features import FeatureBuffer
from hpdm_core.metrics.interface import Features
from hpdm_core.metrics.protocols.records import Preparation

__all__ = ["Extracted", "Extraction", "FeatureCache", "Task"]

SHARE = 4
"""Number of clips that a process takes at a time."""


class Counting(Protocol):
    """A function that is called with the progress."""

    def __call__(self, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` clips are done."""


@dataclass(frozen=True)
class Extracted:
    """Features [n, d] float64, with a manifest entry and facts for each row; ``unreadable``: video -> reason."""

    features: Features
    entries: tuple[Entry, ...]
    facts: tuple[ClipFacts, ...]
    unreadable: dict[str, str]


@dataclass(frozen=True)
class Task:
    """What is done to every clip of a side. ``detector``: identifies the features, with all options;
    ``sources``: the hashes of the plugin files that compute them.
    """

    frames: int
    prepare: Preparation
    detector: dict[str, Any]
    extract: Callable[[Tensor], Tensor]
    values: ValueRange | None
    sources: Mapping[str, str]

    def identity(self) -> dict[str, Any]:
        """Return everything that a row depends on besides its clip."""
        return {
            "frames": self.frames,
            "prepare": self.prepare.model_dump(mode="json"),
            "detector": self.detector,
            "values": self.values,
            "sources": dict(self.sources),
            "torch": torch.__version__,
            "pillow": PIL.__version__,
        }


class FeatureCache:
    """Features, keyed by the content of the clips' files, their preparation, and the detector.

    They are kept in memory for this run, and in ``folder`` for later ones (None: not stored). Unreadable entries are
    computed again; if the folder cannot be written, nothing is stored.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: dict[str, Extracted] = {}

    def get(self, key: str) -> Extracted | None:
        """Return the features stored under ``key``, or None."""
        if key not in self._held and self._folder is not None:
            found = _load(self._folder / f"{key}.npz")
            if found is not None:
                self._held[key] = found
        return self._held.get(key)

    def put(self, key: str, made: Extracted, *, keep: bool) -> None:
        """Keep ``made`` in memory and, with ``keep``, in the folder."""
        self._held[key] = made
        if self._folder is None or not keep or not distributed.is_main():
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with whole_or_absent(self._folder / f"{key}.npz") as handle:
                np.savez(handle, features=made.features, told=np.frombuffer(_told(made), dtype=np.uint8))
        except OSError:
            return


@dataclass(frozen=True)
class Extraction:
    """Where and how features are computed; none of this enters a record."""

    reader: VideoReader
    cache: FeatureCache
    device: torch.device
    progress: Counting | None = None

    def run(
        self,
        task: Task,
        choices: Iterator[Choice],
        count: int | None,
        *,
        keep: bool,
        expected: Sequence[Entry] | None = None,
        check: Callable[[int], None] = lambda have: None,
    ) -> Extracted:
        """Return the features of the first ``count`` (None: all) readable ``choices``, or of fewer if there are fewer.

        Only the main process iterates over ``choices``; it calls ``check`` with their number before anything is
        decoded. ``keep`` stores the result in the cache's folder. ``expected``: the manifest entries whose content the
        clips must have; raises InputError if it has changed.
        """
        wave = distributed.on_main(lambda: _take(choices, count, check))
        hashes = self._hashes(wave)
        if expected is not None:
            _check_content(hashes, expected)
        key = _key(task, self.reader, count, wave, hashes)
        found = distributed.on_main(lambda: self.cache.get(key))
        if found is not None:
            return found
        total = len(wave)
        held = FeatureBuffer()
        entries: list[Entry] = []
        facts: list[ClipFacts] = []
        rows: list[Features] = []
        unreadable: dict[str, str] = {}
        while wave:
            done = len(rows)

            def work(
                start: int, wave: list[Choice] = wave, hashes: list[str] = hashes, done: int = done
            ) -> Any:
                part = slice(start, start + SHARE)
                if self.progress is not None and distributed.is_main():
                    self.progress(done + start, total)
                return self._work(task, wave[part], hashes[part], held)

            for made in distributed.spread(range(0, len(wave), SHARE), work):
                rows += made.rows
                entries += made.entries
                facts += made.facts
                unreadable.update(made.unreadable)
            missing = 0 if count is None else count - len(rows)
            wave = distributed.on_main(partial(_take, choices, missing)) if missing else []
            hashes = self._hashes(wave)
        if self.progress is not None and distributed.is_main():
            self.progress(len(rows), len(rows))
        features = np.stack(rows) if rows else np.zeros((0, 0))
        extracted = Extracted(features, tuple(entries), tuple(facts), unreadable)
        self.cache.put(key, extracted, keep=keep)
        return extracted

    def _hashes(self, wave: Sequence[Choice]) -> list[str]:
        return distributed.spread(wave, _hash)

    def _work(
        self, task: Task, choices: Sequence[Choice], hashes: Sequence[str], held: FeatureBuffer
    ) -> _Made:
        made = _Made([], [], [], {})
        for choice, content in zip(choices, hashes, strict=True):
            try:
                clip, seen = read_clip(choice, task.prepare, reader=self.reader, values=task.values)
            except ReadError as error:
                made.unreadable[choice.video.name] = error.reason
                continue
            with torch.no_grad():
                row = task.extract(clip[None].to(self.device))
            made.rows.append(held.keep(row[0]))
            made.facts.append(seen)
            made.entries.append(entry_of(choice, content))
        return made


@dataclass
class _Made:
    """The results for a few clips."""

    rows: list[Any]
    entries: list[Entry]
    facts: list[ClipFacts]
    unreadable: dict[str, str]


def _check_content(hashes: Sequence[str], expected: Sequence[Entry]) -> None:
    changed = [entry.video for entry, found in zip(expected, hashes, strict=True) if entry.sha256 != found]
    if changed:
        raise InputError(
            f"--manifest: {len(changed)} of {len(expected)} videos have changed since it was written, such as "
            f"'{changed[0]}'"
        )


def _take(
    choices: Iterator[Choice], count: int | None, check: Callable[[int], None] = lambda have: None
) -> list[Choice]:
    taken = list(itertools.islice(choices, count))
    check(len(taken))
    return taken


def _hash(choice: Choice) -> str:
    try:
        return (
            _file_hash(choice.video.path)
            if choice.video.kind == "array"
            else content_hash(choice.video, choice.frames)
        )
    except ReadError as error:
        return f"unreadable: {error.reason}"


@lru_cache(maxsize=64)
def _file_hash(path: Path) -> str:
    """The hash of a file that holds many videos, computed once per run."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _key(
    task: Task, reader: VideoReader, count: int | None, wave: Sequence[Choice], hashes: Sequence[str]
) -> str:
    clips = [
        [choice.video.name, choice.frames.start, choice.frames.step, len(choice.frames), content]
        for choice, content in zip(wave, hashes, strict=True)
    ]
    asked = [task.identity(), reader.describe(), count, clips]  # decoders return slightly different frames
    text = json.dumps(asked, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _told(made: Extracted) -> bytes:
    return json.dumps(
        {
            "entries": [entry.model_dump(mode="json") for entry in made.entries],
            "facts": [asdict(each) for each in made.facts],
            "unreadable": made.unreadable,
        }
    ).encode()


def _load(path: Path) -> Extracted | None:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            told = json.loads(file["told"].tobytes())
            made = Extracted(
                np.asarray(file["features"], dtype=np.float64),
                tuple(Entry.model_validate(entry) for entry in told["entries"]),
                tuple(ClipFacts(**each) for each in told["facts"]),
                dict(told["unreadable"]),
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return made if len(made.features) == len(made.entries) == len(made.facts) else None
