"""How one network trains on several processes: alone, replicated (DDP) or sharded (FSDP2).

A strategy is chosen by ``runtime.strategy`` and asked a few questions by the training loop; everything else,
the loop, the loss, the optimizer, the average, is the same code. Gradients are averaged over processes by
torch, so the loop scales its loss by their number: the sum over all videos of the global batch is what counts,
whoever has them.
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
    """One process, the base of the others."""

    name = "single"
    sharded = False
    """Whether every process holds a part of each tensor, so that all must take part in every forward pass."""

    def wrap(self, model: HPDM, assembly: Assembly, *, compiled: bool) -> nn.Module:
        """Return what is called to run the ``model`` of ``assembly``; with ``compiled``, what can be compiled
        by itself is.
        """
        return model

    def place(self, model: HPDM) -> None:
        """Lay out a second network, the average, as `wrap` lays out the first."""

    @contextlib.contextmanager
    def part(self, network: nn.Module, *, last: bool) -> Iterator[None]:
        """Run the forward and backward pass of one part of a step's videos; gradients meet after the last."""
        yield

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the loss function compiled as a whole."""
        return torch.compile(function, fullgraph=True)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> float:
        """Scale the gradient down to the global norm ``limit``; return the norm it had."""
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
        # For a plugin's parameters that have no part in a step DDP would wait for ever, or search each time.
        ddp = nn.parallel.DistributedDataParallel
        # Buffers start alike; to send them around at each pass would wait for processes that make no first pass.
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
        """The network is compiled inside its wrapper; the exchange of gradients is none of a compiler's."""
        return function


class Sharded(Strategy):
    """Every process has a part of each weight, gradient, moment and average; a block is whole while it runs."""

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

        # Not fully_shard's own choice: that is the GPU wherever there is one, also for a run on the CPU.
        mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.size(),))
        # It warns of outputs that are views and might be written to; ours are not written to.
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
        """Blocks are compiled each by itself, between the exchanges of weights."""
        return function


STRATEGIES: Mapping[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (Strategy, Replicated, Sharded)
}
"""By the names of ``runtime.strategy``."""


def make_strategy(name: str) -> Strategy:
    """Return the strategy ``name``; in one process alone each is the single one.

    Raises `InputError` where several processes are to train without saying how.
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
    """Return which videos of the global batch are this process's.

    Raises `InputError` where they do not come out even.
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
    """Whether a trained parameter gets no gradient from a step, with a first pass or without one; found
    without computing one."""
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
    """Return the backbone's blocks, where it keeps them in a list; else it is one part with all the rest."""
    blocks = getattr(model.backbone, "blocks", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []
