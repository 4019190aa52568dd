"""What only a server has: a password that no file may show, and connections that break."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpdm_core.base.errors import InputError
from hpdm_core.base.passwords import without_password, without_passwords
from hpdm_core.study.ledger.ledger import Ledger, LedgerCell
from hpdm_core.study.ledger.storage import check_storage

pytestmark = pytest.mark.postgres
A = LedgerCell(identity="aaaa", arm="default", seed=0)


def test_a_wrong_password_is_one_line_without_it(empty_database: str, tmp_path: Path) -> None:
    wrong = empty_database.replace("s3cret-w0rd", "another-w0rd")
    for attempt in (
        lambda: check_storage(wrong, tmp_path / "study"),
        lambda: Ledger(tmp_path, study="tiny", storage=wrong),
    ):
        with pytest.raises(InputError, match="password authentication failed") as error:
            attempt()
        (line,) = error.value.messages
        assert "another-w0rd" not in line and "\n" not in line and "***@127.0.0.1" in line
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_is_not_there(empty_database: str, tmp_path: Path) -> None:
    missing = empty_database + "_missing"
    with pytest.raises(InputError, match="does not exist"):
        check_storage(missing, tmp_path / "study")


def test_a_connection_that_the_server_closed_is_opened_again(empty_database: str, tmp_path: Path) -> None:
    import psycopg

    ledger = Ledger(tmp_path, study="tiny", storage=empty_database)
    ledger.sync([(A, "planned", 0.0)])
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    ledger.set(A, "done", seconds=1.0)
    ledger.close()
    again = Ledger(tmp_path, study="tiny", storage=empty_database)
    assert again.states() == {"aaaa": "done"}
    again.close()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:a/b@c@host/x", "postgresql://***@host/x"),
        ("postgresql://host/x?user=me&password=secret", "postgresql://host/x?user=me&password=***"),
        ("sqlite:///ledger.db", "sqlite:///ledger.db"),
    ],
)
def test_a_url_is_shown_without_its_password(text: str, shown: str) -> None:
    assert without_password(text) == shown


def test_a_command_is_shown_without_passwords() -> None:
    command = "python -m hpdm_core.study f.yaml --set storage=postgresql+psycopg://me:s@3/c@host/x --only a"
    shown = "python -m hpdm_core.study f.yaml --set storage=postgresql+psycopg://me:***@host/x --only a"
    assert without_passwords(command) == shown
    assert without_passwords("see https://example.org/a@b") == "see https://example.org/a@b"


def test_the_password_is_in_no_file_and_nothing_printed(
    empty_database: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from hpdm_core.study.__main__ import main

    study = tmp_path / "study"
    study.mkdir()
    (study / "s.yaml").write_text(
        "name: secret\nextends: tiny_clips\nseeds: [0, 1]\nevaluation: {metrics: [held_out_loss]}\n"
        "backend: {use: simulated}\n"
    )
    results = tmp_path / "results"
    assert main([str(study / "s.yaml"), "--results", str(results), "--set", f"storage={empty_database}"]) == 0
    ledger = Ledger(tmp_path, study="secret", storage=empty_database)
    assert list(ledger.states().values()) == ["done", "done"]
    ledger.close()
    files = [path for path in results.rglob("*") if path.is_file()]
    assert {"study.yaml", "index.csv", "spec.json"} <= {path.name for path in files}
    assert not [path for path in files if b"s3cret-w0rd" in path.read_bytes()]
    assert "s3cret-w0rd" not in "".join(capfd.readouterr())
    assert "***" in (results / "simulated" / "secret" / "study.yaml").read_text()
