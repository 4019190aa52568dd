"""The distance between the features of generated and real clips on every level, and its floor.

Reference: ``evaluation.reals`` real clips of the training split. Compared with it: ``evaluation.samples`` generated
videos. Floor (rows ``NAME.floor``): the distance of as many held-out real clips, so that both values have the same
bias of a finite set. A value near the floor means that the generated videos are no farther from the reference than
real clips that the model was not trained on.

Controls (rows ``NAME.control``, if asked for): the distance of as many training clips, the first of the reference, each
corrupted in one way. If the distance sees that corruption, a good model's videos have a smaller distance than these.

How a value is compared with the floor: the floor of an unbiased distance may be 0 or negative, so differences are
expressed in the floor's standard error (`floor_spread`). For any other distance, values are expressed in multiples of
the floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hpdm_core.base.randomness import generator
from hpdm_core.metrics.corruptions import COARSEST, CORRUPTIONS
from hpdm_core.metrics.distances.projection import FEW, Projection, dimensions_used, fit_projection

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.config.schema import Part
    from hpdm_core.metrics.interface import EvaluationContext, FeatureExtractor, Features, Need, Row

__all__ = ["CONTROLS", "CorruptionCheck", "FeatureDistance", "floor_spread"]

HALVES = 32
SPREAD = f"root mean square change of the floor over {HALVES} random halves of its real clips, on both sides"
CONTROLS = {"level 0 upsampled": COARSEST, "frozen": "freeze", "shuffled": "shuffle"}
"""Name in the report -> corruption of real training clips."""
UNIT = "the floor"
UNBIASED_UNIT = f"the floor's spread ({SPREAD}); the value is the distance less the floor"


def floor_spread(
    measure: Callable[[Features, Features], float], reference: Features, held_out: Features
) -> float:
    """Return the standard error of ``measure(reference, held_out)`` over the choice of real clips.

    The delete-half jackknife (Shao & Wu 1989): the root mean square difference between the distance of random halves of
    both sides and the distance of the whole sides. It is accurate where the two sides differ in distribution; where
    they do not, the distance varies quadratically and the estimate is up to sqrt(3) times too large. NaN with fewer
    than 4 clips on a side. The same clips give the same value.
    """
    if min(len(reference), len(held_out)) < 4:
        return math.nan
    whole = measure(reference, held_out)
    stream = generator("evaluation", "floor_spread")
    changes = []
    for _ in range(HALVES):
        halves = [
            torch.randperm(len(side), generator=stream)[: len(side) // 2] for side in (reference, held_out)
        ]
        changes.append(measure(reference[halves[0].numpy()], held_out[halves[1].numpy()]) - whole)
    return math.sqrt(sum(change**2 for change in changes) / HALVES)


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
        controls: bool = False,
    ) -> None:
        self.name = f"{distance}[{extractor.use}]"
        self.measure = measure
        self.extractor = extractor
        self.dimensions = dimensions
        self.settings = settings
        self.unbiased = unbiased
        """Whether the floor may be 0 or negative, so that it cannot serve as a unit."""
        self.controls = controls

    def protocol(self, assembly: Assembly) -> dict[str, Any]:
        """Return the extractor with the hash of its weights, numbers of clips, splits, sizes and scaling.

        The stride of the clips is part of the data (`EvaluationContext.data_fingerprint`).
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
            **({"floor_spread": SPREAD} if self.unbiased else {}),
            "downsampling": assembly.config.data.downsampling,
            **({"controls": f"{evaluation.samples} training clips, spoiled"} if self.controls else {}),
        }

    def evaluate(self, context: EvaluationContext) -> list[Row]:
        """Return one row per level; one ``.floor`` row per level if the data have a held-out split, for an unbiased
        distance with its ``spread``; and one ``.control`` row per control and level if controls are asked for.
        """
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
                row: dict[str, Any] = {"metric": f"{self.name}.floor", "level": level, "value": floor}
                if self.unbiased:
                    row["spread"] = self._spread(project, reference, held_out[level])
                rows.append(row)
        return rows + (self._controlled(context, references) if self.controls else [])

    def _controlled(self, context: EvaluationContext, references: Sequence[Features]) -> list[Row]:
        samples = context.assembly.config.evaluation.samples
        rows: list[Row] = []
        for control, corruption in CONTROLS.items():
            spoiled = context.real_features(
                self.extractor, split="train", count=samples, corruption=corruption
            )
            for level, (reference, judged) in enumerate(zip(references, spoiled, strict=True)):
                project = self._projection(context, reference, samples)
                rows.append(
                    {
                        "metric": f"{self.name}.control",
                        "level": level,
                        "value": self._between(project, reference, judged),
                        "control": control,
                    }
                )
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

    def _spread(self, project: Projection, reference: Features, held_out: Features) -> float | None:
        spread = floor_spread(self.measure, project(reference), project(held_out))
        return None if math.isnan(spread) else spread


class CorruptionCheck:
    """The sensitivity of a distance: how far corrupted real clips are from the reference. Depends on the data alone.

    The held-out clips of the floor are corrupted on each level (`hpdm_core.metrics.corruptions`). Their distance to the
    same reference is expressed in multiples of the floor (`UNIT`), or, for an unbiased distance, as its difference from
    the floor in multiples of the floor's spread (`UNBIASED_UNIT`). Below 3 the distance counts as blind to that
    corruption on that level.
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
        """Return a row per corruption and level: ``value`` in multiples of ``unit``, ``distance``, ``floor``, ``unit``.

        ``value`` is infinite where the unit is 0 or, with too few clips, unknown (None).
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
                unit: float | None = abs(floor)
                effect = moved
                if self.distance.unbiased:
                    unit = self.distance._spread(project, reference, held_out[level])
                    effect = moved - floor
                rows.append(
                    {
                        "metric": self.name,
                        "level": level,
                        "value": effect / unit if unit else math.inf,
                        "corruption": corruption,
                        "distance": moved,
                        "floor": floor,
                        "unit": unit,
                    }
                )
        return rows
