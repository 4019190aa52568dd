"""Backends by name: the family ``backends`` of plugins.

The interface that a backend follows stands in `hpdm_core.study.backends.interface`.
"""

from collections.abc import Callable
from pathlib import Path

from hpdm_core.config.schema import Part
from hpdm_core.plugins import Plugins
from hpdm_core.study.backends.interface import Backend, JobRunner

__all__ = ["asking_backends", "make_backend", "results_of"]


def make_backend(plugins: Plugins, part: Part, runner: JobRunner, *, slots: int | None = None) -> Backend:
    """Build the backend ``part``; ``slots`` overrides how many jobs may be under way at a time, where it has slots.

    Raises `InputError` for an unknown name or option.
    """
    made: Backend = plugins.make("backends", part, runner)
    if slots is not None and hasattr(made, "slots"):
        made.slots = slots
    return made


def asking_backends(plugins: Plugins) -> Callable[[str], Backend]:
    """Return what builds a backend by its name to ask for jobs that were started by another command: it starts none."""
    runner = JobRunner(work=_no_work)
    return lambda name: make_backend(plugins, Part(use=name), runner)


def _no_work(path: str) -> None:
    raise AssertionError(f"{path}: nothing is started through another backend")


def results_of(backend: Backend, results: Path) -> Path:
    """Return where results go under the folder ``results``: made-up ones apart from real ones."""
    return results / "simulated" if backend.made_up else results
