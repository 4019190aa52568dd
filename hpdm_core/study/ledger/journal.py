"""Optuna's journal file format, written many records at a time.

Optuna's own `JournalFileBackend` takes its lock, writes and syncs to disk for every single record, and rereads the
file from its start whenever another process has written to it. A controller of thousands of cells writes thousands of
records at a time. Within `JournalFile.batch`, records are buffered (this process can read them) and reach the disk in
one write at the end of the block. A kill during that write leaves the first records complete and at most one torn line.

`hpdm_core.study.ledger.ledger` handles a damaged file.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileSymlinkLock

from hpdm_core.base.interruption import shielded

__all__ = ["JournalFile"]

Record = dict[str, Any]


class JournalFile(BaseJournalBackend):
    """The records of ``path``, for one reader (an Optuna `JournalStorage`).

    Other processes, such as a dashboard, may append between this one's writes: the lock file is Optuna's.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = JournalFileSymlinkLock(str(path))
        self._count = 0
        """How many records were read, or written from a batch; the next one begins at byte ``_offset``."""
        self._offset = 0
        self._held: list[Record] | None = None
        """Records of the open batch; None outside a batch."""
        self._whole = False
        """Whether the file has been read to its end since the open batch began."""
        path.open("ab").close()

    def read_logs(self, log_number_from: int) -> Iterable[Record]:
        """Return the records from number ``log_number_from`` (>= 0) on."""
        if self._held is None:
            return self._read(log_number_from)
        if self._whole:
            return self._held[log_number_from - self._count :]
        found = list(self._read(log_number_from))  # nobody else writes while the lock is ours
        self._whole = True
        return itertools.chain(found, self._held)

    def append_logs(self, logs: list[Record]) -> None:
        """Append records: at once, or at the end of the open batch."""
        if self._held is None:
            with self.batch():
                self.append_logs(logs)
        else:
            self._held += logs

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Write all records appended within the block in one write at its end. Batches may be nested.

        After an exception in the block, the records appended before it are still written. Raises OSError when the
        disk is full.
        """
        if self._held is not None:
            yield
            return
        with shielded():
            self._lock.acquire()
            try:
                self._held, self._whole = [], False
                try:
                    yield
                finally:
                    held, self._held = self._held, None
                    if held:
                        self._write(held)
            finally:
                with contextlib.suppress(
                    RuntimeError
                ):  # another process took this one for dead and removed the lock
                    self._lock.release()

    def _write(self, records: list[Record]) -> None:
        data = b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records)
        with self._path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if self._whole:  # the reader has them already
            self._count += len(records)
            self._offset += len(data)

    def _read(self, first: int) -> Iterator[Record]:
        if first < self._count:
            self._count = self._offset = 0
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # another process is writing it
                self._count += 1
                self._offset += len(line)
                if self._count > first:
                    yield json.loads(line)
