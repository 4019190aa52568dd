"""What a metric and a feature extractor are, and the facts that every number carries.

A metric turns a finished stage into rows. A number is never shown without its protocol: `Metric.protocol`
lists everything that its value depends on besides the stage that it reads, and is hashed into the
evaluation's key.
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
"""Features [n, d] of n videos, or what is made of them."""

Need = Literal["configuration", "data", "training", "model", "samples"]
"""What a metric reads, and so what its key hangs on: how the cell is set up (nothing is trained for it), the
data alone (`data_facts`; computed once per study), the train stage's result, the trained weights (both: train
key), or the sampled videos (sample key).
"""

Scaling = Literal["none", "features", "directions"]
"""Fitted on real training clips: nothing; zero mean and unit variance of each feature; or the same of each
principal direction (whitening), which also sees what varies little between real clips.
"""

Row = Mapping[str, Any]
"""One number: ``metric`` (str), ``level`` (int, or None when it has none), ``value`` (float), and any
further columns of plain values, such as ``sigma_eff``.
"""


class FeatureExtractor(Protocol):
    """A fixed map from videos to vectors.

    One that reads files may have an attribute ``places``: the names of its options that say where they lie.
    Features are then found again when the files have moved, as long as `describe` is the same.
    """

    name: str
    """Column stem: a distance on these features is called ``frechet[NAME]``."""
    scaling: Scaling
    """How a distance brings the features to a common scale."""

    def features(self, videos: Tensor) -> Tensor:
        """Return float64 features [n, d] of uint8 ``videos`` [n, F, H, W, C] in 0..255, of any size.

        Row i depends on video i alone. Not random: what is drawn is drawn from fixed streams.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return what identifies the features, as JSON: name, dimension, SHA-256 of the weights if there
        are any.
        """
        ...


class EvaluationContext(Protocol):
    """What a metric gets to read of a cell. It opens what is asked for and nothing else."""

    assembly: Assembly
    """The cell's parts: configuration, pyramid, dataset, plugins."""
    model_path: Path | None
    """The averaged weights."""
    samples_folder: Path | None
    """The stored videos."""
    train_result: Mapping[str, Any]
    """The train stage's result; empty where there is none."""
    cache_folder: Path | None
    """Where features of real clips are kept; None for memory only."""
    facts: dict[str, Any]
    """What is found while measuring, for the protocol: labels, the data's fingerprint."""
    details: dict[str, Any]
    """What belongs to this cell alone, beside the rows: intervals, points of a curve."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
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
        """SHA-256 of what the dataset says of its files."""
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
        """Return all that features by ``part`` depend on besides the videos, as JSON."""
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
        """Return what ``make`` makes of real clips, kept for all cells under ``facts`` and what the data are."""
        ...


class Metric(Protocol):
    """Something that is measured on a cell, or, with ``needs == "data"``, on its data.

    One that can read the clips of one dataset only may have an attribute ``dataset``: its name. The conformance
    cases then try it on that one; refusing others is its own task.
    """

    name: str
    """Stem of the rows' ``metric`` column, e.g. ``held_out_loss`` or ``frechet[random3d]``."""
    needs: Need

    def protocol(self, assembly: Assembly) -> dict[str, Any]:
        """Return everything that the values depend on besides the stage that is read, as JSON. Opens no
        data.
        """
        ...

    def evaluate(self, context: EvaluationContext) -> list[Row]:
        """Return the rows. Raises TroubleError when what it needs is missing or not usable."""
        ...


def resolution(size: tuple[int, int, int]) -> str:
    """Return how people are shown a level: ``16x64x64`` for frames, height and width."""
    return "x".join(str(side) for side in size)


def data_facts(config: CellConfig, plugins: Plugins, known: Known | None = None) -> dict[str, Any]:
    """Return the part of ``config`` that real clips on every level depend on: the base of a key for ``needs
    == "data"``. Where the clips lie is no part of it, what lies there is; ``known``: as in `train_key`.
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
    """Return ``videos`` [n, F, H, W, C] with three channels: grey ones are repeated, others refused with
    InputError.
    """
    channels = videos.shape[-1]
    if channels == 3:
        return videos
    if channels == 1:
        return videos.expand(*videos.shape[:-1], 3)
    raise InputError(
        f"feature extractor: videos have {channels} channels; allowed are 1 (grey, repeated) and 3 (RGB)"
    )
