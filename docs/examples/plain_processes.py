"""A backend of one's own: each cell is a plain process of this machine."""

import os
import signal
import subprocess
import sys
from typing import Annotated

from pydantic import Field

from hpdm_core import hookimpl
from hpdm_core.base.files import read_json, write_json
from hpdm_core.store.lease import Process
from hpdm_core.study.backends.interface import SchedulerStatus, SystemClock


class PlainProcesses:
    attached = queued = made_up = False
    gpus = 0
    grace = 8.0

    def __init__(self, runner, *, slots: Annotated[int, Field(gt=0)] = 1):
        self.clock = SystemClock()
        self.slots = slots
        self.work = runner.work

    def check(self):
        """Processes can be started anywhere."""

    def free_slots(self, under_way):
        return self.slots - len(under_way)

    def interval(self, under_way):
        return 0.2

    def submit(self, jobs):
        run = f"import sys; from {self.work.__module__} import {self.work.__name__} as run; run(sys.argv[1])"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        for job in jobs:
            child = subprocess.Popen([sys.executable, "-c", run, str(job.spec)], env=environment)
            write_json(job.folder / "job.json", {"process": Process.of(child.pid).to_json()})
            child.returncode = 0  # nobody waits for it: `find` sees when it has ended

    def poll(self, jobs):
        return {job.id: SchedulerStatus(phase="alive" if self.find(job) else "over") for job in jobs}

    def find(self, job):
        process = Process.read((read_json(job.folder / "job.json") or {}).get("process"))
        return process if process is not None and process.alive() else None

    def cancel(self, jobs, *, now=False):
        for process in filter(None, map(self.find, jobs)):
            os.kill(process.pid, signal.SIGKILL if now else signal.SIGTERM)
        return True


@hookimpl
def register_backends(register):
    register("plain_processes", PlainProcesses, source="this file")
