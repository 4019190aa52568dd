"""Measure the time of the parts of a network, forward and backward. Imported by the other benchmarks.

Time is assigned to the part that was entered last. In the forward pass, a part is entered by its call and left when it
returns. In the backward pass, which runs in reverse order, a part is entered when the gradient of its result arrives,
and left when that of an earlier part's result does. On CUDA every change of part waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hpdm_core.model.hpdm import HPDM
from hpdm_core.model.rin import RINBlock

__all__ = ["SECTIONS", "Laps", "watched"]

SECTIONS = ("tokenize", "read", "latent", "write", "fusion", "output")
REST = "noise, embeddings, loss"


class Laps:
    """Accumulates seconds by part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Set all times to zero."""
        self.seconds = dict.fromkeys((*SECTIONS, REST, "optimizer"), 0.0)
        self._name = REST
        self._since = time.perf_counter()

    def enter(self, name: str) -> None:
        """Assign the time from now on to the part ``name``."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self._name] += now - self._since
        self._name, self._since = name, now

    def watch(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``function`` so that its time, and that of its backward pass, is assigned to ``name``."""

        def timed(*arguments: Any, **options: Any) -> Any:
            before = self._name
            self.enter(name)
            made = function(*arguments, **options)
            if isinstance(made, Tensor) and made.requires_grad and torch.is_grad_enabled():
                made = _Mark.apply(made, lambda: self.enter(name))
            self.enter(before)
            return made

        return timed


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, note: Callable[[], None]) -> Tensor:
        ctx.note = note
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.note()
        return gradients[0], None


@contextmanager
def watched(model: HPDM, laps: Laps) -> Iterator[None]:
    """Within the block, ``laps`` measures the parts of ``model``, whose backbone's blocks are RIN's."""
    places: list[tuple[Any, str, str]] = [
        (model, "_tokenize", "tokenize"),
        (model, "_detokenize", "output"),
        *((model.fusion, method, "fusion") for method in ("pixel_context", "token_context", "fuse")),
    ]
    for block in model.modules():
        if isinstance(block, RINBlock):
            places += [(block.condition_read, "forward", "read"), (block.patch_read, "forward", "read")]
            places += [(layer, "forward", "latent") for layer in block.process]
            places += [(block.patch_write, "forward", "write")]
    for owner, method, name in places:
        setattr(owner, method, laps.watch(name, getattr(owner, method)))
    try:
        yield
    finally:
        for owner, method, _ in places:
            delattr(owner, method)
