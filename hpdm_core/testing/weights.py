"""Random weights for detectors, to test code without the published files: keyed and well scaled.

Metric values computed with them are meaningless, but shapes, files, names, memory and speed are the real ones.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpdm_core.base.randomness import generator
from hpdm_core.metrics.networks.state_dicts import Naming

__all__ = ["export", "randomise", "write_state_dict", "write_torchscript"]


def randomise(network: nn.Module, *, seed: int = 0) -> None:
    """Fill the detector ``network`` with keyed random weights that preserve the scale of activations.

    The running statistics of batch normalisation are random too; its learned scale is 1, as in the published graph.
    """
    for name, value in network.state_dict().items():
        stream = generator(seed, "random weights", name)
        if value.ndim > 1:  # He initialisation, for ReLU
            value.copy_(torch.randn(value.shape, generator=stream) * (2 / value[0].numel()) ** 0.5)
        elif name.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=stream))
        elif name.endswith(("bias", "running_mean")):
            value.copy_(0.1 * torch.randn(value.shape, generator=stream))
        elif name.endswith("weight"):
            value.fill_(1.0)


def export(network: nn.Module, naming: Naming) -> dict[str, Tensor]:
    """Return the weights of ``network`` with the names and the layout of files of ``naming``."""
    made = {}
    for own, value in network.state_dict().items():
        theirs = None if own.endswith("num_batches_tracked") else naming.name(own)
        if theirs is None:
            continue
        axes = naming.axes.get(value.ndim)
        made[theirs] = value if axes is None else value.permute(*np.argsort(axes).tolist()).contiguous()
    return made


def write_state_dict(state: Mapping[str, Tensor], file: Path) -> Path:
    """Write ``state`` to ``file``: numpy's form for ``.npz``, else torch's; return ``file``."""
    if file.suffix == ".npz":
        arrays: dict[str, Any] = {name: value.numpy() for name, value in state.items()}
        np.savez(file, **arrays)
    else:
        torch.save(dict(state), file)
    return file


class _Scripted(nn.Module):
    """The call signature of the published TorchScript I3D: uint8 videos, with preprocessing chosen by flags."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        x = x.float()
        if resize:
            x = functional.interpolate(x, size=[x.shape[2], 224, 224], mode="trilinear", align_corners=False)
        if rescale:
            x = 2 * (x / 255) - 1
        logits: Tensor = self.network(x)
        return logits if return_features else torch.softmax(logits, dim=1)


def write_torchscript(network: nn.Module, file: Path, *, frames: int) -> Path:
    """Write the I3D ``network`` as a TorchScript file with the published file's call signature; return ``file``.

    It accepts only clips of ``frames`` frames, because tracing fixes the padding.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but the published files use it
        with torch.no_grad():
            traced = torch.jit.trace(network, torch.zeros(1, 3, frames, 224, 224))  # type: ignore[no-untyped-call]
        torch.jit.script(_Scripted(traced)).save(str(file))  # type: ignore[no-untyped-call]
    return file
