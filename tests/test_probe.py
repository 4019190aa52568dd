"""Training steps measured in processes of their own: out of memory is an answer, anything else an error."""

import subprocess
import sys

import pytest

from hpdm_core import cost
from hpdm_core.config.compose import load_cell
from hpdm_core.errors import TroubleError
from hpdm_core.probe import Probe, _is_out_of_memory, largest_batch, probe_training

MIB = 2**20
SMALL = ["runtime.threads=1", "model.video=[8,32,32]", "model.patch=[2,8,8]"]


@pytest.fixture(scope="module")
def assembly():
    return load_cell("efficiency_small", sets=SMALL)


def test_a_step_is_measured_and_a_larger_batch_takes_more_memory(assembly):
    one = probe_training(assembly, batch=1, steps=1)
    many = probe_training(assembly, batch=64, steps=1)
    assert one.outcome == many.outcome == "ok"
    assert one.device == "cpu" and one.seconds > 0
    weights = cost.DURING_TRAINING * 4 * cost.count_parameters(assembly)
    assert weights < one.peak < many.peak
    kept = cost.training_memory(load_cell("efficiency_small", sets=[*SMALL, "training.batch=64"])) - weights
    assert kept < many.peak - weights < 2.5 * kept  # what is kept, and what kernels use for a moment


def test_a_process_at_its_limit_is_out_of_memory(assembly):
    assert probe_training(assembly, batch=256, steps=1, memory=64 * MIB) == Probe("oom", 256)


def test_other_failures_are_errors_in_one_line():
    broken = load_cell("efficiency_small", sets=["runtime.device=cuda:7"])
    with pytest.raises(
        TroubleError, match=r"probe of 1 video\(s\): the process ended with code \d+: .*cuda:7"
    ):
        probe_training(broken, batch=1, steps=1)


def test_a_process_that_the_kernel_kills_is_out_of_memory(assembly, monkeypatch):
    killed = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: run(killed, **options))
    assert probe_training(assembly, batch=3).outcome == "oom"


def test_memory_that_is_short_inside_a_library_is_out_of_memory(assembly, monkeypatch):
    assert _is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not _is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE"))
    said = "terminate called after throwing an instance of 'std::bad_alloc'"
    aborted = [
        sys.executable,
        "-c",
        f'import os, sys; sys.stderr.write("{said}"); sys.stderr.flush(); os.abort()',
    ]
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: run(aborted, **options))
    assert probe_training(assembly, batch=3).outcome == "oom"


@pytest.mark.parametrize("fitting", [0, 1, 2, 3, 7, 20, 97, 150])
@pytest.mark.parametrize("told", [True, False], ids=["limit known", "limit unknown"])
def test_the_largest_batch_is_found(fitting, told):
    """Memory: 10 for the network and 2 per video, with a little that is not even."""

    def probe(batch):
        if batch > fitting:
            return Probe("oom", batch)
        return Probe("ok", batch, seconds=0.1, peak=10 + 2 * batch + batch % 2)

    best, probes = largest_batch(probe, memory=10 + 2 * fitting + 1 if told else None, most=128)
    assert len({each.batch for each in probes}) == len(probes) <= 14
    assert all(each.batch <= 128 for each in probes)
    if fitting == 0:
        assert best is None and [each.batch for each in probes] == [1]
    else:
        assert 0.93 * min(fitting, 128) - 1 <= best.batch <= min(fitting, 128)
