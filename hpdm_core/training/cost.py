"""Predicts the cost of a cell before it is run: parameters, floating-point operations, memory, time, disk space.

Operations are counted by running the real training step (`hpdm_core.training.step`) and the sampler's network
calls on the meta device, where tensors have shapes but no values: nothing is computed and no memory is used.
Memory is what this training step would keep for its backward pass. Times are operations divided by a given rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hpdm_core.assembly.denoiser import Denoiser
from hpdm_core.model.counted_calls import Calls, CountedExecution, CountedFusion, KnownCalls
from hpdm_core.model.counting import Counter
from hpdm_core.model.fusion import ContextFusion
from hpdm_core.model.hpdm import HPDM, Encoded
from hpdm_core.training.batches import Batch
from hpdm_core.training.step import joint_loss

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.plugins import Plugins

__all__ = [
    "count_parameters",
    "disk_bytes",
    "flops_per_second",
    "predicted_sampling",
    "predicted_training",
    "sampling_flops",
    "training_flops",
    "training_memory",
]

Made = TypeVar("Made")

BYTES = 4
"""Bytes per float32 value."""
DURING_TRAINING = 5
"""Tensors per weight during training: the weight, its gradient, the two moments of Adam or LAMB, the average."""
TENSORS_PER_CHECKPOINT = 4
"""The weight, its average, and the two moments of Adam or LAMB."""
CHECKPOINTS = 3
"""The two newest checkpoints, and the one being written."""


def count_parameters(assembly: Assembly) -> int:
    """Return the number of trainable weights."""
    network, _ = _built(assembly)
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def training_flops(assembly: Assembly) -> int:
    """Return the floating-point operations of one training step (a multiply and an add are two).

    Counted are matrix products and convolutions: of the forward and backward pass over the whole batch, and of
    the first pass over the expected share of videos with self-conditioning. Element-wise operations and the
    optimizer are not counted.
    """
    share = assembly.config.training.self_conditioning
    batch = _meta_batch(assembly)
    if share == 0:
        batch = replace(batch, conditioned=batch.conditioned[:0])

    counts: list[int] = []  # operations up to the end of each forward pass

    def both_passes(model: HPDM, counter: Counter) -> None:
        with model.register_forward_hook(lambda *_: counts.append(counter.flops)):
            loss = joint_loss(assembly, model, batch).total
        loss.backward()  # type: ignore[no-untyped-call]

    _, both = _counted(assembly, both_passes)
    first = counts[0] if len(counts) > 1 else 0
    return both - round((1 - share) * first)


def training_memory(assembly: Assembly) -> int:
    """Return the bytes that training takes on one device.

    These are five tensors per weight (`DURING_TRAINING`), and the activations that a step keeps for its backward
    pass. The activations are counted on the meta device in float32 (bf16 takes less), with the given
    ``runtime.micro_batch`` and ``runtime.activation_checkpointing``. Temporary memory of kernels is not
    included. Sharing of the batch or the weights among several processes is not considered.
    """
    runtime, counter = assembly.config.runtime, Counter()
    model = _network(assembly, counter, "fused attention", checkpointing=runtime.activation_checkpointing)
    part = _meta_batch(assembly, runtime.micro_batch)
    with _FusedAttention(), counter, saved_tensors_hooks(counter.keep, lambda tensor: tensor):
        joint_loss(assembly, model, part)
    return DURING_TRAINING * BYTES * count_parameters(assembly) + counter.kept_bytes(
        besides=model.parameters()
    )


class _FusedAttention(TorchFunctionMode):
    """Within the block, attention keeps what its fused kernels keep; the default on the meta device would keep the
    whole attention matrix."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, True)[0]
        return func(*args, **(kwargs or {}))


def flops_per_second(assembly: Assembly) -> float:
    """Return the rate of one GPU for predicted times: ``runtime.utilisation`` times its peak rate."""
    runtime = assembly.config.runtime
    return runtime.utilisation * runtime.peak_tflops * 1e12


def predicted_training(assembly: Assembly, flops: int) -> dict[str, float]:
    """Return the predicted cost of training, with ``flops`` operations per step, as JSON.

    ``memory_bytes`` of one device (`training_memory`), ``train_seconds`` of one GPU, and the
    ``flops_per_second`` that the prediction uses.
    """
    rate = flops_per_second(assembly)
    return {
        "memory_bytes": training_memory(assembly),
        "train_seconds": assembly.config.training.steps * flops / rate,
        "flops_per_second": rate,
    }


def predicted_sampling(assembly: Assembly) -> float:
    """Return the predicted seconds on one GPU for sampling all videos of the cell."""
    config = assembly.config
    each = sampling_flops(assembly, cached=config.runtime.cache == "contexts")
    return config.evaluation.samples * each / flops_per_second(assembly)


