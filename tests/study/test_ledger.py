import json
from pathlib import Path

import pytest

from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.study.ledger.ledger import Ledger, LedgerCell, mend_journal

A = LedgerCell(identity="aaaa", arm="default", seed=0)
B = LedgerCell(identity="bbbb", arm="none", seed=1)
C = LedgerCell(identity="cccc", arm="late", seed=0)


def open_ledger(folder: Path, storage: str | None = None) -> Ledger:
    return Ledger(folder, study="tiny", storage=storage)


def test_cells_are_trials_with_attributes_only(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.sync([(A, "waiting", 0.0), (B, "waiting", 0.0)])
    ledger.set(A, "running")
    ledger.set(A, "done", seconds=3.5)
    assert open_ledger(tmp_path).records() == [
        {"cell": "aaaa", "arm": "default", "seed": 0, "state": "done", "optuna": "COMPLETE"},
        {"cell": "bbbb", "arm": "none", "seed": 1, "state": "waiting", "optuna": "WAITING"},
    ]


def test_cells_may_start_in_any_order(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.sync([(A, "waiting", 0.0), (B, "waiting", 0.0)])
    ledger.set(B, "running")
    ledger.set(B, "done", seconds=1.0)
    assert ledger.states() == {"aaaa": "waiting", "bbbb": "done"}


def test_a_record_left_running_is_taken_over(tmp_path: Path) -> None:
    first = open_ledger(tmp_path)
    first.sync([(A, "waiting", 0.0)])
    first.set(A, "running")
    second = open_ledger(tmp_path)
    second.sync([(A, "done", 2.0)])
    assert [record["optuna"] for record in second.records()] == ["COMPLETE"]


def test_a_retry_is_a_new_record_that_names_the_old(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.sync([(A, "waiting", 0.0)])
    ledger.set(A, "running")
    ledger.set(A, "failed")
    ledger.set(A, "failed")  # said twice, written once
    ledger.set(A, "running")
    ledger.set(A, "done", seconds=1.0)
    assert [(record["state"], record.get("retry_of")) for record in ledger.records()] == [
        ("failed", None),
        ("done", 0),
    ]
    assert ledger.states() == {"aaaa": "done"}


def test_arms_can_be_added(tmp_path: Path) -> None:
    open_ledger(tmp_path).sync([(A, "done", 1.0)])
    open_ledger(tmp_path).sync([(A, "done", 1.0), (C, "waiting", 0.0)])
    assert [record["cell"] for record in open_ledger(tmp_path).records()] == ["aaaa", "cccc"]


def test_syncing_again_writes_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        open_ledger(tmp_path).sync([(A, "done", 1.0), (B, "waiting", 0.0)])
        size = (tmp_path / "journal.log").stat().st_size
    open_ledger(tmp_path).sync([(A, "done", 1.0), (B, "waiting", 0.0)])
    assert (tmp_path / "journal.log").stat().st_size == size


@pytest.mark.parametrize("tail", ['{"op_code":8,"wor', '{"op_code":8,"wor\n', "\0\0\0\0"])
def test_a_torn_last_line_is_cut(tmp_path: Path, tail: str) -> None:
    open_ledger(tmp_path).sync([(A, "done", 1.0)])
    journal = tmp_path / "journal.log"
    whole = journal.read_text()
    journal.write_text(whole + tail)
    ledger = open_ledger(tmp_path)
    assert ledger.notices == [] and journal.read_text() == whole
    assert ledger.states() == {"aaaa": "done"}


def test_every_cut_of_the_journal_can_be_opened(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.sync([(A, "waiting", 0.0)])
    ledger.set(A, "running")
    ledger.set(A, "done", seconds=1.0)
    data = (tmp_path / "journal.log").read_bytes()
    for cut in range(0, len(data), 97):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "journal.log").write_bytes(data[:cut])
        again = open_ledger(folder)
        again.sync([(A, "done", 1.0)])
        assert again.notices == [] and again.states() == {"aaaa": "done"}


def test_damage_sets_the_file_aside_and_says_so(tmp_path: Path) -> None:
    open_ledger(tmp_path).sync([(A, "done", 1.0), (B, "waiting", 0.0)])
    journal = tmp_path / "journal.log"
    lines = journal.read_text().splitlines(keepends=True)
    for number in (1, 2):
        journal.write_text("".join([lines[0], "garbage\n", *lines[1:]]))
        ledger = open_ledger(tmp_path)
        ledger.sync([(A, "done", 1.0), (B, "waiting", 0.0)])
        assert len(ledger.notices) == 1 and "\n" not in ledger.notices[0]
        assert "line 2 is not a record" in ledger.notices[0]
        assert f"journal.log.damaged-{number}" in ledger.notices[0]
        assert "garbage" in (tmp_path / f"journal.log.damaged-{number}").read_text()
        assert ledger.states() == {"aaaa": "done", "bbbb": "waiting"}


def test_a_record_without_its_end_is_cut_too(tmp_path: Path) -> None:
    """The next record would be written behind it, on the same line."""
    open_ledger(tmp_path).sync([(A, "done", 1.0)])
    journal = tmp_path / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-1])
    assert mend_journal(journal) is None
    assert journal.read_bytes() == b"".join(whole.splitlines(keepends=True)[:-1])


@pytest.mark.parametrize("rubbish", ["garbage\n", '{"a": 1}\n', "[1]\n", '{"op_code": "x"}\n'])
def test_damage_with_a_torn_end_is_damage(tmp_path: Path, rubbish: str) -> None:
    open_ledger(tmp_path).sync([(A, "done", 1.0)])
    journal = tmp_path / "journal.log"
    first, *others = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([first, rubbish, *others, '{"op_code":8,"wor']))
    notice = mend_journal(journal)
    assert notice is not None and "line 2 is not a record" in notice and not journal.exists()


