"""Training batches, drawn from keyed streams: video i of step s is the same in every process and attempt.

Every random number depends on (seed, stream, step, index of the video in the global batch) and, for noise, on the
slot's stream; see `hpdm_core.base.randomness`. So batches can be prepared in a thread, and a resumed run needs no
saved random state.
"""

from __future__ import annotations

import contextlib
import functools
import math
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from hpdm_core.assembly.runtime import pinned
from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import generator, normal
from hpdm_core.config.schema import CellConfig
from hpdm_core.data.loader import in_processes
from hpdm_core.pyramid import level_patch, level_patches, unit_range

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly

__all__ = ["Batch", "TrainingBatches", "in_thread", "loaded"]

Item = TypeVar("Item")

SMALL_CLIP = 2**18
"""Clips of at most this many values are kept whole until the batch is complete, and then downsampled together, because
for small clips the overhead of a call dominates. A larger clip is cut into patches at once and freed.
"""
WORKER_AHEAD = 2
"""Batches that a worker process prepares in advance if ``runtime.prefetch`` is 0."""


@dataclass(frozen=True)
class Batch:
    """The videos of one training step, cut into the patches of S slots. The lists have one entry per slot."""

    step: int
    clean: list[Tensor]  # [B, C, f, h, w] in [-1, 1]
    noise: list[Tensor]  # [B, C, f, h, w] unit Gaussian
    sigma: list[Tensor]  # [B]
    in_loss: list[Tensor]  # [B] bool
    offsets: list[Tensor]  # [B, 3] int64, in the own pixels of the slot's level; always on the CPU
    label: Tensor  # [B] int64, -1 where there is none or it was dropped
    conditioned: Tensor  # [K] int64, on the CPU: rows that take latents from a first pass

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        """Return this batch on ``device``, with floating-point tensors as ``dtype``."""

        def moved(tensors: list[Tensor]) -> list[Tensor]:
            return [
                tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
                for tensor in tensors
            ]

        return Batch(
            step=self.step,
            clean=moved(self.clean),
            noise=moved(self.noise),
            sigma=moved(self.sigma),
            in_loss=moved(self.in_loss),
            offsets=self.offsets,
            label=self.label.to(device, non_blocking=True),
            conditioned=self.conditioned,  # stays on the CPU: `split` reads it, which would synchronise a GPU
        )

    def pinned(self) -> Batch:
        """Return this batch in pinned memory, if the system has enough, except for tensors that stay on the CPU."""

        def kept(tensors: list[Tensor]) -> list[Tensor]:
            return [pinned(tensor) for tensor in tensors]

        return replace(
            self,
            clean=kept(self.clean),
            noise=kept(self.noise),
            sigma=kept(self.sigma),
            in_loss=kept(self.in_loss),
            label=pinned(self.label),
        )

    def split(self, rows: int | None) -> list[Batch]:
        """Return this batch in parts of at most ``rows`` videos, in order; None: in one part."""
        videos = len(self.label)
        if rows is None or rows >= videos:
            return [self]
        return [self._part(start, min(start + rows, videos)) for start in range(0, videos, rows)]

    def _part(self, start: int, stop: int) -> Batch:
        def cut(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor[start:stop] for tensor in tensors]

        here = (self.conditioned >= start) & (self.conditioned < stop)
        return Batch(
            step=self.step,
            clean=cut(self.clean),
            noise=cut(self.noise),
            sigma=cut(self.sigma),
            in_loss=cut(self.in_loss),
            offsets=cut(self.offsets),
            label=self.label[start:stop],
            conditioned=self.conditioned[here] - start,
        )


