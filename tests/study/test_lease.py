import errno
import json
import os
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from hpdm_core.base.errors import TroubleError
from hpdm_core.store import lease as lease_module
from hpdm_core.store.lease import Held, Lease, Process, Watch


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


class Hands:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    made = Hands()
    monkeypatch.setattr(Lease, "_watch", Watch(made))
    return made


def elsewhere(path: Path, beat: int) -> None:
    data = {"host": "elsewhere", "pid": 1, "start": "x", "token": "old", "beat": beat}
    path.write_text(json.dumps(data))


def test_a_holder_on_another_host_lives_while_its_counter_moves(tmp_path: Path, hands: Hands) -> None:
    path = tmp_path / "lease"
    for beat in range(5):
        elsewhere(path, beat)
        hands.now += lease_module.STALE_SECONDS - 1
        with pytest.raises(Held, match="process 1 on elsewhere"), Lease(path):
            pass


def test_a_silent_holder_on_another_host_is_replaced_whatever_its_clock_says(
    tmp_path: Path, hands: Hands
) -> None:
    path = tmp_path / "lease"
    elsewhere(path, 7)
    os.utime(path, (4e9, 4e9))  # that host's clock is decades ahead
    with pytest.raises(Held), Lease(path):
        pass
    hands.now += lease_module.STALE_SECONDS + 1
    with Lease(path):
        assert Lease.holder(path) == Process.here()


def test_a_holder_on_another_host_is_given_all_of_its_time(tmp_path: Path, hands: Hands) -> None:
    path = tmp_path / "lease"
    elsewhere(path, 7)
    for _ in range(3):  # looking does not start the time anew
        with pytest.raises(Held), Lease(path):
            pass
        hands.now += lease_module.STALE_SECONDS / 3 - 1
    with pytest.raises(Held), Lease(path):
        pass
    data = json.loads(path.read_text())
    path.write_text(
        json.dumps({**data, "token": "new"})
    )  # another holder, its counter where the old one's was
    hands.now += 4
    with pytest.raises(Held), Lease(path):
        pass


def test_a_watch_that_was_told_to_forget_begins_again(hands: Hands) -> None:
    watch = Watch(hands)
    assert watch.silent("a", 1) == 0
    hands.now += 5
    assert (watch.silent("a", 1), watch.silent("b", 1)) == (5, 0)
    watch.forget("a")
    assert watch.silent("a", 1) == 0
    watch.forget("never seen")


def test_a_second_lease_without_content_is_given_its_own_time(tmp_path: Path, hands: Hands) -> None:
    path = tmp_path / "lease"
    for _ in range(2):
        path.touch()
        with pytest.raises(Held), Lease(path):
            pass
        hands.now += lease_module.EMPTY_SECONDS + 1
        with Lease(path):
            pass


def test_a_lease_makes_its_folder(tmp_path: Path) -> None:
    with Lease(tmp_path / "a" / "b" / "lease") as lease:
        assert lease.mine()
    assert not lease.mine()


def test_one_process_of_a_host_at_a_time_judges_a_lease(tmp_path: Path) -> None:
    """Or two find the same dead lease, and the second throws away the first one's new one."""
    fcntl = pytest.importorskip("fcntl")
    entered = threading.Event()

    def enter() -> None:
        with Lease(tmp_path / "lease"):
            entered.set()

    with (tmp_path / ".lease.guard").open("a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join()


def test_a_lease_without_content_is_given_time_and_then_replaced(tmp_path: Path, hands: Hands) -> None:
    path = tmp_path / "lease"
    path.touch()
    with pytest.raises(Held), Lease(path):
        pass
    hands.now += lease_module.EMPTY_SECONDS + 1
    with Lease(path):
        assert Lease.holder(path) == Process.here()


def test_a_lease_that_was_taken_over_is_noticed_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    with Lease(path) as lease:
        lease.check()
        path.write_text(json.dumps({**Process.here().to_json(), "token": "another"}))
        with pytest.raises(TroubleError, match="taken this work over"):
            lease.check()
    assert json.loads(path.read_text())["token"] == "another"


def test_the_holder_moves_its_counter_and_leaves_another_lease_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.01)
    path = tmp_path / "lease"

    def beat() -> int:
        return int(json.loads(path.read_text())["beat"])

    with Lease(path):
        deadline = time.monotonic() + 5
        while beat() < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert beat() >= 3
        path.unlink()
        elsewhere(path, 0)
        time.sleep(0.1)
        assert beat() == 0


@pytest.mark.parametrize("links", [True, False])
def test_a_file_system_without_links_has_leases_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def refuse(*paths: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr("os.link", refuse)
    with Lease(tmp_path / "lease"):
        assert Lease.holder(tmp_path / "lease") == Process.here()
        with pytest.raises(Held), Lease(tmp_path / "lease"):
            pass
    assert not list(tmp_path.glob("*lease")) and not list(tmp_path.glob(".*.tmp"))


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
