"""Atomic file writes: a file is written under a temporary name, synced, then renamed.

A reader sees the old file or the new one, never a partly written one, even after a crash. Results,
checkpoints, samples, reports, the ledger's index and the locks are written with these functions.
"""

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from hpdm_core.base.errors import TroubleError

__all__ = [
    "clear_temporaries",
    "disk_trouble",
    "of_the_disk",
    "publish",
    "read_json",
    "sha256_of",
    "sync_folder",
    "trouble_when_unwritable",
    "whole_or_absent",
    "write_bytes",
    "write_json",
    "write_synced",
]

DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}


def of_the_disk(error: BaseException | None) -> bool:
    """Whether ``error``, or an error that caused it, comes from a full or failing disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def disk_trouble(path: Path | str) -> Iterator[None]:
    """Turn errors of a full or failing disk into a one-line `TroubleError`; it names ``path`` if they name no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRNOS:
            raise
        raise _unwritten(error.filename or path, error) from error


@contextlib.contextmanager
def trouble_when_unwritable(path: Path) -> Iterator[None]:
    """Turn every `OSError` while writing ``path`` into a `TroubleError` of one line."""
    try:
        yield
    except OSError as error:
        raise _unwritten(path, error) from error


def sync_folder(folder: Path) -> None:
    """Sync ``folder``, so that new names in it survive a power cut. Raises `OSError` for a full or failing disk.

    Some file systems do not allow this; a rename is still atomic there.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in DISK_ERRNOS:
            raise


def write_synced(path: Path, data: bytes | memoryview) -> None:
    """Write ``data`` directly to ``path`` and sync it. For a file in a folder that is renamed when it is complete."""
    with path.open("wb") as handle:
        handle.write(data)
        _sync(handle)


@contextlib.contextmanager
def whole_or_absent(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a file to write: at the end of the block it becomes ``path``; on an error it is deleted.

    ``durable`` also syncs it to the disk. A killed process leaves a hidden temporary file, which
    `clear_temporaries` deletes.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as handle:
            yield handle
            if durable:
                _sync(handle)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def clear_temporaries(folder: Path) -> None:
    """Delete temporary files that killed processes left in ``folder``. No other process may be writing there."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes | memoryview, *, durable: bool = True) -> None:
    """Write ``data`` to ``path`` atomically; ``durable`` also syncs it to the disk.

    Heartbeats are not durable: they are written every second and are of no use after a crash.
    """
    with whole_or_absent(path, durable=durable) as handle:
        handle.write(data)


def write_json(path: Path, data: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write ``data`` as indented JSON to ``path`` atomically."""
    text = json.dumps(data, indent=1, ensure_ascii=False, default=_plain)
    write_bytes(path, (text + "\n").encode(), durable=durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in ``path``, or None where there is no file, no JSON, or no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(source: Path, target: Path) -> None:
    """Sync the finished file or folder ``source`` and rename it to ``target``, on the same file system."""
    if source.is_file():
        with source.open("rb") as handle:
            _sync(handle)
    source.replace(target)
    sync_folder(target.parent)


def _sync(handle: BinaryIO) -> None:
    handle.flush()
    os.fsync(handle.fileno())


def _unwritten(path: Path | str, error: OSError) -> TroubleError:
    return TroubleError(
        f"{path}: could not be written: {error.strerror or error}; the work done is kept, free some space and "
        "give the same command again"
    )


def _plain(value: Any) -> Any:
    """Convert values of a result that are not plain Python for JSON: numpy and torch numbers, paths."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
