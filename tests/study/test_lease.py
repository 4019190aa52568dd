import json
import os
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from hpdm_core.errors import TroubleError
from hpdm_core.study import lease as lease_module
from hpdm_core.study.lease import Held, Lease, Process


def dead_process() -> Process:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = Process.of(child.pid)
    child.communicate(b"\n")
    assert known is not None
    return known


def test_a_process_knows_whether_it_lives() -> None:
    assert Process.here().alive() is True
    assert dead_process().alive() is False


def test_a_pid_given_to_another_process_is_not_the_old_one() -> None:
    here = Process.here()
    assert Process(host=here.host, pid=here.pid, start="another boot:1").alive() is False


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = Process.of(child.pid)
    assert known is not None and known.alive()
    child.kill()
    deadline = time.monotonic() + 10
    while known.alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not known.alive()  # before anyone has waited for it
    child.communicate()


def test_a_second_lease_names_the_first(tmp_path: Path) -> None:
    with Lease(tmp_path / "lease"), pytest.raises(Held) as held, Lease(tmp_path / "lease"):
        pass
    assert held.value.holder == Process.here()
    assert str(os.getpid()) in str(held.value)


def test_leaving_frees(tmp_path: Path) -> None:
    with Lease(tmp_path / "lease"):
        assert Lease.holder(tmp_path / "lease") == Process.here()
    assert Lease.holder(tmp_path / "lease") is None
    with Lease(tmp_path / "lease"):
        pass


def test_a_dead_holder_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    path.write_text(json.dumps({**dead_process().to_json(), "token": "old"}))
    assert Lease.holder(path) is None
    with Lease(path):
        assert Lease.holder(path) == Process.here()


@pytest.mark.parametrize(("silent", "taken"), [(10.0, True), (lease_module.STALE_SECONDS + 10, False)])
def test_a_holder_on_another_host_is_judged_by_its_silence(
    tmp_path: Path, silent: float, taken: bool
) -> None:
    path = tmp_path / "lease"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "x", "token": "old"}))
    touched = time.time() - silent
    os.utime(path, (touched, touched))
    assert (Lease.holder(path) is not None) is taken
    if taken:
        with pytest.raises(Held, match="process 1 on elsewhere"), Lease(path):
            pass
    else:
        with Lease(path):
            pass


def test_a_lease_that_was_taken_over_is_noticed_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    with Lease(path) as lease:
        lease.check()
        path.write_text(json.dumps({**Process.here().to_json(), "token": "another"}))
        with pytest.raises(TroubleError, match="taken this work over"):
            lease.check()
    assert json.loads(path.read_text())["token"] == "another"


def test_the_holder_touches_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.01)
    path = tmp_path / "lease"
    with Lease(path):
        os.utime(path, (1.0, 1.0))
        deadline = time.monotonic() + 5
        while path.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 2


def _race(path: str, start: float, wins: str) -> None:
    time.sleep(max(0.0, start - time.time()))
    try:
        with Lease(Path(path)):
            Path(wins, str(os.getpid())).touch()
            time.sleep(0.5)
    except Held:
        pass


def test_of_racing_processes_one_wins(tmp_path: Path) -> None:
    path, wins = tmp_path / "lease", tmp_path / "wins"
    wins.mkdir()
    path.write_text(
        json.dumps({**dead_process().to_json(), "token": "old"})
    )  # all want to replace a dead one
    context = get_context("fork")
    start = time.time() + 0.3
    racers = [context.Process(target=_race, args=(str(path), start, str(wins))) for _ in range(6)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(list(wins.iterdir())) == 1
