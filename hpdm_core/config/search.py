"""What ``search:`` may say in a study file: the space, how it is searched, when a proposal is given up, what counts.

    search:
      space:
        training.learning_rate: {float: [1.0e-4, 1.0e-1], log: true}
        model.blocks: {int: [2, 8], step: 2}
        model.context_fusion: {choices: [deep, none]}
      sampler: tpe
      pruner: {use: median, startup: 4}
      proposals: 30
      seeds: [100, 101]
      objective: {metric: held_out_loss, level: finest, where: {parents: clean}}

Samplers and pruners are built from these options by `hpdm_core.study.search.parts`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from hpdm_core.base.canonical import canonical_json
from hpdm_core.base.errors import did_you_mean
from hpdm_core.config.problems import KeyPath, Problem, check
from hpdm_core.config.schema import CellConfig, Frozen, Part

__all__ = [
    "PRUNERS",
    "SAMPLERS",
    "SEARCHED",
    "Dimension",
    "Objective",
    "SearchKeys",
    "search_problems",
]

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Scalar = str | int | float | bool | None

SEARCHED = tuple(name for name in CellConfig.model_fields if name not in ("seed", "runtime", "evaluation"))
"""Sections that a search may change: what is measured stays the same, and ``runtime`` changes no number."""


class Dimension(Frozen):
    """One axis of the space: exactly one of ``float``, ``int`` and ``choices``."""

    float_: Annotated[tuple[float, float] | None, Field(alias="float")] = None
    """Lowest and highest value."""
    int_: Annotated[tuple[int, int] | None, Field(alias="int")] = None
    """Lowest and highest value."""
    choices: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """Any values, parts with options among them."""
    step: float | None = None
    """Distance of neighbouring values from the lowest; null for any float, for every int."""
    log: bool = False
    """Whether to look at the logarithm of the value."""

    @model_validator(mode="after")
    def _one_kind(self) -> Dimension:
        kinds = {"float": self.float_, "int": self.int_, "choices": self.choices}
        given = [name for name, value in kinds.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"should have exactly one of float, int, choices, has {', '.join(given) or 'none'}"
            )
        if self.choices is not None:
            if self.step is not None or self.log:
                raise ValueError("choices have neither step nor log")
            if len({label(value) for value in self.choices}) != len(self.choices):
                raise ValueError("should name each choice once")
            return self
        low, high = self.bounds
        if low >= high:
            raise ValueError("should be [lowest, highest]")
        if self.log and (low <= 0 or self.step is not None):
            raise ValueError("log takes a lowest value above 0, and no step")
        if self.step is not None and not (0 < self.step <= high - low):
            raise ValueError(f"step should be above 0 and at most {high - low}")
        if self.int_ is not None and self.step is not None and self.step != int(self.step):
            raise ValueError("the step of an int should be whole")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value of a number."""
        found = self.float_ if self.float_ is not None else self.int_
        assert found is not None, "choices have no bounds"
        return found

    @property
    def values(self) -> tuple[Any, ...] | None:
        """Every value, in order, where there are finitely many that are meant one by one; else None."""
        if self.choices is not None:
            return self.choices
        low, high = self.bounds
        if self.int_ is not None and not self.log:
            return tuple(range(int(low), int(high) + 1, int(self.step or 1)))
        if self.step is None:
            return None
        count = math.floor((high - low) / self.step + 1e-9)
        return tuple(low + number * self.step for number in range(count + 1))

    @property
    def probes(self) -> tuple[Any, ...]:
        """Values that stand for the whole axis when it is checked: its ends, or every choice."""
        return self.choices if self.choices is not None else self.bounds


def label(choice: Any) -> Scalar:
    """Return what stands for ``choice`` in Optuna, which takes plain values only."""
    return (
        choice if choice is None or isinstance(choice, str | int | float | bool) else canonical_json(choice)
    )


class Objective(Frozen):
    """One number of a finished cell: the mean of the rows that match."""

    metric: str
    """Column ``metric`` of the rows, such as ``held_out_loss`` or ``throughput.videos_per_second``."""
    level: Annotated[int, Field(ge=0)] | Literal["finest", "coarsest", "mean"] = "finest"
    """Level whose rows count: a number, or ``finest``, ``coarsest``, or ``mean`` over the levels. Rows without a level
    match every level."""
    where: dict[str, Scalar] = Field(default_factory=dict)
    """Further columns and their values. Of a column that is not named here, rows without a value in it go first."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Whether a lower or a higher value of the metric is better."""


class TPEOptions(Frozen):
    """Tree-structured Parzen estimator."""

    startup: Positive = 10
    """Proposals drawn at random first."""


class GPOptions(Frozen):
    """Gaussian process."""

    startup: Positive = 10
    """Proposals drawn at random first."""
    deterministic: bool = False
    """Whether the same proposal always gives the same objective."""


class RandomOptions(Frozen):
    """Independent draws."""


class GridOptions(Frozen):
    """Every combination once, in the order of the file, the last axis varying fastest."""


class BruteForceOptions(Frozen):
    """Every combination once, in a random order."""


SAMPLERS: Mapping[str, type[Frozen]] = {
    "tpe": TPEOptions,
    "gp": GPOptions,
    "random": RandomOptions,
    "grid": GridOptions,
    "brute_force": BruteForceOptions,
}
"""Name in a study file -> the options that the sampler takes."""
EXHAUSTIVE: tuple[type[Frozen], ...] = (GridOptions, BruteForceOptions)


