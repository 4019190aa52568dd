"""Training steps measured in processes of their own: out of memory is an answer, anything else an error."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hpdm_core.assembly.compose import load_cell
from hpdm_core.base.errors import TroubleError
from hpdm_core.training import cost
from hpdm_core.training.figures import MemoryMeter
from hpdm_core.training.probe import Probe, _is_out_of_memory, _limit, largest_batch, probe_training

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


@pytest.fixture
def driver(monkeypatch):
    """torch.cuda without a card: its Python is torch's own, below it stands what the driver was asked."""
    asked = []

    def reset(index):
        if "init" not in asked:
            raise RuntimeError(f"Invalid device argument {index}: did you call init?")
        asked.append(("reset", index))

    def init():
        if "init" not in asked:
            asked.append("init")

    monkeypatch.setattr(torch.cuda, "_lazy_init", init)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", init)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: (init(), 1)[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=8 * MIB))
    below = {
        "_cuda_setMemoryFraction": lambda share, index: asked.append((share, index)),
        "_cuda_resetPeakMemoryStats": reset,
    }
    for name, does in below.items():
        monkeypatch.setattr(torch._C, name, does, raising=False)
    return asked


@pytest.mark.parametrize(("device", "index"), [("cuda", 1), ("cuda:0", 0)])
def test_a_share_of_the_gpu_is_set_with_and_without_a_number(driver, device, index):
    _limit(torch.device(device), 2 * MIB)
    assert driver[-1] == (0.25, index)


def test_memory_is_metered_before_anything_is_on_the_gpu(driver):
    MemoryMeter(torch.device("cuda:0"))
    assert driver == ["init", ("reset", 0)]
