"""The loop from clips to features: streamed, in the order of the clips, in float64.

At any time one batch of clips is held, and the features of all (10,000 x 400 are 32 MB). The order of rows is
that of the clips, so nothing that is computed from features can depend on the size of a batch or on which
process did what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hpdm_core.errors import InputError

if TYPE_CHECKING:
    from hpdm_core.metrics.frechet import Features
    from hpdm_core.metrics.protocol import FeatureExtractor

__all__ = ["extract"]

LEAST_ROWS = 1024


def extract(
    clips: Iterable[Any],
    extractor: FeatureExtractor,
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Return the features [N, d] of ``clips``, each uint8 [F, H, W, C], tensor or array.

    Clips are taken from the iterable one batch ahead of their use at most. A batch holds clips of one shape:
    where it changes, a new batch begins. ``progress`` is told the number of clips done after each. Raises
    InputError for no clips, and for a clip that is no uint8 [F, H, W, C].
    """
    if batch_size < 1:
        raise InputError(f"batch size: {batch_size} was given; allowed is 1 or more")
    found: Features = np.empty((0, 0))
    done = 0
    for batch in _batches(clips, batch_size):
        made = extractor.features(batch.to(device)).double().cpu().numpy()
        if done + len(made) > len(found):
            # Few large pieces: many small ones, kept between the large tensors of the batches, would hold the
            # heap open, and memory would grow with the number of clips.
            larger = np.empty((max(2 * len(found), LEAST_ROWS, done + len(made)), made.shape[1]))
            if done:
                larger[:done] = found[:done]
            found = larger
        found[done : done + len(made)] = made
        done += len(made)
        if progress is not None:
            progress(done)
    if not done:
        raise InputError("features: no clips were given")
    return found[:done].copy()


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
