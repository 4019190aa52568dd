"""Stages by key: their results, their attempts, and which process works on them. Shared by all studies.

    store/train/<key>/        spec.json  attempts/<n>/{log.txt,heartbeat,error.json,checkpoints/,...}
                              model.safetensors  result.json
    store/samples/<key>/      000000.safetensors ...  contact_sheet.png  attempts/<n>/  result.json
    store/evaluations/<key>/  features.npy ...  attempts/<n>/  result.json

A worker holds a stage's lease while it works on it, and each attempt has its own folder. Finished files are renamed
into place, and ``result.json`` is written last. A stage is done if and only if it has ``result.json``; everything else
may be lost.
"""

import contextlib
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hpdm_core.base.errors import HpdmError
from hpdm_core.base.files import of_the_disk, publish, read_json, sha256_of, write_json
from hpdm_core.store.failures import kind_of
from hpdm_core.store.lease import Lease, Process

__all__ = ["Attempt", "Kind", "Stage", "Store", "describe", "is_product"]

Kind = Literal["train", "samples", "evaluations"]


@dataclass(frozen=True)
class Store:
    """The stages under folder ``root``."""

    root: Path

    def stage(self, kind: Kind, key: str) -> "Stage":
        """Return the stage of ``kind`` with ``key`` (hexadecimal), whether or not anything is there yet."""
        assert kind in get_args(Kind) and key, f"not a stage: {kind}/{key}"
        return Stage(kind=kind, key=key, folder=self.root / kind / key)

    def holds(self, stages: Iterable[tuple[str, str]]) -> bool:
        """Whether each of ``stages`` (kind, key) has a result file; its content is not read."""
        root = str(self.root)  # for tens of thousands of stages, strings are ten times as fast as Path
        return all(os.path.exists(f"{root}/{kind}/{key}/result.json") for kind, key in stages)  # noqa: PTH110


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage and its folder. Only `claim` writes to it."""

    kind: Kind
    key: str
    folder: Path

    def result(self) -> dict[str, Any] | None:
        """Return the result, or None while the stage is not done."""
        return read_json(self.folder / "result.json")

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self.result() is not None

    def attempts(self) -> list[Path]:
        """Return the folders of all attempts, oldest first."""
        folder = self.folder / "attempts"
        if not folder.is_dir():
            return []
        return sorted(
            (path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name)
        )

    def newest(self) -> int:
        """Return the number of the newest attempt, 0 when there is none."""
        attempts = self.attempts()
        return int(attempts[-1].name) if attempts else 0

    def failure(self) -> dict[str, Any] | None:
        """Return ``{"class", "message", "traceback", ...}`` when the newest attempt failed, else None.

        An attempt that was killed, interrupted or still runs has not failed.
        """
        attempts = self.attempts()
        return read_json(attempts[-1] / "error.json") if attempts else None

    def progress(self) -> dict[str, Any] | None:
        """Return the newest attempt's heartbeat: ``{"stage", "step", "steps", "loss", "time", ...}``."""
        attempts = self.attempts()
        return read_json(attempts[-1] / "heartbeat") if attempts else None

    def holder(self) -> Process | None:
        """Return the living process that works on the stage, or None."""
        return Lease.holder(self.folder / "lease.json")

    @contextlib.contextmanager
    def claim(self) -> Iterator["Attempt"]:
        """Take the lease of the stage and open a new attempt. Raises `hpdm_core.store.lease.Held` if it is taken.

        An `Exception` that leaves the block (not Ctrl-C or SystemExit) is written to the attempt's ``error.json``.
        """
        with Lease(self.folder / "lease.json") as lease:
            previous = self.attempts()
            number = self.newest() + 1
            folder = self.folder / "attempts" / str(number)
            folder.mkdir(parents=True)
            attempt = Attempt(
                stage=self, folder=folder, number=number, previous=tuple(reversed(previous)), lease=lease
            )
            try:
                yield attempt
            except Exception as error:
                attempt.fail(error)
                raise

    def attempt(self, number: int) -> "Attempt":
        """Return attempt ``number``, which the main process has claimed; for the other processes of a group."""
        earlier = [path for path in self.attempts() if int(path.name) < number]
        return Attempt(
            stage=self,
            folder=self.folder / "attempts" / str(number),
            number=number,
            previous=tuple(reversed(earlier)),
            lease=Lease(self.folder / "lease.json"),
        )


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a stage. ``previous``: the folders of earlier attempts, newest first."""

    stage: Stage
    folder: Path
    number: int
    previous: tuple[Path, ...]
    lease: Lease

    def log(self, line: str) -> None:
        """Append a line with the time to ``log.txt``."""
        with (self.folder / "log.txt").open("a", encoding="utf-8") as handle:
            handle.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def heartbeat(self, progress: Mapping[str, Any]) -> None:
        """Write the attempt's progress to its file ``heartbeat``."""
        write_json(self.folder / "heartbeat", progress, durable=False)

    def finish(self, result: Mapping[str, Any], *, files: Mapping[str, str] | None = None) -> None:
        """Rename ``files`` (name in the attempt -> name in the stage) into place, then write the result.

        The result gets the SHA-256 of every file of the stage. Raises `LeaseLost` if the lease was taken over.
        """
        self.lease.check()
        folder = self.stage.folder
        for source, target in (files or {}).items():
            publish(self.folder / source, folder / target)
        hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if is_product(path)}
        write_json(folder / "result.json", {**result, "sha256": hashes})

    def fail(self, error: BaseException) -> None:
        """Write ``error.json``, and the traceback to the log, as far as the disk allows."""
        text = "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):
            write_json(self.folder / "error.json", describe(error, stage=self.stage.kind))
        with contextlib.suppress(OSError):
            self.log(text)

    def take_output(self) -> None:
        """Redirect the output of this process, also from native code, to ``log.txt``."""
        sys.stdout.flush()
        sys.stderr.flush()
        with (self.folder / "log.txt").open("ab") as handle:
            for stream in (1, 2):
                os.dup2(handle.fileno(), stream)

    def drop(self, name: str, *, keep: Iterable[str] = ()) -> None:
        """Delete the entries of the folders ``name`` of this and earlier attempts, except those named in ``keep``."""
        kept = set(keep)
        for folder in (self.folder, *self.previous):
            for entry in (folder / name).glob("*"):
                if entry.name not in kept:
                    shutil.rmtree(entry, ignore_errors=True)


def is_product(path: Path) -> bool:
    """Whether ``path`` in a stage's folder is one of the stage's results."""
    other = path.name in ("result.json", "spec.json", "lease.json") or path.name.startswith(".")
    return not other and path.is_file()


def describe(error: BaseException, *, stage: Kind | None = None) -> dict[str, Any]:
    """Return the JSON form of an error: class, a message with one line per problem, traceback.

    ``kind`` is its `Cause`; ``stage`` is where it arose, None outside the stages; ``passing``: whether the disk was
    full or failed, which is not the cell's fault.
    """
    first = str(error).strip().partition("\n")[0]  # torch appends a stack trace to its messages: drop it here
    message = str(error) if isinstance(error, HpdmError) else f"{type(error).__name__}: {first}"
    return {
        "class": type(error).__name__,
        "kind": kind_of(error),
        "stage": stage,
        "message": message,
        "passing": of_the_disk(error),
        "traceback": "".join(traceback.format_exception(error)),
        "time": time.time(),
    }
