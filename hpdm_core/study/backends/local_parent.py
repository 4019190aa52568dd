"""The parent process of a worker on this machine: records how the worker ended and enforces its memory limit.

Run as a script, ``local_parent.py FOLDER OPTIONS COMMAND...``; OPTIONS is JSON: ``memory_bytes`` (the command is
killed above it) and ``cores`` (those that it may use). Writes FOLDER/exit.json. It imports nothing of this package, so
it starts in milliseconds and takes little memory beside a worker.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from types import FrameType

__all__ = ["main"]

POLL_SECONDS = 0.2
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Run the command to its end and return its exit code, 128 + n after signal n."""
    folder, options, command = arguments[0], json.loads(arguments[1]), arguments[2:]
    limit = options.get("memory_bytes")
    cores = options.get("cores")
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    kills = _kernel_kills()
    child = subprocess.Popen(command, preexec_fn=_die_with_parent)

    def forward(signum: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signum)

    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), forward)

    guarded = None
    while True:
        try:
            code = child.wait(timeout=POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            used = _resident(child.pid) if limit else 0
            if limit and used > limit and guarded is None:
                guarded = used
                child.kill()
    word = {"pid": child.pid, "code": max(code, 0), "signal": "", "cause": None, "memory_bytes": guarded}
    if code < 0:
        with contextlib.suppress(ValueError):
            word["signal"] = signal.Signals(-code).name
        word["signal"] = word["signal"] or f"signal {-code}"
    if guarded is not None or (code == -signal.SIGKILL and _kernel_kills() > kills):
        word["cause"] = "out of memory"
    with contextlib.suppress(OSError):
        temporary = os.path.join(folder, f".exit.json.{os.getpid()}.tmp")  # noqa: PTH118
        with open(temporary, "w") as file:  # noqa: PTH123
            json.dump(word, file)
        os.replace(temporary, os.path.join(folder, "exit.json"))  # noqa: PTH105, PTH118
    return code if code >= 0 else 128 - code


def _die_with_parent() -> None:
    """In the worker: ask the kernel to kill it when this parent dies, since nothing could then record how it ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _resident(pid: int) -> int:
    """Resident memory of a process in bytes; 0 where it cannot be read."""
    try:
        with open(f"/proc/{pid}/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * PAGE
    except (OSError, ValueError, IndexError):
        return 0


def _kernel_kills() -> int:
    """How many processes this machine's kernel has killed for lack of memory since it booted."""
    try:
        with open("/proc/vmstat") as file:  # noqa: PTH123
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
