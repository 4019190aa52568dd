"""A real SLURM of two nodes on one machine: munge, MariaDB, slurmdbd, slurmctld and two slurmd, without systemd.

    python tests/slurm/cluster.py install          Debian or Ubuntu, as root: the packages
    python tests/slurm/cluster.py run COMMAND...   start it, run COMMAND in it, end it

Everything lives in a temporary folder and ends with it; of the system only /etc/hosts is touched (the nodes' names),
and put back. Without slurmdbd and MariaDB it starts without accounting.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge", "slurmdbd", "mariadb-server")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo", "scontrol")
ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacct", "sacctmgr")
PLACE = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
"""Several clusters may run side by side, one per pytest process: each has nodes and ports of its own."""
NODES = (f"n{2 * PLACE + 1}", f"n{2 * PLACE + 2}")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
MAX_ARRAY = 16

# cred_expire: a requeued job waits so long, 120 s by default. CPUs: more than the machine may have, the cells are tiny.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=10
MaxArraySize={array}
MailProg=/bin/true
SchedulerParameters=sched_interval=2,bf_interval=2
{accounting}
DefMemPerCPU=1000
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 RealMemory=16000 State=UNKNOWN
PartitionName=all Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""
WITH_ACCOUNTING = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.socket"""
ACCOUNTS = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""


class Missing(Exception):
    """The machine lacks what a SLURM takes."""


class Broken(Exception):
    """A daemon did not come up."""


def install() -> None:
    """Install the packages, unless they are there. Takes root and a network."""
    if not missing((*NEEDED, *ACCOUNTING)):
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if shutil.which(name, path=PATH) is None]


