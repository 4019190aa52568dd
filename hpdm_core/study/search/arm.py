"""The search of one arm: an Optuna study whose trials are proposals.

The storage holds everything that the next proposal depends on. A new sampler is built for each proposal; its seed is a
hash of the search's seed, the arm and the proposal's number. So a search that was killed and restarted makes the same
proposals as one that was not. A proposal's trial holds its parameters, the curve that the pruner has seen, its
objectives, and as attributes its cells, their results, and the steps and seconds that they took.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from hpdm_core.config.search import SearchKeys, Watching
from hpdm_core.study.ledger.storage import Storage
from hpdm_core.study.search.parts import build_pruner, build_sampler, distributions, suggest, values_of

__all__ = ["ArmSearch", "Proposed"]

DIRECTIONS = {"minimize": StudyDirection.MINIMIZE, "maximize": StudyDirection.MAXIMIZE}


@dataclass(frozen=True, kw_only=True)
class Proposed:
    """One proposal as the storage records it. ``state``: running, done, pruned or failed."""

    number: int
    values: dict[str, Any]
    """Dotted key -> value."""
    state: str
    objectives: tuple[float, ...] | None
    curve: dict[int, float]
    facts: Mapping[str, Any]
    """What `ArmSearch.note` wrote."""


STATES = {
    TrialState.WAITING: "running",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class ArmSearch:
    """The proposals of ``arm``, in ``storage`` under ``name``; each cell trains for ``steps`` steps."""

    def __init__(self, search: SearchKeys, *, arm: str, name: str, steps: int, storage: Storage) -> None:
        self.arm = arm
        self.search = search
        self._name = name
        self._storage = storage
        pruning = search.pruning
        watching = pruning if isinstance(pruning, Watching) else None
        self.every = (watching.every if watching is not None else None) or max(1, steps // 20)
        self.watch = watching.watch if watching is not None else None
        """Column of metrics.jsonl that the pruner watches; None when nothing is pruned."""
        directions = [DIRECTIONS[objective.direction] for objective in search.objectives]
        against = watching is not None and watching.watch_direction != search.objectives[0].direction
        self._sign = -1.0 if against else 1.0  # the pruner minimises or maximises as the objective does
        self._pruner = build_pruner(search, steps=steps, every=self.every)
        optuna = storage.optuna
        try:
            self._id = optuna.get_study_id_from_name(name)
        except KeyError:
            self._id = optuna.create_new_study(directions, name)
        self._closed: dict[int, Proposed] = {}
        self._trial_ids = {trial.number: trial._trial_id for trial in self._trials()}
        self._mend()

    @property
    def asked(self) -> int:
        """How many proposals there are."""
        return len(self._trial_ids)

    @property
    def exhausted(self) -> bool:
        """Whether the budget is used up, though proposals may still run."""
        return self.asked >= self.search.budget

    def propose(self) -> Proposed:
        """Make the next proposal, in one batch of writes."""
        number = self.asked
        with self._storage.batch():
            trial = self._study(number).ask()
            assert trial.number == number, "one writer makes the proposals of a study"
            self._complete(trial)
        self._trial_ids[number] = trial._trial_id
        return self.proposal(number)

    def proposals(self) -> list[Proposed]:
        """Return all proposals in order."""
        return [self.proposal(number) for number in range(self.asked)]

    def proposal(self, number: int) -> Proposed:
        """Return proposal ``number``."""
        if number not in self._closed:
            proposed = self._proposed(self._storage.optuna.get_trial(self._trial_ids[number]))
            if proposed.state == "running":
                return proposed
            self._closed[number] = proposed
        return self._closed[number]

    def note(self, number: int, **facts: Any) -> None:
        """Write facts (JSON) into a running proposal."""
        with self._storage.batch():
            for name, value in facts.items():
                self._storage.optuna.set_trial_user_attr(self._trial_ids[number], name, value)

    def show(self, number: int, step: int, value: float) -> bool:
        """Report a point of the curve to the pruner; return whether to prune the proposal."""
        trial_id = self._trial_ids[number]
        with self._storage.batch():
            self._storage.optuna.set_trial_intermediate_value(trial_id, step, self._sign * value)
            frozen = self._storage.optuna.get_trial(trial_id)
            return self._pruner.prune(self._study(number), frozen)

    def tell(self, number: int, state: str, objectives: Sequence[float] | None = None, **facts: Any) -> None:
        """Close a proposal: ``done`` with its objectives, ``pruned`` or ``failed``."""
        closed = {name: code for code, name in STATES.items()}[state]
        with self._storage.batch():
            self.note(number, **facts)
            self._storage.optuna.set_trial_state_values(self._trial_ids[number], closed, objectives)

    # Optuna

    def _study(self, number: int) -> Study:
        return Study(self._name, self._storage.optuna, sampler=self._sampler(number, ""), pruner=self._pruner)

    def _sampler(self, number: int, key: str) -> BaseSampler:
        digest = hashlib.sha256(f"{self.search.seed}/{self.arm}/{number}/{key}".encode()).digest()
        return build_sampler(self.search, seed=int.from_bytes(digest[:4], "big"))

    def _complete(self, trial: Trial) -> None:
        """Draw the parameters that the trial lacks; Optuna returns those that it already has.

        Each draw has its own seed, so a draw that was lost in a kill is repeated with the same value.
        """
        assert trial.relative_params is not None, "reading relative_params makes the sampler's joint draw"
        for key, distribution in distributions(self.search).items():
            trial.study.sampler = self._sampler(trial.number, key)
            suggest(distribution, trial, key)

    def _mend(self) -> None:
        """Draw the missing parameters of a proposal that the last controller was killed in the middle of making."""
        for trial in self._trials():
            if not trial.state.is_finished() and set(trial.params) != set(self.search.space):
                with self._storage.batch():
                    self._complete(Trial(self._study(trial.number), trial._trial_id))

    def _trials(self) -> list[FrozenTrial]:
        found: list[FrozenTrial] = self._storage.optuna.get_all_trials(self._id, deepcopy=False)
        return found

    def _proposed(self, trial: FrozenTrial) -> Proposed:
        values = trial.values if trial.state == TrialState.COMPLETE else None
        return Proposed(
            number=trial.number,
            values=values_of(self.search, trial.params),
            state=STATES[trial.state],
            objectives=None if values is None else tuple(values),
            curve={
                step: self._sign * value
                for step, value in sorted(trial.intermediate_values.items())
                if not math.isnan(value)
            },
            facts=trial.user_attrs,
        )
