"""Checkpoints that survive a kill at any moment: written to a temporary folder, synced, renamed, verified before use.

A checkpoint is a folder ``checkpoints/<step, 8 digits>/`` with model.safetensors, ema.safetensors,
optimizer.pt (tensors and plain types only) and state.json, which holds the step, a SHA-256 of each other file
and running statistics. A folder with a missing or damaged state.json or a wrong hash is skipped with a line in
the log. The tensors of a sharded network are in the folder ``shards`` instead (`hpdm_core.training.shards`);
everything else is the same.
"""

import contextlib
import hashlib
import io
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from hpdm_core.base.errors import InputError
from hpdm_core.base.files import (
    clear_temporaries,
    sync_folder,
    trouble_when_unwritable,
    write_bytes,
    write_synced,
)

__all__ = [
    "Checkpoint",
    "checkpoint_folders",
    "clear_partial",
    "load_weights",
    "newest_intact",
    "open_partial",
    "prune",
    "read_checkpoint",
    "read_header",
    "read_weights",
    "save_checkpoint",
    "save_weights",
    "seal_shards",
]

FORMAT = 1
SHARDED_FORMAT = 2
PARTIAL = ".partial"
FILES = ("model.safetensors", "ema.safetensors", "optimizer.pt")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that training needs to resume after ``step`` updates.

    ``running`` holds plain JSON values (statistics that accumulate over attempts). ``path``: the folder that it was
    read from. ``shards``: the folder of a sharded network's tensors; ``model`` and ``ema`` are then empty, and
    ``optimizer`` holds only its values that are not tensors.
    """

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    running: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    shards: Path | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write ``checkpoint`` under ``folder``/checkpoints atomically and return its folder.

    Raises `TroubleError` when the disk is full or not writable.
    """
    partial = open_partial(folder, checkpoint.step)
    with _sealing(partial) as final:
        # Only one file's bytes are in memory at a time.
        hashes = {
            "model.safetensors": _write(partial / "model.safetensors", _pack(checkpoint.model)),
            "ema.safetensors": _write(partial / "ema.safetensors", _pack(checkpoint.ema)),
            "optimizer.pt": _write(partial / "optimizer.pt", _pack_optimizer(checkpoint.optimizer)),
        }
        state = {"format": FORMAT, "step": checkpoint.step, "running": checkpoint.running, "sha256": hashes}
        _write(partial / "state.json", json.dumps(state, indent=1).encode())
    return final


