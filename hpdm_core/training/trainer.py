"""The training loop of one cell: deterministic, resumable at any step, observed by plugins.

Per step: a keyed batch -> the joint loss -> gradient, clipped -> optimizer -> weight average -> figures ->
sometimes a checkpoint. Nothing depends on what ran before but weights, optimizer state and average, and those
are in checkpoints: a run that is killed and started again ends with the same bits. One process; many
processes are not handled here.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpdm_core import cost, interruption
from hpdm_core.config.schema import SCHEMA_VERSION
from hpdm_core.errors import DivergedError
from hpdm_core.model.hpdm import HPDM
from hpdm_core.plugins.observers import Observers
from hpdm_core.runtime import prepare_torch
from hpdm_core.training import checkpoint as checkpoints
from hpdm_core.training.batches import Batch, TrainingBatches, prefetched
from hpdm_core.training.ema import WeightAverage
from hpdm_core.training.metrics_log import MetricsLog
from hpdm_core.training.schedule import default_ema_halflife, learning_rate
from hpdm_core.training.step import joint_loss

if TYPE_CHECKING:
    from hpdm_core.assembly import Assembly
    from hpdm_core.cell import Cell

__all__ = ["Trainer", "load_ema_model"]

SETTLING_STEPS = 5
"""First steps of an attempt that do not count as throughput."""


class Trainer:
    """Trains the cell of ``assembly``.

    ``folder`` is this attempt's: metrics.jsonl, checkpoints/ and at the end model.safetensors (the average)
    are written there; None keeps nothing. ``previous`` are folders of ended attempts, newest first: training
    goes on from the newest intact checkpoint among all of them. ``cell`` is what observers are handed; None
    calls none.

    `model` holds the raw weights, `ema_model` their average. Building one draws initial weights; `run` may be
    called once.
    """

    def __init__(
        self,
        assembly: Assembly,
        *,
        folder: Path | None = None,
        previous: Sequence[Path] = (),
        cell: Cell | None = None,
    ) -> None:
        self.assembly = assembly
        self.config = assembly.config.training
        self.folder = folder
        self.previous = tuple(previous)
        self.observers = Observers(assembly.plugins, None) if cell is None else cell.observers
        self.device = prepare_torch(assembly.config.runtime)
        self.memory = _MemoryMeter(self.device)
        self.model: HPDM = assembly.build_model(device=self.device)
        halflife = self.config.ema_halflife
        self.halflife = default_ema_halflife(self.config.steps) if halflife is None else halflife
        self.average = WeightAverage(self.model, halflife=self.halflife)
        self.parameters = [
            (name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad
        ]
        self.optimizer: torch.optim.Optimizer = assembly.make(
            "optimizers", self.config.optimizer, self.parameters, self.config.learning_rate
        )
        self.log = MetricsLog(folder)
        self.last_good: Path | None = None
        self.resumed_from: list[int] = []
        self.loss = _RunningMean(assembly.pyramid.levels, halflife=self.halflife)
        self.before: dict[str, Any] = {"seconds": 0.0, "videos_per_second": None, "peak_memory_bytes": None}
        """Figures of earlier attempts."""
        self.durations: list[float] = []
        self.started = time.perf_counter()

    @property
    def ema_model(self) -> HPDM:
        """The network with the averaged weights, in evaluation mode."""
        return self.average.average

    def run(self, progress: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Train to the last step and return the result; ``progress`` gets each step's figures.

        Raises `TroubleError` when the loss or the gradient is not finite, and when the disk is full.
        """
        done = self._resume()
        steps = range(done + 1, self.config.steps + 1)
        ahead = self.assembly.config.runtime.prefetch
        self.started = time.perf_counter()
        # With nothing left to do the dataset is not opened.
        source: Iterator[Batch] = (
            prefetched(TrainingBatches(self.assembly), steps, ahead=ahead) if steps else (_ for _ in ())
        )
        with interruption.deferred(), closing(source):  # type: ignore[type-var]  # both are generators
            tick = time.perf_counter()
            for batch in source:
                row = self._step(batch)
                tock = time.perf_counter()
                self.durations.append(tock - tick)
                row["videos_per_second"] = self.config.batch / (tock - tick)
                self._after_step(row, progress)
                tick = time.perf_counter()
        self._save_average()
        return self._result()

    def _resume(self) -> int:
        """Load the newest intact checkpoint, if there is one; return how many steps are done."""
        own = [] if self.folder is None else [self.folder]
        if self.folder is not None:
            checkpoints.clear_partial(self.folder)
        found = checkpoints.newest_intact([*own, *self.previous])
        if found is None:
            self.log.start(step=0, source=None)
            return 0
        assert found.path is not None, "a checkpoint that was read has a path"
        checkpoints.load_weights(self.model, found.model, origin=found.path)
        checkpoints.load_weights(self.ema_model, found.ema, origin=found.path)
        self.optimizer.load_state_dict(found.optimizer)
        self.loss.load(found.running["loss"])
        self.before = found.running["figures"]
        self.resumed_from = [*found.running["resumed_from"], found.step]
        self.last_good = found.path
        self.log.start(step=found.step, source=found.path.parent.parent)
        return found.step

    def _step(self, batch: Batch) -> dict[str, Any]:
        """Make update ``batch.step`` and return its figures."""
        batch = batch.to(self.device)
        rate = learning_rate(
            batch.step - 1,
            peak=self.config.learning_rate,
            warmup=self.config.warmup,
            steps=self.config.steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        self.optimizer.zero_grad(set_to_none=True)
        loss = joint_loss(self.assembly, self.model, batch)
        loss.total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        norm = self._clip()
        levels: list[float] = loss.levels.tolist()
        self._check(batch, total=float(loss.total.detach()), levels=levels, norm=norm)
        self.optimizer.step()
        self.average.update(self.model)
        self.loss.add(levels)
        self.observers.call("after_step_finished", step=batch.step, loss=loss.levels.detach().clone())

        shown = [None if math.isnan(value) else value for value in levels]
        whole = sum(value for value in shown if value is not None)
        return {
            "step": batch.step,
            "lr": rate,
            "loss": shown,
            "loss_share": [None if value is None else value / whole if whole else 0.0 for value in shown],
            "gradient_norm": norm,
        }

    def _clip(self) -> float:
        """Scale the gradient down to the allowed global norm; return the norm it had."""
        parameters = [parameter for _, parameter in self.parameters]
        limit = math.inf if self.config.clip is None else self.config.clip
        return float(nn.utils.clip_grad_norm_(parameters, limit))

    def _check(self, batch: Batch, *, total: float, levels: list[float], norm: float) -> None:
        """Raise `TroubleError` before a loss or gradient that is not finite touches a weight."""
        if math.isfinite(total) and math.isfinite(norm):
            return
        slots = self.assembly.noise_sampler.slots
        active = {slot.level for slot, rows in zip(slots, batch.in_loss, strict=True) if bool(rows.any())}
        bad = [str(level) for level in sorted(active) if not math.isfinite(levels[level])]
        what = f"the loss of level {', '.join(bad)}" if bad else "the gradient"
        raise DivergedError(
            f"training: {what} is not finite at step {batch.step} (seed {self.assembly.config.seed}); "
            f"{self._where_good()}; try a lower training.learning_rate or a longer training.warmup"
        )

    def _where_good(self) -> str:
        if self.last_good is None:
            return "no checkpoint was saved before"
        return f"the last good checkpoint is {self.last_good}"

    def _after_step(self, row: dict[str, Any], progress: Callable[[dict[str, Any]], None] | None) -> None:
        runtime, step = self.assembly.config.runtime, row["step"]
        last = step == self.config.steps
        if last or step % runtime.log_every == 0:
            self.log.write(row)
        if progress is not None:
            progress({**row, "steps": self.config.steps})
        end = interruption.requested()
        if last or step % runtime.checkpoint_every == 0 or step in self.config.keep or end is not None:
            self._save(step)
        if end is not None and not last:
            raise interruption.Interrupted(end)

    def _save(self, step: int) -> None:
        if self.folder is None:
            return
        for name, tensor in self.model.state_dict().items():
            if not bool(torch.isfinite(tensor).all()):
                raise DivergedError(
                    f"training: the weight '{name}' is not finite after step {step}; {self._where_good()}; "
                    "try a lower training.learning_rate or a longer training.warmup"
                )
        path = checkpoints.save_checkpoint(
            self.folder,
            checkpoints.Checkpoint(
                step=step,
                model=self.model.state_dict(),
                ema=self.ema_model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                running={
                    "loss": self.loss.state(),
                    "figures": self._figures(),
                    "resumed_from": self.resumed_from,
                },
            ),
        )
        self.last_good = path
        checkpoints.prune(self.folder, keep=self.config.keep)
        self.observers.call("after_checkpoint_saved", path=path)

    def _save_average(self) -> None:
        if self.folder is not None:
            checkpoints.save_weights(
                self.folder / "model.safetensors",
                self.ema_model.state_dict(),
                metadata={
                    "weights": "exponential moving average",
                    "halflife": self.halflife,
                    "steps": self.config.steps,
                    "seed": self.assembly.config.seed,
                    "schema": SCHEMA_VERSION,
                },
            )

    def _figures(self) -> dict[str, Any]:
        """Return seconds, throughput and memory over this attempt and those before."""
        settled = self.durations[SETTLING_STEPS:] or self.durations
        speed = (
            self.config.batch / statistics.median(settled) if settled else self.before["videos_per_second"]
        )
        peaks = [peak for peak in (self.before["peak_memory_bytes"], self.memory.peak()) if peak is not None]
        return {
            "seconds": self.before["seconds"] + time.perf_counter() - self.started,
            "videos_per_second": speed,
            "peak_memory_bytes": max(peaks, default=None),
        }

    def _result(self) -> dict[str, Any]:
        return {
            "steps": self.config.steps,
            "loss": self.loss.values(),
            **self._figures(),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "parameters": cost.count_parameters(self.assembly),
            "flops_per_step": cost.training_flops(self.assembly),
            "resumed_from": self.resumed_from,
            "observer_errors": self.observers.errors,
        }


def load_ema_model(assembly: Assembly, path: Path) -> HPDM:
    """Return the network of ``assembly`` with the averaged weights in ``path`` (a trainer's
    model.safetensors).

    It is on ``runtime.device``, in evaluation mode, without gradients. Raises `InputError` when the file is
    missing, damaged or of another model.
    """
    model = assembly.build_model(device=prepare_torch(assembly.config.runtime))
    checkpoints.load_weights(model, checkpoints.read_weights(path), origin=path)
    return model.requires_grad_(False).eval()


class _RunningMean:
    """A mean of the losses per level that forgets with a half-life in steps; a level without a row is left
    out."""

    def __init__(self, levels: int, *, halflife: float) -> None:
        self.decay = 0.5 ** (1 / halflife)
        self.sums, self.weights = [0.0] * levels, [0.0] * levels

    def add(self, values: Sequence[float]) -> None:
        for level, value in enumerate(values):
            if not math.isnan(value):
                self.sums[level] = self.decay * self.sums[level] + (1 - self.decay) * value
                self.weights[level] = self.decay * self.weights[level] + (1 - self.decay)

    def values(self) -> list[float | None]:
        return [
            total / weight if weight else None for total, weight in zip(self.sums, self.weights, strict=True)
        ]

    def state(self) -> dict[str, list[float]]:
        return {"sums": self.sums, "weights": self.weights}

    def load(self, state: dict[str, list[float]]) -> None:
        self.sums, self.weights = list(state["sums"]), list(state["weights"])


class _MemoryMeter:
    """Peak memory since it was made: what CUDA's allocator held, or what the whole process had in RAM.

    On the CPU that takes Linux, where the kernel's high-water mark can be set back: the mark that every system
    has is of the process's whole life, and says nothing of the second cell in it.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        if self.cuda is not None:
            torch.cuda.reset_peak_memory_stats(self.cuda)
        self.resettable = self.cuda is None and _reset_high_water()

    def peak(self) -> int | None:
        """Return bytes, or None where they cannot be told."""
        if self.cuda is not None:
            return int(torch.cuda.max_memory_allocated(self.cuda))
        return _high_water_bytes() if self.resettable else None


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water_bytes() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
