"""What ``--dry-run`` says: cells, what is done of each, parameters, work and disk. Writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from hpdm_core.cell import Cell
from hpdm_core.config.study_file import StudyConfig
from hpdm_core.study.cells import cells_of

__all__ = ["amount", "describe_study"]


def describe_study(study: StudyConfig, results: Path) -> str:
    """Return the text of a dry run of ``study`` whose results go under ``results``."""
    from hpdm_core import cost

    cells, _ = cells_of(study, results.resolve() / "store")
    figures: dict[str, tuple[int, int, int]] = {}
    for cell in cells:  # the seeds of an arm cost the same
        if cell.arm not in figures:
            assembly = cell.assembly
            figures[cell.arm] = (
                cost.count_parameters(assembly),
                cost.training_flops(assembly),
                cost.disk_bytes(assembly),
            )
    rows = []
    for cell in cells:
        parameters, flops, disk = figures[cell.arm]
        missing = [step.name for step in cell.missing()]
        rows.append(
            {
                "arm": cell.arm,
                "seed": cell.seed,
                "parameters": amount(parameters),
                "FLOPs/step": amount(flops),
                "steps": cell.config.training.steps,
                "disk": f"{amount(disk)}B",
                "done": _short(_done(cell, missing)),
                "to do": _short(missing),
            }
        )
    to_train = {
        cell.keys.train: cell for cell in cells if any(step.name == "train" for step in cell.missing())
    }
    work = sum(figures[cell.arm][1] * cell.config.training.steps for cell in to_train.values())
    disk = sum(figures[cell.arm][2] for cell in cells if cell.missing())
    lines = [
        f"study '{study.name}': {len(cells)} cells, {len(figures)} arms, baseline '{study.baseline}', "
        f"backend {study.backend.use}, results in {results / study.name}",
        tabulate(rows, headers="keys", disable_numparse=True),
        f"to do: {sum(bool(cell.missing()) for cell in cells)} cells, {len(to_train)} models to train "
        f"({amount(work)}FLOPs), at most {amount(disk)}B of disk; nothing was run or written",
    ]
    return "\n".join(lines)


def _done(cell: Cell, missing: Sequence[str]) -> list[str]:
    names = ["train", "sample", *(f"evaluate {part.use}" for part in cell.config.evaluation.metrics)]
    return [name for name in dict.fromkeys(names) if name not in missing]


def _short(names: Sequence[str]) -> str:
    """Return the stages as people list them: ``train, sample, evaluate (a, b)``."""
    first = [name for name in names if not name.startswith("evaluate ")]
    metrics = [name.removeprefix("evaluate ") for name in names if name.startswith("evaluate ")]
    return ", ".join(first + ([f"evaluate ({', '.join(metrics)})"] if metrics else [])) or "-"


def amount(number: float) -> str:
    """Return ``number`` with three figures and a unit prefix: 177870000 -> ``178 M``."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(number) < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} Z"
