"""Query the state of SLURM jobs: squeue first, then sacct for jobs that squeue no longer lists.

submitit's own watcher asks sacct alone, takes states that it does not know (CONFIGURING, SUSPENDED, NODE_FAIL) for
ended ones, and reports nothing where accounting is off. squeue lists an ended job for a few minutes (MinJobAge);
polling within that time shows how jobs ended on a cluster without accounting too. When a command gives no answer, a
job's phase is ``unknown``.
"""

import getpass
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hpdm_core.store.failures import Cause
from hpdm_core.study.backends.interface import Phase, SchedulerStatus

__all__ = ["Line", "Queue", "outside", "run", "seen_of"]

WAITING = {
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESV_DEL_HOLD",
    "SPECIAL_EXIT",
}
ALIVE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
OVER: Mapping[str, Cause | None] = {
    "BOOT_FAIL": "lost node",
    "CANCELLED": "cancelled",
    "COMPLETED": None,
    "DEADLINE": "time limit",
    "FAILED": None,
    "NODE_FAIL": "lost node",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "REVOKED": "cancelled",
    "TIMEOUT": "time limit",
}
UNCERTAIN = {"NODE_FAIL", "BOOT_FAIL"}
"""States of a node that does not answer: its processes may still run, and SLURM may still requeue the job."""

COLUMNS = ("JobArrayID:40", "State:24", "exit_code:12", "Name:40", "Reason:80")
ANSWER_SECONDS = 60
NO_ACCOUNTS_SECONDS = 300.0
"""How long to wait before asking sacct again after it gave no answer."""
AT_ONCE = 300
"""Most job numbers in one command line."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One job as squeue or sacct shows it; ``number`` is 77, or 77_3 in an array."""

    number: str
    state: str
    code: int = 0
    """Exit code of its script; 128 + n after signal n."""
    name: str = ""
    reason: str = ""


