"""Figures that accumulate while training: mean losses, and how much memory was in use at most."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["MemoryMeter", "RunningMean"]


class RunningMean:
    """A mean of the losses per level that forgets with a half-life in steps; a level without a row is left
    out."""

    def __init__(self, levels: int, *, halflife: float) -> None:
        self.decay = 0.5 ** (1 / halflife)
        self.sums, self.weights = [0.0] * levels, [0.0] * levels

    def add(self, values: Sequence[float]) -> None:
        """Take the losses of one step; NaN for a level without one."""
        for level, value in enumerate(values):
            if not math.isnan(value):
                self.sums[level] = self.decay * self.sums[level] + (1 - self.decay) * value
                self.weights[level] = self.decay * self.weights[level] + (1 - self.decay)

    def values(self) -> list[float | None]:
        """Return the mean per level, None where nothing was added."""
        return [
            total / weight if weight else None for total, weight in zip(self.sums, self.weights, strict=True)
        ]

    def state(self) -> dict[str, list[float]]:
        """Return what `load` takes."""
        return {"sums": self.sums, "weights": self.weights}

    def load(self, state: dict[str, list[float]]) -> None:
        """Go on from ``state``."""
        self.sums, self.weights = list(state["sums"]), list(state["weights"])


class MemoryMeter:
    """Peak memory since it was made: what CUDA's allocator held, or what the whole process had in RAM.

    On the CPU that takes Linux, where the kernel's high-water mark can be set back: the mark that every system
    has is of the process's whole life, and says nothing of the second cell in it.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        if self.cuda is not None:
            # A device with a number is not looked up, and the allocator knows none before this.
            torch.cuda.init()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            torch.cuda.reset_peak_memory_stats(self.cuda)
        self.resettable = self.cuda is None and _reset_high_water()

    def peak(self) -> int | None:
        """Return bytes, or None where they cannot be told."""
        if self.cuda is not None:
            return int(torch.cuda.max_memory_allocated(self.cuda))
        return _high_water_bytes() if self.resettable else None


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water_bytes() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
