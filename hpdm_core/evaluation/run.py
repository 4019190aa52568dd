"""Run the evaluator: measure folders by protocols and return results with their records. Writes no results.

The features of a set of clips are computed once per run, also if several protocols use them.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hpdm_core.assembly.keys import plugin_hashes
from hpdm_core.base import distributed
from hpdm_core.base.errors import InputError
from hpdm_core.config.schema import Part
from hpdm_core.data.readers import ReadError, VideoInfo, VideoReader
from hpdm_core.evaluation.extraction import Extracted, Extraction, FeatureCache, Task
from hpdm_core.evaluation.folders import splits
from hpdm_core.evaluation.folders.manifest import Entry, Manifest, ProtocolEntries, SideEntries
from hpdm_core.evaluation.folders.reading import ValueRange
from hpdm_core.evaluation.folders.sides import Side, VideoSet
from hpdm_core.evaluation.folders.sources import Video, list_videos, probe
from hpdm_core.evaluation.scores import measured, warnings_about
from hpdm_core.metrics.interface import FeatureExtractor
from hpdm_core.metrics.protocols.records import ProtocolRecord, SideRule, differences, identity_of

if TYPE_CHECKING:
    from hpdm_core.plugins import Plugins

__all__ = ["Changes", "Evaluation", "FolderEvaluator", "changed_record", "resolved_record"]

FILES = ("weights", "mean")
"""Options of a detector that name files; `describe` has the hashes of their content."""
UNRECORDED = (*FILES, "trust_weights")

Progress = Callable[[str, int, int], None]
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Changes to a protocol that the user asks for; results are marked as modified."""

    num_reals: int | None = None
    num_fakes: int | None = None
    stride_reals: int | None = None
    stride_fakes: int | None = None
    split: str | None = None
    seed: int | None = None
    weights: Path | None = None
    trust_weights: bool = False


def changed_record(record: ProtocolRecord, changes: Changes) -> tuple[ProtocolRecord, list[str]]:
    """Return ``record`` with ``changes``, and each difference in words. Paths of weight files are not a difference."""
    sides: dict[str, SideRule] = {}
    wanted: dict[str, dict[str, Any]] = {
        "reals": {"count": changes.num_reals, "stride": changes.stride_reals, "split": changes.split},
        "fakes": {"count": changes.num_fakes, "stride": changes.stride_fakes},
    }
    for name, rule in record.sides().items():
        given = {key: value for key, value in wanted[name].items() if value is not None}
        sides[name] = SideRule.model_validate({**rule.model_dump(), **given})
    made = record.model_copy(update={**sides, **({} if changes.seed is None else {"seed": changes.seed})})
    said = [
        f"{field} {before} -> {after}"
        for field, before, after in differences(record.model_dump(mode="json"), made.model_dump(mode="json"))
    ]
    return made.model_copy(update={"detector": _with_files(record.detector, changes)}), said


def _with_files(part: Part, changes: Changes) -> Part:
    options = dict(part.options)
    if changes.weights is not None:
        if changes.weights.is_dir():
            for name in FILES:
                inside = changes.weights / str(options.get(name))
                if name in options and inside.is_file():
                    options[name] = str(inside)
        elif "weights" in options:
            options["weights"] = str(changes.weights)
    if changes.trust_weights and "trust_weights" in options:
        options["trust_weights"] = True
    return Part(use=part.use, options=options)


