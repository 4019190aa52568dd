"""The interfaces of metrics and feature extractors.

A metric turns a finished stage into rows. Every number carries its protocol: `Metric.protocol` lists everything that
the value depends on besides the stage that it reads, and is hashed into the evaluation's key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hpdm_core.assembly.keys import keyed_section
from hpdm_core.base.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.assembly.denoiser import Denoiser
    from hpdm_core.config.content import Known
    from hpdm_core.config.schema import CellConfig, Part
    from hpdm_core.data.dataset import Clip, Split
    from hpdm_core.plugins import Plugins

__all__ = [
    "EvaluationContext",
    "FeatureExtractor",
    "Features",
    "Metric",
    "Need",
    "Row",
    "Scaling",
    "colour",
    "data_facts",
    "resolution",
]

Features = NDArray[np.float64]
"""Features [n, d] of n videos, or arrays computed from them."""

Need = Literal["configuration", "data", "training", "model", "samples"]
"""What a metric reads, which also determines its key: the cell's configuration (nothing is trained for it), the data
alone (`data_facts`; computed once per study), the train stage's result, the trained weights (both: train key), or the
sampled videos (sample key).
"""

Scaling = Literal["none", "features", "directions"]
"""How features are scaled, fitted on real training clips: not at all; each feature to zero mean and unit variance; or
each principal direction to these (whitening), which also weighs directions that vary little between real clips.
"""

Row = Mapping[str, Any]
"""One number: ``metric`` (str), ``level`` (int, or None when it has none), ``value`` (float), and any
further columns of plain values, such as ``sigma_eff``.
"""


class FeatureExtractor(Protocol):
    """A fixed map from videos to vectors.

    An extractor that reads files may have an attribute ``places``: the names of its options that hold their paths.
    Stored features are then reused after the files have moved, as long as `describe` returns the same.
    """

    name: str
    """Name in result columns: a distance on these features is called ``frechet[NAME]``."""
    scaling: Scaling
    """How a distance brings the features to a common scale."""

    def features(self, videos: Tensor) -> Tensor:
        """Return float64 features [n, d] of uint8 ``videos`` [n, F, H, W, C] in 0..255, of any size.

        Row i depends on video i alone. Deterministic: random numbers may come from fixed streams only.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return what identifies the features, as JSON: name, dimension, SHA-256 of the weights if there are any."""
        ...


class EvaluationContext(Protocol):
    """A metric's access to a cell. Files are opened only when they are asked for."""

    assembly: Assembly
    """The cell's parts: configuration, pyramid, dataset, plugins."""
    model_path: Path | None
    """The file of the averaged weights."""
    samples_folder: Path | None
    """The folder of the generated videos."""
    train_result: Mapping[str, Any]
    """The train stage's result; empty where there is none."""
    cache_folder: Path | None
    """Folder in which features are stored; None keeps them in memory only."""
    facts: dict[str, Any]
    """Facts found while measuring, to be added to the protocol: labels, the data's fingerprint."""
    details: dict[str, Any]
    """Results of this cell besides the rows: intervals, points of a curve."""

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        ...

    @property
    def denoiser(self) -> Denoiser:
        """The trained model with averaged weights. Raises TroubleError where there are none."""
        ...

    @property
    def has_held_out(self) -> bool:
        """Whether the data have a held-out split."""
        ...

    @property
    def data_fingerprint(self) -> str:
        """SHA-256 of the dataset's own description of its files."""
        ...

    def clip(self, stream: str, split: Split, number: int) -> Clip:
        """Return clip ``number`` of a fixed list named ``stream``, drawn from ``split``."""
        ...

    def samples(self, level: int, indices: Sequence[int]) -> Tensor:
        """Return generated videos ``indices``, uint8 [n, F, H, W, C]."""
        ...

    def reals(self, split: Split, numbers: Sequence[int]) -> tuple[list[Tensor], list[int]]:
        """Return real clips on every level, uint8 [n, F, H, W, C] each, and their labels."""
        ...

    def extractor(self, part: Part) -> FeatureExtractor:
        """Return the feature extractor ``part``, built once."""
        ...

    def extractor_facts(self, part: Part) -> dict[str, Any]:
        """Return everything that features by ``part`` depend on besides the videos, as JSON."""
        ...

    def fake_features(self, part: Part) -> list[Features]:
        """Return the features [n, d] of all ``evaluation.samples`` generated videos, per level."""
        ...

    def real_features(
        self, part: Part, *, split: Split, count: int, corruption: str | None = None
    ) -> list[Features]:
        """Return the features [count, d] of real clips per level, corrupted if asked for."""
        ...

    def kept(self, facts: Mapping[str, Any], make: Callable[[], list[Features]]) -> list[Features]:
        """Return the arrays that ``make`` computes from real clips, stored for all cells under ``facts`` and the data's
        fingerprint.
        """
        ...


class Metric(Protocol):
    """Something that is measured on a cell, or, with ``needs == "data"``, on its data.

    A metric that works with one dataset only may have an attribute ``dataset``: its name. The conformance tests then
    use that dataset; the metric itself must refuse others.
    """

    name: str
    """Stem of the rows' ``metric`` column, e.g. ``held_out_loss`` or ``frechet[random3d]``."""
    needs: Need

    def protocol(self, assembly: Assembly) -> dict[str, Any]:
        """Return everything that the values depend on besides the stage that is read, as JSON. Opens no data."""
        ...

    def evaluate(self, context: EvaluationContext) -> list[Row]:
        """Return the rows. Raises TroubleError when something that it needs is missing or unusable."""
        ...


def resolution(size: tuple[int, int, int]) -> str:
    """Return the displayed name of a level: ``16x64x64`` for frames, height and width."""
    return "x".join(str(side) for side in size)


def data_facts(config: CellConfig, plugins: Plugins, known: Known | None = None) -> dict[str, Any]:
    """Return the part of ``config`` that real clips on every level depend on.

    It is the base of a key for ``needs == "data"``. It contains the content of the clips' files, not their paths;
    ``known``: as in `train_key`.
    """
    model = config.model
    return {
        "data": keyed_section(config, "data", plugins, known),
        "video": list(model.video),
        "patch": list(model.patch),
        "token": list(model.token),
        "levels": model.levels,
        "channels": model.channels,
    }


def colour(videos: Tensor) -> Tensor:
    """Return ``videos`` [n, F, H, W, C] with three channels: a grey one is repeated. InputError for other numbers."""
    channels = videos.shape[-1]
    if channels == 3:
        return videos
    if channels == 1:
        return videos.expand(*videos.shape[:-1], 3)
    raise InputError(
        f"feature extractor: videos have {channels} channels; allowed are 1 (grey, repeated) and 3 (RGB)"
    )
