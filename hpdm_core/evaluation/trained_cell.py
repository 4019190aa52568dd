"""``python -m hpdm_core.evaluate CELL_DIR``: the metrics of one trained cell, without a study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from hpdm_core.assembly.runtime import prepare_torch
from hpdm_core.base.errors import InputError
from hpdm_core.base.files import read_json, trouble_when_unwritable, write_bytes
from hpdm_core.config.schema import Part
from hpdm_core.evaluation.stage import evaluate_metric
from hpdm_core.training.trained import load_trained

__all__ = ["evaluate_cell"]


def evaluate_cell(
    cell: Path, *, metrics: Sequence[str] = (), samples: Path | None = None, out: Path | None = None
) -> int:
    """Measure ``metrics`` (parts as text; none: those of the cell) on the train stage ``cell``, print rows and
    protocols, write them to ``out``, and return the exit code.
    """
    trained = load_trained(cell)
    cell, spec = trained.folder, trained.spec
    assembly = trained.assembly()
    parts = [assembly.plugins.validate("metrics", _part(text)) for text in metrics]
    store = cell.resolve().parent.parent
    prepare_torch(assembly.config.runtime, assembly.config.training)
    results = []
    for part in parts or assembly.config.evaluation.metrics:
        result = evaluate_metric(
            assembly,
            part,
            model_path=trained.weights,
            samples_folder=samples or store / "samples" / str(spec.get("keys", {}).get("samples")),
            train_result=read_json(cell / "result.json"),
            store_folder=store / "evaluations" / "none",
        )
        results.append(result)
        for row in result["rows"]:
            print("\t".join(f"{name}={value}" for name, value in row.items() if value is not None))
        print(f"protocol of {result['metric']}: {json.dumps(result['protocol'], sort_keys=True)}", flush=True)
    if out is not None:
        with trouble_when_unwritable(out):
            write_bytes(out, (json.dumps(results, indent=1) + "\n").encode())
    return 0


def _part(text: str) -> Part:
    try:
        return Part.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError) as error:
        raise InputError(
            f"--metric: '{text}' is not a part; allowed is NAME or '{{use: NAME, option: value}}'"
        ) from error
