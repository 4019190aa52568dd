"""Training that starts from another model: parameters with matching names and shapes are copied, others are random.

The paper trains its text-to-video model in this way: first at low resolution, then with the pyramid.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpdm_core.base.errors import InputError
from hpdm_core.config.schema import TrainingConfig
from hpdm_core.model.layers import LevelTable
from hpdm_core.training.checkpoint import read_weights

__all__ = ["start_from", "start_of"]


def start_of(config: TrainingConfig, given: Path | None) -> Path | None:
    """Return the file of weights that training starts from; None to start from random weights.

    ``given``: the weights of the arm that ``config`` names. Raises `InputError` if it names one and ``given`` is None.
    """
    if config.start_from is None:
        return None
    if config.start_from.path is not None:
        return config.start_from.path.expanduser()
    if given is None:
        raise InputError(
            f"training.start_from.arm: '{config.start_from.arm}' is an arm of a study, which trains it first; "
            "outside a study allowed is training.start_from.path"
        )
    return given


@torch.no_grad()
def start_from(model: nn.Module, path: Path, *, resize: Collection[str] = ()) -> dict[str, Any]:
    """Copy the weights in ``path`` into the parameters of ``model`` with the same names and shapes.

    ``resize`` as in `StartFrom`: with ``levels``, the rows of a shorter `LevelTable` are copied into the first rows.

    Returns, as JSON, the names of the parameters that were copied (``taken``), of those of which only the first rows
    were (``first_rows``: name -> number of rows), of those that keep their random values (``new``), and of the weights
    in the file that were not used (``unused``). Raises `InputError` if ``path`` is not a file of weights, no weight
    fits, or one that fits is not finite.
    """
    weights = read_weights(path)
    parameters = dict(model.named_parameters())
    first_rows = _first_rows(model, weights) if "levels" in resize else {}
    taken = [
        name
        for name, each in parameters.items()
        if name in first_rows or (name in weights and weights[name].shape == each.shape)
    ]
    if not taken:
        raise InputError(
            f"training.start_from: {path} has no weight with the name and shape of a parameter of this model; allowed "
            "is a model of the same kind and width"
        )
    for name in taken:
        if not bool(torch.isfinite(weights[name]).all()):
            raise InputError(f"training.start_from: {path}: the weight '{name}' is not finite")
        place = parameters[name]
        (place[: first_rows[name]] if name in first_rows else place).copy_(weights[name])
    return {
        "taken": taken,
        **({"first_rows": first_rows} if "levels" in resize else {}),
        "new": [name for name in parameters if name not in taken],
        "unused": [name for name in weights if name not in taken],
    }


def _first_rows(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Return name -> number of rows in ``weights``, for each `LevelTable` of ``model`` that has more rows."""
    found = {}
    for module, table in model.named_modules():
        name = f"{module}.rows"
        if isinstance(table, LevelTable) and name in weights:
            rows, *rest = weights[name].shape
            if rest == list(table.rows.shape[1:]) and rows < len(table.rows):
                found[name] = rows
    return found
