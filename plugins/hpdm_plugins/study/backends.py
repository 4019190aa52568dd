"""Where cells run: in this process, in processes of this machine, on a SLURM cluster, or made up."""

from typing import Any

from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.plugins.options import options_from
from hpdm_core.study.backends.inline import Inline
from hpdm_core.study.backends.interface import JobRunner
from hpdm_core.study.backends.local import Local, LocalOptions
from hpdm_core.study.backends.simulated import Simulated, SimulatedOptions
from hpdm_core.study.backends.slurm import Slurm, SlurmOptions

__all__ = ["register_backends"]


def inline(runner: JobRunner) -> Inline:
    """Cells one after another in the controller's own process."""
    return Inline(runner)


@options_from(LocalOptions, "runner")
def local(runner: JobRunner, **options: Any) -> Local:
    """Processes of this machine, behind slots."""
    return Local(runner, LocalOptions(**options))


@options_from(SlurmOptions, "runner")
def slurm(runner: JobRunner, **options: Any) -> Slurm:
    """Jobs of a SLURM cluster, through submitit."""
    return Slurm(runner, SlurmOptions(**options))


@options_from(SimulatedOptions, "runner")
def simulated(runner: JobRunner, **options: Any) -> Simulated:
    """Virtual jobs on a virtual clock, with made-up results: to try studies of thousands of cells."""
    return Simulated(SimulatedOptions(**options))


@hookimpl
def register_backends(register: Register) -> None:
    """Register the four."""
    register("inline", inline, source="cells in the controller's process")
    register("local", local, source="submitit's processes, behind our own slots")
    register("slurm", slurm, source="submitit, SLURM")
    register("simulated", simulated, source="our own: made-up results")
