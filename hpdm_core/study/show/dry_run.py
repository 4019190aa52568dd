"""The text of ``--dry-run``: cells, which of their stages are done, parameters, work and disk. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from hpdm_core.cell import Cell
from hpdm_core.study.plan.cells import cells_of
from hpdm_core.study.plan.study_file import StudyConfig

__all__ = ["amount", "describe_study"]


def describe_study(
    study: StudyConfig, results: Path, *, say: Callable[[str], None] = lambda line: None
) -> str:
    """Return the text of a dry run of ``study`` whose results go under ``results``.

    ``say`` is called with a line about each arm before it is counted.
    """
    from hpdm_core.training import cost

    cells, _ = cells_of(study, results.resolve() / "store")
    figures: dict[str, _Figures] = {}
    counted = [each for cell in cells for each in (cell, *cell.bases)]
    for cell in counted:  # the seeds of an arm cost the same
        if cell.arm not in figures:
            say(
                f"counting the cost of arm '{cell.arm}' ({len(figures) + 1} of {len({each.arm for each in counted})})"
            )
            assembly = cell.assembly
            flops = cost.training_flops(assembly)
            predicted = cost.predicted_training(assembly, flops)
            figures[cell.arm] = _Figures(
                parameters=cost.count_parameters(assembly),
                flops=flops,
                disk=cost.disk_bytes(assembly),
                memory=int(predicted["memory_bytes"]),
                train_hours=0.0 if cell.only_measured else predicted["train_seconds"] / 3600,
                sample_hours=0.0 if cell.only_measured else cost.predicted_sampling(assembly) / 3600,
            )
    rows = []
    for cell in cells:
        found = figures[cell.arm]
        missing = [step.name for step in cell.missing()]
        hours = (
            found.train_hours + found.sample_hours + sum(figures[each.arm].train_hours for each in cell.bases)
        )
        rows.append(
            {
                "arm": cell.arm,
                "seed": cell.seed,
                "parameters": amount(found.parameters),
                "FLOPs/step": amount(found.flops),
                "steps": cell.config.training.steps,
                "GPU memory": f"{amount(found.memory)}B",
                "GPU-hours": f"{hours:.3g}",
                "disk": f"{amount(found.disk)}B",
                "done": _short(_done(cell, missing)),
                "to do": _short(missing),
            }
        )
    to_train = {
        step.stage.key: step.cell for cell in cells for step in cell.missing() if step.stage.kind == "train"
    }
    work = sum(figures[cell.arm].flops * cell.config.training.steps for cell in to_train.values())
    hours = sum(figures[cell.arm].train_hours for cell in to_train.values())
    to_sample = {
        cell.keys.samples: cell for cell in cells if any(step.name == "sample" for step in cell.missing())
    }
    hours += sum(figures[cell.arm].sample_hours for cell in to_sample.values())
    disk = sum(figures[cell.arm].disk for cell in cells if cell.missing())
    lines = [
        f"study '{study.name}': {len(cells)} cells, {len(figures)} arms, baseline '{study.baseline}', "
        f"backend {study.backend.use}, results in {results / study.name}",
        tabulate(rows, headers="keys", disable_numparse=True),
        f"to do: {sum(bool(cell.missing()) for cell in cells)} cells, {len(to_train)} models to train "
        f"({amount(work)}FLOPs), {hours:.3g} GPU-hours, at most {amount(disk)}B of disk; nothing was run or "
        "written",
        _assumptions(cells),
        *_too_large(cells, figures),
    ]
    if study.search is not None:
        seeds = len(study.search.seeds or study.seeds[:1])
        lines.append(
            f"search: before that, {study.search.budget} proposals of each arm with {seeds} seeds, "
            f"{study.search.budget * seeds * len(study.selected)} cells at most, not counted above; then each arm "
            "runs with its best proposal"
        )
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class _Figures:
    """What one arm costs, per cell."""

    parameters: int
    flops: int
    disk: int
    memory: int
    """Bytes of GPU memory in a training step."""
    train_hours: float
    """Hours of one GPU."""
    sample_hours: float


def _assumptions(cells: Sequence[Cell]) -> str:
    """Return the assumptions of the predictions, as a line of text."""
    rates = {(cell.config.runtime.utilisation, cell.config.runtime.peak_tflops) for cell in cells}
    some = {cell.config.runtime.activation_checkpointing for cell in cells}
    checkpointing = {(True,): ", with recomputed blocks", (False, True): ", some with recomputed blocks"}.get(
        tuple(sorted(some)), ""
    )
    started = ", including the models that arms start from" if any(cell.bases for cell in cells) else ""
    listed = "; ".join(f"{share:g} of {peak:g} TFLOP/s" for share, peak in sorted(rates))
    return (
        f"predicted: GPU-hours of training and sampling at {listed} (runtime.utilisation, "
        f"runtime.peak_tflops){started}; GPU memory of a training step in one process, of "
        f"{_videos_at_a_time(cells)} at a time (runtime.micro_batch){checkpointing}; evaluation is not counted"
    )


def _videos_at_a_time(cells: Sequence[Cell]) -> str:
    numbers = {
        min(cell.config.runtime.micro_batch or cell.config.training.batch, cell.config.training.batch)
        for cell in cells
    }
    listed = " or ".join(map(str, sorted(numbers)))
    return f"{listed} video{'' if numbers == {1} else 's'}"


def _too_large(cells: Sequence[Cell], figures: Mapping[str, _Figures]) -> list[str]:
    """Return a line per arm whose training step is predicted to take more than ``runtime.gpu_memory``."""
    lines = []
    for cell in {cell.arm: cell for cell in cells}.values():
        needed, runtime = figures[cell.arm].memory, cell.config.runtime
        if cell.only_measured or needed <= runtime.gpu_memory * 2**30:
            continue
        videos = runtime.micro_batch or cell.config.training.batch
        lines.append(
            f"warning: arm '{cell.arm}' is predicted to take {needed / 2**30:.1f} GiB for a training step of {videos} "
            f"videos at a time, more than runtime.gpu_memory {runtime.gpu_memory:g}; a smaller runtime.micro_batch, or "
            "runtime.activation_checkpointing, takes less"
        )
    return lines


def _done(cell: Cell, missing: Sequence[str]) -> list[str]:
    stages = [] if cell.only_measured else ["train", "sample"]
    names = [*stages, *(f"evaluate {part.use}" for part in cell.config.evaluation.metrics)]
    return [name for name in dict.fromkeys(names) if name not in missing]


def _short(names: Sequence[str]) -> str:
    """Return the stages as a short list: ``train, sample, evaluate (a, b)``."""
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
