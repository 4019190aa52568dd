"""What a cell costs before it is run: parameters, floating-point operations of a training step, disk.

Operations are counted by running the real training step (`hpdm_core.training.step`) on the meta device, where
tensors have shapes and no contents: nothing is computed and no memory is used. Times are not estimated here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hpdm_core.training.batches import Batch
from hpdm_core.training.step import joint_loss, make_entries, self_conditioning_latents

if TYPE_CHECKING:
    from hpdm_core.assembly import Assembly

__all__ = ["count_parameters", "disk_bytes", "training_flops"]

BYTES = 4
"""Bytes of a float32."""
TENSORS_PER_CHECKPOINT = 4
"""Weights, their average, and the two moments of Adam or LAMB."""
CHECKPOINTS = 3
"""The two newest, and the one being written."""


def count_parameters(assembly: Assembly) -> int:
    """Return the number of trainable weights."""
    model = assembly.build_model(device="meta")
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def training_flops(assembly: Assembly) -> int:
    """Return the floating-point operations of one training step (a multiply and an add are two).

    Matrix products and convolutions of the forward and backward pass over the whole batch, and of the first
    pass on the expected share of videos that self-conditioning keeps. Element-wise work and the optimizer are
    not counted.
    """
    share = assembly.config.training.self_conditioning
    model = assembly.build_model(device="meta")
    batch = _meta_batch(assembly)
    if share == 0:
        batch = replace(batch, conditioned=batch.conditioned[:0])
    # The math form of attention is made of matrix products, which the counter sees on every device.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as both:
            joint_loss(assembly, model, batch).total.backward()  # type: ignore[no-untyped-call]
        with FlopCounterMode(display=False) as first:
            self_conditioning_latents(model, make_entries(assembly, batch), batch.conditioned)
    return int(both.get_total_flops()) - round((1 - share) * int(first.get_total_flops()))


def disk_bytes(assembly: Assembly) -> int:
    """Return the most disk space in bytes that the cell's weights and samples take (metrics and logs aside).

    Checkpoints count with two moments per weight, samples as unsigned bytes on every level, uncompressed.
    """
    weights = BYTES * count_parameters(assembly)
    config = assembly.config
    kept = CHECKPOINTS + len(config.training.keep)
    pixels = 0
    for level in range(assembly.pyramid.levels):
        frames, height, width = assembly.pyramid.size(level)
        pixels += frames * height * width * config.model.channels
    return kept * TENSORS_PER_CHECKPOINT * weights + weights + config.evaluation.samples * pixels


def _meta_batch(assembly: Assembly) -> Batch:
    """Return a batch of shapes."""
    videos, slots = assembly.config.training.batch, assembly.noise_sampler.slots

    def patches() -> list[Tensor]:
        shape = (videos, assembly.config.model.channels, *assembly.config.model.patch)
        return [torch.empty(shape, device="meta") for _ in slots]

    return Batch(
        step=1,
        clean=patches(),
        noise=patches(),
        sigma=[torch.empty(videos, device="meta") for _ in slots],
        in_loss=[torch.empty(videos, dtype=torch.bool, device="meta") for _ in slots],
        offsets=[torch.zeros(videos, 3, dtype=torch.long) for _ in slots],
        label=torch.empty(videos, dtype=torch.long, device="meta"),
        conditioned=torch.empty(videos, dtype=torch.long, device="meta"),
    )