def resolved_record(record: ProtocolRecord, described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record as it is stored with a number: with the hashes of the detector's weights instead of paths."""
    data: dict[str, Any] = record.model_dump(mode="json")
    kept = {key: value for key, value in data["detector"].items() if key not in UNRECORDED}
    return {**data, "detector": {**kept, **described}}


@dataclass(frozen=True)
class Evaluation:
    """One protocol's result, as JSON, and the clips that were used."""

    result: dict[str, Any]
    clips: ProtocolEntries


@dataclass(frozen=True, kw_only=True)
class FolderEvaluator:
    """Two folders, and the settings with which they are measured; `evaluate` measures by one protocol.

    ``replicates``: bootstrap replicates, 0 for none. ``progress`` is called with the side, the clips done, the total.
    """

    plugins: Plugins
    reader: VideoReader
    real: Path | None
    fake: Path
    cache: FeatureCache
    lists: Path | None = None
    values: ValueRange | None = None
    device: torch.device = CPU
    replicates: int = 200
    progress: Progress | None = None
    _infos: dict[str, dict[str, VideoInfo | None]] = field(default_factory=dict)

    @cached_property
    def _real_videos(self) -> list[Video]:
        assert self.real is not None, "checked by evaluate"
        folder = splits.videos_root(self.real)
        return distributed.on_main(lambda: list_videos(folder, option="--real"))

    @cached_property
    def _fake_videos(self) -> list[Video]:
        return distributed.on_main(lambda: list_videos(self.fake, option="--fake"))

    def check(self, record: ProtocolRecord) -> FeatureExtractor:
        """Return the record's detector.

        Raises InputError for problems that show before a clip is read: missing weights, too few frames or fakes, no
        folder of reals.
        """
        extractor: FeatureExtractor = self.plugins.make("feature_extractors", record.detector)
        extractor.describe()
        least = getattr(extractor, "least_frames", 1)
        if record.frames < least:
            raise InputError(
                f"protocol '{record.name}': frames: {record.frames}; {extractor.name} needs at least {least}"
            )
        score, count = record.score, record.fakes.count
        if score is not None and count != "all" and count < score.splits * score.repeats:
            raise InputError(
                f"protocol '{record.name}': {count} fakes; its {score.splits} splits and {score.repeats} repeats need "
                f"at least {score.splits * score.repeats}"
            )
        if record.reals is not None and self.real is None:
            raise InputError(f"protocol '{record.name}' compares with real videos: give --real DIR")
        return extractor

    def evaluate(
        self, record: ProtocolRecord, modified: Sequence[str] = (), *, manifest: Manifest | None = None
    ) -> Evaluation:
        """Measure by ``record``; ``modified``: how it differs from the protocol of its name.

        With a ``manifest``, its clips are used. Raises InputError for folders that do not fit the record.
        """
        started = time.monotonic()
        extractor = self.check(record)
        described = extractor.describe()
        found = self._sets(record)
        record = self._sized(record, found["fakes"])
        stored = resolved_record(record, described)
        identity = identity_of(stored)
        again = None if manifest is None else manifest.of(record.name, identity)
        sources = plugin_hashes(self.plugins, [("feature_extractors", record.detector)])
        sides: dict[str, Side] = {}
        extracted: dict[str, Extracted] = {}
        for name, rule in record.sides().items():
            side = Side(
                name=name,
                found=found[name],
                rule=rule,
                record=record,
                reader=self.reader,
                infos=self._infos.setdefault(name, {}),
            )
            entries = None if again is None else again.sides[name].clips
            task = Task(
                record.frames, rule.prepare, stored["detector"], extractor.features, self.values, sources
            )
            extracted[name] = self._extract(side, task, entries)
            sides[name] = side
        said = warnings_about(record, extracted, jpeg=_jpeg(found, extracted))
        said = [*self._weights_warning(extractor), *_passed_over(sides, extracted), *said]
        holes = _holes(sides) if again is None else again.passed_over
        if holes:  # an incomplete set: the number must not share a column with those of complete sets
            stored = {**stored, "passed_over": holes}
        reals = extracted["reals"].features if "reals" in extracted else None
        numbers = measured(record, reals, extracted["fakes"].features, replicates=self.replicates)
        lacks = [
            f"{name}: {', '.join(f'{count} {what}' for what, count in hole.items())}"
            for name, hole in holes.items()
        ]
        result = {
            "protocol": record.name,
            "modified": [*modified, *_other_weights(record, described.get("weights")), *lacks],
            "title": title_of(record, extractor),
            "record": stored,
            "identity": identity_of(stored),
            **numbers,
            "sides": {name: {**side.describe(), **_used(extracted[name])} for name, side in sides.items()},
            "warnings": said,
            "seconds": round(time.monotonic() - started, 3),
            "versions": versions(self.reader),
            "processes": distributed.size(),
        }
        return Evaluation(result, _clips(record, identity, sides, extracted, holes))

    def _extract(self, side: Side, task: Task, entries: Sequence[Entry] | None) -> Extracted:
        name = side.name
        progress = self.progress
        extraction = Extraction(
            reader=self.reader,
            cache=self.cache,
            device=self.device,
            progress=None if progress is None else lambda done, total: progress(name, done, total),
        )
        count = None if side.rule.count == "all" else side.rule.count
        made = extraction.run(
            task,
            side.choices(entries),
            len(entries) if entries is not None else count,
            keep=name == "reals",
            expected=entries,
            check=side.check_count,
        )
        side.unreadable, side.short = distributed.broadcast((side.unreadable, side.short))
        side.unreadable.update(made.unreadable)
        if entries is not None and len(made.entries) < len(entries):
            raise InputError(
                f"--manifest: {len(entries) - len(made.entries)} of its clips cannot be read any more"
            )
        side.check_count(len(made.entries))
        return made

    def _sets(self, record: ProtocolRecord) -> dict[str, VideoSet]:
        made = {"fakes": VideoSet("--fake", self.fake, self._fake_videos)}
        if record.reals is None or self.real is None:
            return made
        absent: list[str] = []
        videos, split = self._real_videos, record.reals.split
        lists = splits.find_lists(self.real, self.lists)
        if split is not None and lists is not None:
            videos, absent = splits.of_split(videos, split, lists)
        reals = VideoSet("--real", self.real, videos, split if lists is not None else None, absent)
        return {"reals": reals, **made}

    def _sized(self, record: ProtocolRecord, fakes: VideoSet) -> ProtocolRecord:
        """Return ``record`` with ``as_fakes`` replaced by the size of the first readable fake."""
        if record.reals is None or record.reals.prepare.size != "as_fakes":
            return record

        def size() -> tuple[int, int]:
            for video in fakes.videos:
                try:
                    info = probe(video, self.reader)
                except ReadError:
                    continue
                return info.height, info.width
            raise InputError(f"--fake {fakes.folder}: none of {len(fakes.videos)} videos can be opened")

        prepare = record.reals.prepare.model_copy(update={"size": distributed.on_main(size)})
        return record.model_copy(update={"reals": record.reals.model_copy(update={"prepare": prepare})})

    def _weights_warning(self, extractor: FeatureExtractor) -> list[str]:
        warning = getattr(getattr(extractor, "identity", None), "warning", None)
        return [] if warning is None else [str(warning)]


def title_of(record: ProtocolRecord, extractor: FeatureExtractor) -> str:
    """Return the record's title; for FVD or KVD on weights other than published FVD's, with the weights' name."""
    identity = getattr(extractor, "identity", None)
    if identity is None or identity.fvd or not record.title.upper().startswith(("FVD", "KVD")):
        return record.title
    return f"{record.title} [{identity.known} weights]"


def _other_weights(record: ProtocolRecord, weights: Any) -> list[str]:
    """Return the modification ``weights NAME`` if the weights are a known file other than the protocol's."""
    known = weights.get("known") if isinstance(weights, Mapping) else None
    asked = Path(str(record.detector.options.get("weights"))).name
    return [f"weights {known}"] if known not in (None, "unknown", asked) else []


def _holes(sides: Mapping[str, Side]) -> dict[str, dict[str, int]]:
    """Return side -> what is missing -> count, for sides of which the protocol takes all clips."""
    made: dict[str, dict[str, int]] = {}
    for name, side in sides.items():
        found = {"unreadable": len(side.unreadable), "listed and absent": len(side.found.absent)}
        if side.rule.count == "all" and any(found.values()):
            made[name] = {what: count for what, count in found.items() if count}
    return made


def _passed_over(sides: Mapping[str, Side], extracted: Mapping[str, Extracted]) -> list[str]:
    said = []
    for name, side in sides.items():
        have = len(extracted[name].entries)
        if side.rule.count != "all" and have < side.rule.count:
            said.append(
                f"{name}: {have} clips, all that there are, where the protocol takes {side.rule.count}"
            )
        if side.unreadable:
            first = ", ".join(f"{video} ({reason})" for video, reason in list(side.unreadable.items())[:3])
            said.append(f"{name}: {len(side.unreadable)} videos cannot be read and were passed over: {first}")
        if side.short:
            said.append(f"{name}: {len(side.short)} videos are too short and were passed over")
        if side.found.absent:
            first_absent = side.found.absent[0]
            said.append(
                f"{name}: {len(side.found.absent)} listed videos are not there, such as {first_absent}"
            )
        wanted = side.rule.split
        if wanted is not None and side.found.split is None:
            said.append(
                f"{name}: the protocol takes the split '{wanted}'; {side.found.folder} has no lists beside it, so "
                "all of its videos were used as this split"
            )
    return said


def _used(made: Extracted) -> dict[str, Any]:
    sizes = sorted({(each.height, each.width) for each in made.facts})
    return {"clips": len(made.entries), "sizes": [f"{height}x{width}" for height, width in sizes]}


def _jpeg(found: Mapping[str, VideoSet], extracted: Mapping[str, Extracted]) -> dict[str, bool]:
    made = {}
    for name, each in extracted.items():
        used = {entry.video for entry in each.entries}
        made[name] = any(video.jpeg for video in found[name].videos if video.name in used)
    return made


def _clips(
    record: ProtocolRecord,
    identity: str,
    sides: Mapping[str, Side],
    extracted: Mapping[str, Extracted],
    holes: dict[str, dict[str, int]],
) -> ProtocolEntries:
    return ProtocolEntries(
        protocol=record.name,
        record=identity,
        sides={
            name: SideEntries(folder=str(side.found.folder), clips=extracted[name].entries)
            for name, side in sides.items()
        },
        passed_over=holes,
    )


def versions(reader: VideoReader) -> dict[str, Any]:
    """Return the versions of the packages that decode and compute, and of the video reader."""
    names = ("hpdm", "torch", "numpy", "pillow")
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "reader": reader.describe()}
