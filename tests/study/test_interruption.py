"""Ctrl-C and SIGTERM at a moment that must not be torn apart."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.storages.journal import _file

from hpdm_core.base.interruption import shielded
from hpdm_core.study.ledger.journal import JournalFile


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Let Ctrl-C raise, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Terminated(Exception):
    """What this test's handler of SIGTERM raises."""


def test_what_came_meanwhile_is_dealt_with_at_the_end() -> None:
    done = []

    def terminate(signum: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        for signum, error in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)):
            with pytest.raises(error), shielded():
                signal.raise_signal(signum)
                done.append(signum)
        assert done == [signal.SIGINT, signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is terminate
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("moment", ["symlink", "rename", "unlink"])
def test_ctrl_c_while_the_journals_lock_is_taken_or_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    journal = JournalFile(tmp_path / "journal.log")
    real = getattr(os, moment)

    def interrupted(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(_file.os, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.append_logs([{"op": 1}])
    assert [path.name for path in tmp_path.iterdir()] == ["journal.log"]
    assert list(JournalFile(tmp_path / "journal.log").read_logs(0)) == [{"op": 1}]
