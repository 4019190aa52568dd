import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.config.study_file import BACKENDS as NAMES_IN_FILES
from hpdm_core.errors import InputError
from hpdm_core.files import write_json
from hpdm_core.study.backends import BACKENDS, adopt, end_all, make_backend
from hpdm_core.study.lease import Process


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

        from hpdm_core.files import write_json
        from hpdm_core.interruption import watched
        from hpdm_core.study.lease import Process

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
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "job" / "spec.json"
    path.parent.mkdir()
    write_json(path, {})
    return path


def local(job: Callable[..., None], **options: Any) -> Any:
    return make_backend("local", options, job=job, tick=lambda: None)


def test_the_names_are_those_of_study_files() -> None:
    assert tuple(BACKENDS) == NAMES_IN_FILES


def test_an_unknown_backend_gets_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"unknown 'slrum' - did you mean 'slurm'"):
        make_backend("slrum", {}, job=sleeper(), tick=lambda: None)


def test_max_parallel_overrides_the_slots() -> None:
    assert local(sleeper(), slots=2).slots == 2
    assert make_backend("local", {"slots": 2}, job=sleeper(), tick=lambda: None, slots=3).slots == 3


def test_inline_runs_at_once_and_passes_progress_on(spec: Path) -> None:
    ticks: list[str] = []

    def job(path: str, progress: Any) -> None:
        progress({"step": 1})
        raise RuntimeError("in its files already")

    backend = make_backend("inline", {}, job=job, tick=lambda: ticks.append("tick"))
    assert not backend.start(spec, slot=0).alive()
    assert ticks == ["tick"]


def test_a_local_worker_outlives_its_controller_is_adopted_and_ended(spec: Path) -> None:
    folder = spec.parent
    handle = local(sleeper()).start(spec, slot=0)
    adopted = adopt(folder)  # before the worker has said who it is: its launcher is known
    assert adopted is not None and adopted.alive()
    wait_for((folder / "worker.json").exists)
    adopted = adopt(folder)
    assert adopted is not None
    end_all([adopted])
    assert not handle.alive() and not adopted.alive() and adopt(folder) is None
    assert (folder / "unwound").exists()  # ended as Ctrl-C would, not shot


def test_a_killed_worker_is_noticed_at_once(spec: Path) -> None:
    handle = local(sleeper()).start(spec, slot=0)
    wait_for((spec.parent / "worker.json").exists)
    worker = Process.read(json.loads((spec.parent / "worker.json").read_text()))
    assert worker is not None
    os.kill(worker.pid, 9)
    start = time.monotonic()
    wait_for(lambda: not handle.alive())
    assert time.monotonic() - start < 10  # submitit's own waiting for a result takes 15 s


def test_a_worker_that_does_not_listen_is_shot(spec: Path) -> None:
    def deaf() -> Callable[..., None]:
        def job(path: str) -> None:
            import signal
            import time
            from pathlib import Path

            from hpdm_core.files import write_json
            from hpdm_core.study.lease import Process

            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            write_json(Path(path).parent / "worker.json", Process.here().to_json())
            time.sleep(60)

        return job

    handle = local(deaf()).start(spec, slot=0)
    wait_for((spec.parent / "worker.json").exists)
    end_all([handle], grace=1.0)
    wait_for(lambda: not handle.alive(), seconds=5)


@pytest.mark.parametrize(
    ("gpus", "slot", "seen"), [(("3", "5"), 1, "5"), (("3", "5"), 2, "3"), ((), 0, None)]
)
def test_a_slot_has_its_gpu(
    spec: Path, monkeypatch: pytest.MonkeyPatch, gpus: tuple[str, ...], slot: int, seen: str | None
) -> None:
    class Submitted:
        job_id = str(os.getpid())

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("submitit.LocalExecutor.submit", lambda self, job, path: Submitted())
    local(sleeper(), gpus=gpus).start(spec, slot=slot)
    # submitit would hide every GPU: the worker sets the variable itself, or takes it away.
    assert json.loads(spec.read_text())["environment"] == {"CUDA_VISIBLE_DEVICES": seen}


SHIMS = {
    "sinfo": "exit 0",
    "srun": "exit 0",
    "sbatch": 'cp "$1" "$HERE/batch.sh"; echo "Submitted batch job 77"',
    "squeue": 'echo "$@" >> "$HERE/squeue.log"; cat "$HERE/queue" 2>/dev/null; exit 0',
    "scancel": 'echo "$@" >> "$HERE/scancel.log"; rm -f "$HERE/queue"',
    "sacct": "exit 1",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in SHIMS.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\nHERE={tmp_path}\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr("hpdm_core.study.backends._SlurmJob.POLL_SECONDS", 0.0)
    (tmp_path / "queue").write_text("PENDING\n")
    return tmp_path


def slurm(**options: Any) -> Any:
    return make_backend("slurm", options, job=sleeper(), tick=lambda: None)


def test_slurm_submits_one_job_and_follows_it(cluster: Path, spec: Path) -> None:
    backend = slurm(partition="gpu", time=90, gpus_per_node=1, cpus_per_task=4, wckey="")
    backend.check()
    handle = backend.start(spec, slot=0)
    batch = (cluster / "batch.sh").read_text()
    for line in ("--partition=gpu", "--time=90", "--gpus-per-node=1", "SRUN_CPUS_PER_TASK=4"):
        assert line in batch
    assert "submitit" not in next((row for row in batch.splitlines() if "wckey" in row), "")
    for state, alive in (("CONFIGURING", True), ("NODE_FAIL", False)):
        (cluster / "queue").write_text(f"{state}\n")
        assert handle.alive() is alive


def test_a_slurm_job_is_adopted_by_its_number_and_cancelled(cluster: Path, spec: Path) -> None:
    slurm().start(spec, slot=0)
    adopted = adopt(spec.parent)
    assert adopted is not None and adopted.alive()
    end_all([adopted])
    assert (cluster / "scancel.log").read_text() == "77\n"
    assert adopt(spec.parent) is None


def test_without_slurm_the_backend_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="needs the commands sinfo and sbatch"):
        slurm().check()


def test_slurm_that_does_not_answer_is_refused(cluster: Path) -> None:
    (cluster / "bin" / "sinfo").write_text(
        "#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n"
    )
    with pytest.raises(InputError, match="Unable to contact slurm controller"):
        slurm().check()


def test_sbatch_that_refuses_is_one_line(cluster: Path, spec: Path) -> None:
    (cluster / "bin" / "sbatch").write_text(
        "#!/bin/sh\necho 'invalid partition specified: gpu' >&2\nexit 1\n"
    )
    from hpdm_core.errors import TroubleError

    with pytest.raises(TroubleError, match=r"sbatch refused the job: .*invalid partition"):
        slurm().start(spec, slot=0)