class TrainingBatches:
    """Makes the batch of any step of the cell ``assembly``.

    ``rows``: indices in the global batch of the videos to make, such as the share of one process; None for all.
    """

    def __init__(self, assembly: Assembly, rows: Sequence[int] | None = None) -> None:
        self.config = assembly.config
        self.rows = range(self.config.training.batch) if rows is None else rows
        self.pyramid = assembly.pyramid
        self.dataset = assembly.dataset
        self.coordinate_sampler = assembly.coordinate_sampler
        self.noise_sampler = assembly.noise_sampler
        self.small = math.prod((assembly.config.model.channels, *self.pyramid.video)) <= SMALL_CLIP

    def __call__(self, step: int) -> Batch:
        """Return the batch of ``step`` (from 1), on the CPU."""
        videos = [self._video(step, index) for index in self.rows]
        slots = range(len(self.noise_sampler.slots))
        patches = [self._patches(videos, level) for level in range(self.pyramid.levels)]
        return Batch(
            step=step,
            clean=[patches[slot.level] for slot in self.noise_sampler.slots],
            noise=[torch.stack([video.noise[slot] for video in videos]) for slot in slots],
            sigma=[torch.stack([video.sigma[slot] for video in videos]) for slot in slots],
            in_loss=[torch.stack([video.in_loss[slot] for video in videos]) for slot in slots],
            offsets=[
                torch.stack([video.offsets[slot.level] for video in videos])
                for slot in self.noise_sampler.slots
            ],
            label=torch.tensor([video.label for video in videos]),
            conditioned=torch.tensor(
                [index for index, video in enumerate(videos) if video.conditioned], dtype=torch.long
            ),
        )

    def _patches(self, videos: Sequence[_Video], level: int) -> Tensor:
        """Return [B, C, f, h, w]."""
        if not self.small:
            return torch.stack([video.pixels[level] for video in videos])
        offsets = [video.offsets[level].tolist() for video in videos]
        whole = [video.pixels[0] for video in videos]
        return level_patches(whole, self.pyramid, level, offsets, self.config.data.downsampling)

    def _video(self, step: int, index: int) -> _Video:
        seed = self.config.seed
        clip = self.dataset.draw("train", generator(seed, "clip", step, index))
        offsets = self.coordinate_sampler.sample(generator(seed, "offsets", step, index))  # [L, 3]
        sigma, in_loss = self.noise_sampler.draw(generator(seed, "sigma", step, index))  # [S], [S]
        training = self.config.training
        shape = (self.config.model.channels, *self.pyramid.patch)
        dropped = _chance(training.label_dropout, seed, "label", step, index)
        return _Video(
            pixels=[unit_range(clip.pixels)] if self.small else self._cut(clip.pixels, offsets),
            noise=[
                normal(shape, seed, "noise", step, index, *(slot.stream or (number,)))
                for number, slot in enumerate(self.noise_sampler.slots)
            ],
            sigma=sigma,
            in_loss=in_loss,
            offsets=offsets,
            label=-1 if dropped else self._label(clip.label),
            conditioned=_chance(training.self_conditioning, seed, "self_conditioning", step, index),
        )

    def _cut(self, pixels: Tensor, offsets: Tensor) -> list[Tensor]:
        mode = self.config.data.downsampling
        return [
            level_patch(pixels, self.pyramid, level, tuple(at), mode)
            for level, at in enumerate(offsets.tolist())
        ]

    def _label(self, label: int) -> int:
        classes = self.config.model.classes
        if classes and not -1 <= label < classes:
            raise InputError(
                f"model.classes: the dataset '{self.config.data.dataset.use}' gives label {label}; allowed "
                f"by model.classes={classes} are 0 to {classes - 1}"
            )
        return label if classes else -1


@dataclass(frozen=True)
class _Video:
    pixels: list[Tensor]
    """For a small clip, the whole clip [C, F, H, W]; for a large one, its patches [C, f, h, w], one per level."""
    noise: list[Tensor]
    sigma: Tensor
    in_loss: Tensor
    offsets: Tensor
    label: int
    conditioned: bool


def _chance(probability: float, *key: int | str) -> bool:
    return float(torch.rand((), generator=generator(*key))) < probability


def loaded(assembly: Assembly, steps: range, *, rows: Sequence[int] | None = None) -> Iterator[Batch]:
    """Yield the batches of ``steps`` in order, made as ``runtime`` says: in worker processes, in a thread, or here.

    The batches are the same in each case. For CUDA, a thread copies them to pinned memory, so that copies to the
    device overlap with computation. ``rows``: see `TrainingBatches`.
    """
    runtime = assembly.config.runtime
    device = torch.cuda.current_device() if torch.device(runtime.device).type == "cuda" else None
    made: Iterator[Batch]
    if runtime.workers == 0:
        made, ahead = map(TrainingBatches(assembly, rows), steps), runtime.prefetch
    else:
        spec = assembly.config.model_dump(mode="json")
        build = functools.partial(_rebuilt, spec, tuple(assembly.plugins.names), rows)
        ahead = runtime.prefetch or WORKER_AHEAD
        made, ahead = in_processes(build, steps, workers=runtime.workers, ahead=ahead), 0
    if device is not None:
        made, ahead = _pinned(made), max(ahead, 1)
    yield from in_thread(made, ahead=ahead, device=device)


def _pinned(batches: Iterator[Batch]) -> Iterator[Batch]:
    with _closed(batches):
        yield from map(Batch.pinned, batches)


def _rebuilt(spec: dict[str, Any], plugins: Sequence[str], rows: Sequence[int] | None) -> TrainingBatches:
    """Build the cell in a worker process and return its `TrainingBatches`."""
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.plugins import build_plugins

    return TrainingBatches(Assembly(CellConfig.model_validate(spec), build_plugins(plugins)), rows)


@contextlib.contextmanager
def _closed(items: Iterator[Any]) -> Iterator[None]:
    """Close ``items`` at the end of the block, if they are a generator."""
    try:
        yield
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()


def in_thread(items: Iterator[Item], *, ahead: int, device: int | None = None) -> Iterator[Item]:
    """Yield ``items`` in order; one thread prepares up to ``ahead`` of them in advance (0: no thread).

    An error in the thread is raised here. Closing the iterator ends the thread and closes ``items``.
    ``device``: the CUDA device that is set in the thread, because each thread has its own current device.
    """
    if ahead == 0:
        with _closed(items):
            yield from items
        return
    ready: queue.Queue[Item | BaseException | None] = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def put(item: Item | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        torch.set_flush_denormal(True)  # this setting is per thread
        try:
            if device is not None:
                torch.cuda.set_device(device)
            with _closed(items):
                for item in items:
                    put(item)
                    if stop.is_set():
                        return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="hpdm-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
