"""Files that are either whole or absent: written under a temporary name, synced, renamed.

A reader, also one that starts after a crash, sees the old file or the new one and never a half. The stores,
the ledger's index and the locks are built on these few functions.
"""

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpdm_core.errors import TroubleError

__all__ = ["disk_trouble", "of_the_disk", "publish", "read_json", "sync_folder", "write_bytes", "write_json"]

DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}


def of_the_disk(error: BaseException | None) -> bool:
    """Whether ``error`` comes from a full or failing disk, itself or as its cause."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def disk_trouble(path: Path | str) -> Iterator[None]:
    """Turn the errors of a full or failing disk into a `TroubleError` of one line; ``path`` if they name no
    file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRNOS:
            raise
        raise TroubleError(
            f"{error.filename or path}: could not be written: {error.strerror}; the work done is kept, free "
            "some space and give the same command again"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a power cut. Some file systems refuse; a rename is atomic there
    all the same.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write ``data`` to ``path`` in one step; ``durable`` also waits for the disk.

    Heartbeats are not durable: they are written every second and mean nothing after a crash.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            if durable:
                os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_json(path: Path, data: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write ``data`` as readable JSON to ``path`` in one step."""
    text = json.dumps(data, indent=1, ensure_ascii=False, default=_plain)
    write_bytes(path, (text + "\n").encode(), durable=durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in ``path``, or None where there is no file, no JSON, or no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def publish(source: Path, target: Path) -> None:
    """Give the finished file or folder ``source`` its place ``target``, on the same file system, after
    syncing it.
    """
    if source.is_file():
        with source.open("rb") as handle:
            os.fsync(handle.fileno())
    source.replace(target)
    sync_folder(target.parent)


def _plain(value: Any) -> Any:
    """JSON for what a result may hold besides plain Python: numbers of numpy and torch, paths."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
