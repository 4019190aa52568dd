"""The search of a study: makes the proposals, prunes them, and selects the best proposal of each arm.

Each arm is searched separately with the same budget. The arms take turns, so a search that is stopped early has spent
about the same on every arm. A proposal is one cell per seed of the search; its objectives are the means over these
cells, which are pruned together. When an arm's budget is used up, its best proposal is run with the study's own seeds,
under the arm's name; the report compares these cells.

The ledger's storage holds all proposals, curves and objectives (`hpdm_core.study.search.arm`). The report reads
``search.json`` in the study's folder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpdm_core.base.canonical import canonical_json
from hpdm_core.base.errors import HpdmError
from hpdm_core.base.files import write_json
from hpdm_core.cell import Cell
from hpdm_core.config.schema import CellConfig
from hpdm_core.study.controller.overview import index_row
from hpdm_core.study.ledger.storage import Storage
from hpdm_core.study.plan.cells import make_cell as cell_of
from hpdm_core.study.plan.study_file import StudyConfig
from hpdm_core.study.search.arm import ArmSearch, Proposed
from hpdm_core.study.search.feed import Curve, objective_name, objective_of

__all__ = ["FILE", "Search", "name_of"]

FILE = "search.json"


@dataclass
class _Proposal:
    """An open proposal."""

    arm: ArmSearch
    number: int
    cells: list[Cell]
    curves: list[Curve]
    look: int = 0
    """How many points of the curve the pruner has seen."""
    given_up: str = ""
    """Why the proposal was pruned or dropped, so that its cells are to end; empty while it goes on."""
    outcomes: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Cell -> (state, cause), for the settled cells."""


