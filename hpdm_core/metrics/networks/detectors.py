"""The detectors I3D and C3D as feature extractors: weight files, preprocessing and network.

A detector always computes in float32 and in evaluation mode: TF32, autocast and cuDNN benchmarking are off while it
runs, whatever the settings of the process. It identifies itself by the hash of its weights, not by their path, and
reads them at the first clip. It runs on the device of the videos.
"""

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpdm_core.base.errors import InputError
from hpdm_core.metrics.interface import Scaling, colour
from hpdm_core.metrics.networks import c3d, i3d
from hpdm_core.metrics.networks.preprocessing import RESIZE_RULES, ResizeRule, check_uint8, pixels
from hpdm_core.metrics.networks.weights import (
    WeightIdentity,
    identify,
    load_into,
    load_torchscript,
    locate,
    uninitialised,
)

__all__ = ["C3DDetector", "I3DDetector", "InputRange", "reference_arithmetic"]

InputRange = Literal["-1..1", "-0.5..0.5"]
"""The range to which 0..255 is scaled for I3D: [-1, 1], as in the network's training, or [-0.5, 0.5], as in one commit
of VideoGPT's code (3eee7ec)."""


@contextlib.contextmanager
def reference_arithmetic(device: torch.device) -> Iterator[None]:
    """Within the block: no gradients, no autocast, full float32 precision (no TF32), deterministic algorithms."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class I3DDetector:
    """The extractor ``i3d``: 400 Kinetics logits, averaged over time.

    ``weights``: the name of a file in the folder ``HPDM_WEIGHTS``, or its path; a state dict in any known naming, or a
    TorchScript file with the interface of StyleGAN-V's, which resizes by itself and has its own ``epsilon``.
    ``trust_weights``: run a TorchScript file of unknown hash. ``resize``: how frames are resized to 224 x 224.
    ``epsilon``: that of the batch normalisation, 1e-3 in the reference graph, 1e-5 in several copies.
    """

    name = "i3d"
    scaling: Scaling = "none"
    least_frames = i3d.LEAST_FRAMES
    places = ("weights", "trust_weights")
    """Options that hold paths: they enter no key; `describe` returns the hash of the files instead."""

    def __init__(
        self,
        *,
        weights: str = "i3d_torchscript.pt",
        trust_weights: bool = False,
        resize: ResizeRule = "squash",
        epsilon: float = 1e-3,
        input_range: InputRange = "-1..1",
    ) -> None:
        self.weights, self.trust_weights = weights, trust_weights
        self.resize, self.epsilon, self.input_range = resize, epsilon, input_range

    @property
    def identity(self) -> WeightIdentity:
        """What the weights are. Raises MissingWeights when they are not there."""
        return identify(locate(self.weights, of=self.name))

    def features(self, videos: Tensor) -> Tensor:
        """Return float64 [n, 400] of uint8 ``videos`` [n, F, H, W, C], C in (1, 3), F at least 9."""
        if videos.shape[1] < i3d.LEAST_FRAMES:
            raise InputError(f"i3d: clips of {videos.shape[1]} frames; it needs at least {i3d.LEAST_FRAMES}")
        check_uint8(videos)
        network, scripted = self._network
        network.to(videos.device)
        with reference_arithmetic(videos.device):
            rows = [self._one(network, clip[None], scripted=scripted) for clip in colour(videos)]
        return torch.cat(rows).double().cpu()

    def _one(self, network: nn.Module, clip: Tensor, *, scripted: bool) -> Tensor:
        """Compute the logits of one clip: without a batch, its bits depend on no other clip, at no loss of speed."""
        if scripted and self.resize == "squash" and self.input_range == "-1..1":
            whole = clip.permute(0, 4, 1, 2, 3).contiguous()
            return _logits(network(whole, rescale=True, resize=True, return_features=True))
        shrink = 127.5 if self.input_range == "-1..1" else 255.0
        offset = 1.0 if self.input_range == "-1..1" else 0.5
        frames = RESIZE_RULES[self.resize](pixels(clip), i3d.SIDE) / shrink - offset
        if scripted:
            return _logits(network(frames, rescale=False, resize=False, return_features=True))
        return _logits(network(frames))

    @cached_property
    def _network(self) -> tuple[nn.Module, bool]:
        file = locate(self.weights, of=self.name)
        if identify(file).format == "torchscript":
            return load_torchscript(file, trust=self.trust_weights)[0], True
        network = uninitialised(lambda: i3d.I3D(epsilon=self.epsilon))
        load_into(network, file, kind="i3d")
        return network.requires_grad_(False), False

    def describe(self) -> dict[str, Any]:
        """Return name, dimension, layer, preprocessing and the weights' hashes. Raises MissingWeights."""
        scripted = self.identity.format == "torchscript"
        return {
            "extractor": self.name,
            "dimension": i3d.LOGITS,
            "layer": "logits before softmax, averaged over time",
            "weights": self.identity.key(),
            "path": "torchscript" if scripted else "eager",
            "resize": f"{self.resize} to {i3d.SIDE}x{i3d.SIDE}",
            "input_range": self.input_range,
            "batch_norm_epsilon": "in the file" if scripted else self.epsilon,
        }


