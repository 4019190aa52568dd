import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.base.errors import InputError
from hpdm_core.base.files import write_json
from hpdm_core.config.schema import Part
from hpdm_core.plugins import build_plugins
from hpdm_core.study.backends.interface import Job, JobRunner, SchedulerStatus, SystemClock
from hpdm_core.study.backends.registry import make_backend
from hpdm_core.study.controller.router import BackendRouter, end_jobs

PLUGINS = build_plugins()


def wait_for(condition: Callable[[], Any], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def sleeper() -> Callable[..., None]:
    """Return a job that says who it is and sleeps; nested, so that it travels to another process by value."""

    def job(path: str) -> None:
        import os
        import time
        from pathlib import Path

        from hpdm_core.base.files import write_json
        from hpdm_core.base.interruption import watched
        from hpdm_core.store.lease import Process

        with watched():
            folder = Path(path).parent
            (folder / "gpus").write_text(repr(os.environ.get("CUDA_VISIBLE_DEVICES")))
            write_json(folder / "worker.json", Process.here().to_json())
            try:
                time.sleep(60)
            finally:
                (folder / "unwound").touch()

    return job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    made = Job(cell="c", number=1, folder=tmp_path / "jobs" / "c" / "1")
    made.folder.mkdir(parents=True)
    write_json(made.spec, {})
    return made


def local(work: Callable[..., None], **options: Any) -> Any:
    slots = options.pop("max_parallel", None)
    return make_backend(PLUGINS, Part(use="local", options=options), JobRunner(work=work), slots=slots)


def routed(backend: Any, name: str = "local") -> BackendRouter:
    return BackendRouter(backend, name=name, other=lambda other: pytest.fail(f"{other} is built"))


def over(backend: Any, job: Job) -> bool:
    return bool(backend.poll([job])[job.id].phase == "over")


def pid_of(job: Job) -> int:
    wait_for((job.folder / "worker.json").exists)
    return int(json.loads((job.folder / "worker.json").read_text())["pid"])


def test_an_unknown_backend_gets_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"unknown part 'slrum' of backends - did you mean 'slurm'"):
        make_backend(PLUGINS, Part(use="slrum"), JobRunner(work=sleeper()))


def test_max_parallel_overrides_the_slots(job: Job) -> None:
    assert local(sleeper(), max_parallel=2).free_slots([job]) == 1
    assert local(sleeper(), slots=2, max_parallel=3).free_slots([job]) == 2
    assert local(sleeper(), slots=1).free_slots([job]) == 0


def test_inline_runs_at_once_and_passes_progress_on(job: Job) -> None:
    ticks: list[str] = []

    def work(path: str, progress: Any) -> None:
        progress({"step": 1})
        raise RuntimeError("in its files already")

    backend = make_backend(
        PLUGINS, Part(use="inline"), JobRunner(work=work, tick=lambda: ticks.append("tick"))
    )
    backend.submit([job])
    assert ticks == ["tick"] and over(backend, job)


def test_a_local_worker_outlives_its_controller_is_found_again_and_ended(job: Job) -> None:
    backend = local(sleeper())
    backend.submit([job])
    other = local(sleeper())
    assert not over(other, job)  # before the worker has said who it is: its launcher is known
    wait_for((job.folder / "worker.json").exists)
    end_jobs(routed(other), [job], clock=SystemClock())
    assert over(backend, job) and over(other, job) and over(local(sleeper()), job)
    assert (job.folder / "unwound").exists()  # ended as Ctrl-C would, not shot


def test_a_killed_worker_is_noticed_within_two_seconds_with_its_signal(job: Job) -> None:
    backend = local(sleeper())
    backend.submit([job])
    os.kill(pid_of(job), signal.SIGKILL)
    start = time.monotonic()
    wait_for(lambda: over(backend, job))
    assert time.monotonic() - start < 2  # submitit's own waiting for a result takes 15 s
    seen = backend.poll([job])[job.id]
    assert seen.signal == "SIGKILL" and seen.cause is None


def test_a_worker_that_does_not_listen_is_shot(job: Job) -> None:
    def deaf() -> Callable[..., None]:
        def work(path: str) -> None:
            import signal
            import time
            from pathlib import Path

            from hpdm_core.base.files import write_json
            from hpdm_core.store.lease import Process

            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            write_json(Path(path).parent / "worker.json", Process.here().to_json())
            time.sleep(60)

        return work

    backend = local(deaf())
    backend.submit([job])
    pid_of(job)
    end_jobs(routed(backend), [job], clock=SystemClock(), grace=1.0)
    wait_for(lambda: over(backend, job), seconds=5)


