"""One cell: a configuration that is trained once, sampled and evaluated. Cells share stages in the store by key.

`Cell.run` runs only the missing stages. It may be killed at any moment and run again. The worker process that calls it
is in `hpdm_core.study.worker.run_cell`. With several processes (`hpdm_core.base.distributed`), the main one claims the
stages and writes the results; the others do their share of each stage.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpdm_core.base import distributed
from hpdm_core.base.canonical import canonical_json
from hpdm_core.base.errors import TroubleError
from hpdm_core.base.files import read_json, write_json
from hpdm_core.cell.keys import ArmKeys, Keys
from hpdm_core.config.schema import SCHEMA_VERSION, CellConfig, Part
from hpdm_core.plugins import Plugins, build_plugins
from hpdm_core.plugins.observers import Observers
from hpdm_core.store.heartbeat import Progress, Reporter
from hpdm_core.store.lease import Held, Process
from hpdm_core.store.stages import Attempt, Kind, Stage, Store

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.assembly.denoiser import Denoiser

__all__ = ["Cell", "Keys", "Step"]

WAIT_SECONDS = 0.5
MEASURED_ALONE = ("configuration", "training")
"""The `needs` of metrics that the main process evaluates alone."""
SHEET_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage of one cell: its displayed name, its place in the store, and the function that runs it once claimed."""

    name: str
    stage: Stage
    run: Callable[[Attempt, Progress], Mapping[str, Any]]
    cell: Cell
    """The cell whose stage it is: the training of a base model belongs to the base's cell."""