class C3DDetector:
    """The extractor ``c3d``: the logits of 101 classes of UCF-101 (for the Inception Score), or ``fc7``.

    ``weights``: as for I3D; a TorchScript file with the interface of StyleGAN-V's takes uint8 and returns
    probabilities. Its features are their logarithms (a probability of 0 is replaced by the smallest positive float32),
    and the file's own resizing, mean and scale apply. ``mean``: the file of the mean clip, by name or path;
    ``mean_crop``: `hpdm_core.metrics.networks.c3d.MeanCrop`. ``scale``: the value to which 255 is scaled: 255, or 256
    as in TGAN.
    """

    name = "c3d"
    scaling: Scaling = "none"
    least_frames = c3d.FRAMES
    places = ("weights", "trust_weights", "mean")

    def __init__(
        self,
        *,
        weights: str = "conv3d_deepnetA_ucf.npz",
        trust_weights: bool = False,
        mean: str = "mean2.npz",
        mean_crop: c3d.MeanCrop = "tgan2",
        resize: ResizeRule = "aligned_corners",
        scale: Literal[255, 256] = 256,
        layer: Literal["logits", "fc7"] = "logits",
    ) -> None:
        self.weights, self.trust_weights = weights, trust_weights
        self.mean, self.mean_crop = mean, mean_crop
        self.resize, self.scale, self.layer = resize, scale, layer

    @property
    def identity(self) -> WeightIdentity:
        """What the weights are. Raises MissingWeights when they are not there."""
        return identify(locate(self.weights, of=self.name))

    def features(self, videos: Tensor) -> Tensor:
        """Return float64 [n, 101] (logits) or [n, 4096] (fc7) of uint8 ``videos`` [n, 16, H, W, C]."""
        if videos.shape[1] != c3d.FRAMES:
            raise InputError(f"c3d: clips of {videos.shape[1]} frames; it takes exactly {c3d.FRAMES}")
        check_uint8(videos)
        network, mean = self._network
        network.to(videos.device)
        with reference_arithmetic(videos.device):
            rows = [self._one(network, mean, clip[None]) for clip in colour(videos)]
        return torch.cat(rows).double().cpu()

    def _one(self, network: nn.Module, mean: Tensor | None, clip: Tensor) -> Tensor:
        if mean is None:
            probabilities: Tensor = network(clip.permute(0, 4, 1, 2, 3).contiguous())
            _check_probabilities(probabilities)
            return probabilities.double().clamp_min(_LEAST_FLOAT32).log()
        frames = RESIZE_RULES[self.resize](pixels(clip), c3d.SIDE) * (self.scale / 255)
        layers = network.layers(frames.flip(1) - mean.to(frames))  # type: ignore[operator]
        made: Tensor = layers["fc8" if self.layer == "logits" else "fc7"]
        return made

    @cached_property
    def _network(self) -> tuple[nn.Module, Tensor | None]:
        file = locate(self.weights, of=self.name)
        if identify(file).format == "torchscript":
            if self.layer != "logits":
                raise InputError(
                    f"c3d: '{file}' is TorchScript and returns probabilities only, no {self.layer}"
                )
            return load_torchscript(file, trust=self.trust_weights)[0], None
        network = uninitialised(c3d.C3D)
        load_into(network, file, kind="c3d")
        if self.mean_crop == "constant":
            return network.requires_grad_(False), c3d.constant_mean()
        mean = c3d.load_mean(locate(self.mean, of=f"{self.name}, its mean clip"), self.mean_crop)
        return network.requires_grad_(False), mean

    def describe(self) -> dict[str, Any]:
        """Return name, dimension, layer, preprocessing and the hashes of both files. Raises MissingWeights."""
        scripted = self.identity.format == "torchscript"
        made: dict[str, Any] = {
            "extractor": self.name,
            "dimension": 4096 if self.layer == "fc7" else c3d.CLASSES,
            "layer": self.layer,
            "weights": self.identity.key(),
            "path": "torchscript" if scripted else "eager",
        }
        if scripted:
            return {**made, "layer": "logarithms of the probabilities"}
        mean = None
        if self.mean_crop != "constant":
            mean = identify(locate(self.mean, of=f"{self.name}, its mean clip")).key()
        return {
            **made,
            "mean": mean,
            "mean_crop": self.mean_crop,
            "resize": f"{self.resize} to {c3d.SIDE}x{c3d.SIDE}",
            "scale": f"0..{self.scale}, BGR",
        }


_LEAST_FLOAT32 = 2.0**-149


def _check_probabilities(output: Any) -> None:
    """Raise InputError unless ``output`` are probabilities [1, 101], for example if the file returns logits."""
    shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if shape != [1, c3d.CLASSES]:
        raise InputError(f"c3d: the weights file returned {shape}; wanted is [1, {c3d.CLASSES}]")
    if not (bool((output >= 0).all()) and abs(float(output.double().sum()) - 1) < 1e-3):
        raise InputError("c3d: the weights file returned values that are not probabilities")


def _logits(output: Any) -> Tensor:
    """Return the logits of one clip [1, 400] in float32, checked."""
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] != i3d.LOGITS:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"i3d: the weights file returned {shape}; wanted is [1, {i3d.LOGITS}]")
    return output
