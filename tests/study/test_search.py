"""A search over a toy objective: what it proposes, gives up and finds, and that a kill changes nothing of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from hpdm_core.config.schema import CellConfig
from hpdm_core.study.ledger.storage import Storage, open_storage
from hpdm_core.study.plan.study_file import StudyConfig, load_study
from hpdm_core.study.search.search import Search

STEPS = 40
SPACE = {
    "training.learning_rate": {"float": [1e-4, 1.0], "log": True},
    "diffusion.sigma_max": {"float": [10.0, 90.0]},
}
BEST = {"training.learning_rate": 1e-2, "diffusion.sigma_max": 60.0}
GRID = {
    "training.batch": {"int": [2, 4], "step": 2},
    "sampling.overlap": {"choices": [[], ["h"], ["h", "w"]]},
}


def toy(config: CellConfig) -> float:
    """How far a proposal is from the optimum, which is 0.1."""
    import math

    return (
        0.1
        + (math.log10(config.training.learning_rate / 1e-2) / 2) ** 2
        + ((config.diffusion.sigma_max - 60.0) / 40) ** 2
    )


@dataclass
class ToyCell:
    """What a search asks of a cell. ``curve``: metrics.jsonl by now; ``value``: its objective, once done."""

    config: CellConfig
    arm: str
    folder: Path
    value: float | None = None
    fps: float = 1.0

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def identity(self) -> str:
        text = self.config.model_dump_json(exclude={"runtime"})
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def keys(self) -> Any:
        return SimpleNamespace(train=self.identity, samples=self.identity, evaluations=(self.identity,))

    @property
    def train_stage(self) -> Any:
        attempt = self.folder / self.identity
        return SimpleNamespace(attempts=lambda: [attempt] if attempt.is_dir() else [])

    def results(self) -> dict[str, Any]:
        path = self.folder / self.identity / "result.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def missing(self) -> list[str]:
        return [] if self.results() else ["train"]

    def train_to(self, step: int) -> None:
        """Write the curve up to ``step``: it falls towards the cell's value."""
        attempt = self.folder / self.identity
        attempt.mkdir(parents=True, exist_ok=True)
        rows = [{"step": at, "loss": [toy(self.config) + 2 * 0.9**at, None]} for at in range(1, step + 1)]
        (attempt / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def finish(self, value: float | None = None) -> None:
        value = toy(self.config) + 0.01 * self.seed if value is None else value
        rows = [{"metric": "held_out_loss", "level": level, "value": value + 1 - level} for level in (0, 1)]
        rows.append(
            {"metric": "throughput.videos_per_second", "level": None, "value": 1 / self.config.training.batch}
        )
        results = {"train": {"steps": STEPS, "wall_seconds": 2.0}, "evaluate": {"rows": rows}}
        (self.folder / self.identity).mkdir(parents=True, exist_ok=True)
        (self.folder / self.identity / "result.json").write_text(json.dumps(results))


@dataclass
class Toy:
    """A study with a search in a folder, and what a controller does with it."""

    folder: Path
    study: StudyConfig
    url: str | None = None
    storage: Storage = field(init=False)
    search: Search = field(init=False)
    seen: list[tuple[str, int]] = field(default_factory=list)
    made: dict[str, ToyCell] = field(default_factory=dict)

    def open(self) -> Toy:
        """Begin as a new process would."""
        self.storage = open_storage(self.url, self.folder)
        self.search = Search(
            self.study,
            store=self.folder,
            folder=self.folder,
            make_cell=self.make,
        )
        self.search.begin(self.storage)
        return self

    def make(self, config: CellConfig, arm: str) -> Any:
        cell = ToyCell(config, arm, self.folder / "cells")
        self.made[cell.identity] = cell
        return cell

    def close(self) -> None:
        self.storage.close()

    def run(self, *, free: int = 1, cells: int | None = None, train: bool = True) -> int:
        """Run cells one after another, asking for the pruner's word every other step; return how many."""
        count = 0
        queue: list[Any] = []
        while cells is None or count < cells:
            queue += self.search.next(free if not queue else 0)
            if not queue:
                assert self.search.finished()
                return count
            cell = queue.pop(0)
            self.seen.append((cell.arm, cell.seed))
            count += 1
            self.work(cell, train=train)
        return count

    def work(self, cell: Any, *, train: bool = True) -> None:
        if cell.results():
            self.search.settled(cell, "done", None)
            return
        for step in range(2, STEPS + 1, 2) if train else ():
            cell.train_to(step)
            if self.search.ends(cell) is not None:
                self.search.settled(cell, "cancelled", "pruned")
                return
        cell.finish()
        self.search.settled(cell, "done", None)

    def proposals(self, arm: str = "default") -> list[dict[str, Any]]:
        return self.search.describe()["arms"][arm]


Make = Callable[..., Toy]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Return a function that opens a toy search; its storage is closed at the end."""
    made: list[Toy] = []

    def make_toy(
        *,
        name: str = "toy",
        arms: Sequence[str] = ("default",),
        seeds: Sequence[int] = (0,),
        url: Any = None,
        **search: Any,
    ) -> Toy:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        asked = {"space": SPACE, "proposals": 6, "objective": {"metric": "held_out_loss"}, **search}
        data = {
            "name": "toy",
            "extends": "tiny_clips",
            "training": {"steps": STEPS, "batch": 2},
            "evaluation": {"metrics": ["throughput", "held_out_loss"]},
            "arms": {arm: {"model.blocks": 3 + number} for number, arm in enumerate(arms)},
            "seeds": list(seeds),
            "search": asked,
        }
        (folder / "toy.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
        made.append(Toy(folder, load_study(folder / "toy.yaml"), url(folder) if url else None).open())
        return made[-1]

    yield make_toy
    for toy in made:
        toy.close()


def values(toy: Toy) -> list[Any]:
    return [each["values"] for each in toy.proposals()]


def test_a_search_with_a_pruner_finds_the_optimum(make: Make) -> None:
    pruner = {"use": "median", "startup": 4, "warmup": 10, "every": 4}
    toy = make(proposals=40, sampler={"use": "tpe", "startup": 8}, pruner=pruner)
    toy.run()
    proposals = toy.proposals()
    done = [each for each in proposals if each["state"] == "done"]
    pruned = [each for each in proposals if each["state"] == "pruned"]
    assert len(proposals) == 40 and len(done) + len(pruned) == 40 and len(pruned) >= 8
    best = min(done, key=lambda each: each["objectives"][0])
    assert best["objectives"][0] < 0.1 + 0.02
    assert abs(best["values"]["diffusion.sigma_max"] - BEST["diffusion.sigma_max"]) < 8
    # What was given up was worse, and took fewer steps.
    assert min(each["steps"] for each in done) == STEPS > max(each["steps"] for each in pruned)
    assert all(each["given_up"].startswith(f"given up at step {each['last_step']}: loss ") for each in pruned)


@pytest.mark.parametrize(
    ("sampler", "storage"),
    [(each, "journal") for each in ("tpe", "gp", "random", "grid", "brute_force")] + [("tpe", "sqlite")],
)
def test_a_kill_changes_no_proposal(make: Make, sampler: str, storage: str) -> None:
    url = {"journal": None, "sqlite": lambda folder: f"sqlite:///{folder / 'ledger.db'}"}[storage]
    options = {"startup": 3} if sampler in ("tpe", "gp") else {}
    space = {**GRID, **({} if sampler in ("grid", "brute_force") else SPACE)}
    asked = {"space": space, "sampler": {"use": sampler, **options}, "url": url}
    whole, killed = make(name="whole", **asked), make(name="killed", **asked)
    whole.run(train=False)
    for _ in range(6):
        assert killed.search.next(1)  # asked, and killed before it has run
        killed.close()
        killed.open()
        killed.run(cells=1, train=False)
        killed.close()
        killed.open()
    killed.run(train=False)
    assert values(killed) == values(whole) and len(values(whole)) == 6
    assert [each["objectives"] for each in killed.proposals()] == [
        each["objectives"] for each in whole.proposals()
    ]
    if sampler not in ("grid", "brute_force"):
        other = make(name="other", **asked, seed=1)
        other.run(train=False)
        assert values(other) != values(whole)


@pytest.mark.parametrize("startup", [2, 10])
def test_a_journal_cut_anywhere_gives_the_same_proposals(make: Make, startup: int) -> None:
    asked: dict[str, Any] = {"proposals": 4, "sampler": {"use": "tpe", "startup": startup}}
    whole = make(name="whole", **asked)
    whole.run(train=False, cells=3)
    (cell,) = whole.search.next(1)
    data = (whole.folder / "journal.log").read_bytes()
    ends = [number for number, byte in enumerate(data) if byte == ord("\n")]
    (begins,) = [number for number, line in enumerate(data.splitlines()) if b'"op_code":4' in line][3:]
    for number, end in enumerate(ends[begins - 1 :]):
        cut = make(name=f"cut{number}", **asked)
        cut.close()
        (cut.folder / "journal.log").write_bytes(data[: end + 1])
        cut.open()
        (again,) = cut.search.next(1)
        assert again.identity == cell.identity
    assert number >= 3


def test_a_grid_is_taken_in_order(make: Make) -> None:
    toy = make(space=GRID, sampler="grid", proposals=None)
    toy.run(train=False)
    assert values(toy) == [
        {"training.batch": batch, "sampling.overlap": overlap}
        for batch in (2, 4)
        for overlap in ([], ["h"], ["h", "w"])
    ]


def test_brute_force_takes_each_once(make: Make) -> None:
    toy = make(space=GRID, sampler="brute_force", proposals=None)
    toy.run(train=False)
    assert len({json.dumps(each) for each in values(toy)}) == 6
    assert values(toy)[0] != {"training.batch": 2, "sampling.overlap": []}


def test_arms_take_turns_and_end_with_the_same_budget(make: Make) -> None:
    toy = make(arms=("a", "b", "c"), proposals=3)
    toy.run(train=False, cells=4)
    assert [arm.partition("#")[0] for arm, _ in toy.seen] == ["a", "b", "c", "a"]
    toy.run(train=False)
    assert {arm: len(found) for arm, found in toy.search.describe()["arms"].items()} == {
        "a": 3,
        "b": 3,
        "c": 3,
    }


def test_the_best_of_an_arm_is_run_with_the_studys_seeds(make: Make) -> None:
    toy = make(arms=("a", "b"), seeds=(0, 1))
    unknown = [([arm, seed, "", "", ""], "planned") for arm in "ab" for seed in "01"]
    assert list(toy.search.rows()) == unknown
    toy.run(train=False)
    rows = {(row[0], int(row[1])): toy.made[row[2]] for row, state in toy.search.rows() if state == "done"}
    assert list(rows) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    best = min(toy.proposals("a"), key=lambda each: each["objectives"][0])
    assert rows["a", 1].config.training.learning_rate == best["values"]["training.learning_rate"]
    # Seed 0 is what the proposals were tried with: that cell is known already.
    assert ("a", 0) not in toy.seen and ("a", 1) in toy.seen


def test_several_seeds_are_one_proposal(make: Make) -> None:
    toy = make(proposals=2, seeds=(7,))
    toy.study = load_with(toy, seeds=[4, 6])
    toy.open()
    toy.run(train=False)
    first = toy.proposals()[0]
    assert toy.seen[:2] == [("default#0", 4), ("default#0", 6)] and toy.seen[-1] == ("default", 7)
    (low,), (high,) = first["each"]
    assert high - low == pytest.approx(0.02) and first["objectives"] == [pytest.approx((low + high) / 2)]
    assert first["steps"] == 2 * STEPS and first["seconds"] == 4.0


def load_with(toy: Toy, **search: Any) -> StudyConfig:
    """The toy's study with other keys in its search."""
    data = yaml.safe_load((toy.folder / "toy.yaml").read_text())
    data["search"].update(search)
    (toy.folder / "toy.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return load_study(toy.folder / "toy.yaml")


def test_seeds_are_given_up_together_and_only_when_all_have_come_so_far(make: Make) -> None:
    toy = make(proposals=4, pruner={"use": "median", "startup": 1, "every": 4})
    toy.study = load_with(
        toy, seeds=[0, 1], sampler="grid", space={"diffusion.sigma_max": {"choices": [60.0, 11.0]}}
    )
    toy.open()
    toy.run(cells=2)
    bad = list(toy.search.next(1))
    assert [cell.config.diffusion.sigma_max for cell in bad] == [11.0, 11.0]
    bad[0].train_to(12)
    assert toy.search.ends(bad[0]) is None and toy.search.ends(bad[1]) is None
    bad[1].train_to(4)
    reasons = {toy.search.ends(cell) for cell in bad}
    assert len(reasons) == 1 and str(reasons.pop()).startswith("given up at step 4: loss ")
    toy.search.settled(bad[0], "cancelled", "pruned")
    assert toy.proposals()[1]["state"] == "running"
    toy.search.settled(bad[1], "cancelled", "pruned")
    assert toy.proposals()[1]["state"] == "pruned" and toy.proposals()[1]["steps"] == 12 + 4


def test_a_seed_that_fails_ends_the_others(make: Make) -> None:
    toy = make()
    toy.study = load_with(toy, seeds=[0, 1])
    toy.open()
    one, other = toy.search.next(2)
    toy.search.settled(one, "failed", "diverged")
    assert toy.search.ends(other) == "another seed failed (diverged)"
    toy.search.settled(other, "cancelled", "pruned")
    assert (toy.proposals()[0]["state"], toy.proposals()[0]["reason"]) == ("failed", "diverged")


def given_up(make: Make, proposals: int) -> tuple[Any, Any]:
    """Return a search whose second proposal is given up, and that proposal's cell."""
    toy = make(proposals=proposals, pruner={"use": "median", "startup": 1, "every": 4})
    toy.study = load_with(toy, sampler="grid", space={"diffusion.sigma_max": {"choices": [60.0, 11.0, 50.0]}})
    toy.open()
    toy.run(cells=1)
    (bad,) = toy.search.next(1)
    bad.train_to(8)
    assert toy.search.ends(bad) is not None
    return toy, bad


def test_what_was_given_up_stays_so_after_a_kill(make: Make) -> None:
    toy, _ = given_up(make, proposals=4)
    toy.close()
    toy.open()
    assert toy.proposals()[1]["state"] == "pruned"
    (after,) = toy.search.next(1)
    assert after.config.diffusion.sigma_max == 50.0


def test_an_interrupted_cell_goes_on_with_the_next_command(make: Make) -> None:
    toy = make(proposals=2)
    (cell,) = toy.search.next(1)
    toy.search.settled(cell, "interrupted", "preempted")
    assert toy.proposals()[0]["state"] == "running"
    toy.close()
    toy.open()
    (again,) = toy.search.next(0)
    assert again.identity == cell.identity


def test_two_objectives_have_no_best_but_a_set(make: Make) -> None:
    objectives = [
        {"metric": "held_out_loss"},
        {"metric": "throughput.videos_per_second", "direction": "maximize"},
    ]
    space = {"training.batch": {"choices": [2, 4]}, "diffusion.sigma_max": {"choices": [60.0, 50.0]}}
    toy = make(space=space, sampler="grid", proposals=None, objective=objectives)
    toy.run(train=False)
    found = {
        (each["values"]["training.batch"], each["values"]["diffusion.sigma_max"]): each["objectives"]
        for each in toy.proposals()
    }
    assert found[2, 60.0][1] == 0.5 and found[4, 50.0][1] == 0.25
    assert found[2, 60.0][0] < found[2, 50.0][0]


def test_another_space_is_another_search_and_another_sampler_is_not(make: Make) -> None:
    toy = make(proposals=2)
    toy.run(train=False)
    for changed, count in (({"sampler": "random"}, 2), ({"proposals": 4}, 2), ({"space": GRID}, 0)):
        toy.close()
        toy.study = load_with(toy, **changed)
        toy.open()
        assert len(toy.proposals()) == count


def test_values_that_do_not_fit_together_count_as_tried(make: Make) -> None:
    space = {
        "diffusion.sigma_min": {"choices": [0.1, 20.0]},
        "diffusion.sigma_max": {"choices": [10.0, 90.0]},
    }
    toy = make(space=space, sampler="grid", proposals=None)
    toy.run(train=False)
    states = [each["state"] for each in toy.proposals()]
    assert states == ["done", "done", "failed", "done"]
    assert "sigma_min: should be below sigma_max 10.0, got 20.0" in toy.proposals()[2]["reason"]


def test_a_result_without_the_objective_is_a_failure_that_says_so(make: Make) -> None:
    toy = make(proposals=1, objective={"metric": "held_out_loss", "where": {"parents": "clean"}})
    toy.run(train=False)
    assert toy.proposals()[0]["state"] == "failed"
    assert toy.proposals()[0]["reason"] == "no row of held_out_loss, finest level, parents=clean"
    assert toy.search.finished() and list(toy.search.rows()) == [(["default", "0", "", "", ""], "planned")]


def test_hyperband_gives_up_at_its_rungs(make: Make) -> None:
    toy = make(proposals=16, sampler="random", pruner={"use": "hyperband", "every": 4})
    toy.run()
    pruned = [each for each in toy.proposals() if each["state"] == "pruned"]
    assert 4 <= len(pruned) < 16 and {each["last_step"] for each in pruned} <= {4, 12, 36}


def test_patience_gives_up_what_gets_worse(make: Make) -> None:
    toy = make(pruner={"use": "patient", "patience": 2, "min_delta": 0.1, "every": 5})
    (arm,) = toy.search._arms.values()
    arm.propose()
    curve = [1.0, 0.5, 0.55, 0.55, 0.58, 0.7, 0.7, 0.7]
    shown = [arm.show(0, 5 * look, value) for look, value in enumerate(curve, 1)]
    assert shown == [False] * 7 + [True]


def test_a_pruner_of_something_that_is_to_rise(make: Make) -> None:
    """The objective falls and the watched column rises: what is low is given up."""
    pruner = {"use": "median", "startup": 1, "watch": "psnr", "watch_direction": "maximize"}
    toy = make(pruner=pruner)
    (arm,) = toy.search._arms.values()
    for number, value in enumerate((20.0, 25.0, 15.0)):
        arm.propose()
        assert arm.show(number, 2, value) == (number == 2)
        assert arm.proposal(number).curve == {2: value}
        if number < 2:
            arm.tell(number, "done", [1.0])


def test_what_the_report_reads_is_written(make: Make) -> None:
    toy = make(proposals=2)
    toy.run(train=False)
    written = json.loads((toy.folder / "search.json").read_text())
    assert written == json.loads(json.dumps(toy.search.describe()))
    assert written["budget"] == 2 and written["objectives"][0]["name"] == "held_out_loss, finest level"


def test_a_proposal_that_was_given_up_as_another_is_given_up_too(make: Make) -> None:
    toy, bad = given_up(make, proposals=3)
    (other,) = toy.search.next(1)
    toy.search._open[-1].cells = [bad]  # a sampler that proposes the same again, before the first has ended
    toy.search.settled(bad, "cancelled", "pruned")
    assert [each["state"] for each in toy.proposals()] == ["done", "pruned", "pruned"]
    assert other.config.diffusion.sigma_max == 50.0
