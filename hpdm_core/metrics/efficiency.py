"""The metric ``efficiency``: the cost of a network, measured without training it (Table 1 of the paper).

Parameters and operations are counted. Memory and speed of the trainer's own step are measured in separate processes
(`hpdm_core.training.probe`), so that running out of memory is a result (OOM) and not a failure.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from hpdm_core.assembly.runtime import free_memory
from hpdm_core.training import cost
from hpdm_core.training.probe import Probe, largest_batch, probe_training

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.metrics.interface import EvaluationContext, Need, Row

__all__ = ["Efficiency"]

FIGURES = {
    "tokens": "tokens of one video in a training step, on all levels together",
    "parameters": "trainable parameters",
    "training_flops": "floating-point operations of training on one video, self-conditioning's pass in it",
    "sampling_flops": "floating-point operations of sampling one video, contexts computed once",
    "peak_memory_bytes": "peak of a training step of one video: weights, gradients, moments, average and "
    "activations; on CUDA what PyTorch had allocated, else what the process grew by",
    "batch": "largest batch that fits, up to the one allowed",
    "videos_per_second": "speed of the training step at that batch, making batches aside",
}
HOW = ("threads", "compile", "activation_checkpointing", "micro_batch")
"""Settings of ``runtime`` that the figures depend on; they are recorded beside them."""
GIB = 2**30
FREE_SHARE = 0.8


class Efficiency:
    """The metric ``efficiency``: a row ``efficiency.FIGURE`` for each of `FIGURES`, without a level.

    ``memory``: memory limit in GiB of each process; None for the GPU's memory, or on a CPU 0.8 of the free memory.
    ``most``: largest batch to try; ``steps``: number of steps to time.
    """

    name = "efficiency"
    needs: Need = "configuration"

    def __init__(self, *, memory: float | None, most: int, steps: int) -> None:
        self.memory = memory
        self.most = most
        self.steps = steps

    def protocol(self, assembly: Assembly) -> dict[str, Any]:
        """Return the definition of each figure. The machine does not enter the key; it is recorded in the facts."""
        limits = {"memory_gib": self.memory, "most": self.most, "steps": self.steps}
        return {"metric": self.name, "figures": FIGURES, **limits}

    def evaluate(self, context: EvaluationContext) -> list[Row]:
        """Return the rows; a figure that ran out of memory has the value NaN and ``outcome`` OOM."""
        assembly = context.assembly
        limit = self._limit(assembly)

        def probe(batch: int) -> Probe:
            return probe_training(assembly, batch=batch, steps=self.steps, memory=limit)

        best, probes = largest_batch(probe, memory=limit, most=self.most)
        one = probes[0]
        context.facts["memory_limit_bytes"] = limit
        context.facts["probes"] = [asdict(each) for each in probes]
        context.facts.update(device=one.device or assembly.config.runtime.device)
        runtime = assembly.config.runtime.model_dump(mode="json")
        context.facts.update({name: runtime[name] for name in HOW})
        context.facts["precision"] = assembly.config.training.precision
        if assembly.config.training.attention is not None:
            context.facts["attention"] = assembly.config.training.attention
        figures: dict[str, float | None] = {
            "tokens": assembly.pyramid.levels * math.prod(assembly.pyramid.grid),
            "parameters": cost.count_parameters(assembly),
            "training_flops": cost.training_flops(assembly) / assembly.config.training.batch,
            "sampling_flops": cost.sampling_flops(assembly),
            "peak_memory_bytes": one.peak,
            "batch": None if best is None else best.batch,
            "videos_per_second": None if best is None or best.seconds is None else best.batch / best.seconds,
        }
        oom = best is None
        return [
            {
                "metric": f"{self.name}.{name}",
                "level": None,
                "value": math.nan if value is None else float(value),
                "outcome": "OOM" if value is None else "ok",
            }
            for name, value in figures.items()
            if value is not None or oom
        ]

    def _limit(self, assembly: Assembly) -> int:
        if self.memory is not None:
            return int(self.memory * GIB)
        device = torch.device(assembly.config.runtime.device)
        if device.type == "cuda":
            return int(torch.cuda.get_device_properties(device).total_memory)
        return int(FREE_SHARE * free_memory(device))
