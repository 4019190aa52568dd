"""The training loop of one cell: deterministic, resumable at any step, observed by plugins.

Each step: keyed batch -> joint loss -> clipped gradient -> optimizer -> weight average -> statistics -> (at some
steps) checkpoint. The state of training is weights, optimizer state and average, and all of it is in checkpoints.
So a run that is killed and resumed ends with bitwise the same weights (on CUDA: if ``runtime.deterministic`` is set).

Several processes run the same loop, each with its share of every batch; `hpdm_core.training.strategy` holds what
differs between one process, DDP and FSDP. The main process logs, saves and calls observers.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hpdm_core.assembly.runtime import compiler_problem, execution_of, prepare_torch, state_dtype
from hpdm_core.base import distributed, interruption
from hpdm_core.base.errors import DivergedError
from hpdm_core.config.schema import SCHEMA_VERSION
from hpdm_core.model.hpdm import HPDM
from hpdm_core.plugins.observers import Observers
from hpdm_core.training import checkpoint as checkpoints
from hpdm_core.training import cost
from hpdm_core.training.batches import Batch, loaded
from hpdm_core.training.figures import MemoryMeter, RunningMean
from hpdm_core.training.metrics_log import MetricsLog
from hpdm_core.training.optimizer.ema import WeightAverage
from hpdm_core.training.optimizer.schedule import default_ema_halflife, learning_rate
from hpdm_core.training.shards import load_shards, load_whole, local, save_shards, whole_weights
from hpdm_core.training.start import start_from, start_of
from hpdm_core.training.step import joint_loss, rows_in_loss
from hpdm_core.training.strategy import make_strategy, share_of

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly

__all__ = ["Trainer", "load_ema_model"]

log = logging.getLogger(__name__)

SETTLING_STEPS = 5
"""First steps of an attempt that are left out of the throughput."""


class Trainer:
    """Trains the cell of ``assembly``.

    ``folder``: the folder of this attempt, for metrics.jsonl, checkpoints/ and, at the end, model.safetensors (the
    average); None writes nothing. ``previous``: folders of earlier attempts, newest first; training resumes from the
    newest intact checkpoint in all these folders. ``observers``: called at steps and checkpoints; None for none.
    ``start``: the weights of the arm that ``training.start_from`` names.

    `model` holds the current weights, `ema_model` their average; with ``fsdp`` on several processes, this process's
    parts of them. The constructor draws the initial weights; `run` may be called once. With several processes
    (`hpdm_core.base.distributed.joined`), each process builds and runs a trainer.
    """

    def __init__(
        self,
        assembly: Assembly,
        *,
        folder: Path | None = None,
        previous: Sequence[Path] = (),
        observers: Observers | None = None,
        start: Path | None = None,
    ) -> None:
        self.assembly = assembly
        self.config = assembly.config.training
        self.folder = folder
        self.previous = tuple(previous)
        self.observers: Observers = observers or Observers(assembly.plugins, None)
        runtime = assembly.config.runtime
        self.device = prepare_torch(runtime, self.config)
        self.dtype = state_dtype(self.config)
        self.strategy = make_strategy(runtime.strategy)
        self.rows = share_of(self.config.batch)
        self.memory = MemoryMeter(self.device)
        self.model: HPDM = assembly.build_model(device=self.device).to(self.dtype)
        self.start = start_of(self.config, start)
        self.started_from = self._start()
        self.model.execution = execution_of(self.config, checkpointing=runtime.activation_checkpointing)
        halflife = self.config.ema_halflife
        self.halflife = default_ema_halflife(self.config.steps) if halflife is None else halflife
        self.average = WeightAverage(self.model, halflife=self.halflife)
        compiled = runtime.compile in (True, "training") and self._can_compile()
        self.network = self.strategy.wrap(self.model, assembly, compiled=compiled)
        self.strategy.place(self.ema_model)
        self.joint_loss = self.strategy.compiled(joint_loss) if compiled else joint_loss
        # Under FSDP all ranks must run the first pass if any rank does.
        self.first_pass_always = self.strategy.sharded and self.config.self_conditioning > 0
        self.parameters = [
            (name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad
        ]
        self.optimizer: torch.optim.Optimizer = assembly.make(
            "optimizers", self.config.optimizer, self.parameters, self.config.learning_rate
        )
        self.log = MetricsLog(folder if distributed.is_main() else None)
        self.last_good: Path | None = None
        self.resumed_from: list[int] = []
        self.loss = RunningMean(assembly.pyramid.levels, halflife=self.halflife)
        self.before: dict[str, Any] = {"seconds": 0.0, "videos_per_second": None, "peak_memory_bytes": None}
        """Totals of earlier attempts."""
        self.limit = math.inf if self.config.clip is None else self.config.clip
        self.durations: list[float] = []
        self.started = time.perf_counter()

    def _start(self) -> dict[str, Any]:
        if self.start is None or self.config.start_from is None:
            return {}
        return start_from(self.model, self.start, resize=self.config.start_from.resize)

    def _can_compile(self) -> bool:
        problem = compiler_problem(self.device)
        # Build these parts now: cached_property takes a lock, which the compiler cannot trace.
        _ = self.assembly.objective, self.assembly.noise_sampler, self.assembly.sigma_in
        if problem is not None:
            log.warning("runtime.compile: %s; training continues without compilation", problem)
        return problem is None

    @property
    def ema_model(self) -> HPDM:
        """The network with the averaged weights, in evaluation mode."""
        return self.average.average

    def run(self, progress: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Train to the last step and return the result; ``progress`` is called with each step's statistics.

        Raises `TroubleError` when the loss or the gradient is not finite, and when the disk is full.
        """
        done = self._resume()
        steps = range(done + 1, self.config.steps + 1)
        self.started = time.perf_counter()
        # If no step is left, the dataset is not opened.
        source: Iterator[Batch] = loaded(self.assembly, steps, rows=self.rows) if steps else (_ for _ in ())
        with interruption.deferred(), closing(source):  # type: ignore[type-var]  # both are generators
            tick = time.perf_counter()
            for batch in source:
                row = self.step(batch)
                tock = time.perf_counter()
                self.durations.append(tock - tick)
                row["videos_per_second"] = self.config.batch / (tock - tick)
                self._after_step(row, progress)
                tick = time.perf_counter()
        self._save_average()
        return self._result()

    def _resume(self) -> int:
        """Load the newest intact checkpoint, if there is one; return how many steps are done."""
        folders = [*([] if self.folder is None else [self.folder]), *self.previous]
        found = None
        if distributed.is_main():
            if self.folder is not None:
                checkpoints.clear_partial(self.folder)
            found = checkpoints.newest_intact(folders)
        path = distributed.broadcast(None if found is None else found.path)
        if path is None:
            self.log.start(step=0, source=None)
            return 0
        found = found or checkpoints.read_checkpoint(path)
        load = load_whole if found.shards is None else load_shards
        load(found, self.model, self.ema_model, self.optimizer)
        self.loss.load(found.running["loss"])
        self.before = found.running["figures"]
        self.resumed_from = [*found.running["resumed_from"], found.step]
        self.last_good = path
        self.log.start(step=found.step, source=path.parent.parent)
        return found.step

    def step(self, batch: Batch) -> dict[str, Any]:
        """Make update ``batch.step`` and return its statistics."""
        batch = batch.to(self.device, self.dtype)
        rate = learning_rate(
            batch.step - 1,
            peak=self.config.learning_rate,
            warmup=self.config.warmup,
            steps=self.config.steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        self.optimizer.zero_grad(set_to_none=True)
        counts = distributed.total(rows_in_loss(batch))
        total, level_losses = self._gradient(batch, counts)
        levels: list[float] = level_losses.tolist()
        norm = self.strategy.clip([parameter for _, parameter in self.parameters], self.limit)
        self._check(batch.step, counts, total=total, levels=levels, norm=norm)
        self.optimizer.step()
        self.average.update(self.model)
        self.loss.add(levels)
        self._observe("after_step_finished", step=batch.step, loss=level_losses.clone())

        shown = [None if math.isnan(value) else value for value in levels]
        whole = sum(value for value in shown if value is not None)
        return {
            "step": batch.step,
            "lr": rate,
            "loss": shown,
            "loss_share": [None if value is None else value / whole if whole else 0.0 for value in shown],
            "gradient_norm": norm,
        }

    def _gradient(self, batch: Batch, counts: Tensor) -> tuple[float, Tensor]:
        """Compute the gradient of the global batch, of which ``batch`` is this process's share.

        ``counts`` [S]: for each slot, the rows of the global batch in the loss. Returns the loss of the global
        batch, and its losses per level [L], NaN for a level without a row in the loss.
        """
        sums = torch.zeros(1 + self.assembly.pyramid.levels, device=self.device, dtype=self.dtype)
        parts = batch.split(self.assembly.config.runtime.micro_batch)
        for part in parts:
            with self.strategy.part(self.network, last=part is parts[-1]):
                loss = self.joint_loss(
                    self.assembly, self.network, part, counts, always=self.first_pass_always
                )
                # DDP and FSDP average gradients; scale by the world size to get the sum.
                (loss.total * distributed.size()).backward()
            sums += torch.cat([loss.total.detach()[None], loss.levels])
        sums = distributed.total(sums)
        return float(sums[0]), sums[1:]

    def _check(self, step: int, counts: Tensor, *, total: float, levels: list[float], norm: float) -> None:
        """Raise `DivergedError` if the loss or gradient is not finite, before the weights are updated."""
        if math.isfinite(total) and math.isfinite(norm):
            return
        slots = self.assembly.noise_sampler.slots
        active = {slot.level for slot, count in zip(slots, counts.tolist(), strict=True) if count}
        bad = [str(level) for level in sorted(active) if not math.isfinite(levels[level])]
        what = f"the loss of level {', '.join(bad)}" if bad else "the gradient"
        raise DivergedError(
            f"training: {what} is not finite at step {step} (seed {self.assembly.config.seed}); "
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
        end = self._asked_to_end()
        if last or step % runtime.checkpoint_every == 0 or step in self.config.keep or end is not None:
            self._save(step)
        if end is not None and not last:
            raise interruption.Interrupted(end)

    def _save(self, step: int) -> None:
        if self.folder is None:
            return
        self._check_weights(step)
        running = {
            "loss": self.loss.state(),
            "figures": self._figures(),
            "resumed_from": self.resumed_from,
        }
        if self.strategy.sharded:
            path = save_shards(
                self.folder,
                step=step,
                model=self.model,
                average=self.ema_model,
                optimizer=self.optimizer,
                running=running,
            )
        else:
            checkpoint = checkpoints.Checkpoint(
                step=step,
                model=self.model.state_dict(),
                ema=self.ema_model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                running=running,
            )
            path = distributed.on_main(partial(checkpoints.save_checkpoint, self.folder, checkpoint))
        self.last_good = path
        distributed.on_main(partial(checkpoints.prune, self.folder, keep=self.config.keep))
        self._observe("after_checkpoint_saved", path=path)

    def _check_weights(self, step: int) -> None:
        """Raise `DivergedError` if a weight is not finite, before it is saved."""
        weights = self.model.state_dict().items()
        bad = next((name for name, each in weights if not bool(torch.isfinite(local(each)).all())), None)
        for name in distributed.gather(bad):
            if name is not None:
                raise DivergedError(
                    f"training: the weight '{name}' is not finite after step {step}; {self._where_good()}; "
                    "try a lower training.learning_rate or a longer training.warmup"
                )

    def _observe(self, hook: str, **arguments: Any) -> None:
        """Call observers, in the main process."""
        if distributed.is_main():
            self.observers.call(hook, **arguments)

    def _asked_to_end(self) -> int | None:
        """Return the signal that asked one of the processes to end, or None."""
        asked = interruption.requested()
        if not distributed.total(torch.tensor(0.0 if asked is None else 1.0)):
            return None
        return next(signum for signum in distributed.gather(asked) if signum is not None)

    def _save_average(self) -> None:
        if self.folder is None:
            return
        weights = whole_weights(self.ema_model)
        metadata = {
            "weights": "exponential moving average",
            "halflife": self.halflife,
            "steps": self.config.steps,
            "seed": self.assembly.config.seed,
            "schema": SCHEMA_VERSION,
        }
        path = self.folder / "model.safetensors"
        distributed.on_main(partial(checkpoints.save_weights, path, weights, metadata=metadata))

    def _figures(self) -> dict[str, Any]:
        """Return seconds, throughput and peak memory over this attempt and earlier ones."""
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
        flops = cost.training_flops(self.assembly)
        return {
            "steps": self.config.steps,
            "loss": self.loss.values(),
            **self._figures(),
            "device": str(self.device),
            "processes": distributed.size(),
            "threads": torch.get_num_threads(),
            "parameters": cost.count_parameters(self.assembly),
            "flops_per_step": flops,
            "predicted": cost.predicted_training(self.assembly, flops),
            "resumed_from": self.resumed_from,
            **(
                {} if self.start is None else {"started_from": {"file": str(self.start), **self.started_from}}
            ),
            "observer_errors": self.observers.errors,
        }


def load_ema_model(assembly: Assembly, path: Path) -> HPDM:
    """Return the network of ``assembly`` with the averaged weights in ``path`` (model.safetensors of a trainer).

    It is on ``runtime.device``, in float32, in evaluation mode, without gradients. Raises `InputError` when the
    file is missing, damaged or belongs to another model.
    """
    config = assembly.config
    model = assembly.build_model(device=prepare_torch(config.runtime, config.training))
    checkpoints.load_weights(model, checkpoints.read_weights(path), origin=path)
    return model.requires_grad_(False).eval()