class Watching(Frozen):
    """What every pruner but ``none`` looks at."""

    watch: str = "loss"
    """Column of metrics.jsonl; of a list (one number per level) the mean."""
    watch_direction: Literal["minimize", "maximize"] = "minimize"
    """Whether a lower or a higher value of the watched column is better."""
    every: Positive | None = None
    """Steps between looks, each at the mean since the last one; null for a twentieth of the training."""


class NoneOptions(Frozen):
    """Nothing is given up."""


class MedianOptions(Watching):
    """Give up what is worse than the median of the others at the same step."""

    startup: Count = 5
    """Finished proposals before anything is given up."""
    warmup: Count = 0
    """Steps before a proposal may be given up."""


class HyperbandOptions(Watching):
    """Successive halving from several starts."""

    min_resource: Positive | None = None
    """Steps before the first look; null for ``every``."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """At each step of the halving, one of this many proposals goes on."""


class PatientOptions(Watching):
    """Give up what has been getting worse for a while."""

    patience: Positive = 3
    """Looks that must be worse than those before."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """How much worse than before they must be."""
    startup: Count | None = None
    """With a number: only what the median pruner would give up as well, after so many finished proposals."""


PRUNERS: Mapping[str, type[Frozen]] = {
    "none": NoneOptions,
    "median": MedianOptions,
    "hyperband": HyperbandOptions,
    "patient": PatientOptions,
}
"""Name in a study file -> the options that the pruner takes."""


class SearchKeys(Frozen):
    """The section ``search`` of a study file. Every arm is searched on its own, with the same budget."""

    space: Annotated[dict[str, Dimension], Field(min_length=1)]
    """Dotted key -> its values."""
    sampler: Part = Part(use="tpe")
    """How the next proposal is chosen."""
    pruner: Part = Part(use="none")
    """When a proposal is given up before its end."""
    proposals: Positive | None = None
    """Proposals per arm, those that were given up or failed among them; null for all of a grid."""
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """Seeds that every proposal is tried with; null for the first of the study's. The best proposal of each arm is
    run with the study's own seeds."""
    objective: Annotated[
        Annotated[Objective, Tag("one")] | Annotated[tuple[Objective, ...], Field(min_length=1), Tag("many")],
        Discriminator(lambda value: "many" if isinstance(value, list | tuple) else "one"),
    ]
    """What is searched for, one or a list; of several, the Pareto set."""
    seed: Count = 0
    """Seed of the sampler."""

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """All of them."""
        return self.objective if isinstance(self.objective, tuple) else (self.objective,)

    @property
    def size(self) -> int | None:
        """Number of combinations; None where it has no end."""
        values = [axis.values for axis in self.space.values()]
        return None if None in values else math.prod(len(found) for found in values if found is not None)

    @property
    def budget(self) -> int:
        """Proposals per arm."""
        exhaustive = isinstance(self.sampling, EXHAUSTIVE)
        limits = [self.proposals, self.size if exhaustive else None]
        return min(limit for limit in limits if limit is not None)

    @property
    def sampling(self) -> Frozen:
        """The sampler's options."""
        return SAMPLERS[self.sampler.use].model_validate(self.sampler.options)

    @property
    def pruning(self) -> Frozen:
        """The pruner's options."""
        return PRUNERS[self.pruner.use].model_validate(self.pruner.options)


def search_problems(search: SearchKeys, metrics: Collection[str]) -> list[Problem]:
    """Return what is wrong with ``search`` besides its types; ``metrics``: names of the metrics that are measured.

    Paths begin at the section.
    """
    problems: list[Problem] = []
    for kind, part, known in (("sampler", search.sampler, SAMPLERS), ("pruner", search.pruner, PRUNERS)):
        path: KeyPath = (kind,)
        if part.use not in known:
            nearest = did_you_mean(part.use, known)
            message = f"unknown {kind} '{part.use}'{nearest}; {kind}s: {', '.join(known)}"
            problems.append(Problem((*path, "use"), message))
            continue
        for found in check(known[part.use], part.options)[1]:
            problems.append(Problem((*path, *found.path), f"{found.message} (option of '{part.use}')"))
    for key in search.space:
        top = key.partition(".")[0].strip()
        if top not in SEARCHED:
            nearest = did_you_mean(top, SEARCHED) or f"; searched may be keys of: {', '.join(SEARCHED)}"
            problems.append(Problem(("space", key), f"not a key that can be searched{nearest}"))
    if problems:
        return problems
    exhaustive = isinstance(search.sampling, EXHAUSTIVE)
    for key, axis in search.space.items():
        if exhaustive and axis.values is None:
            message = f"sampler '{search.sampler.use}' takes every value: give a step, or choices"
            problems.append(Problem(("space", key), message))
    if search.proposals is None and not exhaustive:
        message = f"missing; sampler '{search.sampler.use}' never ends by itself"
        problems.append(Problem(("proposals",), message))
    listed_objectives = isinstance(search.objective, tuple)
    for number, objective in enumerate(search.objectives):
        where: KeyPath = ("objective", number, "metric") if listed_objectives else ("objective", "metric")
        if not any(objective.metric == name or objective.metric.startswith(f"{name}.") for name in metrics):
            nearest = did_you_mean(objective.metric, metrics)
            listed = ", ".join(metrics) or "none; name some under evaluation.metrics"
            problems.append(
                Problem(where, f"'{objective.metric}' is not measured{nearest}; metrics: {listed}")
            )
    if len(search.objectives) > 1 and isinstance(search.pruning, Watching):
        message = f"'{search.pruner.use}' needs one objective, got {len(search.objectives)}; allowed is none"
        problems.append(Problem(("pruner",), message))
    if search.seeds is not None and len(set(search.seeds)) != len(search.seeds):
        problems.append(Problem(("seeds",), f"each seed once, got {list(search.seeds)}"))
    return problems
