"""Contracts of feature extractors and metrics."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
from torch import Tensor

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.assembly.denoiser import Denoiser
from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import generator
from hpdm_core.config.schema import (
    CellConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Part,
    TrainingConfig,
)
from hpdm_core.data.dataset import Clip, ClipShape, Split, pick
from hpdm_core.evaluation.context import CellContext
from hpdm_core.metrics.interface import Need
from hpdm_core.model.fusion import ContextFusion
from hpdm_core.pyramid import Triple, downsample
from hpdm_core.sampling.files import write_sample
from hpdm_core.testing.case import Case, expect, expect_close, expect_json, leaves_global_rng_alone
from hpdm_core.testing.small import SETTINGS, TOKEN_DIM, network

if TYPE_CHECKING:
    from hpdm_core.data.dataset import ClipDataset
    from hpdm_core.metrics.interface import FeatureExtractor, Metric

__all__ = ["FeatureExtractorCases", "MetricCases"]

SAMPLES = 4
TRAIN_RESULT = {
    "steps": 3,
    "loss": [0.3, 0.2, 0.1],
    "seconds": 2.0,
    "videos_per_second": 1.5,
    "peak_memory_bytes": 2**20,
    "parameters": 1000,
    "flops_per_step": 10**6,
}
"""An example of a train stage's result."""


