"""Storages are tried before anything is written, and trying leaves nothing behind."""

import sqlite3
from pathlib import Path

import pytest

from hpdm_core.base.errors import InputError
from hpdm_core.study.ledger.ledger import Ledger
from hpdm_core.study.ledger.storage import check_storage


def test_a_journal_and_memory_can_always_be_opened(tmp_path: Path) -> None:
    check_storage(None, tmp_path / "missing")
    check_storage("sqlite://", tmp_path / "missing")
    check_storage("sqlite:///:memory:", tmp_path / "missing")


def test_a_file_to_be_made_and_a_ledger_that_is_there(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    check_storage(url, tmp_path / "results" / "study")
    assert list(tmp_path.iterdir()) == []
    Ledger(tmp_path, study="tiny", storage=url)
    before = (tmp_path / "ledger.db").read_bytes()
    check_storage(url, tmp_path / "results" / "study")
    assert (tmp_path / "ledger.db").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.db"]


def test_a_file_within_the_studys_own_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    study = tmp_path / "results" / "study"
    for parent in (study, study.parent):
        check_storage(f"sqlite:///{parent / 'ledger.db'}", study)
    with pytest.raises(InputError, match="No such file or directory"):
        check_storage(f"sqlite:///{study / 'below' / 'ledger.db'}", study)
    with pytest.raises(InputError, match="No such file or directory"):
        check_storage(f"sqlite:///{tmp_path / 'results' / 'other' / 'ledger.db'}", study)


def test_a_database_that_another_process_keeps_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpdm_core.study.ledger.storage.SECONDS", 0.05)
    file = tmp_path / "ledger.db"
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE t (x)")
    connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(InputError, match="database is locked"):
        check_storage(f"sqlite:///{file}", tmp_path)
    connection.rollback()
    check_storage(f"sqlite:///{file}", tmp_path)
    connection.close()


def test_a_driver_that_is_not_installed_or_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"storage: 'mysql://\*\*\*@host/x' cannot be opened: ") as error:
        check_storage("mysql://me:secret@host/x", tmp_path)
    assert "secret" not in str(error.value)
