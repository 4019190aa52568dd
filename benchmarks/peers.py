"""How fast is our RIN block, compared with the block of rin-pytorch (lucidrains), the best-known other implementation?

    pip install --no-deps rin-pytorch==0.8.0
    python benchmarks/peers.py [--rounds 10] [--device cuda] [--json]

Without rin-pytorch (the peer), it prints how to install it and exits with code 2. --no-deps: its blocks need no
further packages; those of its trainer (torchvision, accelerate and others) are replaced by empty modules.

Times the forward and backward pass of one block of each, with the same widths, latents, heads, MLP ratios and number of
latent layers; both use PyTorch's fused attention; the peer's self-attention of tokens is off. `bare`: one read, the
latent layers, one write. `conditioned`: each also with its own conditioning: ours reads two condition tokens; the
peer's, its default, applies scale and shift before each attention and its token MLP. Two parts that only the peer has
are left in: a depthwise convolution of the tokens, and a norm of the latents at the end.

The two take turns, one step each. On the CPU, times are CPU time of --threads threads. Times are medians; `ratio`, the
peer's time over ours, is the median over the turns. FLOPs are counted on the meta device, those of attention for all
pairs of tokens. `ratio per FLOP` is the ratio scaled to equal FLOPs. `ceiling`: the ratio for a block that executes
only the peer's matrix products and fused attention, at the peer's speed: one over their share of its time
(torch.profiler, median of three steps).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock

import torch
from machine import facts
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from hpdm_core.model.rin import RINBlock

MISSING = "rin-pytorch is not installed; this benchmark needs it: pip install --no-deps rin-pytorch==0.8.0"
UNUSED = ("accelerate", "beartype", "ema_pytorch", "torchvision")
"""Modules that the peer's trainer imports and its blocks do not use."""
MLP_RATIO = 4  # the peer's ratio, for latents and tokens
CONDITION_TOKENS = 2  # as in HPDM: one for noise level and place, one for the class

Step = Callable[[nn.Module, Sequence[Tensor]], tuple[Tensor, Tensor]]


@contextmanager
def stand_ins() -> Iterator[None]:
    """Within the block, importing the peer's unused modules gives empty ones."""
    absent = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update((name, MagicMock()) for name in absent)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def peer_block() -> Any:
    """Return the peer's block class. Raises `ImportError` when the peer is not installed."""
    with stand_ins():
        from rin_pytorch.rin_pytorch import RINBlock as Peer
    return Peer


