"""Statistics that accumulate during training: mean losses and peak memory."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["MemoryMeter", "RunningMean"]


class RunningMean:
    """An exponentially decaying mean of the losses per level, with a half-life in steps.

    A level without a row in the loss is skipped at that step.
    """

    def __init__(self, levels: int, *, halflife: float) -> None:
        self.decay = 0.5 ** (1 / halflife)
        self.sums, self.weights = [0.0] * levels, [0.0] * levels

    def add(self, values: Sequence[float]) -> None:
        """Add the losses of one step; NaN for a level without a loss."""
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
        """Return the state that `load` restores."""
        return {"sums": self.sums, "weights": self.weights}

    def load(self, state: dict[str, list[float]]) -> None:
        """Restore ``state``."""
        self.sums, self.weights = list(state["sums"]), list(state["weights"])


class MemoryMeter:
    """Measures peak memory since its construction: of PyTorch's CUDA allocator, or of the whole process in RAM.

    On the CPU this needs Linux, where the kernel's high-water mark can be reset. On other systems the mark covers
    the process's whole life, so it would be wrong for the second cell of a process.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        if self.cuda is not None:
            # For a device with an index, the call below does not initialise CUDA, and would fail without it.
            torch.cuda.init()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            torch.cuda.reset_peak_memory_stats(self.cuda)
        self.resettable = self.cuda is None and _reset_high_water()

    def peak(self) -> int | None:
        """Return the peak in bytes, or None if it cannot be measured."""
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
