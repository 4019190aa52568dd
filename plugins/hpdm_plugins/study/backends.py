"""Backends: cells run in this process, in processes on this machine, on a SLURM cluster, or are simulated."""

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
    """Return a backend that runs cells one after another in the controller's own process."""
    return Inline(runner)


@options_from(LocalOptions, "runner")
def local(runner: JobRunner, **options: Any) -> Local:
    """Return a backend that runs cells in processes on this machine, in a limited number of slots."""
    return Local(runner, LocalOptions(**options))


@options_from(SlurmOptions, "runner")
def slurm(runner: JobRunner, **options: Any) -> Slurm:
    """Return a backend that runs cells as jobs of a SLURM cluster, through submitit."""
    return Slurm(runner, SlurmOptions(**options))


@options_from(SimulatedOptions, "runner")
def simulated(runner: JobRunner, **options: Any) -> Simulated:
    """Return a backend with virtual jobs on a virtual clock and made-up results, to test large studies."""
    return Simulated(SimulatedOptions(**options))


@hookimpl
def register_backends(register: Register) -> None:
    """Register inline, local, slurm and simulated."""
    register("inline", inline, source="cells in the controller's process")
    register("local", local, source="submitit's processes, behind our own slots")
    register("slurm", slurm, source="submitit, SLURM")
    register("simulated", simulated, source="our own: made-up results")
