"""The backend simulated: runs studies of thousands of cells over virtual days in seconds, without computing anything.

Durations and failures are drawn from a seed, the cell and the job's number, so a study gives the same results however
often its controller is killed. Time is virtual: it advances when the controller waits. A finished job writes results
of a toy objective (`Toy`) into a store of its own, so that simulated numbers never stand beside real ones.

Virtual jobs end with the controller's process; the next controller finds them over.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hpdm_core.base.canonical import canonical_json
from hpdm_core.base.errors import did_you_mean
from hpdm_core.base.files import read_json, write_bytes, write_json
from hpdm_core.config.schema import Part
from hpdm_core.plugins import Plugins, build_plugins
from hpdm_core.store.failures import Cause
from hpdm_core.store.stages import Store
from hpdm_core.study.backends.interface import GRACE_SECONDS, Clock, Job, SchedulerStatus

__all__ = ["Simulated", "SimulatedOptions", "Toy", "VirtualClock", "fate"]

WRITTEN: tuple[Cause, ...] = ("code error", "diverged")
"""Failures that a worker reports in ``error.json``; the scheduler reports the others."""
CAUSES: tuple[Cause, ...] = (*WRITTEN, "out of memory", "lost node", "preempted", "killed")
BEAT_SECONDS = 15.0
COLUMNS = {"held_out_loss": {"parents": "clean", "sigma_eff": None}}
"""Columns that the report expects in a metric's rows."""
FINISHED = "finished.log"
"""File in the train stage's folder with one line per job that finished; a second line means work done twice."""
POINTS = 100
"""Number of lines of a finished metrics.jsonl."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Axis(_Frozen):
    """A key's term in the toy objective: ((x - best) / width) squared; with ``log``, of log10(x) and log10(best)."""

    best: float
    width: Annotated[float, Field(gt=0)] = 1.0
    log: bool = False


def _known(failures: dict[str, float]) -> dict[str, float]:
    for name in failures:
        if name not in CAUSES:
            raise ValueError(
                f"unknown class '{name}'{did_you_mean(name, CAUSES)}; classes: {', '.join(CAUSES)}"
            )
    if sum(failures.values()) > 1:
        raise ValueError(f"should sum to 1 at most, sum to {sum(failures.values()):g}")
    return failures


class SimulatedOptions(_Frozen):
    """Options of the backend simulated."""

    slots: Annotated[int, Field(gt=0)] = 64
    """Cells that run at a time."""
    seconds: Annotated[float, Field(gt=0)] = 600.0
    """Median duration of a cell; durations are log-normal."""
    spread: Annotated[float, Field(ge=0)] = 0.5
    """Standard deviation of the duration's logarithm."""
    interval: Annotated[float, Field(gt=0)] = 30.0
    """Virtual seconds between two rounds of the controller."""
    failures: Annotated[dict[str, Annotated[float, Field(ge=0, le=1)]], AfterValidator(_known)] = Field(
        default_factory=dict
    )
    """Class of failure -> its probability in each job."""
    seed: int = 0
    toy: dict[str, Axis] = Field(default_factory=dict)
    """Dotted key -> its term in the toy objective."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of the objective between seeds."""
    curve: bool = False
    """Whether running cells write metrics.jsonl, for pruners."""


class VirtualClock:
    """A clock that advances only in `sleep`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Virtual seconds since the clock was made."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Advance the time by ``seconds``."""
        self.now += seconds


def fate(options: SimulatedOptions, cell: str, attempt: int) -> tuple[float, Cause | None]:
    """Return the seconds that job number ``attempt`` (from 1) of ``cell`` takes, and why it fails; None if it does not.

    A job that fails does so after a uniformly drawn part of its duration.
    """
    draws = _uniform(f"{options.seed}/{cell}/{attempt}", 4)
    normal = math.sqrt(-2 * math.log(1 - draws[0])) * math.cos(2 * math.pi * draws[1])
    seconds = options.seconds * math.exp(options.spread * normal)
    threshold = 0.0
    for cause in CAUSES:
        threshold += options.failures.get(cause, 0.0)
        if draws[2] < threshold:
            return seconds * draws[3], cause
    return seconds, None


