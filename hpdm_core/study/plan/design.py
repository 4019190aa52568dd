"""The cells of a study: every arm with every seed, in a fixed order."""

from dataclasses import dataclass

from hpdm_core.config.schema import CellConfig
from hpdm_core.study.plan.study_file import StudyConfig

__all__ = ["Design", "PlannedCell", "plan"]


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """One cell: an arm with a seed. ``plugins`` are the names that rebuild its plugins."""

    arm: str
    seed: int
    config: CellConfig
    plugins: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Design:
    """What a study compares. Arms and seeds keep the order of the file; ``arms`` are those that run."""

    study: str
    arms: tuple[str, ...]
    baseline: str
    seeds: tuple[int, ...]
    cells: tuple[PlannedCell, ...]


def plan(study: StudyConfig) -> Design:
    """List the cells, seed by seed and the baseline first, so that pairs of arms are complete early."""
    arms = sorted(study.selected, key=lambda arm: arm != study.baseline)
    cells = tuple(
        PlannedCell(
            arm=arm,
            seed=seed,
            config=study.configs[arm].model_copy(update={"seed": seed}),
            plugins=study.plugins.names,
        )
        for seed in study.seeds
        for arm in arms
    )
    return Design(
        study=study.name,
        arms=study.selected,
        baseline=study.baseline,
        seeds=study.seeds,
        cells=cells,
    )
