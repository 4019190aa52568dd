"""How a network trains on one process, or on several: replicated (DDP) or sharded (FSDP2).

``runtime.strategy`` chooses the strategy. Training loop, loss, optimizer and average are the same code for all
strategies. DDP and FSDP average gradients over processes; the training loop scales the loss by their number to get
the sum, so the gradient does not depend on how the videos of the global batch are distributed.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpdm_core.base import distributed
from hpdm_core.base.errors import InputError
from hpdm_core.model.hpdm import HPDM
from hpdm_core.training.batches import TrainingBatches
from hpdm_core.training.shards import whole
from hpdm_core.training.step import joint_loss

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly

__all__ = ["STRATEGIES", "Strategy", "make_strategy", "share_of"]


class Strategy:
    """A single process. Base class of the other strategies."""

    name = "single"
    sharded = False
    """Whether every process holds a part of each tensor, so that all must take part in every forward pass."""

    def wrap(self, model: HPDM, assembly: Assembly, *, compiled: bool) -> nn.Module:
        """Return the module that runs the ``model`` of ``assembly`` in training.

        With ``compiled``, the parts of the model that this strategy compiles separately are compiled.
        """
        return model

    def place(self, model: HPDM) -> None:
        """Shard a second network, the average, in the same way as `wrap` shards the first."""

    @contextlib.contextmanager
    def part(self, network: nn.Module, *, last: bool) -> Iterator[None]:
        """Enclose the forward and backward pass of one part of a step's videos; the last part reduces the gradients."""
        yield

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the loss function, compiled as a whole if the strategy allows it."""
        return torch.compile(function, fullgraph=True)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> float:
        """Clip the gradient to the global norm ``limit``; return its norm before clipping."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return float(norm)


class Replicated(Strategy):
    """Every process has the whole network; gradients are averaged while the backward pass runs."""

    name = "ddp"

    def wrap(self, model: HPDM, assembly: Assembly, *, compiled: bool) -> nn.Module:
        """See `Strategy`."""
        if compiled:
            model.compile(fullgraph=True)
        # A plugin may have parameters without a gradient in some steps. DDP would wait for them for ever; its search
        # for unused parameters costs time in every step, so it is enabled only if there are such parameters.
        ddp = nn.parallel.DistributedDataParallel
        # Buffers are equal at the start. To broadcast them at each pass would hang: some processes run no first pass.
        newer = "forward_sync_buffers" in inspect.signature(ddp).parameters  # its newer name
        buffers: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
        idle = _has_idle(assembly)
        return ddp(model, find_unused_parameters=idle, gradient_as_bucket_view=True, **buffers)

    @contextlib.contextmanager
    def part(self, network: nn.Module, *, last: bool) -> Iterator[None]:
        """See `Strategy`."""
        assert isinstance(network, nn.parallel.DistributedDataParallel), "made by `wrap`"
        with contextlib.nullcontext() if last else network.no_sync():
            yield

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` unchanged: the network is compiled inside its DDP wrapper, without communication."""
        return function


class Sharded(Strategy):
    """Every process has a part of each weight, gradient, moment and average; weights are gathered block by block."""

    name = "fsdp"
    sharded = True

    def wrap(self, model: HPDM, assembly: Assembly, *, compiled: bool) -> nn.Module:
        """See `Strategy`."""
        if compiled:
            for block in _blocks(model):
                block.compile(fullgraph=True)
        self.place(model)
        return model

    def place(self, model: HPDM) -> None:
        """See `Strategy`."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # Not fully_shard's default device, which is the GPU if there is one, even for a run on the CPU.
        mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.size(),))
        # It warns of outputs that are views and might be modified in place; ours are not modified.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        for block in _blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    @contextlib.contextmanager
    def part(self, network: nn.Module, *, last: bool) -> Iterator[None]:
        """See `Strategy`."""
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(network, FSDPModule), "made by `wrap`"
        network.set_requires_gradient_sync(last)
        yield

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` unchanged: each block is compiled separately, without communication."""
        return function


STRATEGIES: Mapping[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (Strategy, Replicated, Sharded)
}
"""The strategies by their names in ``runtime.strategy``."""


def make_strategy(name: str) -> Strategy:
    """Return the strategy ``name``; with a single process, always the single one.

    Raises `InputError` if there are several processes and ``name`` is 'single'.
    """
    processes = distributed.size()
    if processes == 1:
        return Strategy()
    if STRATEGIES[name] is Strategy:
        allowed = ", ".join(other for other in STRATEGIES if other != name)
        raise InputError(
            f"runtime.strategy: '{name}' was given to {processes} processes; allowed for several: {allowed}"
        )
    return STRATEGIES[name]()


def share_of(batch: int) -> range:
    """Return the indices of this process's videos in the global batch.

    Raises `InputError` if the number of processes does not divide ``batch``.
    """
    processes = distributed.size()
    if batch % processes:
        even = [count for count in range(1, batch + 1) if batch % count == 0]
        raise InputError(
            f"training.batch: {batch} videos do not split over {processes} processes; allowed for this batch: "
            f"{', '.join(map(str, even))} processes"
        )
    rows = batch // processes
    return range(distributed.rank() * rows, (distributed.rank() + 1) * rows)


def _has_idle(assembly: Assembly) -> bool:
    """Whether a trained parameter gets no gradient in a step, with or without a first pass.

    This is tested on the meta device, without computing values.
    """
    meta = torch.device("meta")
    batch = TrainingBatches(assembly, range(1))(1).to(meta)
    for rows in (0, 1) if assembly.config.training.self_conditioning else (0,):
        model = assembly.build_model(device=meta)
        chosen = replace(batch, conditioned=torch.empty(rows, dtype=torch.long, device=meta))
        joint_loss(assembly, model, chosen).total.backward()  # type: ignore[no-untyped-call]
        if any(parameter.requires_grad and parameter.grad is None for parameter in model.parameters()):
            return True
    return False


def _blocks(model: HPDM) -> list[nn.Module]:
    """Return the backbone's blocks if it has them in a ModuleList; otherwise no block is treated separately."""
    blocks = getattr(model.backbone, "blocks", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []
