"""Several processes that work together: their ranks, and the few collectives that this project uses.

The processes are started by torchrun, or by submitit on the nodes of a cluster (or on this machine); `joined`
reads the environment to find out which. A process that was started by neither is alone: every function here
then behaves as for one process, and torch.distributed is not used. Rank 0, the *main* process, writes results.

Not here: how a network trains on several processes (`hpdm_core.training.strategy`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hpdm_core.base.errors import HpdmError, TroubleError

__all__ = [
    "barrier",
    "broadcast",
    "gather",
    "is_main",
    "joined",
    "on_main",
    "planned_size",
    "rank",
    "size",
    "spread",
    "total",
]

A = TypeVar("A")
B = TypeVar("B")

PATIENCE = timedelta(days=1)
"""How long a collective waits for the other processes: the main one may wait long for another study's worker.
When a process dies, the others end at once (gloo), or torchrun or SLURM ends them."""


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's rank, 0 when it is alone."""
    return dist.get_rank() if _active() else 0


def size() -> int:
    """Return the number of processes that work together, 1 when this one is alone."""
    return dist.get_world_size() if _active() else 1


def is_main() -> bool:
    """Whether this is the process that writes results."""
    return rank() == 0


def planned_size() -> int:
    """Return the number of processes started together, as the environment gives it, whether they have joined or not."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return _submitit_tasks()


def _submitit_tasks() -> int:
    """Return the number of tasks of this process's submitit job; 1 if it is in no such job."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return 1
    import submitit

    try:
        return int(submitit.JobEnvironment().num_tasks)
    except RuntimeError:  # the variable was inherited from a job around this process
        return 1


@contextlib.contextmanager
def joined(device: str = "cpu") -> Iterator[None]:
    """Within the block, the processes that were started together form one process group; a single process does nothing.

    Tensors on GPUs use NCCL, all others gloo. With ``device`` cuda, each process takes the GPU of its local
    rank (counted among the GPUs that it can see). A nested block does nothing.
    """
    if _active() or planned_size() == 1:
        yield
        return
    if "WORLD_SIZE" not in os.environ:
        import submitit

        # Do not let submitit choose GPUs: a cluster that gives each task its own GPU has done so already.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if size() > 1:
        dist.all_reduce(torch.zeros(1))  # a CPU tensor uses gloo; dist.barrier could use NCCL


def broadcast(value: A) -> A:
    """Return the main process's ``value`` (anything that pickles) in every process."""
    if size() == 1:
        return value
    held = [value if is_main() else None]
    dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
    received: A = held[0]  # type: ignore[assignment]  # the main one's
    return received


def gather(value: A) -> list[A]:
    """Return every process's ``value`` (anything that pickles), by rank, in every process."""
    if size() == 1:
        return [value]
    held: list[A | None] = [None] * size()
    dist.all_gather_object(held, value)
    return list(held)  # type: ignore[arg-type]  # all are filled


def on_main(work: Callable[[], A]) -> A:
    """Return ``work()`` of the main process in every process; the others wait. An error is raised in all."""
    if size() == 1:
        return work()
    made: A | None = None
    error: Exception | None = None
    if is_main():
        try:
            made = work()
        except Exception as caught:
            error = caught
    made, remote = broadcast((made, _told(error)))
    if error is not None:
        raise error
    if remote is not None:
        raise remote
    return made  # type: ignore[return-value]  # the main one's


def total(tensor: Tensor) -> Tensor:
    """Return the sum of ``tensor`` over the processes; ``tensor`` itself is not changed."""
    if size() == 1:
        return tensor
    summed = tensor.detach().clone()
    dist.all_reduce(summed)
    return summed


def spread(items: Sequence[A], work: Callable[[A], B]) -> list[B]:
    """Return ``[work(item) for item in items]`` in every process; each process computes its share.

    Items are assigned round-robin, and each is computed as in a single process, so the results do not depend
    on the number of processes. What ``work`` returns must pickle. An error in one process is raised in all.
    """
    if size() == 1:
        return [work(item) for item in items]
    mine: dict[int, B] = {}
    error: Exception | None = None
    try:
        for index in range(rank(), len(items), size()):
            mine[index] = work(items[index])
    except Exception as caught:
        error = caught
    gathered = gather((mine, _told(error)))
    if error is not None:
        raise error
    for _, remote in gathered:
        if remote is not None:
            raise remote
    done = {index: made for part, _ in gathered for index, made in part.items()}
    return [done[index] for index in range(len(items))]


def _told(error: Exception | None) -> HpdmError | None:
    """Return the error in a form that can be sent to other processes."""
    if error is None or isinstance(error, HpdmError):
        return error
    first = str(error).strip().partition("\n")[0]
    return TroubleError(f"process {rank()} of {size()}: {type(error).__name__}: {first}")