def sampling_flops(assembly: Assembly, *, cached: bool = True) -> int:
    """Return the floating-point operations of sampling one video on all levels, as `training_flops` counts.

    With ``cached``, each distinct ancestor patch is encoded, and the contexts of each tile are computed, once
    per video; without, at every call of the denoiser (``runtime.cache: none``).
    """
    pyramid, solver = assembly.pyramid, assembly.solver
    label = torch.empty(1, dtype=torch.long, device="meta")
    encoded: list[Encoded] = []  # one patch of each coarser level
    encoding: list[int] = []  # operations to encode each

    def counted(work: Callable[[Denoiser], Made]) -> tuple[Made, int]:
        return _counted(
            assembly, lambda model, _: work(Denoiser(model, assembly.objective, assembly.sigma_in))
        )

    total = 0
    for level in range(pyramid.levels):
        tiles = pyramid.tiles(level, assembly.config.sampling.overlap)
        chains = [pyramid.chain(level, offset) for offset in tiles]
        coords = pyramid.coords(level, torch.zeros(1, 3, dtype=torch.long)).to("meta")
        z = torch.empty(1, assembly.config.model.channels, *pyramid.patch, device="meta")
        patch = (level, z, torch.empty(1, device="meta"), coords, label)
        contexts, each = counted(lambda denoiser: denoiser.contexts(level, coords, encoded))  # noqa: B023 - called here
        ancestors = sum(len({chain[: k + 1] for chain in chains}) * encoding[k] for k in range(level))
        once = len(tiles) * each + ancestors
        _, step = counted(lambda denoiser: denoiser(*patch, contexts if level else None, None))  # noqa: B023
        calls = solver.calls(level)
        total += calls * len(tiles) * step + (once if cached else calls * once)
        made, flops = counted(lambda denoiser: denoiser.encode(*patch, encoded))  # noqa: B023
        encoded.append(made)
        encoding.append(flops)
    return total


_networks: WeakKeyDictionary[Assembly, tuple[HPDM, ContextFusion]] = WeakKeyDictionary()
"""A cell's network on the meta device, and the fusion that it was built with."""
_calls: WeakKeyDictionary[Plugins, KnownCalls] = WeakKeyDictionary()
"""The recorded calls, shared by all cells that take their parts from the same plugins."""


def _built(assembly: Assembly) -> tuple[HPDM, ContextFusion]:
    if assembly not in _networks:
        model = assembly.build_model(device="meta")
        _networks[assembly] = model, model.fusion
    return _networks[assembly]


def _network(assembly: Assembly, counter: Counter, attention: str, *, checkpointing: bool = False) -> HPDM:
    """Return the cell's network, with the calls of its blocks and fusion counted by ``counter``.

    Recorded calls are shared by all networks with the same parts and ``attention``.
    """
    network, fusion = _built(assembly)
    config, shape = assembly.config.model, assembly.fusion_shape
    calls = Calls(counter, _calls.setdefault(assembly.plugins, {}), attention)
    network.execution = CountedExecution(
        calls=calls,
        kind=(config.backbone.model_dump_json(), config.token_dim, config.blocks, shape.grid),
        checkpointing=checkpointing,
    )
    network.fusion = CountedFusion(fusion, calls, (config.context_fusion.model_dump_json(), shape))
    return network


def _counted(assembly: Assembly, work: Callable[[HPDM, Counter], Made]) -> tuple[Made, int]:
    """Return the result of ``work``, which gets the cell's network and a counter, and its floating-point operations."""
    counter = Counter()
    network = _network(assembly, counter, "products")
    # The math backend of attention consists of matrix products, which the counter can count.
    with sdpa_kernel(SDPBackend.MATH), counter:
        made = work(network, counter)
    return made, counter.flops


def disk_bytes(assembly: Assembly) -> int:
    """Return the largest disk space in bytes that the cell's weights and samples take, without metrics and logs.

    A checkpoint has two moments per weight; samples are uint8, uncompressed, on every level.
    """
    weights = BYTES * count_parameters(assembly)
    config = assembly.config
    kept = CHECKPOINTS + len(config.training.keep)
    pixels = 0
    for level in range(assembly.pyramid.levels):
        frames, height, width = assembly.pyramid.size(level)
        pixels += frames * height * width * config.model.channels
    return kept * TENSORS_PER_CHECKPOINT * weights + weights + config.evaluation.samples * pixels


def _meta_batch(assembly: Assembly, most: int | None = None) -> Batch:
    """Return a batch of meta tensors, with at most ``most`` videos."""
    slots = assembly.noise_sampler.slots
    videos = min(assembly.config.training.batch, most or assembly.config.training.batch)

    def patches() -> list[Tensor]:
        shape = (videos, assembly.config.model.channels, *assembly.config.model.patch)
        return [torch.empty(shape, device="meta") for _ in slots]

    return Batch(
        step=1,
        clean=patches(),
        noise=patches(),
        sigma=[torch.empty(videos, device="meta") for _ in slots],
        in_loss=[torch.empty(videos, dtype=torch.bool, device="meta") for _ in slots],
        offsets=[torch.zeros(videos, 3, dtype=torch.long) for _ in slots],
        label=torch.empty(videos, dtype=torch.long, device="meta"),
        conditioned=torch.empty(videos, dtype=torch.long, device="meta"),
    )
