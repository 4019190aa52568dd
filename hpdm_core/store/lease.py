"""Process identities, and leases: locks that become free when their holder dies.

A lease is a file that names its holder (host, pid, start of the process) and holds a counter that the holder
increments every few seconds. It is free when the holder is dead (same host), or when its counter has not changed for
`STALE_SECONDS` on the observer's monotonic clock (another host). Clocks of two hosts are never compared. The same
class locks a stage of the store against a second worker and a study against a second controller.
"""

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hpdm_core.base.errors import TroubleError
from hpdm_core.base.files import read_json

__all__ = ["HEARTBEAT_SECONDS", "STALE_SECONDS", "Held", "Lease", "LeaseLost", "Process", "Watch"]

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 90.0  # above the 60 s for which a network file system may show an old file
EMPTY_SECONDS = 2 * HEARTBEAT_SECONDS
DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Process:
    """A unique identity of a process: host, pid and start time, since pids are reused."""

    host: str
    pid: int
    start: str
    """When the process started, as the operating system reports it: boot id and clock ticks, or a date."""

    @classmethod
    def here(cls) -> "Process":
        """Return this process."""
        return cls(host=_host(), pid=os.getpid(), start=_start_of(os.getpid()) or "unknown")

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """Return the living process ``pid`` of this host, or None."""
        start = _start_of(pid)
        return None if start is None else cls(host=_host(), pid=pid, start=start)

    @classmethod
    def read(cls, data: Any) -> "Process | None":
        """Return the process that a lease or job file describes, or None if it describes none."""
        try:
            return cls(host=str(data["host"]), pid=int(data["pid"]), start=str(data["start"]))
        except (KeyError, TypeError, ValueError):
            return None

    def to_json(self) -> dict[str, Any]:
        """Return the plain form that `read` understands."""
        return asdict(self)

    def alive(self) -> bool | None:
        """Whether the process still runs; None if it belongs to another host, where this cannot be told."""
        if self.host != _host():
            return None
        return _start_of(self.pid) == self.start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.partition(':')[0]}"


class Watch:
    """Measures, on this process's own clock, for how long values have not changed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[Any, float]] = {}

    def silent(self, name: str, value: Any) -> float:
        """Return for how many seconds ``name`` has had this ``value``; 0 when it is seen for the first time."""
        now = self._clock()
        before = self._seen.get(name)
        if before is None or before[0] != value:
            self._seen[name] = (value, now)
            return 0.0
        return now - before[1]

    def forget(self, name: str) -> None:
        """Forget the value of ``name``."""
        self._seen.pop(name, None)


class Held(Exception):
    """The lease belongs to another process, which is alive or not yet known to be dead."""

    def __init__(self, holder: Process | None) -> None:
        super().__init__(f"held by {holder or 'another process'}")
        self.holder = holder


class LeaseLost(TroubleError):
    """Another process has taken the work over."""


class Lease:
    """A lock on the file ``path``, held within a block.

    Entering raises `Held` when a living process holds it. A holder on another host counts as alive until this process
    has seen no change of its counter for `STALE_SECONDS`: try again until then. A thread increments the counter.
    `check` raises `LeaseLost` once another process has taken the lease over, which happens when the machine was
    suspended for longer than `STALE_SECONDS`.
    """

    _watch = Watch()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def holder(cls, path: Path) -> Process | None:
        """Return the living holder of the lease at ``path``, or None when it is free."""
        data = read_json(path)
        process = Process.read(data)
        if data is None or process is None:
            return None
        alive = process.alive()
        if alive is None:
            counter = (data.get("token"), data.get("beat"))
            alive = cls._watch.silent(str(path), counter) < STALE_SECONDS
        return process if alive else None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(self.path.with_name(f".{self.path.name}.guard")):
            if self.path.exists():
                holder = self.holder(self.path)
                if holder is not None:
                    raise Held(holder)
                if read_json(self.path) is None and self._unfilled():
                    raise Held(None)  # created by another host a moment ago, not yet filled
                self.path.unlink(missing_ok=True)
            self._watch.forget(str(self.path))
            counter = self._create()
        self._thread = threading.Thread(
            target=self._beat, args=counter, name=f"lease {self.path.name}", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.mine():
            with contextlib.suppress(OSError):
                self.path.unlink()

    def mine(self) -> bool:
        """Whether the file still names this lease."""
        try:
            data = json.loads(self.path.read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return False
        except OSError:  # the file system does not answer: assume that the lease is still ours
            return True
        return isinstance(data, dict) and data.get("token") == self._token

    def check(self) -> None:
        """Raise `LeaseLost` when another process has taken the lease over."""
        if not self.mine():
            raise LeaseLost(
                f"{self.path}: another process has taken this work over (this one was silent for more than "
                f"{STALE_SECONDS:.0f} s); what it did is left to the other"
            )

    def _unfilled(self) -> bool:
        return self._watch.silent(str(self.path), "unfilled") < EMPTY_SECONDS

    def _create(self) -> tuple[int, int]:
        """Create the complete file unless it exists; return its descriptor and the byte offset of its counter."""
        data = {**Process.here().to_json(), "token": self._token, "beat": "0" * DIGITS}
        text = json.dumps(data).encode()
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.tmp")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        try:
            os.write(descriptor, text)
            os.fsync(descriptor)
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                raise Held(self.holder(self.path)) from None
            except OSError:  # a file system without hard links
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
                temporary.replace(self.path)
        except FileExistsError:
            os.close(descriptor)
            raise Held(self.holder(self.path)) from None
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return descriptor, text.rindex(b'"' + b"0" * DIGITS) + 1

    def _beat(self, descriptor: int, offset: int) -> None:
        """Increment the counter through the descriptor of our own file, so that a successor's file is not touched."""
        beat = 0
        try:
            while not self._stop.wait(HEARTBEAT_SECONDS):
                if not self.mine():
                    return
                beat += 1
                with contextlib.suppress(OSError):
                    os.pwrite(descriptor, f"{beat:0{DIGITS}}".encode(), offset)
                    os.fsync(descriptor)
        finally:
            with contextlib.suppress(OSError):
                os.close(descriptor)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Admit one process of this host at a time. The kernel releases the lock when its process dies.

    Between hosts, the creation of the lease file itself (``O_EXCL``) decides. This guard closes the gap between
    judging a lease dead and replacing it. On a file system without locks there is no guard.
    """
    try:
        import fcntl
    except ImportError:  # pragma: no cover - Windows
        yield
        return
    with path.open("a") as handle:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@cache
def _host() -> str:
    """This host's name, with its pid namespace where there is one: pids of another container mean nothing here."""
    try:
        namespace = Path("/proc/self/ns/pid").readlink().name.partition("[")[2].rstrip("]")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}:{namespace}" if namespace else socket.gethostname()


@cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """When process ``pid`` of this host started, or None if it does not exist or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        return _start_from_ps(pid)
    return None if fields[0] in "ZX" else f"{_boot()}:{fields[19]}"


def _start_from_ps(pid: int) -> str | None:  # pragma: no cover - systems without /proc
    shown = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    state, _, start = shown.stdout.strip().partition(" ")
    return start.strip() if start and not state.startswith("Z") else None