def _uniform(name: str, count: int) -> list[float]:
    digest = hashlib.sha256(name.encode()).digest()
    return [int.from_bytes(digest[6 * i : 6 * i + 6], "big") / 2**48 for i in range(count)]


@dataclass
class _Running:
    job: Job
    begun: float
    ends: float
    cause: Cause | None
    beat: int = 0
    beaten: float = -math.inf
    spec: dict[str, Any] = field(default_factory=dict)
    over: bool = False


class Simulated:
    """Jobs on a virtual clock; see the module's docstring.

    ``seconds`` and ``busy`` are the wall-clock and the CPU time that the simulation has taken so far.
    """

    attached = False
    queued = False
    made_up = True
    grace = GRACE_SECONDS

    def __init__(self, options: SimulatedOptions, *, clock: VirtualClock | None = None) -> None:
        self.clock: Clock = clock or VirtualClock()
        self.gpus = 1
        self.slots = options.slots
        self.seconds = 0.0
        self.busy = 0.0
        self.polls = 0
        self._options = options
        self._toy = Toy(options)
        self._running: dict[str, _Running] = {}

    def check(self) -> None:
        """Do nothing: every machine can simulate."""

    def free_slots(self, under_way: Sequence[Job]) -> int:
        """Return the number of free slots."""
        return self.slots - len(under_way)

    def interval(self, under_way: int) -> float:
        """Return the option ``interval``, in virtual seconds."""
        return self._options.interval

    def submit(self, jobs: Sequence[Job]) -> None:
        """Start the jobs now, in virtual time."""
        started = time.perf_counter(), time.process_time()
        for job in jobs:
            seconds, cause = fate(self._options, job.cell, job.number)
            write_json(job.folder / "job.json", {"simulated": seconds}, durable=False)
            now = self.clock.monotonic()
            self._running[job.id] = _Running(job, now, now + seconds, cause)
        self._count(*started)

    def poll(self, jobs: Sequence[Job]) -> Mapping[str, SchedulerStatus]:
        """End the jobs whose time has passed, and return each job's status; jobs of another process are over."""
        started = time.perf_counter(), time.process_time()
        self.polls += 1
        seen = {job.id: self._seen(job) for job in jobs}
        self._count(*started)
        return seen

    def _count(self, seconds: float, busy: float) -> None:
        self.seconds += time.perf_counter() - seconds
        self.busy += time.process_time() - busy

    def cancel(self, jobs: Sequence[Job], *, now: bool = False) -> bool:
        """End the jobs at once."""
        for job in jobs:
            running = self._running.get(job.id)
            if running is not None and not running.over:
                running.over, running.cause = True, "cancelled"
        return True

    def _seen(self, job: Job) -> SchedulerStatus:
        running = self._running.get(job.id)
        if running is None:
            return SchedulerStatus(phase="over", word="of another process", cause="killed")
        if running.over:
            return SchedulerStatus(phase="over", cause=running.cause)
        now = self.clock.monotonic()
        if now - running.beaten >= BEAT_SECONDS:
            self._beat(running, now)
        if now < running.ends:
            return SchedulerStatus(phase="alive")
        running.over = True
        if running.cause is None:
            self._toy.finish(self._spec(running), number=job.number, seconds=running.ends - running.begun)
            running.spec = {}  # thousands of ended jobs stay in memory, and their specs are not needed
            return SchedulerStatus(phase="over")
        if running.cause in WRITTEN:
            error = {"kind": running.cause, "class": "Simulated", "message": f"simulated: {running.cause}"}
            write_json(job.folder / "error.json", error, durable=False)
            return SchedulerStatus(phase="over")
        return SchedulerStatus(phase="over", cause=running.cause, word="SIMULATED")

    def _beat(self, running: _Running, now: float) -> None:
        running.beat, running.beaten = running.beat + 1, now
        beat = {"beat": running.beat, "seconds": now - running.begun, "born": running.begun}
        if self._options.curve:
            part = min(1.0, (now - running.begun) / (running.ends - running.begun))
            beat.update(self._toy.train(self._spec(running), number=running.job.number, part=part))
        # Only this process reads the file, so it need not be written atomically.
        (running.job.folder / "heartbeat.json").write_text(json.dumps(beat))

    def _spec(self, running: _Running) -> dict[str, Any]:
        if not running.spec:
            running.spec = read_json(running.job.spec) or {}
        return running.spec