def seen_of(line: Line) -> SchedulerStatus:
    """Return the status that a line means."""
    state = line.state.split()[0].rstrip("+") if line.state else ""
    word = state if line.reason in ("", "None") else f"{state} ({line.reason})"
    phase: Phase = "over" if state in OVER else "alive" if state in ALIVE else "waiting"
    if phase == "over":
        killed = _signal_name(line.code - 128) if state == "FAILED" and line.code > 128 else ""
        cause = OVER[state]
        if line.reason == "OutOfMemory":
            cause = "out of memory"
        return SchedulerStatus(
            phase="over", word=word, cause=cause, certain=state not in UNCERTAIN, signal=killed
        )
    if state not in ALIVE | WAITING:
        return SchedulerStatus(phase="unknown", word=word or "no state")
    return SchedulerStatus(phase=phase, word="" if state == "RUNNING" else word)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Queue:
    """Caches squeue's answer; asks at most once per ``seconds``, and whenever it is asked about new jobs."""

    def __init__(self, *, seconds: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._asked = float("-inf")
        self._lines: dict[str, Line] | None = None
        self._known: set[str] = set()
        self._over: dict[str, Line] = {}
        """Number -> how the job ended, for jobs that squeue no longer lists and sacct knows."""
        self._accounts_asked = float("-inf")
        """When sacct last gave no answer: accounting may be off, or its database was briefly unavailable."""
        self.problem = "never asked"
        """Why there is no answer."""

    def look(self, numbers: Collection[str]) -> dict[str, SchedulerStatus]:
        """Return number -> status of the jobs ``numbers``."""
        # An answer from before a job was submitted cannot contain it: ask again for new numbers.
        if not self._known.issuperset(numbers) or self._clock() - self._asked >= self.seconds:
            self.ask()
        self._known.update(numbers)
        if self._lines is None:
            return {number: SchedulerStatus(phase="unknown", word=self.problem) for number in numbers}
        gone = [number for number in numbers if number not in self._lines and number not in self._over]
        if gone:
            self._over.update(self._account(gone))
        found = {}
        for number in numbers:
            line = self._lines.get(number) or self._over.get(number)
            if line is not None:
                found[number] = seen_of(line)
            else:  # neither squeue nor sacct knows it: judge it by its files and heartbeat
                found[number] = SchedulerStatus(phase="over", word="not in the queue any more", certain=False)
        return found

    def find(self, name: str) -> dict[str, Line] | None:
        """Ask squeue now and return number -> line of the jobs called ``name``; None without an answer."""
        self.ask()
        if self._lines is None:
            return None
        return {number: line for number, line in self._lines.items() if line.name == name}

    def ask(self) -> None:
        """Ask squeue about this user's jobs."""
        self._asked = self._clock()
        command = ["squeue", "--noheader", "--states=all", "--array", f"--user={user()}"]
        text, self.problem = run([*command, "--Format=" + ",".join(COLUMNS)])
        if text is None:
            self._lines = None
            return
        self._lines = {line.number: line for line in map(_of_squeue, text.splitlines()) if line is not None}

    def _account(self, numbers: Sequence[str]) -> dict[str, Line]:
        """Return how jobs ended according to sacct; empty where there is no accounting."""
        found: dict[str, Line] = {}
        if self._clock() - self._accounts_asked < NO_ACCOUNTS_SECONDS:
            return found
        for begin in range(0, len(numbers), AT_ONCE):
            command = ["sacct", "--noheader", "--parsable2", "--allocations"]
            asked = ",".join(numbers[begin : begin + AT_ONCE])
            text, _ = run([*command, "--format=JobID,State,ExitCode", f"--jobs={asked}"])
            if text is None:
                self._accounts_asked = self._clock()
                return found
            for row in text.splitlines():
                found.update({line.number: line for line in _of_sacct(row) if line.number in numbers})
        return {number: line for number, line in found.items() if seen_of(line).phase == "over"}


def _of_squeue(text: str) -> Line | None:
    words, begin = [], 0
    for column in COLUMNS:
        width = int(column.partition(":")[2])
        words.append(text[begin : begin + width].strip())
        begin += width
    number, state, code, name, reason = words
    if not number:
        return None
    status = int(code) if code.isdecimal() else 0
    return Line(number=number, state=state, code=_exit_code(status), name=name, reason=reason)


def _exit_code(status: int) -> int:
    """Return the shell's exit code for a wait status, which squeue shows."""
    return 128 + (status & 127) if status & 127 else status >> 8


def _of_sacct(row: str) -> list[Line]:
    fields = row.split("|")
    if len(fields) < 3:
        return []
    code, _, signum = fields[2].partition(":")
    number = int(signum) if signum.isdecimal() else 0
    shown = 128 + number if number else int(code) if code.isdecimal() else 0
    return [Line(number=each, state=fields[1], code=shown) for each in _tasks(fields[0])]


def _tasks(number: str) -> list[str]:
    """Return 12_0, 12_1, 12_2 and 12_5 for 12_[0-2,5%2], and any other number as it is.

    sacct shows the tasks of an array that never began in one row, and not every release has an option to list them.
    """
    job, bracket, tasks = number.partition("_[")
    if not bracket:
        return [number]
    found = []
    for piece in tasks.partition("]")[0].partition("%")[0].split(","):
        first, _, last = piece.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found += [f"{job}_{task}" for task in range(int(first), int(last or first) + 1)]
    return found


def user() -> str:
    """Return this user's name, or the user id if it has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def run(command: Sequence[str], *, seconds: float = ANSWER_SECONDS) -> tuple[str | None, str]:
    """Run a SLURM command; return (its output, ""), or (None, why it failed in one line)."""
    try:
        shown = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env=outside(os.environ)
        )
    except FileNotFoundError:
        return None, f"{command[0]} is not on this machine's PATH"
    except subprocess.TimeoutExpired:
        return None, f"{command[0]} gave no answer within {seconds:.0f} s"
    except OSError as error:
        return None, f"{command[0]}: {error.strerror}"
    if shown.returncode:
        lines = [line for line in shown.stderr.splitlines() if line.strip()]
        return None, f"{command[0]}: {(lines or ['exit code ' + str(shown.returncode)])[-1].strip()}"
    return shown.stdout, ""


KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
ALLOCATION = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")
GROUP = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def outside(environment: Mapping[str, str]) -> dict[str, str]:
    """Return ``environment`` without the variables that a surrounding SLURM allocation or torchrun has set.

    A job that is submitted from within another job would inherit its CPU binding, memory and task numbers.
    """
    return {
        name: value
        for name, value in environment.items()
        if name in KEPT or not (name.startswith(ALLOCATION) or name in GROUP)
    }


def chunks(items: Sequence[str], size: int = AT_ONCE) -> Iterable[Sequence[str]]:
    """Yield ``items`` in pieces of ``size``."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
