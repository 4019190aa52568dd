"""A distance between the features of generated and of real clips, on every level, beside its floor.

Reference: ``evaluation.reals`` real clips of the training split. Judged: ``evaluation.samples`` generated
videos. Floor (rows ``NAME.floor``): as many held-out real clips as there are generated videos, so that both
carry the same bias of a finite set. A value near the floor means nothing: real clips that the model never
saw are as far away.
"""

from __future__ import annotations

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
    ) -> None:
        self.name = f"{distance}[{extractor.use}]"
        self.measure = measure
        self.extractor = extractor
        self.dimensions = dimensions
        self.settings = settings

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


class CorruptionCheck:
    """What a distance sees: how many floors away corrupted real clips are. Depends on the data alone.

    The held-out clips of the floor are corrupted on each level (`hpdm_core.metrics.corruptions`), and their
    distance to the same reference is divided by the floor. Below 3 the distance is blind to that corruption
    on that level.
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
        }

    def evaluate(self, context: EvaluationContext) -> list[Row]:
        """Return a row per corruption and level; ``value`` in floors, with ``distance`` and ``floor``
        beside it.
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
                moved = self.distance._between(project, reference, spoiled[level])
                rows.append(
                    {
                        "metric": self.name,
                        "level": level,
                        # An unbiased floor may be negative: its size is the unit then.
                        "value": moved / abs(floor) if floor else float("inf"),
                        "corruption": corruption,
                        "distance": moved,
                        "floor": floor,
                    }
                )
        return rows
