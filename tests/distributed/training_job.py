"""What test_training.py runs in several processes: cells trained one after the other, as a file of JSON asks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.base import distributed
from hpdm_core.config.schema import CellConfig
from hpdm_core.plugins import build_plugins
from hpdm_core.training import Trainer
from hpdm_core.training.shards import local, whole_weights

TINY: dict[str, Any] = {
    "model": {
        "video": (8, 16, 24),
        "patch": (2, 4, 6),
        "token": (1, 2, 3),
        "levels": 3,
        "classes": 4,
        "token_dim": 12,
        "blocks": 3,
        "backbone": {
            "use": "rin",
            "latent_dim": 8,
            "latents": 5,
            "latent_layers": 1,
            "latent_heads": 2,
            "latent_head_dim": 4,
            "heads": 2,
        },
    },
    "data": {"dataset": "synthetic"},
    "training": {"steps": 12, "batch": 12, "learning_rate": 0.002, "warmup": 2, "ema_halflife": 3.0},
    "runtime": {"threads": 1, "precision": "fp64", "checkpoint_every": 1000},
}


class Stopped(Exception):
    """Ends a run in the middle, in every process after the same step."""


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    made = dict(base)
    for key, value in changes.items():
        made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) else value
    return made


def train(
    changes: dict[str, Any],
    *,
    folder: str | None = None,
    previous: tuple[str, ...] = (),
    stop_after: int | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train the tiny cell; return its whole weights (in the main process), and facts of the run."""
    assembly = Assembly(CellConfig.model_validate(merged(TINY, changes)), build_plugins())
    trainer = Trainer(
        assembly,
        folder=None if folder is None else Path(folder),
        previous=[Path(each) for each in previous],
    )
    decay = 0.5 ** (1 / 3)
    expected = {name: local(tensor).clone() for name, tensor in trainer.model.state_dict().items()}
    rows: list[dict[str, Any]] = []

    def progress(row: dict[str, Any]) -> None:
        rows.append(row)
        for name, tensor in trainer.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * local(tensor)
        if row["step"] == stop_after:
            raise Stopped

    facts: dict[str, Any] = {}
    try:
        facts["resumed_from"] = trainer.run(progress)["resumed_from"]
    except Stopped:
        facts["stopped"] = stop_after
    if not previous:
        facts["average_off"] = max(
            float((local(tensor) - expected[name]).abs().max())
            for name, tensor in trainer.ema_model.state_dict().items()
            if local(tensor).numel()
        )
    parameters = [local(parameter).numel() for parameter in trainer.model.parameters()]
    facts |= {"own_numbers": sum(parameters), "norms": [row["gradient_norm"] for row in rows]}
    facts["losses"] = [row["loss"] for row in rows]
    weights = {f"raw.{name}": tensor for name, tensor in whole_weights(trainer.model).items()}
    weights |= {f"ema.{name}": tensor for name, tensor in whole_weights(trainer.ema_model).items()}
    return weights, facts


def main(file: Path) -> None:
    """Do the jobs in ``file``, a JSON list of `train`'s arguments with an ``out`` each."""
    with distributed.joined():
        for job in json.loads(file.read_text()):
            out = Path(job.pop("out"))
            weights, facts = train(job.pop("changes"), **job)
            everybody = distributed.gather(facts)
            if distributed.is_main():
                safetensors.torch.save_file(weights, out.with_suffix(".safetensors"))
                out.with_suffix(".json").write_text(json.dumps(everybody))


if __name__ == "__main__":
    import hpdm_core.training.cost

    hpdm_core.training.cost.training_flops = lambda assembly: 1  # takes longer than the run
    main(Path(sys.argv[1]))