def bare(block: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Run our block without its read of the condition."""
    tokens, latents, _ = inputs
    latents = block.patch_read(latents, tokens)
    for layer in block.process:
        latents = layer(latents)
    return block.patch_write(tokens, latents), latents


def both_ways(block: nn.Module, step: Step, inputs: Sequence[Tensor]) -> None:
    """Run forward and backward, with gradients of the parameters and the inputs."""
    tokens, latents = step(block, inputs)
    torch.autograd.backward((tokens.sum(), latents.sum()))


def flops(block: nn.Module, step: Step, inputs: Sequence[Tensor]) -> int:
    """Count the floating-point operations of `both_ways`."""
    on_meta = [each.detach().to("meta").requires_grad_() for each in inputs]
    counter = FlopCounterMode(
        display=False,
        # PyTorch counts the backward pass of a depthwise convolution as that of a full one.
        custom_mapping={torch.ops.aten.convolution_backward: depthwise_backward},
    )
    with counter:
        both_ways(copy.deepcopy(block).to("meta"), step, on_meta)
    return counter.get_total_flops()


def depthwise_backward(
    gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any
) -> int:
    """Return the operations of a convolution's two gradients, given shapes: twice those of its forward pass."""
    return 2 * 2 * torch.Size(gradient).numel() * torch.Size(weight[1:]).numel()


def seconds(block: nn.Module, step: Step, inputs: Sequence[Tensor]) -> float:
    """Time `both_ways` on new inputs."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    device = leaves[0].device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    block.zero_grad()
    wait(device)
    begun = clock()
    both_ways(block, step, leaves)
    wait(device)
    return clock() - begun


KERNELS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product",
    "aten::_efficient",
)
"""Prefixes of the names of matrix products and of fused attention, forward and backward."""


def kernel_share(block: nn.Module, step: Step, inputs: Sequence[Tensor]) -> float:
    """Return the share of a step's time that is spent in `KERNELS`."""
    spent = "self_device_time_total" if inputs[0].is_cuda else "self_cpu_time_total"
    with profile() as seen:
        seconds(block, step, inputs)
    times = [(each.key, getattr(each, spent)) for each in seen.key_averages()]
    kernels = sum(time for name, time in times if name.startswith(KERNELS))
    return kernels / sum(time for _, time in times)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    ours: tuple[nn.Module, Step, Sequence[Tensor]],
    peer: tuple[nn.Module, Step, Sequence[Tensor]],
    rounds: int,
) -> dict[str, float]:
    """Time both in turns, after one warm-up turn."""
    seconds(*ours)
    seconds(*peer)
    turns = [(seconds(*ours), seconds(*peer)) for _ in range(rounds)]
    counted = flops(*ours), flops(*peer)
    ratio = statistics.median(theirs / mine for mine, theirs in turns)
    return {
        "ours_ms": 1e3 * statistics.median(mine for mine, _ in turns),
        "peer_ms": 1e3 * statistics.median(theirs for _, theirs in turns),
        "ratio": ratio,
        "ours_flops": counted[0],
        "peer_flops": counted[1],
        "ratio_per_flop": ratio * counted[0] / counted[1],
        "ceiling": 1 / statistics.median(kernel_share(*peer) for _ in range(3)),
    }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Compare bare and conditioned blocks. Raises `ImportError` without the peer."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # the peer's way of asking for fused attention
    peer = peer_block()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    width, narrow, heads = given.width, given.latent_width, given.heads
    own = RINBlock(
        width,
        narrow,
        heads=heads,
        latent_layers=given.layers,
        latent_heads=heads,
        latent_head_dim=width // heads,
        latent_mlp_ratio=MLP_RATIO,
        token_mlp_ratio=MLP_RATIO,
    ).to(given.device)
    options = {
        "dim_latent": narrow,
        "latent_self_attn_depth": given.layers,
        "patches_self_attn": False,
        "heads": heads,
        "dim_head": width // heads,
        "flash": True,
    }
    time_width = 4 * width  # as the peer's network makes it
    tokens, latents, condition, noise_level = (
        torch.randn(shape, device=given.device)
        for shape in (
            (given.batch, given.tokens, width),
            (given.batch, given.latents, narrow),
            (given.batch, CONDITION_TOKENS, width),
            (given.batch, time_width),
        )
    )
    ours, theirs = (tokens, latents, condition), (tokens, latents, noise_level)
    plain = peer(width, **options).to(given.device)
    modulated = peer(width, **options, time_cond_dim=time_width).to(given.device)
    return {
        "benchmark": "peers",
        "rounds": given.rounds,
        "rows": {
            "bare": compare(
                (own, bare, ours), (plain, lambda block, x: block(x[0], x[1], None), theirs), given.rounds
            ),
            "conditioned": compare(
                (own, lambda block, x: block(*x), ours),
                (modulated, lambda block, x: block(*x), theirs),
                given.rounds,
            ),
        },
        **facts(given.device),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; return 2 without the peer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096, help="a square, for the peer's convolution")
    parser.add_argument("--width", type=int, default=512, help="width of the tokens and of all attention")
    parser.add_argument("--latents", type=int, default=256)
    parser.add_argument("--latent-width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4, help="self-attention layers of the latents")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    given = parser.parse_args(arguments)
    try:
        result = measure(given)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("rin_pytorch"):
            raise
        print(MISSING, file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(result))
        return 0
    print(f"{result['device']}, {result['threads']} threads, PyTorch {result['torch']}")
    heads = ("ours ms", "peer ms", "ratio", "ours GFLOP", "peer GFLOP", "per FLOP", "ceiling")
    print(" " * 12 + "".join(f"{head:>12}" for head in heads))
    for name, row in result["rows"].items():
        print(
            f"{name:12}{row['ours_ms']:12.1f}{row['peer_ms']:12.1f}{row['ratio']:12.3f}"
            f"{row['ours_flops'] / 1e9:12.2f}{row['peer_flops'] / 1e9:12.2f}"
            f"{row['ratio_per_flop']:12.3f}{row['ceiling']:12.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
