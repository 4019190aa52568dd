"""The contexts of a level's tiles, computed from their parents once before the first denoising step, and cached.

The paper caches the parents' features; here the contexts computed from them are cached as well, for any fusion,
so that a denoising step runs only the tiles themselves. Contexts stay on the device up to a memory budget. On
CUDA, those beyond the budget are kept in host memory (pinned, if the system allows) and copied back while the
tiles before them are denoised. On the CPU, they are kept in a memory-mapped scratch file in Python's folder for
temporary files (TMPDIR). If the disk is full too, the parents are run again at each step, for one batch of
tiles at a time.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hpdm_core.assembly.runtime import free_memory, pinned
from hpdm_core.sampling.parents import Ancestors
from hpdm_core.sampling.tiles import TileBatch

__all__ = ["CachedContexts", "FreshContexts", "LevelContexts", "NoContexts"]

GIB = 2**30
FREE_SHARE = 0.5
"""Share of the free memory that contexts may take if no budget is given."""
PARENTS_SHARE = 0.125
"""Share of the budget that encoded parents may take while contexts are computed from them."""


class LevelContexts(Protocol):
    """Provides the contexts of a level's tile batches."""

    def begin(self) -> None:
        """Start a denoiser pass over all batches. The contexts are then asked for in the order of the batches."""

    def get(self, index: int) -> Any:
        """Return the contexts of batch number ``index``."""


class NoContexts:
    """For the coarsest level, which has no parents."""

    def begin(self) -> None:
        """Do nothing."""

    def get(self, index: int) -> None:
        """Return None."""


class FreshContexts:
    """No cache: at each pass, each distinct parent is run and each tile's contexts are computed again."""

    def __init__(self, ancestors: Ancestors, batches: Sequence[TileBatch]) -> None:
        self._ancestors = ancestors
        self._batches = batches

    def begin(self) -> None:
        """Run all parents."""
        self._ancestors.keep([])
        self._ancestors.encode(self._batches)

    def get(self, index: int) -> Any:
        """Compute and return the contexts of a batch."""
        return self._ancestors.contexts(self._batches[index])


class CachedContexts:
    """Contexts that are computed once, parent by parent, and kept on the device, in host memory or in a file.

    ``budget``: bytes of contexts and parents on the device, without those of the current batch; None for half
    of its free memory.
    """

    def __init__(
        self,
        ancestors: Ancestors,
        batches: Sequence[TileBatch],
        *,
        device: torch.device,
        budget: int | None,
    ) -> None:
        self._ancestors = ancestors
        self._batches = batches
        self._copies = _HostCopies(device) if device.type == "cuda" else None
        self._may_map = device.type == "cpu" and hasattr(os, "posix_fallocate")
        self._budget = int(FREE_SHARE * free_memory(device)) if budget is None else budget
        self._kept: list[Any] = []  # per batch: its contexts, or None if there was no room
        self.nbytes = {"device": 0, "host": 0, "file": 0}
        """Bytes of the cached contexts, by place."""
        self._make()
        self.recomputed = [index for index, found in enumerate(self._kept) if found is None]
        """Batches whose contexts are not cached, for lack of room."""

    def begin(self) -> None:
        """Start to copy the first contexts to the device."""
        if self._copies is not None:
            self._copies.fetch(self._kept[0])

    def get(self, index: int) -> Any:
        """Return the contexts of a batch, and start to copy those of the next batch."""
        found = self._kept[index]
        if found is None:
            batch = self._batches[index]
            self._ancestors.keep([batch])  # keep the parents that it shares with the batch before
            self._ancestors.encode([batch])
            return self._ancestors.contexts(batch)
        if self._copies is None:
            return found
        found = self._copies.arrived(found)
        if index + 1 < len(self._kept):
            self._copies.fetch(self._kept[index + 1])
        return found

    def _make(self) -> None:
        group = 1  # batches whose parents are encoded together; adapted to their memory below
        start = 0
        while start < len(self._batches):
            batches = self._batches[start : start + group]
            self._ancestors.encode(batches)
            parents = self._ancestors.nbytes
            for batch in batches:
                self._kept.append(self._place(self._ancestors.contexts(batch), parents))
            start += len(batches)
            group = max(1, int(group * PARENTS_SHARE * self._budget / max(parents, 1)))
            self._ancestors.keep(self._batches[start : start + group])
        self._ancestors.keep([])

    def _place(self, contexts: Any, parents: int) -> Any:
        size = getattr(contexts, "nbytes", 0)
        if self.nbytes["device"] + parents + size <= self._budget or not size:
            self.nbytes["device"] += size
            return contexts
        if self._copies is not None:
            self.nbytes["host"] += size
            return contexts.map(lambda tensor: pinned(tensor.to("cpu")))
        if self._may_map:
            with contextlib.suppress(OSError):  # the disk is full or not writable
                mapped = contexts.map(_mapped)
                self.nbytes["file"] += size
                return mapped
        return None


class _HostCopies:
    """Copies contexts from pinned host memory to a CUDA device, on a separate stream, one batch in advance."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._coming: tuple[Any, Any] | None = None  # the cached contexts and their copy on the device

    def fetch(self, contexts: Any) -> None:
        if contexts is None:
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            moved = contexts.map(lambda tensor: tensor.to(self._device, non_blocking=True))
        self._coming = (contexts, moved)

    def arrived(self, contexts: Any) -> Any:
        if self._coming is None or self._coming[0] is not contexts:
            self.fetch(contexts)
        assert self._coming is not None, "fetched"
        moved = self._coming[1]
        self._coming = None
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)

        def used(tensor: Tensor) -> Tensor:
            tensor.record_stream(current)
            return tensor

        return moved.map(used)


def _mapped(tensor: Tensor) -> Tensor:
    """Return a copy of a CPU tensor whose memory is a memory-mapped, already deleted file.

    Raises OSError when the disk is full, before anything is written: a write to a mapped page cannot report it.
    """
    if tensor.numel() == 0:
        return tensor
    with tempfile.NamedTemporaryFile(prefix="hpdm-contexts-") as file:
        os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        made = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return made.view(tensor.shape).copy_(tensor)
