"""C3D fine-tuned on UCF-101: the classifier behind the Inception Score of videos, in plain PyTorch.

Source: Tran et al. 2015 (1412.0767); the variant and its preprocessing are those of TGAN and TGAN2 (Saito et
al. 2017, 2020). Eight 3x3x3 convolutions; the last pooling counts windows that reach over the edge (7 -> 4),
as Caffe and Chainer do: the common PyTorch port pads that pooling instead and gives other values.

Its input is exactly 16 frames of 112 x 112 pixels, BGR, in 0..255, minus the mean clip of the training data.
`load_mean` reads that mean; `MeanCrop` names the part of it that is subtracted.
"""

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpdm_core.base.errors import InputError

__all__ = [
    "C3D",
    "CLASSES",
    "FRAMES",
    "MEAN_BGR",
    "SIDE",
    "MeanCrop",
    "constant_mean",
    "crop_mean",
    "load_mean",
]

CLASSES = 101
FRAMES = 16
SIDE = 112
MEAN_BGR = (90.25164795, 97.65701294, 101.4083252)
"""Mean blue, green and red of the training data, 0..255, from a comment in TGAN2's code, for use without the mean file.
"""

_CONVOLUTIONS = {
    "conv1a": (3, 64),
    "conv2a": (64, 128),
    "conv3a": (128, 256),
    "conv3b": (256, 256),
    "conv4a": (256, 512),
    "conv4b": (512, 512),
    "conv5a": (512, 512),
    "conv5b": (512, 512),
}
_POOLED_AFTER = ("conv1a", "conv2a", "conv3b", "conv4b", "conv5b")

MeanCrop = Literal["tgan", "tgan2", "constant"]
"""Which 112 x 112 pixels of the mean clip are subtracted: the middle (rows 8:120, columns 29:141, as TGAN), the
left part (rows and columns 8:120, as TGAN2, 21 pixels off the middle), or one constant per colour.
"""


class C3D(nn.Module):
    """The network; it starts in evaluation mode."""

    def __init__(self, *, classes: int = CLASSES) -> None:
        super().__init__()
        for name, (inputs, outputs) in _CONVOLUTIONS.items():
            self.add_module(name, nn.Conv3d(inputs, outputs, 3, padding=1))
        self.fc6 = nn.Linear(8192, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, classes)
        self.eval()

    def layers(self, videos: Tensor) -> dict[str, Tensor]:
        """Return every layer by name: ``conv1a``, ``pool1`` ... ``pool5`` [B, C, T, H, W], ``fc6``, ``fc7``
        [B, 4096] after ReLU, and ``fc8``, the logits [B, classes].

        ``videos`` [B, 3, 16, 112, 112] float32, BGR, 0..255 minus the mean. Raises InputError for other shapes.
        """
        if videos.ndim != 5 or tuple(videos.shape[1:]) != (3, FRAMES, SIDE, SIDE):
            raise InputError(
                f"C3D: videos of shape {list(videos.shape)}; allowed is [batch, 3, {FRAMES}, {SIDE}, {SIDE}]: "
                f"it takes exactly {FRAMES} frames"
            )
        found = {}
        hidden = videos
        for name in _CONVOLUTIONS:
            hidden = functional.relu(self.get_submodule(name)(hidden))
            found[name] = hidden
            if name in _POOLED_AFTER:
                level = _POOLED_AFTER.index(name) + 1
                window = (1, 2, 2) if level == 1 else (2, 2, 2)
                hidden = functional.max_pool3d(hidden, window, window, ceil_mode=True)
                found[f"pool{level}"] = hidden
        hidden = hidden.flatten(1)  # C, T, H, W
        found["fc6"] = functional.relu(self.fc6(hidden))
        found["fc7"] = functional.relu(self.fc7(found["fc6"]))
        found["fc8"] = self.fc8(found["fc7"])
        return found

    def forward(self, videos: Tensor) -> Tensor:
        """Return the logits [B, classes]; see `layers`. Probabilities are their softmax."""
        return self.layers(videos)["fc8"]


def constant_mean() -> Tensor:
    """Return `MEAN_BGR` as a mean clip [3, 1, 1, 1] that broadcasts."""
    return torch.tensor(MEAN_BGR, dtype=torch.float32).reshape(3, 1, 1, 1)


def crop_mean(mean: object, crop: MeanCrop) -> Tensor:
    """Return the part of a mean clip that is subtracted: float32 [3, 16, 112, 112], BGR, 0..255.

    ``mean``: an array of 3 x 16 x 128 x 171 values in any shape (the file's own layout, with or without axes
    of length 1, or flat), 3 x 16 x 128 x 128 (columns 21:149 already cut out: both crops take the middle of these) or
    3 x 16 x 112 x 112 (already cropped; used unchanged). Raises InputError for another number of values, and for values
    that are not finite.
    """
    if crop not in get_args(MeanCrop):
        raise InputError(f"mean clip: no crop '{crop}'; allowed are {', '.join(get_args(MeanCrop))}")
    if crop == "constant":
        return constant_mean()
    values = np.asarray(mean, dtype=np.float32)
    shapes = [(3, FRAMES, 128, 171), (3, FRAMES, 128, 128), (3, FRAMES, SIDE, SIDE)]
    fitting = [shape for shape in shapes if values.size == np.prod(shape)]
    if not fitting:
        raise InputError(
            f"mean clip: an array of shape {list(values.shape)}; allowed are "
            f"{', '.join('x'.join(map(str, shape)) for shape in shapes)} values"
        )
    if not np.isfinite(values).all():
        raise InputError("mean clip: it holds values that are not finite")
    clip = torch.from_numpy(values.reshape(fitting[0]).copy())
    width = clip.shape[-1]
    if width == SIDE:
        return clip
    left = {("tgan", 171): 29, ("tgan", 128): 8, ("tgan2", 171): 8, ("tgan2", 128): 8}[crop, width]
    return clip[:, :, 8 : 8 + SIDE, left : left + SIDE].contiguous()


def load_mean(file: Path, crop: MeanCrop) -> Tensor:
    """Read the mean clip from ``file`` (npz with the key ``mean``, or npy) and crop it as `crop_mean`.

    Raises InputError for a file that is missing, damaged, pickled or has other content.
    """
    from hpdm_core.metrics.networks.state_dicts import read_arrays

    arrays = read_arrays(file)
    if "mean" not in arrays:
        raise InputError(f"{file}: no array 'mean' in it; it holds {', '.join(sorted(arrays)[:5])}")
    return crop_mean(arrays["mean"], crop)
