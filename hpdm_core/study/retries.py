"""What follows when an attempt ended without its results, by class of failure; and a study's budgets.

| cause                         | what follows                                                                |
|-------------------------------|-----------------------------------------------------------------------------|
| lost node, preempted          | always again, from the newest checkpoint                                    |
| out of memory                 | once again, with half the micro-batch and twice the accumulation            |
| time limit                    | again while each attempt gets further than the one before                   |
| never started                 | three times again: a node that starts nothing is the cluster's affair       |
| code error, diverged          | never without ``--retry-failed``: the same again would end the same way     |
| killed, cancelled, full disk  | not in this command: somebody, or the disk, said so; the next one goes on   |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpdm_core.files import read_json
from hpdm_core.study.states import Cause

if TYPE_CHECKING:
    from hpdm_core.study.jobs import Job

__all__ = ["Mark", "Outcome", "halved", "mark_of", "micro_batch", "pause", "refusal", "try_again"]

Mark = list[int]
NEVER_STARTED_LIMIT = 3
PAUSE_SECONDS = 10.0
PAUSE_DOUBLINGS = 6


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the controller made of an attempt, as its ``outcome.json`` keeps it."""

    state: str
    cause: Cause | None
    reason: str
    begun: Mark
    """How far the cell was when the attempt was submitted, see `mark_of`."""
    reached: Mark
    """How far it was at its end."""
    micro_batch: int | None = None
    """The micro-batch that the attempt was given because an earlier one ran out of memory."""

    def to_json(self) -> dict[str, Any]:
        """Return the plain form that `read` understands."""
        return {
            "state": self.state,
            "cause": self.cause,
            "reason": self.reason,
            "begun": self.begun,
            "reached": self.reached,
            "micro_batch": self.micro_batch,
        }

    @classmethod
    def read(cls, job: "Job") -> "Outcome | None":
        """Return the outcome of ``job``, or None while it has none."""
        data = read_json(job.folder / "outcome.json")
        if data is None or not {"state", "cause", "reason"} <= data.keys():
            return None
        return cls(
            state=str(data["state"]),
            cause=data["cause"],
            reason=str(data["reason"]),
            begun=list(data.get("begun") or []),
            reached=list(data.get("reached") or []),
            micro_batch=data.get("micro_batch"),
        )


def mark_of(cell: Any) -> Mark:
    """Return how far ``cell`` is: stages done (as minus those missing), newest checkpoint, videos sampled.

    Greater is further. Names of files only; nothing is read.
    """
    steps = cell.missing()
    checkpoint = videos = 0
    for step in steps:
        found = (path.name for path in step.stage.folder.glob("attempts/*/checkpoints/*"))
        checkpoint = max([checkpoint, *(int(name) for name in found if name.isdecimal())])
        videos += sum(1 for _ in step.stage.folder.glob("*.safetensors"))
    return [-len(steps), checkpoint, videos]


def try_again(outcomes: Sequence[Outcome]) -> bool:
    """Return whether a cell is to be tried again in the same command, after ``outcomes``, oldest first."""
    if not outcomes:
        return True
    last = outcomes[-1]
    if last.cause in ("lost node", "preempted"):
        return True
    if last.cause == "out of memory":
        return sum(each.cause == "out of memory" for each in outcomes) == 1
    if last.cause == "time limit":
        return last.reached > last.begun
    if last.cause == "never started":
        recent = outcomes[-NEVER_STARTED_LIMIT:]
        return len(recent) < NEVER_STARTED_LIMIT or any(each.cause != "never started" for each in recent)
    return False


def pause(outcomes: Sequence[Outcome]) -> float:
    """Return the seconds to wait before a cell is tried again: none, unless it gets nowhere twice in a row."""
    stuck = 0
    for each in reversed(outcomes):
        if each.reached > each.begun:
            break
        stuck += 1
    return PAUSE_SECONDS * 2 ** min(stuck - 2, PAUSE_DOUBLINGS) if stuck > 1 else 0.0


def refusal(outcomes: Sequence[Outcome]) -> str:
    """Return what to add to the last reason when `try_again` says no, for people."""
    last = outcomes[-1]
    if last.cause == "out of memory":
        smaller = f" also with micro-batches of {last.micro_batch}" if last.micro_batch else ""
        return f"{smaller}; lower runtime.micro_batch, or ask for more memory"
    if last.cause == "time limit":
        return " without getting any further; raise backend.time"
    if last.cause == "never started":
        return f", {NEVER_STARTED_LIMIT} times in a row"
    if last.cause in ("killed", "preempted"):
        return "; the same command goes on"
    return ""


def halved(spec: Mapping[str, Any]) -> tuple[dict[str, Any], int] | None:
    """Return ``spec`` with half the micro-batch, and that number; None when it cannot be halved.

    The global batch stays: the trainer sums as many micro-batches as it takes.
    """
    config = spec.get("config")
    if not isinstance(config, Mapping) or "batch" not in config.get("training", {}):
        return None
    runtime = config.get("runtime", {})
    if "micro_batch" not in runtime:
        return None
    now = int(runtime["micro_batch"] or config["training"]["batch"])
    if now < 2:
        return None
    return micro_batch(spec, (now + 1) // 2), (now + 1) // 2


def micro_batch(spec: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return ``spec`` with micro-batches of ``number`` videos."""
    config = spec["config"]
    return {**spec, "config": {**config, "runtime": {**config["runtime"], "micro_batch": number}}}
