"""Extract features from a stream of clips, in the order of the clips, in float64.

At any time one batch of clips is in memory, and the features of all clips (10,000 x 400 are 32 MB). Rows are in the
order of the clips, so results do not depend on how clips are distributed over batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hpdm_core.base.errors import InputError

if TYPE_CHECKING:
    from hpdm_core.metrics.interface import FeatureExtractor, Features

__all__ = ["FeatureBuffer", "extract"]

SLAB = 2**19  # numbers, 4 MiB


def extract(
    clips: Iterable[Any],
    extractor: FeatureExtractor,
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Return the features [N, d] of ``clips``, each uint8 [F, H, W, C], tensor or array.

    At most one batch of clips is taken from the iterable in advance. A batch holds clips of one shape: where the shape
    changes, a new batch begins. ``progress`` is called with the number of finished clips after each batch. Raises
    InputError for no clips, and for a clip that is not uint8 [F, H, W, C].
    """
    if batch_size < 1:
        raise InputError(f"batch size: {batch_size} was given; allowed is 1 or more")
    held = FeatureBuffer()
    found: list[Features] = []
    done = 0
    for batch in _batches(clips, batch_size):
        found.append(held.keep(extractor.features(batch.to(device))))
        done += len(batch)
        if progress is not None:
            progress(done)
    if not found:
        raise InputError("features: no clips were given")
    return np.concatenate(found)


class FeatureBuffer:
    """Copies small arrays into a few large blocks of memory, against fragmentation of the heap.

    Small arrays between the large temporary tensors of two batches would keep the freed memory from being reused, so
    memory would grow with every clip by a good part of the clip's temporary memory.
    """

    def __init__(self) -> None:
        self._slab: Features = np.empty(0)
        self._used = 0

    def keep(self, values: Tensor) -> Features:
        """Return a float64 copy of ``values``, of the same shape."""
        given = values.double().cpu().numpy()
        if self._used + given.size > self._slab.size:
            self._slab, self._used = np.empty(max(SLAB, given.size)), 0
        kept = self._slab[self._used : self._used + given.size].reshape(given.shape)
        self._used += given.size
        kept[...] = given
        return kept


def _batches(clips: Iterable[Any], size: int) -> Iterator[Tensor]:
    held: list[Tensor] = []
    for number, given in enumerate(clips):
        clip = torch.as_tensor(given)
        if clip.ndim != 4 or clip.dtype != torch.uint8:
            raise InputError(
                f"features: clip {number} is {clip.dtype} of shape {list(clip.shape)}; allowed is uint8 "
                "[frames, height, width, channels]"
            )
        if held and held[0].shape != clip.shape:
            yield torch.stack(held)
            held = []
        held.append(clip)
        if len(held) == size:
            yield torch.stack(held)
            held = []
    if held:
        yield torch.stack(held)
