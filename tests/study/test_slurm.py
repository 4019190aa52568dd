"""The backend slurm against commands that answer as told; the real thing is in tests/slurm."""

import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.base.files import read_json, write_json
from hpdm_core.config.schema import Part
from hpdm_core.plugins import build_plugins
from hpdm_core.study.backends.interface import Job, JobRunner
from hpdm_core.study.backends.registry import make_backend
from hpdm_core.study.backends.slurm import SlurmOptions
from hpdm_core.study.backends.slurm_queue import Line, outside, seen_of

PLUGINS = build_plugins()

SHIMS = {
    "sinfo": "exit 0",
    "srun": "exit 0",
    "sbatch": '''n=$(($(ls "$HERE" | grep -c "^batch") + 77))
cp "$1" "$HERE/batch.$n"
env > "$HERE/environment"
echo "Submitted batch job $n"''',
    "squeue": """echo "$@" >> "$HERE/squeue.log"
[ -e "$HERE/deaf" ] && { echo "squeue: error: Unable to contact slurm controller" >&2; exit 1; }
cat "$HERE/queue" 2>/dev/null; exit 0""",
    "scancel": 'echo "$@" >> "$HERE/scancel.log"',
    "sacct": """for option; do case $option in
  --noheader|--parsable2|--allocations|--format=*|--jobs=*) ;;
  *) echo "sacct: unrecognized option '$option'" >&2; exit 1;;
esac; done
[ -e "$HERE/accounts" ] || exit 1; cat "$HERE/accounts"
""",
    "scontrol": 'echo "MaxArraySize            = $(cat "$HERE/array" 2>/dev/null || echo 1001)"',
}


def work(path: str) -> None:
    """Never called: nothing is started here."""


