"""Processes that work together: who is who, what they tell one another, and one process alone."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hpdm_core.base import distributed

TALK = """
import json, sys
import numpy as np, torch
from hpdm_core.base import distributed
with distributed.joined():
    me = distributed.rank()
    here = {"rank": me, "size": distributed.size(), "main": distributed.is_main()}
    here["broadcast"] = distributed.broadcast({"from": me})
    here["gather"] = distributed.gather(np.full(2, me)) and [a.tolist() for a in distributed.gather(np.full(2, me))]
    kept = torch.tensor([1.0, me])
    here["total"] = distributed.total(kept).tolist()
    here["kept"] = kept.tolist()
    done = []
    here["spread"] = distributed.spread("abcde", lambda item: done.append(item) or item.upper())
    here["done"] = done
    here["on_main"] = distributed.on_main(lambda: ["made by", me])
    distributed.barrier()
here["after"] = distributed.size()
print(json.dumps(here))
"""


def test_what_processes_tell_one_another(succeed: Callable[..., list[str]]) -> None:
    processes = 3
    told = [json.loads(text) for text in succeed(["-c", TALK], processes=processes)]
    for rank, here in enumerate(told):
        assert (here["rank"], here["size"], here["main"]) == (rank, processes, rank == 0)
        assert here["broadcast"] == {"from": 0}
        assert here["gather"] == [[other, other] for other in range(processes)]
        assert here["total"] == [processes, sum(range(processes))]
        assert here["kept"] == [1, rank]  # the sum is a new tensor
        assert here["spread"] == list("ABCDE")
        assert here["done"] == list("abcde"[rank::processes])
        assert here["on_main"] == ["made by", 0]
        assert here["after"] == 1


FAIL = """
import sys
from hpdm_core.base import distributed
from hpdm_core.base.errors import TroubleError
def work(item):
    if item == 3:
        raise error
    return item
with distributed.joined():
    for error in (TroubleError("clip 3 cannot be read"), ValueError("no 3")):
        try:
            distributed.spread(range(4), work)
        except Exception as raised:
            print(type(raised).__name__, raised)
    def full():
        raise OSError(28, "No space left on device")
    try:
        distributed.on_main(full)
    except Exception as raised:
        print(type(raised).__name__, raised)
"""


def test_an_error_in_one_process_is_raised_in_all(succeed: Callable[..., list[str]]) -> None:
    first, second = succeed(["-c", FAIL], processes=2)
    remote = "TroubleError process 1 of 2: ValueError: no 3"
    full = "[Errno 28] No space left on device"
    assert first.splitlines() == ["TroubleError clip 3 cannot be read", remote, f"OSError {full}"]
    assert second.splitlines() == [
        "TroubleError clip 3 cannot be read",
        "ValueError no 3",
        f"TroubleError process 0 of 2: OSError: {full}",
    ]


def test_one_process_alone_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.joined():
        assert not torch.distributed.is_initialized()
        assert (distributed.rank(), distributed.size(), distributed.is_main()) == (0, 1, True)
        kept = object()
        assert distributed.broadcast(kept) is kept
        assert distributed.gather(kept) == [kept]
        assert distributed.spread([1, 2], str) == ["1", "2"]
        assert distributed.total(torch.ones(2)).tolist() == [1, 1]
        distributed.barrier()


SUBMIT = """
import sys, json
import submitit
from hpdm_core.base import distributed

def job():
    from hpdm_core.base import distributed
    before = distributed.planned_size()
    with distributed.joined():
        return before, distributed.size(), distributed.gather(distributed.rank())

executor = submitit.LocalExecutor(folder=sys.argv[1])
executor.update_parameters(timeout_min=5, tasks_per_node=2)
print(json.dumps(executor.submit(job).results()))
"""


def test_tasks_of_a_submitit_job_find_one_another(tmp_path: Path) -> None:
    script = tmp_path / "submit.py"
    script.write_text(SUBMIT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "log")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[2, 2, [0, 1]]] * 2
