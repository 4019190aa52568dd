"""I3D: the inflated Inception network whose 400 Kinetics logits FVD is measured on, in plain PyTorch.

Source: Carreira and Zisserman 2017 (1705.07750), computed as in the published TensorFlow graph. Padding follows
TensorFlow's SAME rule and is computed from the shape at run time, so that endpoints agree with the graph's for any
input size. Parameters have the names of the first PyTorch port (``Mixed_3b.b1a.conv3d.weight``).

The graph has no learned scale in its batch normalisation; a network with its weights has ones there. Its ``epsilon`` is
1e-3; several well-known PyTorch copies use 1e-5, which changes every feature slightly.
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpdm_core.base.errors import InputError

__all__ = ["ENDPOINTS", "I3D", "LEAST_FRAMES", "LOGITS", "MIXED", "SIDE"]

SIDE = 224
"""Height and width for which the logits are defined: the last pooling is one window of 7 x 7."""
LEAST_FRAMES = 9
"""Least number of frames: 8 frames leave a single time step for the last pooling, which needs two."""
LOGITS = 400

MIXED: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}
"""Channels of each block: in, b0, b1a, b1b, b2a, b2b, b3b."""

ENDPOINTS = (
    "Conv3d_1a_7x7",
    "MaxPool3d_2a_3x3",
    "Conv3d_2b_1x1",
    "Conv3d_2c_3x3",
    "MaxPool3d_3a_3x3",
    "Mixed_3b",
    "Mixed_3c",
    "MaxPool3d_4a_3x3",
    "Mixed_4b",
    "Mixed_4c",
    "Mixed_4d",
    "Mixed_4e",
    "Mixed_4f",
    "MaxPool3d_5a_2x2",
    "Mixed_5b",
    "Mixed_5c",
)
"""Layers in execution order, up to the pooling before the logits."""

Triple = tuple[int, int, int]


class I3D(nn.Module):
    """The network; it starts in evaluation mode. ``classes``: width of the logits."""

    def __init__(self, *, epsilon: float = 1e-3, classes: int = LOGITS) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.Conv3d_1a_7x7 = _Unit(3, 64, (7, 7, 7), epsilon=epsilon, stride=(2, 2, 2))
        self.MaxPool3d_2a_3x3 = _Pool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = _Unit(64, 64, (1, 1, 1), epsilon=epsilon)
        self.Conv3d_2c_3x3 = _Unit(64, 192, (3, 3, 3), epsilon=epsilon)
        self.MaxPool3d_3a_3x3 = _Pool((1, 3, 3), (1, 2, 2))
        self.MaxPool3d_4a_3x3 = _Pool((3, 3, 3), (2, 2, 2))
        self.MaxPool3d_5a_2x2 = _Pool((2, 2, 2), (2, 2, 2))
        for name, widths in MIXED.items():
            self.add_module(name, _Mixed(widths, epsilon=epsilon))
        self.logits = _Logits(1024, classes)
        self.eval()

    def endpoints(self, videos: Tensor, last: str = "Mixed_5c") -> dict[str, Tensor]:
        """Return every endpoint up to ``last``, name -> [B, C, T', H', W'].

        ``videos`` [B, 3, T, H, W] float32 in [-1, 1], of any size. Raises InputError for a name not in
        `ENDPOINTS`.
        """
        if last not in ENDPOINTS:
            raise InputError(f"I3D: no endpoint '{last}'; there are {', '.join(ENDPOINTS)}")
        found = {}
        hidden = videos
        for name in ENDPOINTS[: ENDPOINTS.index(last) + 1]:
            hidden = self.get_submodule(name)(hidden)
            found[name] = hidden
        return found

    def forward(self, videos: Tensor) -> Tensor:
        """Return the logits [B, classes], averaged over time, of ``videos`` [B, 3, T, 224, 224] in [-1, 1].

        Raises InputError for other heights and widths, and for fewer than 9 frames.
        """
        _check(videos)
        hidden = videos
        for name in ENDPOINTS:  # not by `endpoints`, which keeps the activations of all layers
            hidden = self.get_submodule(name)(hidden)
        pooled = functional.avg_pool3d(hidden, (2, 7, 7), stride=1)  # [B, 1024, T', 1, 1]
        logits: Tensor = self.logits(pooled)
        return logits.mean(dim=(2, 3, 4))


class _Unit(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Triple, *, epsilon: float, stride: Triple = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride=stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=epsilon)
        self.kernel, self.stride = kernel, stride

    def forward(self, hidden: Tensor) -> Tensor:
        padded = _same(hidden, self.kernel, self.stride)
        return functional.relu(self.bn(self.conv3d(padded)), inplace=True)


class _Pool(nn.Module):
    """Maximum over a window. Padding with zeros is exact because the input is not negative.

    Computed axis by axis as maxima of shifted views: the values are those of max_pool3d, which on a CPU takes as long
    as all convolutions together.
    """

    def __init__(self, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = _same(hidden, self.kernel, self.stride)
        for axis, (window, step) in enumerate(zip(self.kernel, self.stride, strict=True), start=2):
            hidden = _maximum(hidden, axis, window, step)
        return hidden


class _Mixed(nn.Module):
    """Four parallel branches: 1x1x1; two of 1x1x1 then 3x3x3; and maximum over 3x3x3 then 1x1x1."""

    def __init__(self, widths: tuple[int, ...], *, epsilon: float) -> None:
        super().__init__()
        inputs, b0, b1a, b1b, b2a, b2b, b3b = widths
        point, cube = (1, 1, 1), (3, 3, 3)
        self.b0 = _Unit(inputs, b0, point, epsilon=epsilon)
        self.b1a = _Unit(inputs, b1a, point, epsilon=epsilon)
        self.b1b = _Unit(b1a, b1b, cube, epsilon=epsilon)
        self.b2a = _Unit(inputs, b2a, point, epsilon=epsilon)
        self.b2b = _Unit(b2a, b2b, cube, epsilon=epsilon)
        self.b3a = _Pool(cube, point)
        self.b3b = _Unit(inputs, b3b, point, epsilon=epsilon)

    def forward(self, hidden: Tensor) -> Tensor:
        branches = (
            self.b0(hidden),
            self.b1b(self.b1a(hidden)),
            self.b2b(self.b2a(hidden)),
            self.b3b(self.b3a(hidden)),
        )
        return torch.cat(branches, dim=1)


class _Logits(nn.Module):
    """A 1x1x1 convolution with bias, without normalisation or activation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        made: Tensor = self.conv3d(hidden)
        return made


def _same(hidden: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Pad [B, C, T, H, W] with zeros so that each axis gives ceil(size / stride); an odd zero goes to the end."""
    pads: list[int] = []
    for size, window, step in zip(hidden.shape[2:], kernel, stride, strict=True):
        total = max(window - (size % step or step), 0)
        pads = [total // 2, total - total // 2, *pads]  # the last axis comes first
    return functional.pad(hidden, pads) if any(pads) else hidden


def _maximum(hidden: Tensor, axis: int, window: int, step: int) -> Tensor:
    """Return the maxima of windows along one axis, with stride ``step``."""
    if window == 1:
        return hidden
    count = (hidden.shape[axis] - window) // step + 1
    every = (slice(None),) * axis
    shifted = [
        hidden.narrow(axis, start, (count - 1) * step + 1)[(*every, slice(None, None, step))]
        for start in range(window)
    ]
    return functools.reduce(torch.maximum, shifted)


def _check(videos: Tensor) -> None:
    if videos.ndim != 5 or videos.shape[1] != 3:
        raise InputError(
            f"I3D: videos of shape {list(videos.shape)}; allowed is [batch, 3, T, {SIDE}, {SIDE}]"
        )
    frames, height, width = videos.shape[2:]
    if (height, width) != (SIDE, SIDE):
        raise InputError(
            f"I3D: frames of {height}x{width} pixels; its logits are defined at {SIDE}x{SIDE}: resize first "
            "(hpdm_core.metrics.networks.preprocessing)"
        )
    if frames < LEAST_FRAMES:
        raise InputError(f"I3D: clips of {frames} frames; it needs at least {LEAST_FRAMES}")
