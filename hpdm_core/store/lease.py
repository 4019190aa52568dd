"""Who is working on what: process identities, and leases that outlive no process.

A lease is a file that names its holder (host, pid, start of the process) and holds a counter that the holder
moves on every few seconds. It is free when the process is dead (same host), or when its counter has not moved
for a while on the monotonic clock of the one who looks (another host): clocks of two hosts are never compared.
The same class locks a stage of the store against a second worker and a study against a second controller.
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
    """One process for all time: a pid alone is given to another process sooner or later."""

    host: str
    pid: int
    start: str
    """When the process started, as its system tells it: a boot's id and clock ticks, or a date."""

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
        """Whether the process still runs; None when it belongs to another host and cannot be asked."""
        if self.host != _host():
            return None
        return _start_of(self.pid) == self.start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.partition(':')[0]}"


class Watch:
    """For how long things have not changed, on this process's own clock."""

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
        """Begin again with ``name``."""
        self._seen.pop(name, None)


class Held(Exception):
    """The lease belongs to another process that lives, or of which it is not known yet that it does not."""

    def __init__(self, holder: Process | None) -> None:
        super().__init__(f"held by {holder or 'another process'}")
        self.holder = holder


class LeaseLost(TroubleError):
    """Another process has taken the work over."""


class Lease:
    """The right to work behind ``path``, while the block lasts.

    Entering raises `Held` when a living process has it. A holder on another host is alive until it has been
    watched for `STALE_SECONDS` without a move of its counter: whoever wants to know tries again. A thread
    moves the counter; `check` raises `LeaseLost` once the lease was taken over, which happens to a machine
    that slept longer than that.
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
        except OSError:  # the file system does not answer: that says nothing of the lease
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
        """Make the file, whole, unless there is one; return its descriptor and where its counter stands."""
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
        """Move the counter on, in our own file: one that has replaced it is not touched."""
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
    """Let one process of this host in at a time. The kernel frees it when a process dies, however it dies.

    Between hosts the creation of the lease file itself (``O_EXCL``) decides; this guard closes the gap
    between judging a lease dead and replacing it. A file system without locks goes without.
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
    """This host, and the pid namespace when there are such: pids of another container mean nothing here."""
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
    """When process ``pid`` of this host started, or None when it is gone or only waits to be buried (a
    zombie).
    """
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