def test_the_newest_record_of_a_cell_is_the_one_that_counts(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    for state in ("running", "failed", "running", "done"):
        ledger.set(A, state)
    assert len(ledger.records()) == 2
    assert open_ledger(tmp_path).states() == {"aaaa": "done"}


def test_records_that_make_no_sense_are_damage(tmp_path: Path) -> None:
    open_ledger(tmp_path).sync([(A, "done", 1.0)])
    journal = tmp_path / "journal.log"
    journal.write_text(journal.read_text() + json.dumps({"op_code": 8, "worker_id": "x"}) + "\n")
    ledger = open_ledger(tmp_path)
    assert len(ledger.notices) == 1 and (tmp_path / "journal.log.damaged-1").exists()
    assert ledger.states() == {}


def test_the_lock_of_a_killed_controller_costs_no_time(tmp_path: Path) -> None:
    open_ledger(tmp_path).sync([(A, "waiting", 0.0)])
    (tmp_path / "journal.log.lock").symlink_to(tmp_path / "journal.log")
    import time

    start = time.monotonic()
    open_ledger(tmp_path).sync([(A, "done", 0.0)])
    assert time.monotonic() - start < 5


def test_a_journal_that_is_a_folder_is_trouble(tmp_path: Path) -> None:
    (tmp_path / "journal.log").mkdir()
    with pytest.raises(TroubleError, match="cannot be read"):
        mend_journal(tmp_path / "journal.log")


def test_another_storage(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = open_ledger(tmp_path, url)
    ledger.sync([(A, "done", 1.0)])
    assert open_ledger(tmp_path, url).states() == {"aaaa": "done"}
    assert not (tmp_path / "journal.log").exists()


def test_a_storage_that_cannot_be_opened_keeps_its_password(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="storage: 'nonsense://\\*\\*\\*@host/x'") as error:
        open_ledger(tmp_path, "nonsense://me:secret@host/x")
    assert "secret" not in str(error.value)