def test_a_worker_that_takes_too_much_memory_is_ended_as_out_of_memory(job: Job) -> None:
    def greedy() -> Callable[..., None]:
        def work(path: str) -> None:
            import time

            held = []
            for _ in range(600):
                held.append(bytearray(10 << 20))
                time.sleep(0.01)

        return work

    backend = local(greedy(), memory_gb=0.5)
    backend.submit([job])
    wait_for(lambda: over(backend, job))
    seen = backend.poll([job])[job.id]
    assert seen.cause == "out of memory" and "memory_gb" in seen.detail


def test_a_worker_of_another_host_cannot_be_asked(job: Job) -> None:
    elsewhere = {"host": "elsewhere", "pid": 1, "start": "x"}
    write_json(job.folder / "job.json", {"launcher": elsewhere, "slot": 0})
    seen = local(sleeper()).poll([job])[job.id]
    assert seen.phase == "unknown" and "elsewhere" in seen.word


def test_a_job_that_was_never_started_is_over(job: Job) -> None:
    assert local(sleeper()).poll([job])[job.id] == SchedulerStatus(phase="over", cause="never started")


def test_a_slot_has_its_cores(job: Job, tmp_path: Path) -> None:
    def work() -> Callable[..., None]:
        def say(path: str) -> None:
            import os
            from pathlib import Path

            Path(path).with_name("cores").write_text(repr(sorted(os.sched_getaffinity(0))))

        return say

    cores = sorted(os.sched_getaffinity(0))
    backend = local(work(), slots=len(cores), cpus_per_slot=1)
    backend.check()
    backend.submit([job])
    wait_for(lambda: over(backend, job))
    assert (job.folder / "cores").read_text() == repr(cores[:1])
    with pytest.raises(InputError, match=f"at most the {len(cores)} cores"):
        local(work(), slots=len(cores) + 1, cpus_per_slot=1).check()


def test_no_further_cell_is_started_when_memory_is_short(job: Job) -> None:
    short = local(sleeper(), slots=2, min_free_gb=1e6)
    assert short.free_slots([]) == 2 and short.free_slots([job]) == 0
    assert local(sleeper(), slots=2, min_free_gb=0.001).free_slots([job]) == 1


@pytest.mark.parametrize(
    ("gpus", "before", "seen"), [(("3", "5"), 1, "5"), (("3", "5"), 2, "3"), ((), 0, None)]
)
def test_a_slot_has_its_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: tuple[str, ...], before: int, seen: str | None
) -> None:
    class Submitted:
        job_id = str(os.getpid())

        def done(self) -> bool:
            return False

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("submitit.LocalExecutor.submit", lambda self, work, path: Submitted())
    backend = local(sleeper(), gpus=gpus, slots=3)
    jobs = [Job(cell="c", number=number, folder=tmp_path / str(number)) for number in range(before + 1)]
    for job in jobs:
        job.folder.mkdir()
        write_json(job.spec, {})
    backend.submit(jobs)
    # submitit would hide every GPU: the worker sets the variable itself, or takes it away.
    spec = json.loads(jobs[-1].spec.read_text())
    assert spec["environment"] == {"CUDA_VISIBLE_DEVICES": seen}
    assert spec["gpus"] == backend.gpus == (1 if gpus else 0)


@pytest.mark.parametrize(
    ("spec", "noted", "expected"),
    [
        ({"backend": "slurm"}, {}, "slurm"),
        ({"backend": "mine"}, {"launcher": None}, "mine"),
        ({}, {"launcher": None, "slot": 0}, "local"),  # written before specs named their backend
        ({}, {"slurm": None, "name": "hpdm-1"}, "slurm"),
        ({}, {}, "inline"),
    ],
)
def test_a_job_is_asked_through_the_backend_that_it_was_given_to(
    job: Job, spec: dict[str, Any], noted: dict[str, Any], expected: str
) -> None:
    write_json(job.spec, spec)
    write_json(job.folder / "job.json", noted)
    router = BackendRouter("inline", name="inline", other=lambda name: name)  # type: ignore[arg-type,return-value]
    assert router.of(job) == expected  # type: ignore[comparison-overlap]
    router = BackendRouter("inline", name="inline", other=lambda name: name)  # type: ignore[arg-type,return-value]
    router.own(job)
    assert router.of(job) == "inline"  # type: ignore[comparison-overlap]
