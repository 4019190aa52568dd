"""The metric ``fake_counts``: a Frechet distance over training, at several numbers of fakes (the paper's Figure 8).

Every kept checkpoint, and the trained model, generate the same indexed samples. For each n, the distance of the first n
samples to the reals is measured. Distances at different n do not compare: they fall together as a model trains, with a
nearly constant offset between them. So the rows hold the trained model only, as a separate metric for each n; the
curves over training go into the details, from which the report draws them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpdm_core.base import distributed
from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.base.files import whole_or_absent
from hpdm_core.metrics.distances.frechet import frechet_distance
from hpdm_core.metrics.distances.metric import FeatureDistance
from hpdm_core.metrics.interface import Features
from hpdm_core.metrics.networks.weights import MissingWeights

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.config.schema import Part
    from hpdm_core.metrics.interface import EvaluationContext, Need, Row
    from hpdm_core.plugins import Plugins

__all__ = ["FakeCounts"]


class FakeCounts:
    """The metric on the features of ``extractor``, or, if its weights are missing, of ``substitute``.

    ``counts``: numbers of fakes; ``dimensions``: as for ``frechet``, determined by the smallest count so that all
    points of a figure are distances in the same space.
    """

    needs: Need = "samples"

    def __init__(
        self, *, counts: Sequence[int], extractor: Part, substitute: Part, dimensions: int | None
    ) -> None:
        self.counts = tuple(sorted(set(counts)))
        self.extractor = extractor
        self.substitute = substitute
        self.dimensions = dimensions
        self.name = f"fake_counts[{extractor.use}]"

    def lacks(self, plugins: Plugins) -> str | None:
        """Return which weights are missing to measure it on its own extractor, or None."""
        try:
            plugins.make("feature_extractors", self.extractor).describe()
        except MissingWeights as error:
            return str(error)
        return None

    def stand_ins(self, plugins: Plugins) -> list[str]:
        """Return the names of the metrics that replace it while its weights are missing."""
        return [self._distance(self.substitute).name]

    def _part(self, plugins: Plugins) -> Part:
        return self.extractor if self.lacks(plugins) is None else self.substitute

    def _distance(self, part: Part) -> FeatureDistance:
        return FeatureDistance(
            "frechet", frechet_distance, extractor=part, dimensions=self.dimensions, settings={"ddof": 0}
        )

    def titles(self, assembly: Assembly) -> list[str]:
        """Return the rows' metric names, one for each number of fakes."""
        name = self._distance(self._part(assembly.plugins)).name
        return [_title(name, count) for count in self.counts]

    def protocol(self, assembly: Assembly) -> dict[str, Any]:
        """Return the distance's protocol with the counts and steps.

        Raises InputError for counts below 2 or above ``evaluation.samples``.
        """
        evaluation = assembly.config.evaluation
        if self.counts[-1] > evaluation.samples or self.counts[0] < 2:
            raise InputError(
                f"metric fake_counts: counts {list(self.counts)}; allowed are 2 to evaluation.samples, "
                f"{evaluation.samples}"
            )
        found = self._distance(self._part(assembly.plugins)).protocol(assembly)
        found.pop("floor")
        return {
            **found,
            "metric": self.name,
            "fakes": list(self.counts),
            "steps": self._steps(assembly),
            "not_measured": self.lacks(assembly.plugins),
        }

    def _steps(self, assembly: Assembly) -> list[int]:
        training = assembly.config.training
        return sorted({*training.keep, training.steps})

    def evaluate(self, context: EvaluationContext) -> list[Row]:
        """Return a row per level and count for the trained model; ``details`` gets all points.

        Raises TroubleError when a checkpoint is missing that was to be kept.
        """
        assembly = context.assembly
        distance = self._distance(self._part(assembly.plugins))
        references, _ = distance._real(context)
        last = assembly.config.training.steps
        points: list[dict[str, Any]] = []
        for step in self._steps(assembly):
            fakes = (
                context.fake_features(distance.extractor)
                if step == last
                else list(self._features_at(context, distance.extractor, step))
            )
            for level, (reference, found) in enumerate(zip(references, fakes, strict=True)):
                project = distance._projection(context, reference, self.counts[0])
                for count in self.counts:
                    value = distance._between(project, reference, found[:count])
                    points.append({"step": step, "level": level, "fakes": count, "value": value})
        context.details["curves"] = {"distance": distance.name, "points": points}
        return [
            {
                "metric": _title(distance.name, point["fakes"]),
                "level": point["level"],
                "value": point["value"],
            }
            for point in points
            if point["step"] == last
        ]

    # The model at an earlier step

    def _features_at(self, context: EvaluationContext, part: Part, step: int) -> Iterator[Features]:
        """Yield, per level, the features [n, d] of the samples of the model at ``step``.

        Each batch is stored, so that a killed run resumes after its last batch.
        """
        from hpdm_core.sampling.cascade import label_of, sample
        from hpdm_core.sampling.files import to_uint8

        config = context.assembly.config
        extractor = context.extractor(part)
        denoiser = lru_cache(lambda: context.assembly.denoiser(_model_at(context, step)))

        def work(indices: range) -> list[Features]:
            file = self._file(context, part, step, indices)
            made = _kept(file, config.model.levels)
            if made is None:
                labels = [label_of(index, config.model.classes) for index in indices]
                levels = sample(context.assembly, denoiser(), list(indices), labels)
                seen = [extractor.features(to_uint8(videos).to(context.device)) for videos in levels]
                made = [features.double().cpu().numpy() for features in seen]
                _keep(file, made)
            return made

        most, size = self.counts[-1], config.runtime.sample_batch
        shares = [range(start, min(start + size, most)) for start in range(0, most, size)]
        batches = distributed.spread(shares, work)
        for level in range(config.model.levels):
            yield np.concatenate([made[level] for made in batches])

    def _file(self, context: EvaluationContext, part: Part, step: int, indices: range) -> Path | None:
        if context.cache_folder is None or context.samples_folder is None:
            return None
        facts = [
            context.samples_folder.name,
            step,
            indices.start,
            indices.stop,
            context.extractor_facts(part),
        ]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return context.cache_folder / f"{key}.npz"


def _model_at(context: EvaluationContext, step: int) -> Any:
    """Return the network with the averaged weights of ``step``."""
    from hpdm_core.training.checkpoint import load_weights, read_checkpoint

    assert context.model_path is not None, "samples come from a trained cell"
    stage = context.model_path.parent
    missing = (
        f"fake_counts: no checkpoint of step {step} in {stage}; needed is an unsharded one, which training.keep keeps "
        "if it lists the step"
    )
    for folder in sorted(stage.glob(f"attempts/*/checkpoints/{step:08d}")):
        try:
            weights = read_checkpoint(folder).ema
        except ValueError:
            continue
        if weights:
            model = context.assembly.build_model(device=context.device)
            load_weights(model, weights, origin=folder)
            return model.requires_grad_(False).eval()
    raise TroubleError(missing)


def _kept(file: Path | None, levels: int) -> list[Features] | None:
    if file is None:
        return None
    try:
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as held:
            return [held[f"array{level}"] for level in range(levels)]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _keep(file: Path | None, made: Sequence[Features]) -> None:
    if file is None:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_absent(file) as handle:
            np.savez(handle, **{f"array{level}": each for level, each in enumerate(made)})  # type: ignore[arg-type]


def _title(distance: str, fakes: int) -> str:
    return f"{distance} of {fakes} fakes"
