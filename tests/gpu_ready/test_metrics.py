"""The evaluator's networks and features on a pretended GPU: devices, types, one wait per batch of clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hpdm_core.metrics.distances.statistics import Statistics
from hpdm_core.metrics.networks.c3d import C3D, constant_mean
from hpdm_core.metrics.networks.detectors import C3DDetector, I3DDetector
from hpdm_core.metrics.networks.i3d import I3D
from hpdm_core.metrics.networks.random3d import Random3D
from hpdm_core.metrics.networks.weights import uninitialised

CLIPS, FRAMES = 2, 16


def i3d(put: Callable[[nn.Module], nn.Module]) -> I3DDetector:
    made = I3DDetector()
    made.__dict__["_network"] = (put(uninitialised(I3D)), False)
    return made


def c3d(put: Callable[[nn.Module], nn.Module]) -> C3DDetector:
    made = C3DDetector()
    made.__dict__["_network"] = (put(uninitialised(C3D)), constant_mean())
    return made


EXTRACTORS: dict[str, tuple[Callable[..., Any], int]] = {
    "i3d": (i3d, 400),
    "c3d": (c3d, 101),
    "random3d": (lambda put: Random3D(), 272),
    "statistics": (lambda put: Statistics(), 18),
}


@pytest.mark.parametrize("name", EXTRACTORS)
def test_features_are_made_on_the_gpu_and_read_once(name: str, pretend: Any, put: Any) -> None:
    make, width = EXTRACTORS[name]
    extractor = make(put)
    clips = torch.zeros(CLIPS, FRAMES, 64, 64, 3, dtype=torch.uint8, device="cuda")
    pretend.found.clear()
    features = extractor.features(clips)
    assert features.shape == (CLIPS, width) and features.dtype == torch.float64
    read = pretend.found["item"] + pretend.found["tolist"] + pretend.found["to the CPU"]
    assert read == (features.device.type == "cpu") and not pretend.found["nonzero"], pretend.found
