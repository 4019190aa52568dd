"""One suite for a journal, SQLite and PostgreSQL: what the ledger promises does not depend on where it is kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.base.errors import TroubleError
from hpdm_core.study.ledger.ledger import LedgerCell

A = LedgerCell(identity="aaaa", arm="default", seed=0)
B = LedgerCell(identity="bbbb", arm="none", seed=1)
Open = Callable[..., Any]


def test_cells_are_there_for_the_next_command(opened: Open) -> None:
    ledger = opened()
    ledger.sync([(A, "planned", 0.0), (B, "planned", 0.0)])
    ledger.set(B, "running")
    ledger.set(B, "done", seconds=3.5)
    ledger.set(A, "queued")
    again = opened()
    assert again.states() == {"aaaa": "queued", "bbbb": "done"}
    assert again.records() == [
        {"cell": "aaaa", "arm": "default", "seed": 0, "state": "queued", "optuna": "WAITING"},
        {"cell": "bbbb", "arm": "none", "seed": 1, "state": "done", "optuna": "COMPLETE"},
    ]
    assert again.storage.optuna.get_all_trials(again._study_id)[1].value == 3.5


@pytest.mark.parametrize(
    ("state", "cause", "optuna"),
    [
        ("running", None, "RUNNING"),
        ("done", None, "COMPLETE"),
        ("failed", "out of memory", "FAIL"),
        ("interrupted", "preempted", "FAIL"),
        ("cancelled", "cancelled", "FAIL"),
        ("cancelled", "pruned", "PRUNED"),
    ],
)
def test_every_state_comes_back(opened: Open, state: str, cause: str | None, optuna: str) -> None:
    opened().set(A, state, cause=cause)
    assert opened().states() == {"aaaa": state}
    (record,) = opened().records()
    assert (record["state"], record.get("cause"), record["optuna"]) == (state, cause, optuna)


def test_a_retry_is_a_new_record_that_names_the_old(opened: Open) -> None:
    ledger = opened()
    ledger.sync([(B, "planned", 0.0), (A, "planned", 0.0)])
    for state in ("running", "failed", "failed"):
        ledger.set(A, state)
    ledger = opened()
    ledger.set(A, "running")
    ledger.set(A, "done", seconds=1.0)
    assert [(record["state"], record.get("retry_of")) for record in opened().records()] == [
        ("planned", None),
        ("failed", None),
        ("done", 1),
    ]


def test_what_is_said_twice_is_written_once(opened: Open) -> None:
    for _ in range(2):
        ledger = opened()
        ledger.sync([(A, "done", 1.0), (B, "planned", 0.0)])
        ledger.set(B, "failed", cause="diverged")
        ledger.set(B, "failed", cause="diverged")
    assert len(opened().records()) == 2


def test_two_studies_in_one_storage_do_not_mix(opened: Open) -> None:
    opened("one").sync([(A, "done", 1.0)])
    opened("two").sync([(B, "planned", 0.0)])
    assert opened("one").states() == {"aaaa": "done"} and opened("two").states() == {"bbbb": "planned"}


def test_a_batch_is_written_at_its_end(opened: Open, storage: str | None, tmp_path: Path) -> None:
    ledger = opened()
    ledger.sync([(A, "planned", 0.0)])
    with ledger.batch():
        ledger.set(A, "running")
        ledger.set(A, "done", seconds=1.0)
        ledger.set(B, "running")
        assert seen_elsewhere(storage, tmp_path) == {"aaaa": "planned"}
        assert ledger.states() == {"aaaa": "done", "bbbb": "running"}
    assert seen_elsewhere(storage, tmp_path) == {"aaaa": "done", "bbbb": "running"}


def seen_elsewhere(storage: str | None, folder: Path) -> dict[str, str]:
    """What another process reads, at the same time."""
    script = """if True:
    import sys
    from pathlib import Path
    from hpdm_core.study.ledger import storage
    from hpdm_core.study.ledger.journal import JournalFile
    from optuna.storages import JournalStorage
    url = sys.argv[2] if len(sys.argv) > 2 else None
    # The journal's lock is the writer's: read beside it.
    opened = (JournalStorage(JournalFile(Path(sys.argv[1]) / "journal.log")) if url is None
              else storage.open_storage(url, Path(sys.argv[1])).optuna)
    for trial in opened.get_all_trials(opened.get_study_id_from_name("tiny"), deepcopy=False):
        names = {"WAITING": "planned", "RUNNING": "running", "COMPLETE": "done"}
        print(trial.user_attrs["cell"], names[trial.state.name])
    """
    command = [sys.executable, "-c", script, str(folder), *([storage] if storage else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return dict(line.split() for line in done.stdout.splitlines())


def test_a_batch_costs_one_write(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a thousand cells cost is counted in waits for the disk or the server, not in time."""
    import os

    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    ledger = opened()
    writes = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (writes.append("fsync"), fsync(handle))[1])
    event.listen(Engine, "commit", lambda connection: writes.append("commit"))
    cells = [LedgerCell(identity=f"{number:04}", arm="a", seed=number) for number in range(20)]
    ledger.sync([(cell, "planned", 0.0) for cell in cells])
    assert len(writes) == 1
    with ledger.batch():
        for cell in cells:
            ledger.set(cell, "running")
    assert len(writes) == 2


def test_a_storage_that_goes_away_is_one_line(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = opened()
    ledger.sync([(A, "planned", 0.0)])
    break_it(ledger, monkeypatch)
    with pytest.raises(TroubleError, match="the work done is kept") as error:
        ledger.set(A, "running")
    assert len(error.value.messages) == 1 and "\n" not in error.value.messages[0]


def break_it(ledger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk be full, or the server refuse."""
    from hpdm_core.study.ledger.journal import JournalFile

    if ledger.storage.journal is not None:

        def full(*arguments: Any) -> None:
            raise OSError(28, "No space left on device", str(ledger.storage.journal))

        monkeypatch.setattr(JournalFile, "_write", full)
        return
    with ledger.storage._rdb.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE trial_values")
        connection.exec_driver_sql("ALTER TABLE trials RENAME TO gone")


def test_many_cells_are_read_at_once(opened: Open) -> None:
    cells = [LedgerCell(identity=f"{number:04}", arm="a", seed=number) for number in range(200)]
    ledger = opened()
    ledger.sync([(cell, "done", 1.0) for cell in cells])
    assert set(opened().states().values()) == {"done"} and len(opened().states()) == 200
