"""Checkpoints of a sharded network: every process writes its own part, and any number of processes can read them.

The files are those of torch.distributed.checkpoint, in the folder ``shards`` of a checkpoint; values that are not
tensors are in optimizer.pt. No tensor is gathered: a process holds its own parts and the bytes of one file. Every
strategy can read both this format and that of `hpdm_core.training.checkpoint` with whole tensors.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpdm_core.base import distributed
from hpdm_core.base.errors import TroubleError
from hpdm_core.training import checkpoint as checkpoints

__all__ = ["like", "load_shards", "load_whole", "local", "save_shards", "whole", "whole_weights"]


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of ``tensor`` (sharing its memory); ``tensor`` itself if it is not sharded."""
    made: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return made


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of ``tensor``, gathered from all processes. All processes must call it."""
    made: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return made


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """Return the whole ``tensor`` sharded like ``pattern``; each process takes its own part."""
    if not hasattr(pattern, "to_local"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(pattern, DTensor), "only these are sharded"
    moved = tensor.to(pattern.to_local().device)
    return distribute_tensor(moved, pattern.device_mesh, pattern.placements, src_data_rank=None)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole weights of ``model`` on the CPU in the main process, an empty dict in the others.

    One tensor is gathered at a time.
    """
    kept = {}
    for name, tensor in model.state_dict().items():
        made = whole(tensor)
        if distributed.is_main():
            kept[name] = made.cpu()
    return kept


def load_whole(
    found: checkpoints.Checkpoint, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Load a checkpoint of whole tensors; the network may be sharded."""
    for network, weights in ((model, found.model), (average, found.ema)):
        patterns = network.state_dict()
        placed = {name: like(tensor, patterns.get(name, tensor)) for name, tensor in weights.items()}
        checkpoints.load_weights(network, placed, origin=found.path or "checkpoint")
    parameters = _parameters(optimizer)
    state = {
        index: {
            key: like(value, parameters[index]) if _shaped_like(value, parameters[index]) else value
            for key, value in entries.items()
        }
        for index, entries in found.optimizer["state"].items()
    }
    optimizer.load_state_dict({**found.optimizer, "state": state})


def save_shards(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    running: Mapping[str, Any],
) -> Path:
    """Write a checkpoint under ``folder``/checkpoints, each process its own part; return its folder.

    Raises `TroubleError` in every process when a disk is full or not writable.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors = _weights(model, average)
    plain: dict[int, dict[str, Any]] = {}
    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        plain[index] = {key: value for key, value in entries.items() if not isinstance(value, Tensor)}
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
    partial = distributed.on_main(lambda: checkpoints.open_partial(folder, step))
    try:
        save(tensors, storage_writer=FileSystemWriter(partial / "shards", sync_files=True))
    except CheckpointException as error:
        problem = next(iter(error.failures.values()))[0]
        raise TroubleError(
            f"{partial}: could not be written: {problem}; the work done is kept, free some space and give "
            "the same command again"
        ) from error

    def seal() -> Path:
        buffer = io.BytesIO()
        torch.save({"state": plain, "param_groups": state["param_groups"]}, buffer)
        return checkpoints.seal_shards(
            partial, optimizer=buffer.getbuffer(), step=step, running=dict(running)
        )

    return distributed.on_main(seal)


def load_shards(
    found: checkpoints.Checkpoint, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Load a checkpoint of `save_shards`. The number of processes may differ from when it was written."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    assert found.shards is not None, "a checkpoint in shards"
    tensors = _weights(model, average)
    parameters = _parameters(optimizer)
    reader = FileSystemReader(found.shards)
    state: dict[int, dict[str, Any]] = {
        index: dict(entries) for index, entries in found.optimizer["state"].items()
    }
    for name, facts in reader.read_metadata().state_dict_metadata.items():
        kind, _, rest = name.partition("/")
        if kind != "optimizer":
            continue
        number, _, key = rest.partition("/")
        parameter = parameters[int(number)]
        assert isinstance(facts, TensorStorageMetadata), "only tensors are written"
        dtype = facts.properties.dtype
        if tuple(facts.size) == tuple(parameter.shape):
            empty = torch.zeros_like(parameter, dtype=dtype)
        else:
            empty = torch.zeros(facts.size, dtype=dtype)
        state[int(number)][key] = tensors[name] = empty
    # If no tensor is sharded, each process reads the whole checkpoint independently.
    alone = not any(hasattr(tensor, "to_local") for tensor in tensors.values())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        load(tensors, storage_reader=reader, no_dist=alone)
    optimizer.load_state_dict({**found.optimizer, "state": state})


def _weights(model: nn.Module, average: nn.Module) -> dict[str, Tensor]:
    networks = {"model": model, "ema": average}
    return {
        f"{kind}/{name}": tensor
        for kind, network in networks.items()
        for name, tensor in network.state_dict().items()
    }


def _parameters(optimizer: torch.optim.Optimizer) -> Sequence[Tensor]:
    """Return the parameters in the order of their indices in the optimizer's state."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _shaped_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