class Cluster:
    """The daemons, and what they were started with. `slurmd` may be stopped and started while jobs run."""

    def __init__(self, stack: ExitStack, *, accounting: bool) -> None:
        lacking = missing(NEEDED)
        if lacking:
            raise Missing(
                f"no {', '.join(lacking)} on this machine (Debian: apt-get install {' '.join(PACKAGES)})"
            )
        # Not pytest's own folder: the path of a socket may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.folder.chmod(0o755)
        self.config = self.folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.config), "PATH": PATH}
        self.accounting = accounting
        self._stack = stack
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._start()

    def _start(self) -> None:
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / f"spool.{node}").mkdir()
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        controller, accounts, database, first = (*free_ports(3), free_range(len(NODES)))
        names = {"folder": self.folder, "host": socket.gethostname(), "user": user, "array": MAX_ARRAY}
        text = CONFIGURATION.format(
            **names,
            controller=controller,
            first=first,
            last=first + len(NODES) - 1,
            nodes=f"n[{2 * PLACE + 1}-{2 * PLACE + 2}]",
            accounting=WITH_ACCOUNTING.format(port=accounts, folder=self.folder) if self.accounting else "",
        )
        self.config.write_text(text)
        # For a client whose site keeps no accounts: sacct then says so.
        without = (
            text.replace(WITH_ACCOUNTING.format(port=accounts, folder=self.folder), "")
            if self.accounting
            else text
        )
        (self.folder / "without").mkdir()
        self.config_without_accounting = self.folder / "without" / "slurm.conf"
        self.config_without_accounting.write_text(without)
        self._stack.enter_context(names_of_nodes())
        self._munge()
        if self.accounting:
            self._accounts(ACCOUNTS.format(**names, port=accounts, database=database), database, accounts)
        self.daemon("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self._stack.callback(self.empty_queue)
        self.wait(self.all_idle, seconds=60, what="idle nodes")

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        options = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
        self.daemon("munged", "--foreground", "--force", *options)  # --force: the folder is not the system's
        self.wait((self.folder / "munge.socket").exists, seconds=20, what="munged")

    def _accounts(self, text: str, database: int, port: int) -> None:
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        data, socket_file = self.folder / "database", self.folder / "database.socket"
        own = ["--no-defaults", f"--datadir={data}", f"--user={user}"]
        self.run("mariadb-install-db", *own, "--auth-root-authentication-method=normal", "--skip-test-db")
        where = [f"--socket={socket_file}", f"--port={database}", "--bind-address=127.0.0.1"]
        small = ["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0"]
        self.daemon("mariadbd", *own, *where, *small, f"--pid-file={self.folder}/database.pid")
        grants = (
            "CREATE DATABASE slurm_acct_db; CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';"
            "CREATE USER 'slurm'@'localhost' IDENTIFIED BY 'slurm';"
            "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1'; GRANT ALL ON slurm_acct_db.* TO 'slurm'@'localhost';"
        )
        client = ["mariadb", "--no-defaults", f"--socket={socket_file}", "--user=root"]
        self.wait(lambda: self.ask(*client, "-e", "SELECT 1") is not None, seconds=60, what="mariadbd")
        self.run(*client, "-e", grants)
        config = self.folder / "slurmdbd.conf"
        config.touch(mode=0o600)
        config.write_text(text)
        self.daemon("slurmdbd", "-D")
        self.wait(lambda: listening(port), seconds=60, what="slurmdbd")
        self.run("sacctmgr", "--immediate", "add", "cluster", "test")

    # Daemons and commands

    def daemon(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        """Start a daemon in the foreground, to be ended with the cluster."""
        program = shutil.which(name, path=PATH)
        assert program is not None, name
        log = self.folder / f"{name}.{len(list(self.folder.glob(name + '.*.out')))}.out"
        output = self._stack.enter_context(log.open("wb"))
        made = subprocess.Popen(
            [program, *arguments], env=self.environment, stdout=output, stderr=output, start_new_session=True
        )
        self._stack.callback(end, made)
        return made

    def run(self, *command: str) -> str:
        """Run a command and return what it prints; `Broken` when it fails."""
        shown = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if shown.returncode:
            raise Broken(f"{' '.join(command)}: {shown.stdout}{shown.stderr}")
        return shown.stdout

    def ask(self, *command: str) -> str | None:
        """Return what a command prints, or None when it fails."""
        shown = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return None if shown.returncode else shown.stdout

    def wait(self, ready: Callable[[], bool], *, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                files = [*sorted(self.folder.glob("*.log")), *sorted(self.folder.glob("*.out"))]
                logs = [f"{path.name}: {path.read_text(errors='replace')[-1000:]}" for path in files]
                raise Broken("\n".join([f"waited {seconds:.0f} s in vain for {what}", *logs]))
            time.sleep(0.1)

    # Nodes and jobs

    def all_idle(self) -> bool:
        states = (self.ask("sinfo", "--noheader", "--Node", "--format=%N %T") or "").split()[1::2]
        return len(states) == len(NODES) and set(states) == {"idle"}

    def start_node(self, node: str) -> None:
        self._nodes[node] = self.daemon("slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """End a node as a power cut would: its slurmd, and every process of its jobs."""
        doomed = self._nodes[node]
        for pid in [*_descendants(doomed.pid), *_steps_of(node)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        doomed.kill()
        doomed.wait()

    def empty_queue(self) -> None:
        """End the jobs that a failed test left, so that none outlives the daemons."""
        jobs = (self.ask("squeue", "--noheader", "--format=%A") or "").split()
        if jobs:
            self.ask("scancel", *jobs)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and self.ask("squeue", "--noheader"):
                time.sleep(0.2)


@contextlib.contextmanager
def running(*, accounting: bool | None = None) -> Iterator[Cluster]:
    """Start a cluster, and end it with the block. ``accounting``: None for where its daemons are installed."""
    wanted = not missing(ACCOUNTING) if accounting is None else accounting
    with ExitStack() as stack:
        yield Cluster(stack, accounting=wanted)


@contextlib.contextmanager
def names_of_nodes() -> Iterator[None]:
    """torch.distributed asks for the first node by its name, so that has to mean this machine."""
    hosts = Path("/etc/hosts")
    unknown = [node for node in NODES if not resolves(node)]
    if not unknown or not os.access(hosts, os.W_OK):
        yield
        return
    line = f"127.0.0.1 {' '.join(unknown)}  # tests/slurm\n"
    with hosts.open("a") as file:
        file.write(line)
    try:
        yield
    finally:
        hosts.write_text(hosts.read_text().replace(line, ""))


def resolves(name: str) -> bool:
    try:
        return socket.gethostbyname(name).startswith("127.")
    except OSError:
        return False


def listening(port: int) -> bool:
    with closing(socket.socket()) as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def free_range(count: int) -> int:
    """Return the first of ``count`` neighbouring free ports."""
    for first in range(17001 + 1000 * PLACE, 30000, count):
        if not any(listening(first + number) for number in range(count)):
            return first
    raise Broken("no free ports")


def _descendants(pid: int) -> list[int]:
    """Return the processes below ``pid``."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = path.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found: list[int] = []
    todo = [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def _steps_of(node: str) -> list[int]:
    """Return the slurmstepd of a node and what runs below them: they are no children of its slurmd."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"SLURMD_NODENAME={node}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    parents = []
    for pid in found:
        with contextlib.suppress(OSError, ValueError):
            above = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if "slurmstepd" in Path(f"/proc/{above}/comm").read_text():
                parents.append(above)
    return [*parents, *found]


def end(daemon: "subprocess.Popen[bytes]") -> None:
    if daemon.poll() is None:
        daemon.terminate()
        try:
            daemon.wait(timeout=20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["install"]:
        install()
        return 0
    if arguments[:1] == ["run"] and arguments[1:]:
        with running() as cluster:
            print(
                f"SLURM of {len(NODES)} nodes, accounting {'on' if cluster.accounting else 'off'}", flush=True
            )
            return subprocess.run(arguments[1:], env=cluster.environment, check=False).returncode
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (Missing, Broken) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
