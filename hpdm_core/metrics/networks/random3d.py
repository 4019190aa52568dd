"""Features of a fixed random 3-D convolutional network, which is untrained and the same in all installations.

Weights come from random streams keyed by constants (not by a study's seed), and their SHA-256 is part of every
protocol. The network is not trained, so it favours no data; it responds to texture, edges and motion on three scales.
A distance on it is called ``frechet[random3d]``, not FVD, and is comparable only with values of the same name.
"""

import hashlib
from functools import cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from hpdm_core.base.randomness import normal
from hpdm_core.metrics.interface import Scaling, colour
from hpdm_core.metrics.networks.detectors import reference_arithmetic

__all__ = ["Random3D"]

_VERSION = 1
_LAYERS: tuple[tuple[int, tuple[int, int, int]], ...] = ((24, (1, 2, 2)), (48, (2, 2, 2)), (64, (1, 2, 2)))
"""Channels and stride (f, h, w) of each 3x3x3 convolution."""
_QUIET = 0.01
"""Added to a standard deviation: about one grey level, below which responses are rounding errors."""


@cache
def _kernels() -> tuple[Tensor, ...]:
    """Return the weight of every layer, [out, in, 3, 3, 3]."""
    made: list[Tensor] = []
    channels = 3
    for index, (width, _) in enumerate(_LAYERS):
        kernel = normal((width, channels, 3, 3, 3), "random3d", _VERSION, index)
        # Every other filter sums to zero over time, so it responds to motion and not to static content.
        kernel[::2] -= kernel[::2].mean(dim=2, keepdim=True)
        made.append(kernel / kernel.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1, 1))
        channels = width
    return tuple(made)


class Random3D:
    """The extractor ``random3d``: per layer convolution, normalisation of each channel over the clip, GELU.

    The features of each layer and channel are the logarithm of the response's standard deviation over the clip, and the
    mean of the activation. (Unnormalised activations would depend mainly on the picture's contrast.)
    """

    name = "random3d"
    scaling: Scaling = "features"

    def __init__(self) -> None:
        self.weights = _kernels()

    def features(self, videos: Tensor) -> Tensor:
        """Return float64 [n, 272] for uint8 ``videos`` [n, F, H, W, C], C in (1, 3), of any size.

        Always computed in float32, whatever the settings of the process.
        """
        with reference_arithmetic(videos.device):
            return self._features(videos)

    def _features(self, videos: Tensor) -> Tensor:
        hidden = rearrange(colour(videos), "n f h w c -> n c f h w").float() / 127.5 - 1.0
        columns = []
        for weight, (_, stride) in zip(self.weights, _LAYERS, strict=True):
            # Replicate the border: padding with grey would look like an edge in the picture.
            padded = functional.pad(hidden, (1, 1, 1, 1, 1, 1), mode="replicate")
            response = functional.conv3d(padded, weight.to(hidden.device), stride=stride)
            spread, centre = torch.std_mean(response, dim=(2, 3, 4), keepdim=True, correction=0)
            spread = spread + _QUIET
            hidden = functional.gelu((response - centre) / spread)
            columns += [spread.log().flatten(1), hidden.mean(dim=(2, 3, 4))]
        return torch.cat(columns, dim=1).double().cpu()

    def describe(self) -> dict[str, Any]:
        """Return name, version, dimension, layers, and the SHA-256 of the weights' float32 bytes."""
        digest = hashlib.sha256()
        for weight in self.weights:
            digest.update(weight.contiguous().numpy().tobytes())
        return {
            "extractor": self.name,
            "version": _VERSION,
            "dimension": sum(2 * width for width, _ in _LAYERS),
            "layers": [[width, list(stride)] for width, stride in _LAYERS],
            "weights": digest.hexdigest(),
        }
