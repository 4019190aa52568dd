"""Sampling with HPDM-S on a pretended GPU: what the host waits for does not grow with tiles, nor with steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.sampling.cascade import sample

SETS = (
    "model.levels=2",
    "model.blocks=2",
    "model.patch=[32,128,128]",
    "model.token=[2,8,8]",
    "sampling.solver.order=[1]",
    "sampling.solver.churn=[0.0]",
)
PER_LEVEL = 2
"""Whether a finished level is finite, and its pixels: the host asks for both."""


@pytest.mark.parametrize(
    ("fusion", "cache"),
    [("deep", "contexts"), ("deep", "none"), ("shallow_concat", "contexts")],
)
def test_the_host_waits_once_per_level(
    fusion: str, cache: str, hpdm_s: Callable[..., Assembly], pretend: Any
) -> None:
    found: list[Counter[str]] = []
    model: Any = None
    for steps, tiles in ((1, 8), (2, 3)):
        assembly = hpdm_s(
            *SETS,
            f"model.context_fusion={fusion}",
            f"sampling.solver.steps=[{steps}]",
            f"runtime.cache={cache}",
            f"runtime.tile_batch={tiles}",
        )
        assert len(assembly.pyramid.tiles(1, ())) == 8
        model = model or assembly.build_model(device="cuda").requires_grad_(False).eval()
        pretend.found.clear()
        coarse, fine = sample(assembly, assembly.denoiser(model), [5], [3])
        assert coarse.shape == (1, 3, 32, 128, 128) and fine.shape == (1, 3, 64, 256, 256)
        assert fine.dtype == torch.float32
        found.append(+pretend.found)
    once, often = found
    assert once["item"] + once["to the CPU"] == PER_LEVEL * 2 and not once["nonzero"] and not once["tolist"]
    assert often == once, "nothing per tile or step"
