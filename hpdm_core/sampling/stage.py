"""The sample stage: samples the missing videos of a cell, batch by batch, distributed over processes.

The batches are the same for any number of processes, and every random number is keyed by its video, so neither the
number of processes nor an interruption changes a video.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpdm_core.base import distributed
from hpdm_core.base.files import clear_temporaries
from hpdm_core.sampling import files
from hpdm_core.sampling.cascade import Observe, label_of, sample

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.sampling.parents import CascadeDenoiser

__all__ = ["sample_missing"]


def sample_missing(
    assembly: Assembly,
    folder: Path,
    denoiser: Callable[[], CascadeDenoiser],
    *,
    observe: Observe,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Store the samples 0 .. evaluation.samples - 1 in ``folder``, without changing those that exist.

    ``denoiser`` is called once, and only if a sample is missing. Each process stores its own samples and calls
    ``observe`` for them. ``report`` gets the progress, which assumes that all processes are equally fast.
    """
    count, classes = assembly.config.evaluation.samples, assembly.config.model.classes

    def look() -> list[int]:
        clear_temporaries(folder)
        return files.missing_samples(folder, count)

    missing = set(distributed.on_main(look))
    made = 0
    loaded = cache(denoiser)

    def sampled(numbers: Mapping[str, Any]) -> None:
        done = count - len(missing) + distributed.size() * made
        report({**numbers, "step": min(done, count), "steps": count})

    def work(batch: list[int]) -> None:
        nonlocal made
        labels = [label_of(index, classes) for index in batch]
        sampled({})
        levels = sample(assembly, loaded(), batch, labels, observe=observe, progress=sampled)
        for row, (index, label) in enumerate(zip(batch, labels, strict=True)):
            if index in missing:
                files.write_sample(folder, index, [level[row] for level in levels], label=label)
                made += 1

    distributed.spread(files.batches_to_sample(missing, count, assembly.config.runtime.sample_batch), work)
