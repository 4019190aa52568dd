"""A real SLURM of one node on this machine; its daemons run as the user who tests, in a temporary folder."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "squeue", "scancel", "sinfo")
PACKAGES = "Debian: apt-get install slurm-wlm munge"

# No accounting, no control groups: what a plain machine allows. NodeHostname: the node is this host, whatever
# its name.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=n1 Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="session")
def configuration() -> Iterator[Path]:
    """Start munged, slurmctld and slurmd, and return the slurm.conf that they share. Ends them afterwards."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    missing = [name for name in (*DAEMONS, *CLIENTS) if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} on this machine ({PACKAGES})")
    munged, slurmctld, slurmd = (str(shutil.which(name, path=path)) for name in DAEMONS)
    # Not pytest's own folder: the path of a socket may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    config = folder / "slurm.conf"
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    controller, node = free_ports(2)
    config.write_text(
        CONFIGURATION.format(
            host=socket.gethostname(),
            user=subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip(),
            folder=folder,
            controller=controller,
            node=node,
        )
    )
    environment = {**os.environ, "SLURM_CONF": str(config)}
    files = {
        "key-file": "munge.key",
        "socket": "munge.socket",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "munged.seed",
    }
    munge = [f"--{option}={folder / name}" for option, name in files.items()]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for command in (
            [munged, "--foreground", "--force", *munge],  # --force: the folder is not the system's
            [slurmctld, "-D"],
            [slurmd, "-D", "-N", "n1"],
        ):
            output = stack.enter_context((folder / f"{Path(command[0]).name}.out").open("wb"))
            daemon = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            stack.callback(end, daemon)
            if command[0] == munged:
                wait_until((folder / "munge.socket").exists, seconds=20, what="munged", folder=folder)
        stack.callback(empty_queue, environment)

        def idle() -> bool:
            shown = subprocess.run(
                ["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True, check=False
            )
            return shown.stdout.strip() == b"idle"

        wait_until(idle, seconds=60, what="an idle node", folder=folder)
        yield config


@pytest.fixture
def cluster(configuration: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the commands of this test, and what it starts, talk to the SLURM of `configuration`."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SQUEUE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(configuration))
    return configuration


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_until(ready: Callable[[], bool], *, seconds: float, what: str, folder: Path) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            logs = [f"{path.name}: {path.read_text()[-1000:]}" for path in sorted(folder.glob("*.log"))]
            pytest.fail("\n".join([f"waited {seconds:.0f} s in vain for {what}", *logs]))
        time.sleep(0.1)


def empty_queue(environment: dict[str, str]) -> None:
    """End the jobs that a failed test left, so that none outlives the daemons."""
    jobs = subprocess.run(
        ["squeue", "--noheader", "--format=%i"], env=environment, capture_output=True, text=True, check=False
    ).stdout.split()
    if jobs:
        subprocess.run(["scancel", *jobs], env=environment, check=False)
        deadline = time.monotonic() + 30
        queue = ["squeue", "--noheader"]
        while time.monotonic() < deadline:
            if not subprocess.run(queue, env=environment, capture_output=True, check=False).stdout:
                return
            time.sleep(0.2)


def end(daemon: "subprocess.Popen[bytes]") -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