class Cell:
    """One model with one seed: three stages, train -> sample -> evaluate each metric.

    ``arm`` is its displayed name; neither ``arm`` nor ``study`` is part of any key. ``store`` is the root of the store.
    ``contents``: recorded fingerprints of paths named in the configuration (`places_in`) that no longer exist; without
    it they are taken from the spec files in the store, so that finished work is still found. ``arm_keys``: the keys of
    a cell of the same arm in the same store, which need not be computed again. ``base``: the cell from whose model
    this one starts, if ``training.start_from`` names an arm; it is trained first if it is missing.
    """

    def __init__(
        self,
        config: CellConfig,
        plugins: Plugins,
        *,
        store: Path,
        arm: str = "run",
        study: str = "",
        contents: Mapping[str, str] | None = None,
        arm_keys: ArmKeys | None = None,
        base: Cell | None = None,
    ) -> None:
        self.config = config
        self.plugins = plugins
        self.arm = arm
        self.seed = config.seed
        self.study = study
        self.store = Store(store)
        self.contents = dict(contents or {})
        self.base = base
        self.arm_keys: ArmKeys = arm_keys or ArmKeys(
            config, plugins, self._known, base=None if base is None else base.arm_keys
        )
        self.observers = Observers(plugins, self)
        self.at: Kind | None = None
        """The kind of the stage that this process works on; None outside the stages."""

    @property
    def name(self) -> str:
        """The cell's displayed name: ``ARM, seed SEED``."""
        return f"{self.arm}, seed {self.seed}"

    @cached_property
    def assembly(self) -> Assembly:
        """The parts of the cell, built on first use."""
        from hpdm_core.assembly.assembly import Assembly

        return Assembly(self.config, self.plugins)

    @cached_property
    def keys(self) -> Keys:
        """The keys of the stages."""
        return self.arm_keys.keys(self.seed)

    def _known(self, place: str) -> str | None:
        """Return the fingerprint of the vanished path ``place``: from ``contents``, or from the newest training."""
        if place in self.contents:
            return self.contents[place]
        with contextlib.suppress(OSError):  # another process may delete files
            files = sorted(
                self.store.root.glob("train/*/spec.json"), key=lambda file: file.stat().st_mtime, reverse=True
            )
            for remembered in ((read_json(file) or {}).get("contents", {}) for file in files):
                if place in remembered:
                    return str(remembered[place])
        return None

    def absent(self) -> list[str]:
        """Return a line for each path that the cell needs and that neither exists nor has a recorded fingerprint."""
        return self.arm_keys.absent

    @cached_property
    def identity(self) -> str:
        """The cell's own hash: it changes when anything that the cell computes changes."""
        facts = {
            "train": self.keys.train,
            "samples": self.keys.samples,
            "evaluations": sorted(self.keys.evaluations),
            "count": self.config.evaluation.samples,
        }
        return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:16]

    # Stages

    @cached_property
    def train_stage(self) -> Stage:
        """The stage of the trained model."""
        return self.store.stage("train", self.keys.train)

    @cached_property
    def sample_stage(self) -> Stage:
        """The stage of the generated videos."""
        return self.store.stage("samples", self.keys.samples)

    def evaluation_stages(self) -> list[tuple[Part, Stage]]:
        """Return (metric, stage) for each metric of the configuration."""
        keys = self.keys.evaluations
        parts = self.config.evaluation.metrics
        return [(part, self.store.stage("evaluations", key)) for part, key in zip(parts, keys, strict=True)]

    @property
    def only_measured(self) -> bool:
        """Whether all metrics need the configuration alone: then nothing is trained or sampled."""
        return bool(self.arm_keys.needs) and set(self.arm_keys.needs) == {"configuration"}

    def finished(self) -> bool:
        """Whether every stage has a result file. A quick check that reads no file."""
        return self.store.holds(self.keys.stages)

    def forget(self) -> None:
        """Drop cached objects to save memory: thousands of finished cells stay in memory."""
        for name in ("_steps", "train_stage", "sample_stage"):
            self.__dict__.pop(name, None)

    def missing(self) -> list[Step]:
        """Return the stages still to be done, in order. Reads result files only.

        Samples and weights are caches once the evaluations that need them are done: missing ones are made again only
        when another stage needs them.
        """
        evaluations = list(zip(self.arm_keys.needs, (step.stage for step in self._steps[2:]), strict=True))
        is_open = [not stage.done for _, stage in evaluations]
        open_needs = {need for (need, _), still in zip(evaluations, is_open, strict=True) if still}
        train, sample, *evaluate = self._steps
        steps = [step for step, still in zip(evaluate, is_open, strict=True) if still]
        if self.only_measured:
            return steps
        sampled = [still for (need, _), still in zip(evaluations, is_open, strict=True) if need == "samples"]
        evaluated = bool(sampled) and not any(sampled)
        recorded = (self.sample_stage.result() or {}).get("samples", 0) >= self.config.evaluation.samples
        to_sample = not recorded and not evaluated
        if "samples" in open_needs and not self._samples_present():
            to_sample = True
        if to_sample:
            steps.insert(0, sample)
        weights = self.weights.exists()
        if not self.train_stage.done or ((to_sample or "model" in open_needs) and not weights):
            steps = [*self._missing_bases(), train, *steps]
        return steps

    def _missing_bases(self) -> list[Step]:
        """Return the training steps of the missing models that must exist before this one is trained, in order."""
        base = self.base
        if base is None or (base.train_stage.done and base.weights.exists()):
            return []
        return [*base._missing_bases(), base._train_step(f"train {base.arm}")]

    @property
    def bases(self) -> list[Cell]:
        """The cells of the chain of base models, each starting from the one before it; this cell is not included."""
        return [] if self.base is None else [*self.base.bases, self.base]

    @property
    def weights(self) -> Path:
        """The trained model's file."""
        return self.train_stage.folder / "model.safetensors"

    def _train_step(self, name: str) -> Step:
        return Step(name=name, stage=self.train_stage, run=self._train, cell=self)

    @cached_property
    def _steps(self) -> list[Step]:
        """Every stage: train, sample, and one for each metric."""
        return [
            self._train_step("train"),
            Step(name="sample", stage=self.sample_stage, run=self._sample, cell=self),
            *(
                Step(name=f"evaluate {part.use}", stage=stage, run=self._evaluator(part, need), cell=self)
                for need, (part, stage) in zip(self.arm_keys.needs, self.evaluation_stages(), strict=True)
            ),
        ]

    @property
    def _all_steps(self) -> list[Step]:
        """Every stage that may have to run, the training of base models first."""
        return [*(base._train_step(f"train {base.arm}") for base in self.bases), *self._steps]

    def results(self) -> dict[str, Any]:
        """Return stage name -> result of the stages that are done."""
        found = {"train": self.train_stage.result(), "sample": self.sample_stage.result()}
        for part, stage in self.evaluation_stages():
            name = f"evaluate {part.use}"
            number = 2
            while name in found:  # one metric may be asked for twice, with different options
                name = f"evaluate {part.use} {number}"
                number += 1
            found[name] = stage.result()
        return {name: result for name, result in found.items() if result is not None}

    # Running

    def run(self, progress: Progress | None = None, *, own_output: bool = False) -> dict[str, Any]:
        """Run the missing stages and return `results`.

        ``progress`` is called with a dict about every second and at each stage's start; ``own_output`` redirects the
        output of this process to the attempts' log files. An exception of a stage is recorded in its attempt and
        raised. With several processes, each must call `run`; only the main one's arguments are used.
        """
        steps = distributed.on_main(lambda: [step.stage.key for step in self.missing()])
        if not steps:
            return self.results()
        from hpdm_core.assembly.runtime import prepare_torch

        # Before any stage, even one that needs no model, so that a metric run alone gives bit-identical results.
        if not distributed.is_main():
            prepare_torch(self.config.runtime, self.config.training)
            return self._follow()
        self.observers.call("before_cell_started")
        try:
            prepare_torch(self.config.runtime, self.config.training)
            for step in self._all_steps:
                if step.stage.key in steps:
                    self._run_step(step, progress, own_output=own_output)
            distributed.broadcast(None)  # tells `_follow` in the other processes that no stage is left
        except Exception as error:
            self.observers.call("on_cell_error", error=error)
            raise
        results = self.results()
        self.observers.call("after_cell_finished", result=results)
        return results

    def _follow(self) -> dict[str, Any]:
        """In a process other than the main one: do its share of each stage until the main process has run all."""
        while (told := distributed.broadcast(None)) is not None:
            kind, key, number = told
            stage = self.store.stage(kind, key)
            step = next(step for step in self._all_steps if step.stage == stage)
            self.at = stage.kind
            step.run(stage.attempt(number), lambda progress: None)
            self.at = None
        return self.results()

    def _run_step(self, step: Step, progress: Progress | None, *, own_output: bool) -> None:
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    attempt = stack.enter_context(step.stage.claim())
                    break
                except Held as held:  # a worker of another study, or of a controller that has died
                    if progress is not None:
                        progress({"stage": step.name, "waiting": str(held)})
                    time.sleep(WAIT_SECONDS)
            if step.stage.key not in {todo.stage.key for todo in self.missing()}:
                return  # the other worker has done it
            if own_output:
                attempt.take_output()
            attempt.log(f"{step.name} of {step.cell.name}, study '{self.study}', {Process.here()}")
            report = Reporter(step.name, attempt, progress)
            report({})
            self.at = step.stage.kind
            started = time.monotonic()
            distributed.broadcast((step.stage.kind, step.stage.key, attempt.number))
            made = dict(step.run(attempt, report))
            files = made.pop("files", {})
            attempt.finish(
                {
                    **made,
                    **self._provenance(),
                    "wall_seconds": time.monotonic() - started,
                    "attempts": attempt.number,
                    "observer_errors": step.cell.observers.errors,  # the stage calls the observers of its cell
                },
                files=files,
            )
            self.at = None
            attempt.log(f"{step.name} done")
            if step.stage.kind == "train":  # delete the checkpoints, except those listed in training.keep
                attempt.drop("checkpoints", keep=[f"{at:08d}" for at in step.cell.config.training.keep])

    def _train(self, attempt: Attempt, report: Progress) -> Mapping[str, Any]:
        from hpdm_core.training.trainer import Trainer

        if distributed.is_main():
            write_json(attempt.stage.folder / "spec.json", self.spec())
        trainer = Trainer(
            self.assembly,
            folder=attempt.folder,
            previous=attempt.previous,
            observers=self.observers,
            start=None if self.base is None else self.base.weights,
        )
        result = trainer.run(report)
        if self.base is not None:
            result["started_from"] |= self.base._cost()
        return {**result, "files": {"model.safetensors": "model.safetensors"}}

    def _cost(self) -> dict[str, Any]:
        """Return the total cost of the model and its bases, which cells that start from it record."""
        result = self.train_stage.result() or {}
        before = result.get("started_from", {})
        return {
            "arm": self.arm,
            "train": self.keys.train,
            "seconds": result.get("seconds", 0.0) + before.get("seconds", 0.0),
            "flops": result.get("steps", 0) * result.get("flops_per_step", 0) + before.get("flops", 0),
        }

    def _sample(self, attempt: Attempt, report: Progress) -> Mapping[str, Any]:
        from hpdm_core.sampling import files
        from hpdm_core.sampling.stage import sample_missing

        folder, count = attempt.stage.folder, self.config.evaluation.samples
        started = time.monotonic()
        sample_missing(
            self.assembly,
            folder,
            self._denoiser,
            observe=lambda level, videos: self.observers.call(
                "after_level_sampled", level=level, videos=videos
            ),
            report=report,
        )
        if not distributed.is_main():
            return {}
        shown = [files.read_sample(folder, index) for index in range(min(count, SHEET_ROWS))]
        files.contact_sheet(attempt.folder / "contact_sheet.png", shown)
        return {
            "samples": count,
            "seconds": time.monotonic() - started,
            "files": {"contact_sheet.png": "contact_sheet.png"},
        }

    def _denoiser(self) -> Denoiser:
        from hpdm_core.training.trainer import load_ema_model

        return self.assembly.denoiser(load_ema_model(self.assembly, self.weights))

    def _samples_present(self) -> bool:
        folder = self.sample_stage.folder
        return all(
            (folder / f"{index:06d}.safetensors").exists() for index in range(self.config.evaluation.samples)
        )

    def _evaluator(self, part: Part, need: str) -> Callable[[Attempt, Progress], Mapping[str, Any]]:
        def evaluate(attempt: Attempt, report: Progress) -> Mapping[str, Any]:
            from hpdm_core.evaluation.stage import evaluate_metric

            if need in MEASURED_ALONE and not distributed.is_main():
                return {}
            return evaluate_metric(
                self.assembly,
                part,
                model_path=self.weights,
                samples_folder=self.sample_stage.folder,
                train_result=self.train_stage.result() or {},
                store_folder=attempt.stage.folder,
            )

        return evaluate

    def _provenance(self) -> dict[str, Any]:
        from hpdm_core.store.provenance import git_commit, machine, versions

        return {
            "versions": {**versions(), "plugins": self.plugins.versions()},
            "git": git_commit(),
            "machine": machine(),
            "schema": SCHEMA_VERSION,
        }

    # Spec files

    def spec(self) -> dict[str, Any]:
        """Return, as JSON, everything that another process needs to run the cell."""
        return {
            "schema": SCHEMA_VERSION,
            "config": self.config.model_dump(mode="json"),
            "plugins": list(self.plugins.names),
            "keys": {
                "train": self.keys.train,
                "samples": self.keys.samples,
                "evaluations": list(self.keys.evaluations),
            },
            "contents": self.arm_keys.contents,
            **({} if self.base is None else {"base": self.base.spec()}),
            "arm": self.arm,
            "study": self.study,
            "store": str(self.store.root.resolve()),
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Cell:
        """Rebuild a cell from its `spec`. Raises `TroubleError` when its schema version or its keys have changed."""
        if spec.get("schema") != SCHEMA_VERSION:
            raise TroubleError(
                f"the cell was planned by another version (schema {spec.get('schema')}, this is "
                f"{SCHEMA_VERSION}); run the study again"
            )
        base = spec.get("base")
        if base is not None:  # it runs with this cell's runtime settings, which a retry may have changed
            config = {**base["config"], "runtime": spec["config"]["runtime"]}
            base = cls.from_spec({**base, "config": config})
        cell = cls(
            CellConfig.model_validate(spec["config"]),
            build_plugins(spec["plugins"]),
            store=Path(spec["store"]),
            arm=spec["arm"],
            study=spec["study"],
            contents=spec.get("contents"),
            base=base,
        )
        if cell.spec()["keys"] != spec["keys"]:
            raise TroubleError(
                f"{cell.name}: the data, a plugin's source or a metric's protocol has changed since the cell "
                "was planned; run the study again"
            )
        return cell