class Search:
    """The planner (`hpdm_core.study.controller.planner.Planner`) of a study with a search; its cells go into ``store``.

    Call `begin` under the study's lock before anything else. ``seen`` is called with each new cell.
    """

    def __init__(
        self,
        study: StudyConfig,
        *,
        store: Path,
        folder: Path,
        make_cell: Callable[[CellConfig, str], Cell] | None = None,
        seen: Callable[[Cell], None] | None = None,
    ) -> None:
        assert study.search is not None, "a study without a search needs no planner"
        self.study = study
        self.search = study.search
        self.seeds = self.search.seeds if self.search.seeds is not None else study.seeds[:1]
        self._folder = folder
        self._store = store
        self._make = make_cell or self._cell
        self._seen = seen
        self._arms: dict[str, ArmSearch] = {}
        self._open: list[_Proposal] = []
        self._waiting: list[Cell] = []
        """Cells to hand to the controller however many slots are free: their jobs may still run."""
        self._settled: dict[str, tuple[Cell, str, str]] = {}
        """Identity -> (cell, state, cause), for the cells that were settled in this command."""
        self._handed: set[str] = set()
        self._finals: dict[str, list[Cell]] = {}
        self._changed = True

    # The planner's interface

    def begin(self, storage: Storage) -> None:
        """Load the search from the storage."""
        arms = sorted(self.study.selected, key=lambda arm: arm != self.study.baseline)
        for name in arms:
            config = self.study.configs[name]
            base = self._make(config.model_copy(update={"seed": self.seeds[0]}), name)
            self._arms[name] = ArmSearch(
                self.search,
                arm=name,
                name=f"{self.study.name}/{name} {self._design(base)}",
                steps=config.training.steps,
                storage=storage,
            )
        for arm in self._arms.values():
            for proposed in arm.proposals():
                if proposed.state == "running":
                    self._take_up(arm, proposed)
        self._conclude()

    def next(self, free: int) -> Sequence[Cell]:
        """Return cells to run now: those of open proposals first, then new ones, each arm in turn."""
        handed = [cell for cell in self._waiting if self._hand(cell)]
        self._waiting = []
        while len(handed) < free:
            due = [arm for arm in self._arms.values() if not arm.exhausted]
            if not due:
                break
            arm = min(due, key=lambda arm: arm.asked)
            self._take_up(arm, arm.propose())
            handed += [cell for cell in self._waiting if self._hand(cell)]
            self._waiting = []
            self._conclude()
        self._write()
        return handed

    def ends(self, cell: Cell) -> str | None:
        """Return why the running ``cell`` is to end, or None."""
        wanting = [each for each in self._open if any(own.identity == cell.identity for own in each.cells)]
        for proposal in wanting:
            self._look(proposal)
        if wanting and all(proposal.given_up for proposal in wanting):
            return wanting[0].given_up
        return None

    def settled(self, cell: Cell, state: str, cause: str | None) -> None:
        """Take note of a cell's end."""
        self._settled[cell.identity] = (cell, state, cause or "")
        self._conclude()
        self._write()

    def finished(self) -> bool:
        """Whether no more cells will come."""
        return (
            not self._waiting and all(arm.exhausted for arm in self._arms.values()) and not self._open_ends()
        )

    def rows(self) -> Iterator[tuple[list[str], str]]:
        """Yield the rows of index.csv and their states: the cells by which the report compares the arms.

        Rows have empty keys while the arm is still searched, and when none of its proposals finished.
        """
        for name in self._arms:
            cells = {cell.seed: cell for cell in self._finals.get(name, ())}
            for seed in self.study.seeds:
                if seed not in cells:
                    yield [name, str(seed), "", "", ""], "planned"
                    continue
                settled = self._settled.get(cells[seed].identity)
                state = settled[1] if settled is not None else "planned" if cells[seed].missing() else "done"
                yield index_row(cells[seed]), state

    # Proposals

    def _cell(self, config: CellConfig, name: str) -> Cell:
        cell = cell_of(self.study, config, name, self._store)
        if self._seen is not None:
            self._seen(cell)
        return cell

    def _design(self, base: Cell) -> str:
        """Return a hash of the search's space, objectives, seeds and the arm: a change of any starts a new search."""
        facts = {
            "space": {key: axis.model_dump(mode="json") for key, axis in self.search.space.items()},
            "objectives": [each.model_dump(mode="json") for each in self.search.objectives],
            "seeds": list(self.seeds),
            "arm": base.identity,
        }
        return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:8]

    def _take_up(self, arm: ArmSearch, proposed: Proposed) -> None:
        try:
            varied = self.study.vary(arm.arm, proposed.values)
            cells = [
                self._make(varied.model_copy(update={"seed": seed}), name_of(arm.arm, proposed.number))
                for seed in self.seeds
            ]
            identities = [cell.identity for cell in cells]
        except HpdmError as error:  # each value is allowed, but not the combination
            arm.tell(proposed.number, "failed", reason=str(error).partition("\n")[0])
            return
        if proposed.facts.get("cells") != identities:
            arm.note(proposed.number, cells=identities)
        proposal = _Proposal(arm, proposed.number, cells, [Curve(arm.watch or "") for _ in cells])
        proposal.look = max(proposed.curve, default=0) // arm.every
        proposal.given_up = str(proposed.facts.get("given_up", ""))
        self._open.append(proposal)
        if not proposal.given_up:
            self._waiting += cells

    def _hand(self, cell: Cell) -> bool:
        """Whether the cell is new to the controller. Two proposals may have the same values and so the same cells."""
        fresh = cell.identity not in self._handed
        self._handed.add(cell.identity)
        return fresh

    def _look(self, proposal: _Proposal) -> None:
        """Report new points of a proposal's curve to the pruner: means over the seeds, once all have got so far."""
        arm = proposal.arm
        if arm.watch is None or proposal.given_up:
            return
        for cell, curve in zip(proposal.cells, proposal.curves, strict=True):
            attempts = cell.train_stage.attempts()
            if attempts:
                curve.read(attempts[-1] / "metrics.jsonl")
        while True:
            points = [curve.at(proposal.look + 1, every=arm.every) for curve in proposal.curves]
            found = [point for point in points if point is not None]
            if len(found) < len(points):
                return
            proposal.look += 1
            mean, step = sum(found) / len(found), proposal.look * arm.every
            if math.isnan(mean):
                continue
            if arm.show(proposal.number, step, mean):
                proposal.given_up = f"given up at step {step}: {arm.watch} {mean:.4g}"
                arm.note(proposal.number, given_up=proposal.given_up)
                self._changed = True
                return

    def _conclude(self) -> None:
        """Close the proposals whose cells have all ended, and select the best proposal of each finished arm."""
        for proposal in list(self._open):
            for cell in proposal.cells:
                if cell.identity in self._settled and cell.identity not in proposal.outcomes:
                    proposal.outcomes[cell.identity] = self._settled[cell.identity][1:]
            self._close(proposal)
        for name, arm in self._arms.items():
            if name in self._finals or not arm.exhausted or any(each.arm is arm for each in self._open):
                continue
            best = best_of(arm)
            if best is None:
                self._finals[name] = []
                continue
            config = self.study.vary(name, best.values)
            self._finals[name] = [
                self._make(config.model_copy(update={"seed": seed}), name) for seed in self.study.seeds
            ]
            self._waiting += self._finals[name]
            self._changed = True

    def _close(self, proposal: _Proposal) -> None:
        arm, outcomes = proposal.arm, proposal.outcomes
        failed = [cause or state for state, cause in outcomes.values() if state == "failed"]
        if failed and not proposal.given_up:  # the proposal fails whatever the other seeds give
            proposal.given_up = f"another seed failed ({failed[0]})"
        gone = bool(proposal.given_up) and not self._handed & {cell.identity for cell in proposal.cells}
        if len(outcomes) < len({cell.identity for cell in proposal.cells}) and not gone:
            return
        states = {state for state, _ in outcomes.values()}
        pruned = any(cause == "pruned" for _, cause in outcomes.values())
        if failed:
            arm.tell(proposal.number, "failed", reason=failed[0], **self._spent(proposal))
        elif pruned or (
            proposal.given_up and (gone or states == {"done"})
        ):  # another proposal with the same cells may have had them pruned
            arm.tell(proposal.number, "pruned", **self._spent(proposal))
        elif states == {"done"}:
            self._tell(proposal)
        else:  # interrupted, or cancelled by the user: it continues with the next command
            return
        self._open.remove(proposal)
        self._changed = True

    def _tell(self, proposal: _Proposal) -> None:
        each = [
            [objective_of(cell.results(), objective) for objective in self.search.objectives]
            for cell in proposal.cells
        ]
        means = []
        for objective, values in zip(self.search.objectives, zip(*each, strict=True), strict=True):
            found = [value for value in values if value is not None]
            if len(found) < len(values):
                reason = f"no row of {objective_name(objective)}"
                proposal.arm.tell(proposal.number, "failed", reason=reason, **self._spent(proposal))
                return
            means.append(sum(found) / len(found))
        proposal.arm.tell(proposal.number, "done", means, each=each, **self._spent(proposal))

    def _spent(self, proposal: _Proposal) -> dict[str, Any]:
        """Return the training steps and the seconds of work that a proposal took, as far as known."""
        steps, seconds = 0, 0.0
        for cell, curve in zip(proposal.cells, proposal.curves, strict=True):
            results = cell.results()
            trained = results.get("train")
            steps += int(trained.get("steps", 0)) if trained is not None else curve.step
            seconds += sum(float(result.get("wall_seconds", 0.0)) for result in results.values())
        return {"steps": steps, "seconds": seconds}

    def _open_ends(self) -> bool:
        """Whether an open proposal may still lead to more cells in this command."""
        stuck = ("interrupted", "cancelled")
        return any(
            not any(state in stuck for state, _ in proposal.outcomes.values()) for proposal in self._open
        )

    # Written

    def _write(self) -> None:
        """Write search.json if its content has changed."""
        if self._changed:
            self._changed = False
            write_json(self._folder / FILE, self.describe(), durable=False)

    def describe(self) -> dict[str, Any]:
        """Return the content of search.json: the search's settings and every proposal of every arm."""
        search = self.search
        return {
            "space": {key: axis.model_dump(mode="json", by_alias=True) for key, axis in search.space.items()},
            "objectives": [
                {"name": objective_name(each), **each.model_dump(mode="json")} for each in search.objectives
            ],
            "sampler": search.sampler.model_dump(mode="json"),
            "pruner": search.pruner.model_dump(mode="json"),
            "budget": search.budget,
            "seeds": list(self.seeds),
            "final_seeds": list(self.study.seeds),
            "arms": {
                name: [_plain(proposed) for proposed in arm.proposals()] for name, arm in self._arms.items()
            },
        }


def best_of(arm: ArmSearch) -> Proposed | None:
    """Return the finished proposal with the best first objective (the earliest among equals); None without one."""
    sign = -1.0 if arm.search.objectives[0].direction == "maximize" else 1.0
    done = [(sign * each.objectives[0], each.number, each) for each in arm.proposals() if each.objectives]
    return min(done)[2] if done else None


def name_of(arm: str, number: int) -> str:
    """Return the arm name under which a proposal's cells are shown: ``ARM#NUMBER``."""
    return f"{arm}#{number}"


def _plain(proposed: Proposed) -> dict[str, Any]:
    facts: Mapping[str, Any] = proposed.facts
    return {
        "number": proposed.number,
        "values": proposed.values,
        "state": proposed.state,
        "objectives": None if proposed.objectives is None else list(proposed.objectives),
        "last_step": max(proposed.curve, default=None),
        **{
            name: facts[name]
            for name in ("cells", "each", "given_up", "reason", "steps", "seconds")
            if name in facts
        },
    }
