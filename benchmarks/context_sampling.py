"""How fast is the separable context sampling, compared with grid_sample on a permuted view of the same tokens?

    python benchmarks/context_sampling.py [--threads 2] [--repeats 10] [--json]

Times the forward and backward pass for channels-last tokens [2, 16^3, 1024], with a child of half the parent's extent
and one of a quarter (the two sources of level 2 in the paper's setup). The two implementations take turns, so that
other work on the machine slows both. Prints a table, or one JSON line with machine and versions. Outputs are compared
first; a difference above 1e-5 (values) or 1e-4 (gradients) is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hpdm_core.model.interpolation import sample_tokens

BATCH, SIDE, WIDTH = 2, 16, 1024

Sampling = Callable[[Tensor, Sequence[Tensor]], Tensor]


def by_grid_sample(tokens: Tensor, positions: Sequence[Tensor]) -> Tensor:
    """Use PyTorch's grid_sample: a full sampling grid in (w, h, f) order, on channels permuted to the front."""
    f, h, w = positions
    shape = (tokens.shape[0], f.shape[1], h.shape[1], w.shape[1])
    grid = torch.stack(
        [
            w[:, None, None, :].expand(shape),
            h[:, None, :, None].expand(shape),
            f[:, :, None, None].expand(shape),
        ],
        dim=-1,
    )
    volume = rearrange(tokens, "b (f h w) d -> b d f h w", f=SIDE, h=SIDE, w=SIDE)
    sampled = F.grid_sample(volume, 2 * grid - 1, align_corners=False, padding_mode="border")
    return rearrange(sampled, "b d f h w -> b (f h w) d")


def separable(tokens: Tensor, positions: Sequence[Tensor]) -> Tensor:
    """Use HPDM's separable sampling."""
    return sample_tokens(tokens, (SIDE, SIDE, SIDE), positions)


@dataclass
class Run:
    """One forward and backward pass: seconds of the forward pass and of both, the output and the gradient."""

    forward: float
    both: float
    value: Tensor
    gradient: Tensor


def run(sample: Sampling, tokens: Tensor, positions: Sequence[Tensor], upstream: Tensor) -> Run:
    """Time one pass."""
    leaf = tokens.clone().requires_grad_()
    begun = time.perf_counter()
    value = sample(leaf, positions)
    forward = time.perf_counter() - begun
    (gradient,) = torch.autograd.grad(value, leaf, upstream)
    return Run(forward=forward, both=time.perf_counter() - begun, value=value.detach(), gradient=gradient)


def compare(extent: float, repeats: int) -> dict[str, float]:
    """Time both implementations for a child of ``extent`` times the parent; return median milliseconds and speed-up."""
    start = torch.Generator().manual_seed(0)
    tokens = torch.randn(BATCH, SIDE**3, WIDTH, generator=start)
    upstream = torch.randn(BATCH, SIDE**3, WIDTH, generator=start)
    steps = extent * (torch.arange(SIDE) + 0.5) / SIDE
    corners = torch.rand(BATCH, 3, generator=start) * (1 - extent)
    positions = [corners[:, axis, None] + steps for axis in range(3)]
    ours, theirs = [], []
    for turn in range(repeats + 1):
        mine = run(separable, tokens, positions, upstream)
        other = run(by_grid_sample, tokens, positions, upstream)
        if turn == 0:  # warm-up, and the check
            torch.testing.assert_close(mine.value, other.value, atol=1e-5, rtol=0)
            torch.testing.assert_close(mine.gradient, other.gradient, atol=1e-4, rtol=0)
            continue
        ours.append((mine.forward, mine.both))
        theirs.append((other.forward, other.both))
    return {
        "extent": extent,
        "separable_forward_ms": 1e3 * statistics.median(forward for forward, _ in ours),
        "grid_sample_forward_ms": 1e3 * statistics.median(forward for forward, _ in theirs),
        "separable_ms": 1e3 * statistics.median(both for _, both in ours),
        "grid_sample_ms": 1e3 * statistics.median(both for _, both in theirs),
        "speedup": statistics.median(b / a for (_, a), (_, b) in zip(ours, theirs, strict=True)),
    }


def measure(threads: int, repeats: int) -> dict[str, Any]:
    """Compare at both extents."""
    torch.set_num_threads(threads)
    return {
        "benchmark": "context_sampling",
        "tokens": [BATCH, SIDE**3, WIDTH],
        "threads": threads,
        "repeats": repeats,
        "rows": [compare(extent, repeats) for extent in (0.5, 0.25)],
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def processor() -> str:
    """Return the processor's name, if the system provides it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 - a device file
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    given = parser.parse_args(arguments)
    result = measure(given.threads, given.repeats)
    if given.json:
        print(json.dumps(result))
        return 0
    print(f"tokens {result['tokens']}, {given.threads} threads, median of {given.repeats}")
    print(f"{result['machine']}  {result['versions']}")
    print(f"{'extent':>8}{'separable ms':>16}{'grid_sample ms':>16}{'speed-up':>10}   forward + backward")
    for row in result["rows"]:
        print(
            f"{row['extent']:>8}{row['separable_ms']:>16.1f}{row['grid_sample_ms']:>16.1f}{row['speedup']:>10.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
