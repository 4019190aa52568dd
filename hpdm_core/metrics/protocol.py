"""What a metric and a feature extractor are, and the facts that every number carries.

A metric turns a finished stage into rows. A number is never shown without its protocol: `Metric.protocol`
lists everything that its value depends on besides the stage that it reads, and is hashed into the
evaluation's key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hpdm_core.config.keys import keyed_section
from hpdm_core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from hpdm_core.assembly import Assembly
    from hpdm_core.config.content import Known
    from hpdm_core.config.schema import CellConfig
    from hpdm_core.evaluate import EvaluationContext
    from hpdm_core.plugins import Plugins

__all__ = ["FeatureExtractor", "Metric", "Need", "Row", "Scaling", "colour", "data_facts", "resolution"]

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
