"""Items made in worker processes: the same in any number, and every end is an orderly one."""

import importlib
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.data.loader import in_processes

MAKERS = """
import os, signal, time
import torch
from hpdm_core.base.errors import InputError, TroubleError

def squares():
    return lambda number: (torch.full((1000,), number ** 2), os.getpid())

def slow_first(number):
    if number == 0:
        time.sleep(0.5)
    return number

def uneven():
    return slow_first

def fails(number, how):
    if number == 2:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"input": InputError("data: no such file"), "trouble": TroubleError("a", "b")}.get(
            how, ZeroDivisionError("division\\nby zero"))
    return number

def failing(how):
    return lambda number: fails(number, how)

def refused():
    raise InputError("data: nothing here")
"""


@pytest.fixture(scope="module")
def makers(tmp_path_factory):
    """A module that a spawned process finds."""
    folder = tmp_path_factory.mktemp("makers")
    (folder / "loader_makers.py").write_text(MAKERS)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("loader_makers")
    sys.path.remove(str(folder))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_items_come_in_order_whichever_process_is_first(makers):
    assert list(in_processes(makers.uneven, range(6), workers=2, ahead=2)) == list(range(6))
    assert list(in_processes(makers.uneven, range(0), workers=2, ahead=2)) == []


def test_closing_ends_the_processes(makers):
    source = in_processes(makers.squares, range(1000), workers=2, ahead=1)
    (first, one), (second, other) = next(source), next(source)
    assert torch.equal(first, torch.zeros(1000)) and torch.equal(second, torch.ones(1000))
    assert one != other and os.getpid() not in (one, other)
    begun = time.monotonic()
    source.close()
    assert time.monotonic() - begun < 10
    assert not alive(one) and not alive(other)


@pytest.mark.parametrize(
    ("how", "kind", "messages"),
    [
        ("input", InputError, ("data: no such file",)),
        ("trouble", TroubleError, ("a", "b")),
        ("bug", TroubleError, ("loader: making item 2 failed: ZeroDivisionError: division by zero",)),
    ],
)
def test_an_error_in_a_worker_is_raised_here(how, kind, messages, makers):
    source = in_processes(partial(makers.failing, how), range(9), workers=1, ahead=3)
    assert [next(source), next(source)] == [0, 1]
    with pytest.raises(kind) as caught:
        next(source)
    assert tuple(caught.value.messages) == messages


def test_a_worker_that_is_killed_is_one_line(makers):
    source = in_processes(partial(makers.failing, "killed"), range(9), workers=1, ahead=1)
    with pytest.raises(
        TroubleError, match=r"'hpdm-loader-0' ended while making item [012] \(killed, perhaps"
    ):
        list(source)


def test_data_that_cannot_be_opened_are_the_users_error(makers):
    with pytest.raises(InputError, match="data: nothing here"):
        list(in_processes(makers.refused, range(3), workers=1, ahead=1))


def test_workers_end_with_a_parent_that_is_killed(makers, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\n"
        "from hpdm_core.data.loader import in_processes\n"
        "import loader_makers\n"
        "if __name__ == '__main__':\n"
        "    source = in_processes(loader_makers.squares, range(100), workers=1, ahead=1)\n"
        "    print(next(source)[1], flush=True)\n"
        "    time.sleep(60)\n"
    )
    path = os.pathsep.join(each for each in sys.path if each)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    worker = int(parent.stdout.readline())
    assert alive(worker)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while alive(worker) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(worker)
