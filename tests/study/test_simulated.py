"""Studies of simulated cells: virtual time, seeded fates, every cell in the state that its fate asks for."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpdm_core.base.errors import InputError
from hpdm_core.study.__main__ import main
from hpdm_core.study.backends.simulated import FINISHED, SimulatedOptions, Toy, VirtualClock, fate
from hpdm_core.study.ledger.ledger import Ledger
from hpdm_core.study.plan.study_file import load_study
from hpdm_core.study.show import report as reporting

FAILURES = {
    "lost node": 0.015,
    "preempted": 0.01,
    "out of memory": 0.01,
    "code error": 0.01,
    "diverged": 0.005,
}


def study(folder: Path, *, cells: int, **backend: Any) -> Path:
    data = {
        "name": "many",
        "extends": "tiny_clips",
        "seeds": list(range(cells)),
        "evaluation": {"metrics": ["held_out_loss"]},
        "backend": {"use": "simulated", "failures": FAILURES, **backend},
    }
    path = folder / "many.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def destiny(cell: str, options: SimulatedOptions) -> tuple[str, int]:
    """The state that a cell should end in, and its attempts: written down here once more, from the rules."""
    attempt, memory = 0, 0
    while True:
        attempt += 1
        _, cause = fate(options, cell, attempt)
        if cause is None:
            return "done", attempt
        if cause in ("code error", "diverged"):
            return "failed", attempt
        if cause == "out of memory":
            memory += 1
            if memory == 4:  # 8 videos at a time, then 4, 2 and 1
                return "failed", attempt


def check_every_cell(file: Path, results: Path, *, cells: int) -> Counter[str]:
    """Every cell is in its right state in the ledger, in index.csv and in the store, and no work was done twice."""
    home = results / "simulated" / "many"
    options = SimulatedOptions.model_validate(load_study(file).backend.options)
    ledger = Ledger(home, study="many")
    states = ledger.states()
    records = Counter(record["cell"] for record in ledger.records())
    ledger.close()
    assert len(states) == cells
    for cell, state in states.items():
        assert (state, records[cell]) == destiny(cell, options), cell
    with (home / "index.csv").open() as lines:
        index = Counter(row["state"] for row in csv.DictReader(lines))
    finished = list((home.parent / "store" / "train").glob(f"*/{FINISHED}"))
    assert index == Counter(states.values()) and len(finished) == index["done"]
    assert all(len(path.read_text().split()) == 1 for path in finished)
    return index


def test_every_cell_ends_in_its_right_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "report", lambda folder: "")
    many = {name: 4 * share for name, share in FAILURES.items()}  # few cells, so that each class is met
    file = study(tmp_path, cells=150, slots=16, failures=many)
    assert main([str(file), "--results", str(tmp_path / "results")]) == 1
    index = check_every_cell(file, tmp_path / "results", cells=150)
    assert set(index) == {"done", "failed"} and index["failed"] >= 3


@pytest.mark.slow
def test_ten_thousand_cells(tmp_path: Path) -> None:
    """Memory and times are `benchmarks/controller.py`'s affair; what is right is looked at here."""
    file = study(tmp_path, cells=10_000, slots=256)
    assert main([str(file), "--results", str(tmp_path / "results")]) == 1
    index = check_every_cell(file, tmp_path / "results", cells=10_000)
    assert 100 <= index["failed"] <= 250


def test_made_up_results_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "report", lambda folder: "")
    file = study(tmp_path, cells=2, failures={})
    assert main([str(file), "--results", str(tmp_path / "results")]) == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["simulated"]
    (result, _) = (tmp_path / "results" / "simulated" / "store" / "train").glob("*/result.json")
    assert json.loads(result.read_text())["simulated"] is True


def test_fates_depend_on_seed_cell_and_attempt_alone() -> None:
    options = SimulatedOptions(failures={"code error": 0.5}, seconds=100.0, spread=0.5)
    found = [fate(options, f"{number}", attempt) for number in range(300) for attempt in (1, 2)]
    assert found == [fate(options, f"{number}", attempt) for number in range(300) for attempt in (1, 2)]
    assert len(set(found)) == 600
    assert 250 < sum(cause == "code error" for _, cause in found) < 350
    whole = sorted(seconds for seconds, cause in found if cause is None)
    assert 85 < whole[len(whole) // 2] < 115
    assert fate(options.model_copy(update={"seed": 1}), "0", 1) != found[0]


def test_time_passes_when_it_is_waited_for() -> None:
    clock = VirtualClock()
    clock.sleep(3600.0)
    assert clock.monotonic() == 3600.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"failures": {"lost nod": 0.1}}, "unknown class 'lost nod' - did you mean 'lost node'?"),
        ({"failures": {"lost node": 0.7, "preempted": 0.6}}, "should sum to 1 at most, sum to 1.3"),
        ({"slot": 3}, "unknown key - did you mean 'slots'?"),
        ({"toy": {"training.steps": {"bst": 3}}}, "unknown key - did you mean 'best'?"),
    ],
)
def test_wrong_options_are_lines(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        load_study(study(tmp_path, cells=1, **options))
    assert any(said in line for line in error.value.messages), error.value.messages


def test_the_toy_is_a_bowl() -> None:
    options = SimulatedOptions.model_validate(
        {
            "toy": {
                "training.learning_rate": {"best": 0.01, "log": True, "width": 2},
                "model.blocks": {"best": 4},
            }
        }
    )
    toy = Toy(options)

    def at(rate: float, blocks: int) -> float:
        return toy.value({"training": {"learning_rate": rate}, "model": {"blocks": blocks}, "seed": 0})

    assert at(0.01, 4) == pytest.approx(0.1)
    assert at(1.0, 4) == pytest.approx(1.1) and at(0.01, 6) == pytest.approx(4.1)
