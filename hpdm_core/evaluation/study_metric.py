"""The metric ``protocol``: a number by a protocol record, within a study.

Fakes are the cell's stored samples of one level, by index. Reals are the data set's own files, chosen by the record's
rule and downsampled to that level; if the data set has no files, it draws random clips instead, and the number is
marked as modified. While the detector's weights are missing, distances that need no weights are measured instead,
under their own names. The result's key depends on the weights, so it is measured anew once they exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hpdm_core.assembly.keys import plugin_hashes
from hpdm_core.base import distributed
from hpdm_core.base.errors import InputError
from hpdm_core.config.schema import Part
from hpdm_core.evaluation.extraction import Extraction, FeatureCache, Task
from hpdm_core.evaluation.folders.reading import prepared
from hpdm_core.evaluation.folders.selection import candidates, needed_frames, reach
from hpdm_core.evaluation.folders.sources import Video
from hpdm_core.evaluation.run import resolved_record, title_of
from hpdm_core.evaluation.scores import measured
from hpdm_core.metrics.features import FeatureBuffer
from hpdm_core.metrics.networks.weights import MissingWeights
from hpdm_core.metrics.protocols.records import (
    ProtocolRecord,
    SideRule,
    differences,
    identity_of,
    load_record,
)

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.config.schema import CellConfig
    from hpdm_core.metrics.interface import EvaluationContext, FeatureExtractor, Features, Need, Row
    from hpdm_core.plugins import Plugins

__all__ = ["ProtocolMetric", "lacking"]

SPLITS = {"train": ("train",), "test": ("held_out",), "train+test": ("train", "held_out"), None: ("train",)}
"""Split of a record -> splits of a data set."""


@dataclass(frozen=True)
class Fitted:
    """A record fitted to a cell; ``modified`` lists the changes."""

    record: ProtocolRecord
    level: int
    modified: tuple[str, ...]


class ProtocolMetric:
    """The metric; ``given``: a protocol's name or file; ``level``: the level to measure, None for the one that fits.

    ``substitutes``: metrics that are measured instead while weights are missing.
    """

    needs: Need = "samples"

    def __init__(
        self, given: str, *, level: int | None, replicates: int, substitutes: Sequence[Part]
    ) -> None:
        self.given = given
        self.level = level
        self.replicates = replicates
        self.substitutes = tuple(substitutes)
        self.name = f"protocol[{given}]"

    # What it is

    def lacks(self, plugins: Plugins) -> str | None:
        """Return which weights are missing to measure the number, or None."""
        record = load_record(self.given, plugins)
        try:
            plugins.make("feature_extractors", record.detector).describe()
        except MissingWeights as error:
            return str(error)
        return None

    def stand_ins(self, plugins: Plugins) -> list[str]:
        """Return the names of the metrics that replace it while weights are missing."""
        return [plugins.make("metrics", part).name for part in self.substitutes]

    def fitted(self, config: CellConfig, plugins: Plugins, sizes: Sequence[tuple[int, int, int]]) -> Fitted:
        """Return the record for a cell with levels of ``sizes``. Raises InputError when it fits no level."""
        record = load_record(self.given, plugins)
        video = config.model.video
        level = self._level(record, video, sizes)
        size, pitch = (
            sizes[level],
            tuple(whole // part for whole, part in zip(video, sizes[level], strict=True)),
        )
        asked = record.frames * record.fakes.stride
        if asked > size[0]:
            raise InputError(
                f"metric protocol: '{record.name}' takes clips of {asked} frames, level {level} has {size[0]}; "
                "choose another level or protocol"
            )
        made = record.model_dump(mode="json")
        made["fakes"]["count"] = min(_number(record.fakes.count, config), config.evaluation.samples)
        if size[0] > reach(record.fakes, record.frames):
            made["fakes"]["offset"] = "start"  # the first frames of a sample are taken
        if made["reals"] is not None:
            kept = record.reals is not None and record.reals.prepare.size == "as_fakes"
            made["reals"]["prepare"] |= {
                "size": list(size[1:]) if kept else list(video[1:]),
                "average": list(pitch),
            }
            if kept:
                made["reals"]["prepare"]["average"] = [pitch[0], 1, 1]
        fitted = ProtocolRecord.model_validate(made)
        resolved = record.model_dump(mode="json")
        if resolved["reals"] is not None and resolved["reals"]["prepare"]["size"] == "as_fakes":
            resolved["reals"]["prepare"]["size"] = made["reals"]["prepare"]["size"]
        said = [
            f"{field} {a} -> {b}" for field, a, b in differences(resolved, fitted.model_dump(mode="json"))
        ]
        return Fitted(fitted, level, tuple(said))

    def _level(
        self, record: ProtocolRecord, video: tuple[int, int, int], sizes: Sequence[tuple[int, int, int]]
    ) -> int:
        if self.level is not None:
            if not 0 <= self.level < len(sizes):
                raise InputError(
                    f"metric protocol: level {self.level} of '{record.name}'; allowed are 0 to {len(sizes) - 1}"
                )
            return self.level
        rule = record.reals
        if rule is None or isinstance(rule.prepare.size, str):
            return len(sizes) - 1
        wanted = tuple(
            side // part for side, part in zip(rule.prepare.size, rule.prepare.average[1:], strict=True)
        )
        for level, size in enumerate(sizes):
            if size[1:] == wanted and video[0] // size[0] == rule.prepare.average[0]:
                return level
        shown = ", ".join("x".join(map(str, size)) for size in sizes)
        raise InputError(
            f"metric protocol: '{record.name}' is measured on {'x'.join(map(str, wanted))} pixels; the cell's levels "
            f"are {shown}; give 'level', which marks the number as modified"
        )

    def titles(self, assembly: Assembly) -> list[str]:
        """Return the rows' metric names: the record's own title, or the names of the metrics that replace it."""
        if self.lacks(assembly.plugins) is None:
            record = load_record(self.given, assembly.plugins)
            return [title_of(record, assembly.make("feature_extractors", record.detector))]
        return [metric.name for metric in self._stand_ins(assembly)]

    def protocol(self, assembly: Assembly) -> dict[str, Any]:
        """Return the resolved record, or, without weights, the protocols of the metrics that replace it and why."""
        fitted = self._fit(assembly)
        try:
            described = assembly.make("feature_extractors", fitted.record.detector).describe()
        except MissingWeights as error:
            return {
                "metric": self.name,
                "not_measured": str(error),
                "stands_in": {metric.name: metric.protocol(assembly) for metric in self._stand_ins(assembly)},
            }
        stored = resolved_record(fitted.record, described)
        return {
            "metric": self.name,
            "protocol": fitted.record.name,
            "modified": list(fitted.modified),
            "record": stored,
            "identity": identity_of(stored),
            "level": fitted.level,
            "bootstrap": self.replicates,
        }

    def _fit(self, assembly: Assembly) -> Fitted:
        sizes = [assembly.pyramid.size(level) for level in range(assembly.pyramid.levels)]
        return self.fitted(assembly.config, assembly.plugins, sizes)

    def _stand_ins(self, assembly: Assembly) -> list[Any]:
        """Return the metrics that replace it, without those that the configuration asks for itself."""
        asked = {assembly.make("metrics", part).name for part in assembly.config.evaluation.metrics}
        made = [assembly.make("metrics", part) for part in self.substitutes]
        return [metric for metric in made if metric.name not in asked]

    # Measuring

    def evaluate(self, context: EvaluationContext) -> list[Row]:
        """Return one row, or the rows of the metrics that replace it. Results besides the rows go to ``details``."""
        assembly = context.assembly
        fitted = self._fit(assembly)
        record = fitted.record
        extractor: FeatureExtractor = context.extractor(record.detector)
        try:
            described = extractor.describe()
        except MissingWeights as error:
            context.details["not_measured"] = str(error)
            return [row for metric in self._stand_ins(assembly) for row in metric.evaluate(context)]
        reals, drawn = None, None
        if record.reals is not None:
            reals, drawn = self._reals(context, fitted, extractor, described)
        fakes = np.stack(self._fakes(context, fitted, extractor))
        found = measured(record, reals, fakes, replicates=self.replicates)
        few = [len(side) for side in (reals, fakes) if side is not None and len(side) <= side.shape[1]]
        if record.measure == "frechet" and few:
            context.details["warning"] = (
                f"{few[0]} clips for {fakes.shape[1]} features: a covariance is singular"
            )
        context.details.update({name: value for name, value in found.items() if name != "value"})
        modified = [*fitted.modified, *([drawn] if drawn else [])]
        context.facts["modified"] = modified
        identity = identity_of({**resolved_record(record, described), "drawn": drawn})
        name = f"{record.name}{' (modified)' if modified else ''}, {identity}"
        title = title_of(record, extractor)
        return [{"metric": title, "level": fitted.level, "value": found["value"], "record": name}]

    def _fakes(
        self, context: EvaluationContext, fitted: Fitted, extractor: FeatureExtractor
    ) -> list[Features]:
        rule, frames = fitted.record.fakes, fitted.record.frames
        taken = slice(0, frames * rule.stride, rule.stride)
        assert isinstance(rule.count, int), "fitted to the number of samples"
        held = FeatureBuffer()

        def work(index: int) -> Features:
            video = context.samples(fitted.level, [index])[0, taken]
            return held.keep(_row(extractor, prepared(_rgb(video), rule.prepare), context.device))

        return distributed.spread(range(rule.count), work)

    def _reals(
        self,
        context: EvaluationContext,
        fitted: Fitted,
        extractor: FeatureExtractor,
        described: Mapping[str, Any],
    ) -> tuple[Features, str | None]:
        """Return features of reals, and in words how their choice differs from the record, or None."""
        record, rule = fitted.record, fitted.record.reals
        assert rule is not None, "asked for above"
        listed = getattr(context.assembly.dataset, "files", None)
        if listed is None:
            return self._drawn(context, fitted, extractor, described)
        known = [item for split in SPLITS.get(rule.split, ("train",)) for item in listed(split)]
        infos = {file.name: info for file, info in known}
        videos = [Video(file.path, file.name, "video") for file, _ in known]
        needed = needed_frames(rule, record.frames)
        choices = candidates(
            rule,
            record.frames,
            videos,
            lambda video: infos[video.name] if infos[video.name].frames >= needed else None,
            seed=record.seed,
        )
        extraction = Extraction(
            reader=context.assembly.dataset.reader,  # type: ignore[attr-defined]  # it has files
            cache=FeatureCache(context.cache_folder),
            device=context.device,
        )
        detector = resolved_record(record, described)["detector"]
        sources = plugin_hashes(context.assembly.plugins, [("feature_extractors", record.detector)])
        task = Task(record.frames, rule.prepare, detector, extractor.features, None, sources)
        count = None if rule.count == "all" else rule.count
        made = extraction.run(task, choices, count, keep=True, check=lambda have: _enough(have, rule, record))
        _enough(len(made.entries), rule, record)
        context.facts["reals"] = {"clips": len(made.entries), "unreadable": sorted(made.unreadable)}
        if rule.count == "all" and made.unreadable:
            return made.features, f"reals: {len(made.unreadable)} unreadable"
        return made.features, None

    def _drawn(
        self,
        context: EvaluationContext,
        fitted: Fitted,
        extractor: FeatureExtractor,
        described: Mapping[str, Any],
    ) -> tuple[Features, str]:
        """Return features of random windows drawn by the data set, as for other distances; stored for all cells."""
        record, rule = fitted.record, fitted.record.reals
        assert rule is not None, "asked for above"
        count = context.assembly.config.evaluation.reals
        name = context.assembly.config.data.dataset.use
        taken = slice(0, record.frames * rule.stride, rule.stride)
        held = FeatureBuffer()

        def work(number: int) -> Features:
            levels, _ = context.reals("train", [number])
            clip = levels[fitted.level][0, taken]
            if len(clip) < record.frames:
                raise InputError(
                    f"metric protocol: '{record.name}' takes real clips of {record.frames} frames, stride "
                    f"{rule.stride}; '{name}' draws clips of {levels[fitted.level].shape[1]}"
                )
            coded = rule.prepare.model_copy(update={"average": (1, 1, 1), "size": "stored"})
            return held.keep(_row(extractor, prepared(_rgb(clip), coded), context.device))

        facts = {
            "protocol": resolved_record(record, described)["detector"],
            "stride": rule.stride,
            "prepare": rule.prepare.model_dump(mode="json"),
            "frames": record.frames,
            "level": fitted.level,
            "count": count,
        }
        rows = context.kept(facts, lambda: [np.stack(distributed.spread(range(count), work))])
        return rows[0], f"reals: {count} random windows that the data set '{name}' draws"


def lacking(configs: Sequence[CellConfig], plugins: Plugins) -> list[str]:
    """Return one sentence for each metric of a study whose weights are missing."""
    said: dict[str, str] = {}
    for config in configs:
        for part in config.evaluation.metrics:
            metric = plugins.make("metrics", part)
            reason = metric.lacks(plugins) if hasattr(metric, "lacks") else None
            if reason is not None:
                names = ", ".join(metric.stand_ins(plugins))
                said[metric.name] = (
                    f"{metric.name} cannot be measured: {reason}. Measured instead: {names}, which do not compare "
                    "with it; once the weights exist, the same command with --evaluate-only completes the study"
                )
    return list(said.values())


def _row(extractor: FeatureExtractor, clip: Tensor, device: torch.device) -> Tensor:
    with torch.no_grad():
        return extractor.features(clip[None].to(device))[0]


def _rgb(video: Tensor) -> Tensor:
    return video if video.shape[-1] == 3 else video.expand(*video.shape[:-1], 3)


def _number(count: int | str, config: CellConfig) -> int:
    return count if isinstance(count, int) else config.evaluation.samples


def _enough(have: int, rule: SideRule, record: ProtocolRecord) -> None:
    if have < 2 or (rule.count != "all" and have < rule.count and rule.fewer == "refuse"):
        raise InputError(
            f"metric protocol: '{record.name}' takes {rule.count} real clips; the data set has {have} that can be used"
        )
