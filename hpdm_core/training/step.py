"""One joint training pass: patches of all slots, self-conditioning, and the loss (paper, Eq. 4).

Functions of a batch and a model; they do not update weights. `hpdm_core.training.cost` counts the operations of these
same functions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from einops import reduce
from torch import Tensor, nn

from hpdm_core.diffusion import network_input, noise_clean
from hpdm_core.model.hpdm import Patches

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.training.batches import Batch

__all__ = ["JointLoss", "joint_loss", "make_entries", "rows_in_loss", "self_conditioning_latents"]


@dataclass(frozen=True)
class JointLoss:
    """``total``: scalar with gradient; ``levels`` [L]: detached, NaN for a level without a row in the loss.

    If ``counts`` of the whole global batch were given, the values of its parts sum to those of the whole.
    """

    total: Tensor
    levels: Tensor


def make_entries(assembly: Assembly, batch: Batch) -> list[Patches]:
    """Return one entry per slot: c_in * z with z = clean / sigma_in + sigma * noise, without latents."""
    entries = []
    for index, slot in enumerate(assembly.noise_sampler.slots):
        sigma, sigma_in = batch.sigma[index], assembly.sigma_in[slot.level]
        noisy = noise_clean(batch.clean[index], batch.noise[index], sigma, sigma_in)
        entries.append(
            Patches(
                level=slot.level,
                noisy=network_input(noisy, sigma, sigma_in),
                sigma=sigma,
                coords=assembly.pyramid.coords(
                    slot.level, batch.offsets[index], downsampling=assembly.config.data.downsampling
                ).to(noisy.device),
                label=batch.label if assembly.config.model.classes else None,
                sources=slot.sources,
                context_only=slot.context_only,
            )
        )
    return entries


@torch.no_grad()
def self_conditioning_latents(
    model: nn.Module, entries: list[Patches], rows: Tensor, *, always: bool = False
) -> list[Tensor | None]:
    """Return, per entry, the latents [B, M, E] of a first pass, computed for ``rows`` and zero in all other rows.

    The whole hierarchy runs once from zero latents, without gradient. If ``rows`` [K] is empty, no pass is run and
    the result is None per entry; it is also None for a backbone without state. With ``always``, empty ``rows`` run
    a dummy pass on the first row and return zeros, so that all FSDP ranks execute the same collectives.
    """
    if len(rows) == 0:
        if not always:
            return [None] * len(entries)
        unused = self_conditioning_latents(model, entries, rows.new_zeros(1))
        # Zeros, not None, so that every process has gradients of the same parameters, for any backbone.
        return [None if made is None else torch.zeros_like(made) for made in unused]
    rows = rows.to(entries[0].noisy.device, non_blocking=True)
    chosen = [
        replace(
            entry,
            noisy=entry.noisy[rows],
            sigma=entry.sigma[rows],
            coords=entry.coords.take(rows),
            label=None if entry.label is None else entry.label[rows],
            context_only=False,  # the latents of these entries are needed too
        )
        for entry in entries
    ]
    kept: list[Tensor | None] = []
    for entry, (_, latents) in zip(entries, model(chosen), strict=True):
        if latents is None:
            kept.append(None)
            continue
        whole = latents.new_zeros(len(entry.sigma), *latents.shape[1:])
        kept.append(whole.index_copy(0, rows, latents))
    return kept


def rows_in_loss(batch: Batch) -> Tensor:
    """Return how many rows of each slot are in the loss, int64 [S]."""
    return torch.stack([rows.sum() for rows in batch.in_loss])


def joint_loss(
    assembly: Assembly,
    model: nn.Module,
    batch: Batch,
    counts: Tensor | None = None,
    *,
    always: bool = False,
) -> JointLoss:
    """Return the loss of ``model`` on ``batch`` (on the model's device).

    The loss of a slot is the mean, over its rows in the loss, of w(sigma) * mean over the patch of (F - v)^2, with
    F the prediction and v the target. The total is the mean over the slots that have such rows; a slot that only
    serves as context has no loss.

    ``counts`` [S]: `rows_in_loss` of the whole global batch, if ``batch`` is a part of it; the losses of the
    parts then sum to the loss of the whole. ``always``: see `self_conditioning_latents`.
    """
    if counts is None:
        counts = rows_in_loss(batch)
    entries = make_entries(assembly, batch)
    latents = self_conditioning_latents(model, entries, batch.conditioned, always=always)
    predictions = model([replace(entry, latents=kept) for entry, kept in zip(entries, latents, strict=True)])

    objective, levels = assembly.objective, assembly.pyramid.levels
    losses = []
    for index, (entry, (prediction, _)) in enumerate(zip(entries, predictions, strict=True)):
        if prediction is None:
            losses.append(batch.sigma[index].new_zeros(()))
            continue
        sigma_in = assembly.sigma_in[entry.level]
        target = objective.target(batch.clean[index], batch.noise[index], entry.sigma, sigma_in)
        error = reduce((prediction - target).square(), "b c f h w -> b", "mean")
        rows = torch.where(batch.in_loss[index], objective.weight(entry.sigma, sigma_in) * error, 0.0)
        losses.append(rows.sum() / counts[index].clamp(min=1))
    loss, used = torch.stack(losses), counts > 0  # [S], [S]
    total = loss.sum() / used.sum().clamp(min=1)

    level = torch.tensor([entry.level for entry in entries]).to(loss.device, non_blocking=True)
    nothing = loss.new_zeros(levels)
    sums = nothing.index_add(0, level, loss.detach())
    slots = nothing.index_add(0, level, used.to(loss.dtype))
    return JointLoss(total=total, levels=sums / slots)  # 0 / 0 is NaN: no row