class Cluster:
    """A cluster whose answers are files; time stands still until it is moved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def queue(self, *rows: tuple[str, str, str, str]) -> None:
        """Each row: number, state, reason, name."""
        lines = [f"{number:40}{state:24}{0:<12}{name:40}{why:80}" for number, state, why, name in rows]
        (self.folder / "queue").write_text("".join(line + "\n" for line in lines))

    def backend(self, **options: Any) -> Any:
        made: Any = make_backend(PLUGINS, Part(use="slurm", options=options), JobRunner(work=work))
        made.clock = self
        made.queue._clock = self.monotonic
        return made

    def jobs(self, count: int) -> list[Job]:
        made = []
        for number in range(count):
            job = Job(cell=f"c{number}", number=1, folder=self.folder / "study" / "jobs" / f"c{number}" / "1")
            job.folder.mkdir(parents=True)
            write_json(job.spec, {"cell": number})
            made.append(job)
        return made

    def batches(self) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob("batch.*"))]

    def phase(self, backend: Any, job: Job) -> str:
        self.now += 60
        return str(backend.poll([job])[job.id].phase)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in SHIMS.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\nHERE={tmp_path}\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return Cluster(tmp_path)


def number_of(job: Job) -> Any:
    return (read_json(job.folder / "job.json") or {}).get("slurm")


def test_a_job_alone_is_no_array_and_carries_every_option(cluster: Cluster) -> None:
    backend = cluster.backend(
        partition="gpu",
        account="a",
        qos="q",
        constraint="v100",
        gres="gpu:a100:2",
        time="1:30:00",
        mem_gb=4,
        nodes=2,
        tasks_per_node=2,
        cpus_per_task=4,
        exclude="bad1",
        srun_args=["--cpu-bind=none"],
        setup=["module load x"],
        additional_parameters={"reservation": "r"},
    )
    backend.check()
    (job,) = cluster.jobs(1)
    backend.submit([job])
    (batch,) = cluster.batches()
    for line in (
        "--partition=gpu",
        "--account=a",
        "--qos=q",
        "--constraint=v100",
        "--gres=gpu:a100:2",
        "--time=90",
        "--mem=4096MB",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--cpus-per-task=4",
        "--exclude=bad1",
        "--reservation=r",
        "--requeue",
        "--signal=USR2@90",
        "module load x",
        "SRUN_CPUS_PER_TASK=4",
        "--kill-on-bad-exit=1 --cpu-bind=none",
        "--wckey=''",
    ):
        assert line in batch, line
    assert "--array" not in batch and number_of(job) == "77"
    spec = read_json(job.spec)
    assert spec is not None and spec["gpus"] == backend.gpus == 4 and spec["processes"] == 4
    assert spec["slurm"] == {"limit_seconds": 5400, "signal_seconds": 90}


def test_a_short_job_is_told_a_quarter_of_its_time_before_the_end(cluster: Cluster) -> None:
    backend = cluster.backend(time=2)
    backend.submit(cluster.jobs(1))
    assert "--kill-on-bad-exit" not in cluster.batches()[0]  # one process alone
    assert "--signal=USR2@30" in cluster.batches()[0]


def test_jobs_go_in_arrays_no_larger_than_the_cluster_lets(cluster: Cluster) -> None:
    (cluster.folder / "array").write_text("3")
    backend = cluster.backend(max_pending=10)
    jobs = cluster.jobs(7)
    assert backend.free_slots(jobs) == 3
    backend.submit(jobs)
    arrays = [line for batch in cluster.batches() for line in batch.splitlines() if "--array" in line]
    assert arrays == ["#SBATCH --array=0-2%3", "#SBATCH --array=0-2%3"]
    assert [number_of(job) for job in jobs] == ["77_0", "77_1", "77_2", "78_0", "78_1", "78_2", "79"]


STATES = [
    ("PENDING", "waiting", None),
    ("CONFIGURING", "waiting", None),
    ("REQUEUED", "waiting", None),
    ("RUNNING", "alive", None),
    ("COMPLETING", "alive", None),
    ("SUSPENDED", "alive", None),
    ("COMPLETED", "over", None),
    ("CANCELLED", "over", "cancelled"),
    ("CANCELLED by 1000", "over", "cancelled"),
    ("FAILED", "over", None),
    ("TIMEOUT", "over", "time limit"),
    ("DEADLINE", "over", "time limit"),
    ("OUT_OF_MEMORY", "over", "out of memory"),
    ("NODE_FAIL", "over", "lost node"),
    ("BOOT_FAIL", "over", "lost node"),
    ("PREEMPTED", "over", "preempted"),
    ("SOMETHING_NEW", "unknown", None),
]


@pytest.mark.parametrize(("state", "phase", "cause"), STATES)
def test_every_state_of_the_queue_is_known(state: str, phase: str, cause: str | None) -> None:
    seen = seen_of(Line(number="77", state=state))
    assert (seen.phase, seen.cause) == (phase, cause)
    assert seen.certain is (state not in ("NODE_FAIL", "BOOT_FAIL"))


def test_a_worker_that_was_shot_is_known_by_the_exit_code_of_its_script() -> None:
    assert seen_of(Line(number="77", state="FAILED", code=137)).signal == "SIGKILL"
    assert seen_of(Line(number="77", state="FAILED", code=1)).signal == ""


def test_what_squeue_has_forgotten_sacct_knows(cluster: Cluster) -> None:
    backend = cluster.backend()
    (job,) = cluster.jobs(1)
    backend.submit([job])
    cluster.queue(("77", "RUNNING", "None", "x"))
    assert cluster.phase(backend, job) == "alive"
    cluster.queue()
    (cluster.folder / "accounts").write_text("77|OUT_OF_MEMORY|0:125\n")
    cluster.now += 60
    seen = backend.poll([job])[job.id]
    assert (seen.phase, seen.cause, seen.certain) == ("over", "out of memory", True)


def test_tasks_of_an_array_that_never_began_are_one_row_of_sacct(cluster: Cluster) -> None:
    backend = cluster.backend()
    jobs = cluster.jobs(4)
    backend.submit(jobs)
    cluster.queue()
    (cluster.folder / "accounts").write_text("77_2|FAILED|1:0\n77_[0-1,3%2]|CANCELLED by 0|0:0\n")
    cluster.now += 60
    seen = backend.poll(jobs)
    assert [number_of(job) for job in jobs] == ["77_0", "77_1", "77_2", "77_3"]
    assert [seen[job.id].cause for job in jobs] == ["cancelled", "cancelled", None, "cancelled"]
    assert all(seen[job.id].certain for job in jobs)


def test_a_step_killed_for_its_memory_is_known_by_the_log(cluster: Cluster) -> None:
    backend = cluster.backend()
    jobs = cluster.jobs(2)
    backend.submit(jobs)
    rows = [(number_of(job), "FAILED", "NonZeroExitCode", "x") for job in jobs]
    cluster.queue(*rows)
    log = Path((read_json(jobs[0].folder / "job.json") or {})["log"])
    (log / f"{number_of(jobs[0])}_0_log.out").write_text("slurmstepd-n1: error: Exceeded job memory limit\n")
    (log / f"{number_of(jobs[1])}_0_log.out").write_text("RuntimeError: exceeded memory limit of my own\n")
    seen = backend.poll(jobs)
    assert [seen[job.id].cause for job in jobs] == ["out of memory", None]


def test_without_accounting_a_forgotten_job_is_over_but_not_for_certain(cluster: Cluster) -> None:
    backend = cluster.backend()
    (job,) = cluster.jobs(1)
    backend.submit([job])
    cluster.queue()
    cluster.now += 60
    seen = backend.poll([job])[job.id]
    assert (seen.phase, seen.certain) == ("over", False)


@pytest.mark.parametrize("way", ["deaf", "gone"])
def test_a_queue_that_does_not_answer_says_nothing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    backend = cluster.backend()
    (job,) = cluster.jobs(1)
    backend.submit([job])
    if way == "deaf":
        (cluster.folder / "deaf").touch()
    else:
        monkeypatch.setenv("PATH", str(cluster.folder))
    seen = backend.poll([job])[job.id]
    assert seen.phase == "unknown" and "squeue" in seen.word


def test_the_queue_is_asked_once_for_all_and_not_at_every_round(cluster: Cluster) -> None:
    backend = cluster.backend()
    jobs = cluster.jobs(3)
    backend.submit(jobs)
    for _ in range(5):
        backend.poll(jobs)
    assert len((cluster.folder / "squeue.log").read_text().splitlines()) == 1


def test_an_answer_from_before_a_job_was_submitted_says_nothing_of_it(cluster: Cluster) -> None:
    backend = cluster.backend()
    first, second = cluster.jobs(2)
    backend.submit([first])
    cluster.queue(("77", "RUNNING", "None", "x"))
    assert backend.poll([first])[first.id].phase == "alive"
    backend.submit([second])
    cluster.queue(("77", "RUNNING", "None", "x"), ("78", "PENDING", "None", "y"))
    assert backend.poll([first, second])[second.id].phase == "waiting"


def test_a_job_whose_number_was_not_noted_is_found_by_the_name_of_its_array(cluster: Cluster) -> None:
    jobs = cluster.jobs(2)
    cluster.backend().submit(jobs)
    for job in jobs:  # as a controller leaves it that is killed right after sbatch
        write_json(job.folder / "job.json", {**(read_json(job.folder / "job.json") or {}), "slurm": None})
    name = (read_json(jobs[0].folder / "job.json") or {})["name"]
    cluster.queue(("77_0", "RUNNING", "None", name), ("77_1", "PENDING", "None", name))
    another = cluster.backend()
    seen = another.poll(jobs)
    assert [seen[job.id].phase for job in jobs] == ["alive", "waiting"]
    assert [number_of(job) for job in jobs] == ["77_0", "77_1"]


def test_a_job_that_never_reached_the_queue_is_over(cluster: Cluster) -> None:
    (job,) = cluster.jobs(1)
    write_json(job.folder / "job.json", {"slurm": None, "name": "hpdm-1", "index": None})
    seen = cluster.backend().poll([job])[job.id]
    assert (seen.phase, seen.cause) == ("over", "never started")


def test_cancelling_names_the_jobs(cluster: Cluster) -> None:
    backend = cluster.backend()
    jobs = cluster.jobs(2)
    backend.submit(jobs)
    assert backend.cancel(jobs)
    assert (cluster.folder / "scancel.log").read_text() == "77_0 77_1\n"
    (cluster.folder / "bin" / "scancel").write_text("#!/bin/sh\necho no >&2; exit 1\n")
    assert not backend.cancel(jobs)


def test_a_job_is_cancelled_also_when_its_folder_has_vanished(cluster: Cluster) -> None:
    backend = cluster.backend()
    (job,) = cluster.jobs(1)
    backend.submit([job])
    backend.poll([job])
    shutil.rmtree(cluster.folder / "study")
    assert backend.cancel([job])
    assert (cluster.folder / "scancel.log").read_text() == "77\n"


def test_an_allocation_around_the_controller_does_not_leak_into_jobs(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CPU_BIND", "SLURM_JOB_ID", "SLURM_CONF", "SBATCH_ACCOUNT", "RANK"):
        monkeypatch.setenv(name, "x")
    cluster.backend().submit(cluster.jobs(1))
    seen = (cluster.folder / "environment").read_text()
    assert "SLURM_CPU_BIND" not in seen and "SLURM_JOB_ID" not in seen and "RANK" not in seen
    assert "SLURM_CONF=x" in seen and "SBATCH_ACCOUNT=x" in seen
    assert os.environ["SLURM_JOB_ID"] == "x" and "PATH" in outside(os.environ)


def test_without_slurm_the_backend_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="needs the commands sinfo and sbatch"):
        make_backend(PLUGINS, Part(use="slurm"), JobRunner(work=work)).check()


def refuse(cluster: Cluster, command: str, message: str) -> None:
    (cluster.folder / "bin" / command).write_text(f"#!/bin/sh\necho '{message}' >&2\nexit 1\n")


def test_slurm_that_does_not_answer_is_refused(cluster: Cluster) -> None:
    refuse(cluster, "sinfo", "Unable to contact slurm controller")
    with pytest.raises(InputError, match="Unable to contact slurm controller"):
        cluster.backend().check()


def test_sbatch_that_refuses_is_one_line(cluster: Cluster) -> None:
    refuse(cluster, "sbatch", "sbatch: error: invalid partition specified: gpu")
    jobs = cluster.jobs(2)
    with pytest.raises(TroubleError, match=r"sbatch refused the job: .*invalid partition") as error:
        cluster.backend().submit(jobs)
    assert len(error.value.messages) == 1 and "\n" not in str(error.value)
    assert not any((job.folder / "job.json").exists() for job in jobs)


@pytest.mark.parametrize(
    "message",
    [
        "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user)",
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
    ],
)
def test_a_full_queue_or_a_short_silence_is_waited_for(cluster: Cluster, message: str) -> None:
    before = (cluster.folder / "bin" / "sbatch").read_text()
    refuse(cluster, "sbatch", message)
    backend = cluster.backend()
    jobs = cluster.jobs(4)
    backend.submit(jobs)
    assert not any((job.folder / "job.json").exists() for job in jobs)
    assert backend.free_slots([]) == 0
    cluster.now += 60
    (cluster.folder / "bin" / "sbatch").write_text(before)
    assert backend.free_slots([]) == 64
    backend.submit(jobs)
    assert all(number_of(job) for job in jobs)


def test_an_array_that_arrived_in_spite_of_an_error_is_not_submitted_again(cluster: Cluster) -> None:
    script = 'name=$(sed -n "s/.*--job-name=//p" "$1"); printf "%-40s%-24s%-12s%-40s%-80s\\n" '
    script += '55 PENDING 0 "$name" None > "$HERE/queue"; echo "sbatch: error: Socket timed out" >&2; exit 1'
    (cluster.folder / "bin" / "sbatch").write_text(f"#!/bin/sh\nHERE={cluster.folder}\n{script}\n")
    backend = cluster.backend()
    (job,) = cluster.jobs(1)
    backend.submit([job])
    assert cluster.phase(backend, job) == "waiting" and number_of(job) == "55"


@pytest.mark.parametrize(
    ("given", "expected"),
    [("90", 90), ("1:30:00", 90), ("1-12:00:00", 2160), ("2-0", 2880), ("0:00:30", 1), ("5:30", 6), (7, 7)],
)
def test_times_as_slurm_writes_them(given: Any, expected: int) -> None:
    assert SlurmOptions(time=given).time == expected


@pytest.mark.parametrize("given", ["soon", "-5", 0, "1:2:3:4"])
def test_other_times_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="time"):
        SlurmOptions(time=given)


@pytest.mark.parametrize(
    ("options", "gpus"),
    [({}, 0), ({"gpus_per_node": 2, "nodes": 3}, 6), ({"gres": "gpu:4"}, 4), ({"gres": "gpu,lic:2"}, 1)],
)
def test_gpus_are_counted_for_budgets(options: dict[str, Any], gpus: int) -> None:
    assert SlurmOptions(**options).gpus == gpus


def test_why_fewer_are_taken_is_told_once(cluster: Cluster) -> None:
    backend = cluster.backend()
    refuse(cluster, "sbatch", "sbatch: error: Job violates accounting/QOS policy (job submit limit, user)")
    jobs = cluster.jobs(4)
    backend.submit(jobs)
    assert "job submit limit" in backend.refused
    backend.submit(jobs)
    assert backend.refused == ""


def test_an_accounting_that_was_away_for_a_moment_is_asked_again(cluster: Cluster) -> None:
    backend = cluster.backend()
    (job,) = cluster.jobs(1)
    backend.submit([job])
    cluster.queue()
    cluster.now += 60
    assert not backend.poll([job])[job.id].certain
    (cluster.folder / "accounts").write_text("77|OUT_OF_MEMORY|0:125\n")
    cluster.now += 60
    assert not backend.poll([job])[job.id].certain  # not so soon
    cluster.now += 600
    assert backend.poll([job])[job.id].cause == "out of memory"


def test_a_job_whose_number_nobody_can_tell_is_not_cancelled(cluster: Cluster) -> None:
    (job,) = cluster.jobs(1)
    write_json(job.folder / "job.json", {"slurm": None, "name": "hpdm-1", "index": None})
    (cluster.folder / "deaf").touch()
    assert not cluster.backend().cancel([job])
