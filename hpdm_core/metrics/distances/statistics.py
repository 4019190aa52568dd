"""Plain statistics of a video as features: contrast, edges, motion, and colour. Nothing is learned or random.

At three spatial scales (each half the one before, by averaging 2x2 pixels): the standard deviation of all pixels, the
mean absolute differences along x, y and t, and that of second order along t; then the mean of each colour channel:
5 x 3 + 3 = 18 numbers, in units of [-1, 1]. A difference along an axis on which the video is too small is 0.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from hpdm_core.metrics.interface import Scaling, colour

__all__ = ["Statistics"]

_SCALES = 3


class Statistics:
    """The extractor ``statistics``."""

    name = "statistics"
    scaling: Scaling = "directions"

    def features(self, videos: Tensor) -> Tensor:
        """Return float64 [n, 18]; see the module's docstring."""
        pixels = rearrange(colour(videos), "n f h w c -> n c f h w").double() / 127.5 - 1.0
        columns = []
        scaled = pixels
        for scale in range(_SCALES):
            if scale and min(scaled.shape[-2:]) >= 2:
                scaled = functional.avg_pool3d(scaled, (1, 2, 2))
            step = scaled.diff(dim=2)
            columns += [scaled.flatten(1).std(dim=1, correction=0)]
            columns += [
                _size(part) for part in (scaled.diff(dim=4), scaled.diff(dim=3), step, step.diff(dim=2))
            ]
        return torch.cat([torch.stack(columns, dim=1), pixels.mean(dim=(2, 3, 4))], dim=1)

    def describe(self) -> dict[str, Any]:
        """Return the name, dimension and scales; there are no weights."""
        return {"extractor": self.name, "dimension": 5 * _SCALES + 3, "scales": _SCALES, "weights": None}


def _size(difference: Tensor) -> Tensor:
    """Return the mean absolute value per video, 0 where there is nothing to average."""
    if difference.numel() == 0:
        return difference.new_zeros(difference.shape[0])
    return difference.abs().flatten(1).mean(dim=1)