def open_partial(folder: Path, step: int) -> Path:
    """Return a new empty folder in which the checkpoint of ``step`` under ``folder`` can be written."""
    partial = folder / "checkpoints" / f"{step:08d}{PARTIAL}"
    with trouble_when_unwritable(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    return partial


def seal_shards(partial: Path, *, optimizer: bytes | memoryview, step: int, running: dict[str, Any]) -> Path:
    """Complete the checkpoint in the folder ``partial`` after every process has written its shards; return its folder.

    ``optimizer``: the bytes of optimizer.pt. Raises `TroubleError` when the disk is full or not writable.
    """
    with _sealing(partial) as final:
        hashes = {"optimizer.pt": _write(partial / "optimizer.pt", optimizer)}
        for path in sorted((partial / "shards").iterdir()):
            hashes[f"shards/{path.name}"] = _sha256(path)
        sync_folder(partial / "shards")
        state = {"format": SHARDED_FORMAT, "step": step, "running": running, "sha256": hashes}
        _write(partial / "state.json", json.dumps(state, indent=1).encode())
    return final


@contextlib.contextmanager
def _sealing(partial: Path) -> Iterator[Path]:
    """Rename ``partial`` to its final name at the end of the block; on an error in the block, delete it."""
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    with trouble_when_unwritable(final):
        try:
            yield final
            sync_folder(partial)
            _remove(final)
            partial.rename(final)
            sync_folder(final.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify the checkpoint in folder ``path``. Raises `ValueError` with the reason if it is damaged."""
    try:
        state = json.loads((path / "state.json").read_bytes())
        if state["format"] == SHARDED_FORMAT:
            return _read_sharded(path, state)
        if state["format"] != FORMAT:
            raise ValueError(f"its format is {state['format']}, known are {FORMAT} and {SHARDED_FORMAT}")
        contents = {name: (path / name).read_bytes() for name in FILES}
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != state["sha256"][name]:
                raise ValueError(f"{name} does not match its SHA-256")
        return Checkpoint(
            step=state["step"],
            model=safetensors.torch.load(contents["model.safetensors"]),
            ema=safetensors.torch.load(contents["ema.safetensors"]),
            optimizer=_unpack_optimizer(contents["optimizer.pt"]),
            running=state["running"],
            path=path,
        )
    except OSError as error:
        raise ValueError(f"{Path(error.filename or path).name}: {error.strerror}") from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"state.json is damaged ({error})") from error


def _read_sharded(path: Path, state: dict[str, Any]) -> Checkpoint:
    for name, digest in state["sha256"].items():
        if _sha256(path / name) != digest:
            raise ValueError(f"{name} does not match its SHA-256")
    return Checkpoint(
        step=state["step"],
        model={},
        ema={},
        optimizer=_unpack_optimizer((path / "optimizer.pt").read_bytes()),
        running=state["running"],
        path=path,
        shards=path / "shards",
    )


def newest_intact(folders: Sequence[Path]) -> Checkpoint | None:
    """Return the intact checkpoint of the highest step under ``folders``; for equal steps, that of the first folder.

    Damaged checkpoints are skipped with a line in the log. Returns None if there is no intact one.
    """
    found = [(step, -rank, path) for rank, folder in enumerate(folders) for step, path in _steps(folder)]
    for _, _, path in sorted(found, key=lambda item: item[:2], reverse=True):
        try:
            return read_checkpoint(path)
        except ValueError as error:
            log.warning("checkpoint %s is skipped: %s", path, error)
    return None


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the folders of the checkpoints under ``folder``, sorted by step, without reading them."""
    return [path for _, path in sorted(_steps(folder))]


def prune(folder: Path, *, keep: Collection[int]) -> None:
    """Delete all checkpoints under ``folder`` except the newest two and those of the steps ``keep``."""
    for step, path in sorted(_steps(folder))[:-2]:
        if step not in keep:
            _remove(path)


def clear_partial(folder: Path) -> None:
    """Delete the incomplete files that a killed attempt left in ``folder``."""
    clear_temporaries(folder)
    for path in (folder / "checkpoints").glob(f"*{PARTIAL}"):
        shutil.rmtree(path)


def save_weights(path: Path, weights: Mapping[str, Tensor], *, metadata: Mapping[str, Any]) -> None:
    """Write ``weights`` to the safetensors file ``path`` atomically.

    ``metadata`` is stored in the header as one JSON text under ``hpdm`` (one entry, so that equal weights give
    equal bytes). Raises `TroubleError` when the disk is full or not writable.
    """
    with trouble_when_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, _pack(weights, {"hpdm": json.dumps(dict(metadata), sort_keys=True)}))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the safetensors file ``path``. Raises `InputError` if it is missing or damaged."""
    try:
        return safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected trained weights (model.safetensors)") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from error


def read_header(path: Path) -> dict[str, Any]:
    """Return the ``metadata`` that `save_weights` stored in ``path``. Raises `InputError` if it is no such file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("hpdm", "{}"))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or error}; expected trained weights (safetensors)"
        ) from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from error
    if not isinstance(header, dict):
        raise InputError(
            f"{path}: its header holds {type(header).__name__} under 'hpdm'; allowed is an object"
        )
    return header


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, origin: Path | str) -> None:
    """Copy ``weights`` into ``model``. Raises `InputError` naming the first tensor that does not fit."""
    expected = model.state_dict()
    for name in [*expected, *weights]:
        got = list(weights[name].shape) if name in weights else "nothing"
        wanted = list(expected[name].shape) if name in expected else "nothing"
        if got != wanted:
            raise InputError(
                f"{origin}: these weights belong to another model: '{name}' is {got} in the file and {wanted} "
                "in the model of this configuration"
            )
    model.load_state_dict(dict(weights))


def _pack(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    packed: bytes = safetensors.torch.save(whole, metadata)
    return packed


def _pack_optimizer(state: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def _unpack_optimizer(content: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, content: bytes | memoryview) -> str:
    """Write and sync one file; return its SHA-256."""
    write_synced(path, content)
    return hashlib.sha256(content).hexdigest()


def _remove(path: Path) -> None:
    """Delete a checkpoint. If the process is killed meanwhile, no partly deleted folder keeps the checkpoint's name."""
    if path.exists():
        doomed = path.with_name(path.name + ".old" + PARTIAL)
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def _steps(folder: Path) -> Iterator[tuple[int, Path]]:
    root = folder / "checkpoints"
    if root.is_dir():
        for path in root.iterdir():
            if path.is_dir() and path.name.isdecimal():
                yield int(path.name), path
