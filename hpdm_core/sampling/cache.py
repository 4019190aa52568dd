"""What a level's tiles need of their parents, computed once before the first denoising step, and kept.

Beyond the paper not only the parents' features are kept but the contexts made of them, whatever the fusion:
all that is computed at a step is the tiles themselves. Contexts stay on the device up to a budget of memory.
Beyond it they go to host memory on CUDA, pinned as far as the system lets it be, and come back while the tiles
before them are denoised; on the CPU they go to a scratch file that is mapped into memory (in Python's folder
for temporary files: TMPDIR).
Where the disk has no room either, tiles go parent by parent: their parents are run again at each step.
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
"""Share of the free memory that contexts may take where no budget is given."""
PARENTS_SHARE = 0.125
"""Share of the budget that encoded parents may take while contexts are made of them."""


class LevelContexts(Protocol):
    """Where a level's tile batches get their contexts from."""

    def begin(self) -> None:
        """A denoiser pass over all batches begins; they will be asked for in their order."""

    def get(self, index: int) -> Any:
        """Return the contexts of batch number ``index``."""


class NoContexts:
    """For the coarsest level: it has no parents."""

    def begin(self) -> None:
        """Do nothing."""

    def get(self, index: int) -> None:
        """Return None."""


class FreshContexts:
    """No cache: each distinct parent is run, and each tile's contexts are made, anew at each pass."""

    def __init__(self, ancestors: Ancestors, batches: Sequence[TileBatch]) -> None:
        self._ancestors = ancestors
        self._batches = batches

    def begin(self) -> None:
        """Run all parents."""
        self._ancestors.keep([])
        self._ancestors.encode(self._batches)

    def get(self, index: int) -> Any:
        """Make the contexts of a batch."""
        return self._ancestors.contexts(self._batches[index])


class CachedContexts:
    """Contexts made once, parent by parent, and kept where there is room for them.

    ``budget``: bytes of contexts and parents on the device, those of the batch at work aside; None for half
    of what is free there.
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
        self._kept: list[Any] = []  # per batch: contexts on the device or mapped, or None
        self.nbytes = {"device": 0, "host": 0, "file": 0}
        """Bytes of the contexts that are kept, by place."""
        self._make()
        self.recomputed = [index for index, found in enumerate(self._kept) if found is None]
        """Batches whose contexts found no room."""

    def begin(self) -> None:
        """Send for the first contexts."""
        if self._copies is not None:
            self._copies.fetch(self._kept[0])

    def get(self, index: int) -> Any:
        """Return the contexts of a batch, and send for the next ones."""
        found = self._kept[index]
        if found is None:
            batch = self._batches[index]
            self._ancestors.keep([batch])  # those that it shares with the last one
            self._ancestors.encode([batch])
            return self._ancestors.contexts(batch)
        if self._copies is None:
            return found
        found = self._copies.arrived(found)
        if index + 1 < len(self._kept):
            self._copies.fetch(self._kept[index + 1])
        return found

    def _make(self) -> None:
        group = 1  # batches whose parents are encoded together; the first tells what they take
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
            with contextlib.suppress(OSError):  # no room on the disk, or no file may be written
                mapped = contexts.map(_mapped)
                self.nbytes["file"] += size
                return mapped
        return None


class _HostCopies:
    """Brings contexts in pinned host memory to a CUDA device on a stream of its own, one batch ahead."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._coming: tuple[Any, Any] | None = None  # as kept, and on its way

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
    """Return a copy of a CPU tensor in a file that has no name any more: its memory is the file's pages.

    Raises OSError when the disk has no room, before anything is written: a mapped page could not say so.
    """
    if tensor.numel() == 0:
        return tensor
    with tempfile.NamedTemporaryFile(prefix="hpdm-contexts-") as file:
        os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        made = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return made.view(tensor.shape).copy_(tensor)
