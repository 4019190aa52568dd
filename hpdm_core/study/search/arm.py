"""The search of one arm: an Optuna study whose trials are proposals.

Everything that the next proposal depends on stands in the storage: the sampler is built anew for each, from a seed that
is a hash of the search's seed, the arm and the proposal's number. So a search that was killed says next what it would
have said anyway. A proposal's trial holds its parameters, the curve that the pruner was shown, its objectives, and as
attributes its cells, what they gave and what they took.
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
    """What the storage knows of a proposal. ``state``: running, done, pruned or failed."""

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
    """The proposals of ``arm``, in ``storage`` under ``name``; trainings have ``steps`` steps."""

    def __init__(self, search: SearchKeys, *, arm: str, name: str, steps: int, storage: Storage) -> None:
        self.arm = arm
        self.search = search
        self._name = name
        self._storage = storage
        pruning = search.pruning
        watching = pruning if isinstance(pruning, Watching) else None
        self.every = (watching.every if watching is not None else None) or max(1, steps // 20)
        self.watch = watching.watch if watching is not None else None
        """Column that the pruner is shown, None when nothing is given up."""
        directions = [DIRECTIONS[objective.direction] for objective in search.objectives]
        against = watching is not None and watching.watch_direction != search.objectives[0].direction
        self._sign = -1.0 if against else 1.0  # the pruner knows one direction, that of the objective
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
        """Make the next proposal, whole or not at all."""
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
        """Write facts (JSON) into a proposal that runs."""
        with self._storage.batch():
            for name, value in facts.items():
                self._storage.optuna.set_trial_user_attr(self._trial_ids[number], name, value)

    def show(self, number: int, step: int, value: float) -> bool:
        """Show the pruner a point of the curve; return whether to give the proposal up."""
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
        """Draw what the trial lacks; Optuna returns what it has already.

        Each draw has a seed of its own, so that one that was lost in a kill comes out as it did before.
        """
        assert trial.relative_params is not None, "what is drawn together is drawn when it is first asked for"
        for key, distribution in distributions(self.search).items():
            trial.study.sampler = self._sampler(trial.number, key)
            suggest(distribution, trial, key)

    def _mend(self) -> None:
        """Draw the rest of a proposal in whose middle the last controller was killed."""
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
