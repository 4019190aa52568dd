"""Build Optuna's samplers, pruners and search space from the ``search:`` section of a study file.

Each builder is registered for the class of its options. To add a sampler, add an options class in
`hpdm_core.config.search` and a function here.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

from optuna import samplers
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, PatientPruner
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from hpdm_core.config import search as asked
from hpdm_core.config.search import Dimension, SearchKeys, label

__all__ = ["build_pruner", "build_sampler", "distributions", "suggest", "values_of"]


def distributions(search: SearchKeys) -> dict[str, BaseDistribution]:
    """Return dotted key -> Optuna distribution, in the order of the file."""
    return {key: _distribution(axis) for key, axis in search.space.items()}


@functools.singledispatch
def suggest(distribution: BaseDistribution, trial: Trial, key: str) -> None:
    """Draw ``key`` of ``trial``, unless the trial has a value for it."""
    raise AssertionError(f"no draws from {type(distribution).__name__}")


@suggest.register
def _(distribution: FloatDistribution, trial: Trial, key: str) -> None:
    trial.suggest_float(
        key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
    )


@suggest.register
def _(distribution: IntDistribution, trial: Trial, key: str) -> None:
    trial.suggest_int(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


@suggest.register
def _(distribution: CategoricalDistribution, trial: Trial, key: str) -> None:
    trial.suggest_categorical(key, distribution.choices)


def values_of(search: SearchKeys, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the study file's values for a trial's ``params`` (which hold labels for choices), in the file's order."""
    found = {}
    for key, axis in search.space.items():
        choices = {_typed(label(choice)): choice for choice in axis.choices or ()}
        found[key] = choices[_typed(params[key])] if axis.choices is not None else params[key]
    return found


def _typed(value: Any) -> tuple[str, Any]:
    return type(value).__name__, value  # so that True and 1 differ


def _distribution(axis: Dimension) -> BaseDistribution:
    if axis.choices is not None:
        return CategoricalDistribution([label(choice) for choice in axis.choices])
    low, high = axis.bounds
    if axis.values is not None:
        high = axis.values[-1]  # a step that does not meet the highest value stops before it
    if axis.int_ is not None:
        return IntDistribution(int(low), int(high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(low, high, log=axis.log, step=axis.step)


class InOrder(samplers.BaseSampler):
    """Grid sampler: proposal n is the n-th combination, the last axis varying fastest."""

    def __init__(self, search: SearchKeys) -> None:
        axes = [[label(value) for value in axis.values or ()] for axis in search.space.values()]
        self._keys = list(search.space)
        self._combinations = list(itertools.product(*axes))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return nothing: no parameters are sampled jointly."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return nothing: no parameters are sampled jointly."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the value of axis ``param_name`` in combination ``trial.number``."""
        combination = self._combinations[trial.number % len(self._combinations)]
        return combination[self._keys.index(param_name)]


@functools.singledispatch
def _sampler(options: Any, search: SearchKeys, seed: int) -> samplers.BaseSampler:
    raise AssertionError(f"no sampler for {type(options).__name__}")


@_sampler.register
def _(options: asked.TPEOptions, search: SearchKeys, seed: int) -> samplers.BaseSampler:
    return samplers.TPESampler(seed=seed, n_startup_trials=options.startup)


@_sampler.register
def _(options: asked.GPOptions, search: SearchKeys, seed: int) -> samplers.BaseSampler:
    return samplers.GPSampler(
        seed=seed, n_startup_trials=options.startup, deterministic_objective=options.deterministic
    )


@_sampler.register
def _(options: asked.RandomOptions, search: SearchKeys, seed: int) -> samplers.BaseSampler:
    return samplers.RandomSampler(seed=seed)


@_sampler.register
def _(options: asked.GridOptions, search: SearchKeys, seed: int) -> samplers.BaseSampler:
    return InOrder(search)


@_sampler.register
def _(options: asked.BruteForceOptions, search: SearchKeys, seed: int) -> samplers.BaseSampler:
    return samplers.BruteForceSampler(seed=seed)


def build_sampler(search: SearchKeys, *, seed: int) -> samplers.BaseSampler:
    """Return a fresh sampler; ``seed`` and the trials in the storage determine what it draws."""
    with _experiments_allowed():
        return _sampler(search.sampling, search, seed)


@functools.singledispatch
def _pruner(options: Any, steps: int, every: int) -> BasePruner:
    raise AssertionError(f"no pruner for {type(options).__name__}")


@_pruner.register
def _(options: asked.NoneOptions, steps: int, every: int) -> BasePruner:
    return NopPruner()


@_pruner.register
def _(options: asked.MedianOptions, steps: int, every: int) -> BasePruner:
    return MedianPruner(n_startup_trials=options.startup, n_warmup_steps=options.warmup)


@_pruner.register
def _(options: asked.HyperbandOptions, steps: int, every: int) -> BasePruner:
    return HyperbandPruner(
        min_resource=min(options.min_resource or every, steps),
        max_resource=steps,
        reduction_factor=options.reduction_factor,
    )


@_pruner.register
def _(options: asked.PatientOptions, steps: int, every: int) -> BasePruner:
    inner = None if options.startup is None else MedianPruner(n_startup_trials=options.startup)
    return PatientPruner(inner, patience=options.patience, min_delta=options.min_delta)


def build_pruner(search: SearchKeys, *, steps: int, every: int) -> BasePruner:
    """Return the pruner for trainings of ``steps`` steps whose curve it sees every ``every`` steps."""
    with _experiments_allowed():
        return _pruner(search.pruning, steps, every)


class _experiments_allowed(warnings.catch_warnings):  # used like a function
    """Silence Optuna's warnings about experimental samplers and pruners, which it repeats on every use."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore", ExperimentalWarning)
        return entered
