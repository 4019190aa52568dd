"""The metric ``throughput``: training speed, time, memory, parameters and FLOPs, from the train stage's result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpdm_core.base.errors import TroubleError

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.metrics.interface import EvaluationContext, Need, Row

__all__ = ["Throughput"]

FIGURES = {
    "videos_per_second": "training videos per second of optimizer steps",
    "seconds": "seconds of training, all attempts",
    "peak_memory_bytes": "peak during training: the whole process's memory, with Python and libraries (CPU, "
    "Linux), or what PyTorch had allocated (GPU)",
    "parameters": "trainable parameters",
    "flops_per_step": "floating-point operations of one optimizer step, counted on the meta device",
}
BEFORE = {
    "base_seconds": "seconds of training the models that this one started from, all attempts",
    "base_flops": "floating-point operations of training the models that this one started from",
}
"""Further figures of a model that starts from another arm's; ``seconds`` and ``flops_per_step`` are its own."""
UNTOLD = ("peak_memory_bytes",)
"""Figures that some systems cannot measure: the result then holds None, and there is no row."""


class Throughput:
    """The metric ``throughput``: a row ``throughput.FIGURE`` for each of `FIGURES`, without a level."""

    name = "throughput"
    needs: Need = "training"

    def protocol(self, assembly: Assembly) -> dict[str, Any]:
        """Return the definition of each figure.

        The machine does not enter the key: ``device`` and ``threads`` are taken from the training result.
        """
        start = assembly.config.training.start_from
        before = {} if start is None or start.arm is None else BEFORE
        return {"metric": self.name, "figures": {**FIGURES, **before}}

    def evaluate(self, context: EvaluationContext) -> list[Row]:
        """Return the rows; raises TroubleError when the train stage has no such figure."""
        result = context.train_result
        context.facts.update({name: result.get(name) for name in ("device", "threads")})
        untold = [name for name in UNTOLD if name in result and result[name] is None]
        missing = [
            name for name in FIGURES if name not in untold and not isinstance(result.get(name), int | float)
        ]
        if missing:
            raise TroubleError(
                f"throughput: the training result has no {', '.join(missing)}; train the cell first"
            )
        told = {name: result[name] for name in FIGURES if name not in untold}
        started = result.get("started_from", {})
        told |= {f"base_{name}": started[name] for name in ("seconds", "flops") if name in started}
        return [
            {"metric": f"{self.name}.{name}", "level": None, "value": float(value)}
            for name, value in told.items()
        ]