class Toy:
    """Writes results that look like a cell's. Every metric's value is a quadratic bowl over the keys of
    ``options.toy``.
    """

    def __init__(self, options: SimulatedOptions) -> None:
        self._options = options
        self._plugins: dict[tuple[str, ...], Plugins] = {}
        self._names: dict[str, str] = {}

    def value(self, config: Mapping[str, Any]) -> float:
        """Return the objective of a cell's configuration (plain JSON): 0.1 at its minimum, before noise."""
        total = 0.1
        for key, axis in self._options.toy.items():
            found: Any = config
            for step in key.split("."):
                found = found[step]
            x, best = float(found), axis.best
            if axis.log:
                x, best = math.log10(x), math.log10(best)
            total += ((x - best) / axis.width) ** 2
        noise = _uniform(f"{self._options.seed}/noise/{config['seed']}", 1)[0]
        return total + self._options.noise * math.sqrt(12) * (noise - 0.5)

    def train(self, spec: Mapping[str, Any], *, number: int, part: float) -> dict[str, Any]:
        """Write metrics.jsonl for the first ``part`` (0..1) of the training; return the progress there."""
        config = spec["config"]
        steps = config["training"]["steps"]
        reached, every = int(part * steps), max(1, steps // POINTS)
        final = self.value(config)
        lines = [
            json.dumps({"step": step, "loss": [final + 2.0 * math.exp(-5 * step / steps)]}) + "\n"
            for step in range(every, reached + 1, every)
        ]
        attempt = self._stage(spec, "train").folder / "attempts" / str(number)
        attempt.mkdir(parents=True, exist_ok=True)
        write_bytes(attempt / "metrics.jsonl", "".join(lines).encode(), durable=False)
        return {"stage": "train", "step": reached, "steps": steps}

    def finish(self, spec: Mapping[str, Any], *, number: int, seconds: float) -> None:
        """Write the result of every stage that has none."""
        config = spec["config"]
        value, steps = self.value(config), config["training"]["steps"]
        speed = 10.0 / config["model"]["blocks"]
        common = {"simulated": True, "attempts": number}
        if self._options.curve:
            self.train(spec, number=number, part=1.0)
        made = {
            "train": {"steps": steps, "loss": [value], "videos_per_second": speed, "wall_seconds": seconds},
            "samples": {"samples": config["evaluation"]["samples"], "wall_seconds": 0.0},
        }
        for kind, result in made.items():
            self._write(self._stage(spec, kind), {**result, **common})
        levels = config["model"]["levels"]
        for part, key in zip(config["evaluation"]["metrics"], spec["keys"]["evaluations"], strict=True):
            name = self._name(part, spec)
            rows: list[dict[str, Any]] = [
                {
                    "metric": name,
                    "level": level,
                    "value": value + 0.1 * (levels - 1 - level),
                    **COLUMNS.get(name, {}),
                }
                for level in range(levels)
            ]
            if name == "throughput":
                rows = [{"metric": f"{name}.videos_per_second", "level": None, "value": speed}]
            protocol = {"metric": name, "simulated": "made up, nothing was computed"}
            stage = Store(Path(spec["store"])).stage("evaluations", key)
            self._write(stage, {"rows": rows, "protocol": protocol, "wall_seconds": 0.0, **common})
        with (self._stage(spec, "train").folder / FINISHED).open("a") as log:
            log.write(f"{number}\n")

    def _stage(self, spec: Mapping[str, Any], kind: Any) -> Any:
        return Store(Path(spec["store"])).stage(kind, spec["keys"][kind])

    def _write(self, stage: Any, result: Mapping[str, Any]) -> None:
        if not (stage.folder / "result.json").exists():
            stage.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(stage.folder / "result.json", json.dumps(result).encode(), durable=False)

    def _name(self, part: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
        """Return the metric's name as it stands in its rows."""
        text = canonical_json(part)
        if text not in self._names:
            plugins = tuple(spec["plugins"])
            if plugins not in self._plugins:
                self._plugins[plugins] = build_plugins(plugins)
            made = self._plugins[plugins].make("metrics", Part.model_validate(part))
            self._names[text] = str(made.name)
        return self._names[text]
