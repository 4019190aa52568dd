"""A distance between the features of generated and of real clips, on every level, beside its floor.

Reference: ``evaluation.reals`` real clips of the training split. Judged: ``evaluation.samples`` generated
videos. Floor (rows ``NAME.floor``): as many held-out real clips as there are generated videos, so that both
carry the same bias of a finite set. A value near the floor means nothing: real clips that the model never
saw are as far away.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hpdm_core.metrics.corruptions import CORRUPTIONS
from hpdm_core.metrics.projection import FEW, Projection, dimensions_used, fit_projection

if TYPE_CHECKING:
    from hpdm_core.assembly import Assembly
    from hpdm_core.config.schema import Part
    from hpdm_core.evaluate import EvaluationContext
    from hpdm_core.metrics.frechet import Features
    from hpdm_core.metrics.protocol import FeatureExtractor, Need, Row

__all__ = ["CorruptionCheck", "FeatureDistance"]


BLOCKS = 8
UNIT = "the floor"
UNBIASED_UNIT = f"the larger of |floor| and the standard error of the floor over {BLOCKS} blocks of its clips"


class FeatureDistance:
    """The metric ``distance[extractor]``, such as ``frechet[random3d]``."""

    needs: Need = "samples"

    def __init__(
        self,
        distance: str,
        measure: Callable[[Features, Features], float],
        *,
        extractor: Part,
        dimensions: int | None,
        settings: dict[str, Any],
        unbiased: bool = False,
    ) -> None:
        self.name = f"{distance}[{extractor.use}]"
        self.measure = measure
        self.extractor = extractor
        self.dimensions = dimensions
        self.settings = settings
        self.unbiased = unbiased
        """Whether the floor may come out at 0 or below: then it is no unit by itself."""

    def protocol(self, assembly: Assembly) -> dict[str, Any]:
        """Return extractor with weights hash, numbers of clips, splits, sizes and scaling. The stride of the
        clips is found in the data (`EvaluationContext.data_fingerprint`).
        """
        extractor: FeatureExtractor = assembly.make("feature_extractors", self.extractor)
        described = extractor.describe()
        evaluation = assembly.config.evaluation
        return {
            "metric": self.name,
            **self.settings,
            "extractor": described,
            "scaling": extractor.scaling,
            "dimensions": dimensions_used(
                described["dimension"],
                fakes=evaluation.samples,
                reals=evaluation.reals,
                limit=self.dimensions,
                scaling=extractor.scaling,
            ),
            "dimensions_rule": f"at most {self.dimensions or 'all'} with fewer than {FEW} clips per feature",
            "fakes": evaluation.samples,
            "reals": evaluation.reals,
            "reference": "real clips of the training split",
            "floor": f"{evaluation.samples} real clips of the held-out split against the reference",
            "downsampling": assembly.config.data.downsampling,
        }

    def evaluate(self, context: EvaluationContext) -> list[Row]:
        """Return one row per level, and one ``.floor`` row per level where the data have a held-out split."""
        samples = context.assembly.config.evaluation.samples
        fakes = context.fake_features(self.extractor)
        references, held_out = self._real(context)
        rows: list[Row] = []
        for level, (reference, fake) in enumerate(zip(references, fakes, strict=True)):
            project = self._projection(context, reference, samples)
            rows.append(
                {"metric": self.name, "level": level, "value": self._between(project, reference, fake)}
            )
            if held_out:
                floor = self._between(project, reference, held_out[level])
                rows.append({"metric": f"{self.name}.floor", "level": level, "value": floor})
        return rows

    def _real(self, context: EvaluationContext) -> tuple[Sequence[Features], Sequence[Features]]:
        evaluation = context.assembly.config.evaluation
        references = context.real_features(self.extractor, split="train", count=evaluation.reals)
        if not context.has_held_out:
            return references, []
        return references, context.real_features(self.extractor, split="held_out", count=evaluation.samples)

    def _projection(self, context: EvaluationContext, reference: Features, count: int) -> Projection:
        scaling = context.extractor(self.extractor).scaling
        dimensions = dimensions_used(
            reference.shape[1], fakes=count, reals=len(reference), limit=self.dimensions, scaling=scaling
        )
        return fit_projection(reference, scaling=scaling, dimensions=dimensions)

    def _between(self, project: Projection, reference: Features, judged: Features) -> float:
        return self.measure(project(reference), project(judged))

    def _unit(self, project: Projection, reference: Features, held_out: Features, floor: float) -> float:
        """Return what a corruption's effect is counted in; see `UNIT` and `UNBIASED_UNIT`."""
        blocks = min(BLOCKS, len(held_out) // 2)  # an unbiased distance needs two clips
        if not self.unbiased or blocks < 2:
            return abs(floor)
        values = [self._between(project, reference, held_out[start::blocks]) for start in range(blocks)]
        return max(abs(floor), statistics.stdev(values) / math.sqrt(blocks))


class CorruptionCheck:
    """What a distance sees: how many floors away corrupted real clips are. Depends on the data alone.

    The held-out clips of the floor are corrupted on each level (`hpdm_core.metrics.corruptions`), and their
    distance to the same reference is counted in floors. Below 3 the distance is blind to that corruption on
    that level. The floor of an unbiased distance may come out near 0 by chance, which would make it see
    everything: the unit is then the floor's own standard error.
    """

    needs: Need = "data"

    def __init__(self, distance: FeatureDistance) -> None:
        self.distance = distance
        self.name = f"{distance.name}.sensitivity"

    def protocol(self, assembly: Assembly) -> dict[str, Any]:
        """Return the distance's protocol and the corruptions."""
        return {
            **self.distance.protocol(assembly),
            "metric": self.name,
            "corruptions": sorted(CORRUPTIONS),
            "unit": UNBIASED_UNIT if self.distance.unbiased else UNIT,
        }

    def evaluate(self, context: EvaluationContext) -> list[Row]:
        """Return a row per corruption and level; ``value`` in floors, with ``distance``, ``floor``
        and ``unit`` beside it.
        """
        count = context.assembly.config.evaluation.samples
        references, held_out = self.distance._real(context)
        rows: list[Row] = []
        if not held_out:
            return rows
        for corruption in CORRUPTIONS:
            spoiled = context.real_features(
                self.distance.extractor, split="held_out", count=count, corruption=corruption
            )
            for level, reference in enumerate(references):
                project = self.distance._projection(context, reference, count)
                floor = self.distance._between(project, reference, held_out[level])
                unit = self.distance._unit(project, reference, held_out[level], floor)
                moved = self.distance._between(project, reference, spoiled[level])
                rows.append(
                    {
                        "metric": self.name,
                        "level": level,
                        "value": moved / unit if unit else float("inf"),
                        "corruption": corruption,
                        "distance": moved,
                        "floor": floor,
                        "unit": unit,
                    }
                )
        return rows