class FeatureExtractorCases(Case):
    """``factory(*, ...) -> FeatureExtractor``: a fixed map from videos to vectors."""

    family: ClassVar[str] = "feature_extractors"
    sizes: tuple[tuple[int, int, int], ...] = ((4, 16, 24), (8, 24, 40))
    """Frames, height, width of the test videos."""
    count = 4

    def _videos(self, size: tuple[int, int, int], *, seed: int = 0) -> Tensor:
        stream = generator(seed, "conformance", "videos")
        coarse = torch.rand(self.count, 3, *(max(2, side // 4) for side in size), generator=stream)
        smooth = torch.nn.functional.interpolate(coarse, size, mode="trilinear")
        return (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()  # [n, F, H, W, C]

    def test_features(self) -> None:
        """Features are finite, floating-point [n, d], with the same d for every size; the videos are not changed."""
        extractor: FeatureExtractor = self.make()
        widths = set()
        for size in self.sizes:
            videos = self._videos(size)
            kept = videos.clone()
            made = extractor.features(videos)
            expect(torch.equal(videos, kept), "features: changes the videos that it is handed")
            two = made.ndim == 2 and made.shape[0] == self.count
            expect(two, f"features: shape {list(made.shape)}, wanted [{self.count}, d]")
            expect(made.is_floating_point(), f"features: {made.dtype}, wanted a floating type")
            expect(bool(torch.isfinite(made).all()), f"features of {size} videos: not finite")
            widths.add(made.shape[1])
        expect(
            len(widths) == 1,
            f"features: widths {sorted(widths)} for videos of sizes {self.sizes}, wanted one",
        )

    def test_flat_videos(self) -> None:
        """Black, white and uniformly grey videos give finite features (no division by a standard deviation of zero)."""
        extractor: FeatureExtractor = self.make()
        for value in (0, 255, 100):
            made = extractor.features(torch.full((2, *self.sizes[0], 3), value, dtype=torch.uint8))
            expect(
                bool(torch.isfinite(made).all()),
                f"features of a video that is {value} everywhere: not finite",
            )

    def test_clips_are_independent(self) -> None:
        """Features of a clip do not depend on the batch or on the position in it."""
        extractor: FeatureExtractor = self.make()
        videos = self._videos(self.sizes[0])
        together = extractor.features(videos)
        for index in range(self.count):
            alone = extractor.features(videos[index : index + 1])
            expect_close(
                alone, together[index : index + 1], f"features of clip {index} alone", tolerance=1e-5
            )
        turned = extractor.features(videos.flip(0))
        expect_close(turned, together.flip(0), "features of the clips in reverse order", tolerance=1e-5)

    def test_tells_clips_apart(self) -> None:
        """Different clips have different features."""
        extractor: FeatureExtractor = self.make()
        made = extractor.features(self._videos(self.sizes[0]))
        spread = (made - made[:1]).abs().amax(1)[1:]
        expect(bool((spread > 0).all()), "features: two different clips have the same")

    def test_deterministic(self) -> None:
        """Built twice with different global random states, it gives bitwise equal features; it draws no global random
        numbers.
        """
        first, second = self.make(seed=0), self.make(seed=1)
        videos = self._videos(self.sizes[0])
        wanted = first.features(videos)
        with leaves_global_rng_alone("features"):
            same = torch.equal(first.features(videos), wanted) and torch.equal(
                second.features(videos), wanted
            )
        expect(same, "features: differ for the same clips on a second call or from a second extractor")

    def test_describe(self) -> None:
        """It has a name, and a description that is JSON and always the same."""
        extractor: FeatureExtractor = self.make(seed=0)
        name = extractor.name
        expect(isinstance(name, str) and bool(name.strip()), f"name: {name!r}, wanted a name for the column")
        before = expect_json(extractor.describe(), "describe")
        expect(bool(extractor.describe()), "describe: empty; it should identify these features")
        extractor.features(self._videos(self.sizes[0]))
        expect(expect_json(extractor.describe(), "describe") == before, "describe: changes by use")
        again: Any = self.make(seed=1)
        expect(
            expect_json(again.describe(), "describe") == before, "describe: differs for an equal extractor"
        )


class MetricCases(Case):
    """``factory(*, ...) -> Metric``: returns rows about a cell, and the protocol that defines them."""

    family: ClassVar[str] = "metrics"

    def _assembly(self) -> Assembly:
        """Return a small cell with a small dataset and an untrained model."""
        if self.plugins is None:
            raise AssertionError(
                "set `plugins` on the conformance class: a metric may use parts of other families"
            )
        pyramid = SETTINGS[0].pyramid
        dataset: ClipDataset = _Waves(pyramid.video)
        only = getattr(self.make(), "dataset", None)
        if only is not None:
            dataset = self.plugins.make("datasets", Part(use=only), ClipShape(*pyramid.video), None)
        config = CellConfig(
            model=ModelConfig(
                video=pyramid.video,
                patch=pyramid.patch,
                token=pyramid.token,
                levels=pyramid.levels,
                classes=len(dataset.classes),
                token_dim=TOKEN_DIM,
                blocks=len(SETTINGS[0].levels_per_block),
            ),
            data=DataConfig(
                dataset=Part(use=only or "synthetic")
            ),  # replaced below by `_Waves`, which is not registered
            training=TrainingConfig(steps=1, batch=1, learning_rate=1e-3),
            evaluation=EvaluationConfig(samples=SAMPLES, reals=6),
        )
        assembly = Assembly(config, self.plugins)
        assembly.dataset = dataset
        return assembly

    def test_name_and_needs(self) -> None:
        """It has a name, and ``needs`` is one of the values of `hpdm_core.metrics.interface.Need`."""
        metric: Metric = self.make()
        expect(
            isinstance(metric.name, str) and bool(metric.name.strip()),
            f"name: {metric.name!r}, wanted a name",
        )
        allowed = get_args(Need)
        expect(metric.needs in allowed, f"needs: {metric.needs!r}, allowed: {', '.join(allowed)}")

    def test_protocol(self) -> None:
        """The protocol is JSON, not empty, and equal for an equal metric: the evaluation's key is a hash of it."""
        metric, other = self.make(seed=0), self.make(seed=1)
        text = expect_json(metric.protocol(self._assembly()), "protocol")
        expect(text not in ("{}", "null"), "protocol: empty; it should say all that the values depend on")
        expect(
            expect_json(other.protocol(self._assembly()), "protocol") == text,
            "protocol: differs for an equal metric",
        )

    def test_options_are_in_the_protocol(self) -> None:
        """A changed value of a numeric option changes the protocol."""
        given = dict(self.options)
        before = self.make().protocol(self._assembly())
        for name, field in self._model().model_fields.items():
            chosen = given.get(name, field.default)
            if isinstance(chosen, bool) or not isinstance(chosen, (int, float)):
                continue
            try:
                self.options = {**given, name: chosen + 1}
                after = self.make().protocol(self._assembly())
            except InputError:
                continue  # this value is not allowed
            finally:
                self.options = given
            expect(after != before, f"protocol: the same with {name} = {chosen} and with {chosen + 1}")

    def test_rows(self) -> None:
        """On a small cell, each row has the metric's name (or one of its ``titles(assembly)``), an existing level or
        None, and a float; a second evaluation gives the same rows.
        """
        assembly = self._assembly()
        with tempfile.TemporaryDirectory() as folder:
            for index in range(SAMPLES):
                clip = assembly.dataset.draw("train", generator("sample", index))
                pyramid = assembly.pyramid
                levels = [
                    downsample(clip.video, pyramid.pitch(level), "area") for level in range(pyramid.levels)
                ]
                write_sample(Path(folder), index, levels, label=clip.label)
            results = []
            for seed in (0, 1):
                metric: Metric = self.make(seed=seed)
                context = CellContext(assembly, samples_folder=Path(folder), train_result=TRAIN_RESULT)
                model = network(SETTINGS[0], ContextFusion())
                context.denoiser = Denoiser(model, _PredictsClean(), (1.0, 2.0, 4.0))
                results.append([dict(row) for row in metric.evaluate(context)])
        titles = metric.titles(assembly) if hasattr(metric, "titles") else ()
        rows = results[0]
        expect(len(rows) > 0, "evaluate: no rows")
        for row in rows:
            missing = {"metric", "level", "value"} - set(row)
            expect(not missing, f"evaluate: a row without {', '.join(sorted(missing))}: {row}")
            own = str(row["metric"]).split(".")[0] == str(metric.name).split(".")[0]
            named = own or row["metric"] in titles
            expect(named, f"evaluate: a row called {row['metric']!r} by the metric {metric.name!r}")
            level = row["level"]
            known = level is None or (isinstance(level, int) and level in range(assembly.pyramid.levels))
            expect(known, f"evaluate: level {level!r}, wanted None or 0 to {assembly.pyramid.levels - 1}")
            expect(isinstance(row["value"], float), f"evaluate: value {row['value']!r}, wanted a float")
        expect(repr(results[0]) == repr(results[1]), "evaluate: the same cell measured twice has other rows")


class _Waves:
    """A small fixed set of clips with drifting waves, as real clips for metrics."""

    classes: ClassVar[tuple[str, ...]] = ("slow", "fast")

    def __init__(self, size: Triple) -> None:
        self._clips = [self._wave(size, index) for index in range(8)]

    @staticmethod
    def _wave(size: Triple, index: int) -> Clip:
        stream = generator("conformance", "wave", index)
        label = index % 2
        speeds = torch.rand(3, 3, generator=stream) * 6 + label  # [C, axis], radians per axis
        angle = torch.rand(3, 1, 1, 1, generator=stream) * 6
        for axis, (shape, count) in enumerate(zip(((-1, 1, 1), (1, -1, 1), (1, 1, -1)), size, strict=True)):
            places = torch.linspace(0, 1, count).reshape(shape)
            angle = angle + speeds[:, axis].reshape(3, 1, 1, 1) * places
        return Clip(torch.sin(angle), label)

    def draw(self, split: Split, generator: torch.Generator) -> Clip:
        """Return one of the waves."""
        return self._clips[pick(len(self._clips), generator)]

    def distinct(self, split: Split) -> list[Clip] | None:
        """Return all waves."""
        return list(self._clips)

    def describe(self) -> dict[str, Any]:
        """Return the name."""
        return {"name": "waves"}


class _PredictsClean:
    """The simplest objective: the network predicts the clean patch."""

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
        """Return the clean patch."""
        return clean

    def denoised(self, noisy: Tensor, prediction: Tensor, sigma: Tensor, sigma_in: float) -> Tensor:
        """Return the prediction."""
        return prediction

    def weight(self, sigma: Tensor, sigma_in: float) -> Tensor:
        """Return ones."""
        return torch.ones_like(sigma)
