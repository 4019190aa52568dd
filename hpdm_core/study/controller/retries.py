"""Whether and how a cell is retried when its job ended without its results.

| cause                         | retry                                                                       |
|-------------------------------|-----------------------------------------------------------------------------|
| lost node, preempted          | always, from the newest checkpoint                                          |
| out of memory                 | with half the batch (see `smaller`), until that is 1; once in an evaluation |
| time limit                    | while each job gets further than the one before                             |
| never started                 | until three jobs in a row have not started                                  |
| code error, diverged          | only with ``--retry-failed``: the same job would fail again                 |
| killed, cancelled, full disk  | by the next command, not in this one                                        |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpdm_core.base.files import read_json
from hpdm_core.cell.mark import Mark
from hpdm_core.store.failures import Cause
from hpdm_core.store.stages import Kind

if TYPE_CHECKING:
    from hpdm_core.study.backends.interface import Job

__all__ = ["Outcome", "pause", "refusal", "smaller", "told", "try_again", "with_runtime"]

NEVER_STARTED_LIMIT = 3
PAUSE_SECONDS = 10.0
PAUSE_DOUBLINGS = 6


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The controller's record of an ended job, stored in the job's ``outcome.json``."""

    state: str
    cause: Cause | None
    reason: str
    begun: Mark
    """How far the cell was when the job was submitted, see `hpdm_core.cell.mark.mark_of`."""
    reached: Mark
    """How far the cell was when the job ended."""
    stage: Kind | None = None
    """The stage that the job worked on when it ended without its results."""
    smaller: Mapping[str, int] = field(default_factory=dict)
    """Settings of ``runtime:`` that the job was given because an earlier one ran out of memory."""

    def to_json(self) -> dict[str, Any]:
        """Return the plain form that `read` understands."""
        return {
            "state": self.state,
            "cause": self.cause,
            "reason": self.reason,
            "begun": self.begun,
            "reached": self.reached,
            "stage": self.stage,
            "smaller": dict(self.smaller),
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
            stage=data.get("stage"),
            smaller=data.get("smaller") or {},
        )


def try_again(outcomes: Sequence[Outcome]) -> bool:
    """Return whether a cell is to be tried again in the same command, after ``outcomes``, oldest first."""
    if not outcomes:
        return True
    last = outcomes[-1]
    if last.cause in ("lost node", "preempted"):
        return True
    if last.cause == "out of memory":
        evaluating = [each for each in outcomes if each.stage == "evaluations"]
        return last.stage != "evaluations" or sum(each.cause == last.cause for each in evaluating) == 1
    if last.cause == "time limit":
        return last.reached > last.begun
    if last.cause == "never started":
        recent = outcomes[-NEVER_STARTED_LIMIT:]
        return len(recent) < NEVER_STARTED_LIMIT or any(each.cause != "never started" for each in recent)
    return False


def pause(outcomes: Sequence[Outcome]) -> float:
    """Return the seconds to wait before a cell is tried again: 0 unless two jobs in a row made no progress.

    A job that ran out of memory ends this count, because the next one runs with smaller settings.
    """
    stuck = 0
    for each in reversed(outcomes):
        if each.reached > each.begun or each.cause == "out of memory":
            break
        stuck += 1
    return PAUSE_SECONDS * 2 ** min(stuck - 2, PAUSE_DOUBLINGS) if stuck > 1 else 0.0


def refusal(outcomes: Sequence[Outcome]) -> str:
    """Return text for the user to append to the last reason when the cell is not tried again."""
    last = outcomes[-1]
    if last.cause == "out of memory":
        also = f" also with {told(last.smaller)}" if last.smaller else ""
        return f"{also}; ask for more memory, or make the model or its videos smaller"
    if last.cause == "time limit":
        return " without getting any further; raise backend.time"
    if last.cause == "never started":
        return f", {NEVER_STARTED_LIMIT} times in a row"
    if last.cause in ("killed", "preempted"):
        return "; the same command goes on"
    return ""


WORDS = {
    "micro_batch": "micro-batches of {}",
    "tile_batch": "tile batches of {}",
    "sample_batch": "sample batches of {}",
}


def told(settings: Mapping[str, int]) -> str:
    """Return the settings from `smaller` as text for the user."""
    return " and ".join(WORDS[name].format(number) for name, number in settings.items())


def smaller(spec: Mapping[str, Any], stage: Kind | None) -> dict[str, int] | None:
    """Return settings of ``runtime:`` that take less memory than those of a job's ``spec``; None if nothing is left.

    ``stage`` is the stage that ran out of memory. In training, ``micro_batch`` becomes half of what one process takes
    through the network at once: its share of the batch, or ``micro_batch`` where that is less. The global batch stays
    the same: the trainer accumulates over more micro-batches. In sampling, ``tile_batch`` is halved, and once that is
    1, ``sample_batch``. In an evaluation, which may sample too, both are halved. No key depends on these settings.
    """
    config = spec.get("config")
    if not isinstance(config, Mapping) or "training" not in config:
        return None
    runtime = config["runtime"]
    if stage in ("train", None):
        share = -(-int(config["training"]["batch"]) // int(spec.get("processes", 1)))
        return _half("micro_batch", min(runtime["micro_batch"] or share, share))
    videos = min(runtime["sample_batch"], config["evaluation"]["samples"])
    tiles = _half("tile_batch", min(runtime["tile_batch"], videos * _tiles(config)))
    fewer = _half("sample_batch", videos)
    if stage == "evaluations":
        return {**(tiles or {}), **(fewer or {})} or None
    return tiles or fewer


def _half(name: str, number: int) -> dict[str, int] | None:
    return {name: (number + 1) // 2} if number > 1 else None


def _tiles(config: Mapping[str, Any]) -> int:
    """Return the number of tiles of the finest level, which has the most."""
    from hpdm_core.pyramid import Pyramid

    model = config["model"]
    video, patch, token = (tuple(model[name]) for name in ("video", "patch", "token"))
    pyramid = Pyramid(video=video, patch=patch, token=token, levels=model["levels"])
    return len(pyramid.tiles(pyramid.levels - 1, config["sampling"]["overlap"]))


def with_runtime(spec: Mapping[str, Any], settings: Mapping[str, int]) -> dict[str, Any]:
    """Return ``spec`` with each setting of ``runtime:`` lowered to that in ``settings``, and noted in ``smaller``."""
    if not settings:
        return dict(spec)
    config = spec["config"]
    runtime = config["runtime"]
    least = {name: min(number, runtime[name] or number) for name, number in settings.items()}
    return {**spec, "config": {**config, "runtime": {**runtime, **least}}, "smaller": least}
