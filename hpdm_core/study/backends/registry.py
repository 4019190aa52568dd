"""Build backends by name, from the plugin family ``backends``.

`hpdm_core.study.backends.interface` defines the interface of a backend.
"""

from collections.abc import Callable
from pathlib import Path

from hpdm_core.config.schema import Part
from hpdm_core.plugins import Plugins
from hpdm_core.study.backends.interface import Backend, JobRunner

__all__ = ["asking_backends", "make_backend", "results_of"]


def make_backend(plugins: Plugins, part: Part, runner: JobRunner, *, slots: int | None = None) -> Backend:
    """Build the backend ``part``; ``slots`` overrides its number of simultaneous jobs, if it has slots.

    Raises `InputError` for an unknown name or option.
    """
    made: Backend = plugins.make("backends", part, runner)
    if slots is not None and hasattr(made, "slots"):
        made.slots = slots
    return made


def asking_backends(plugins: Plugins) -> Callable[[str], Backend]:
    """Return a function that builds a backend by name, only to poll and cancel jobs that another command started."""
    runner = JobRunner(work=_no_work)
    return lambda name: make_backend(plugins, Part(use=name), runner)


def _no_work(path: str) -> None:
    raise AssertionError(f"{path}: a backend built for polling starts no jobs")


def results_of(backend: Backend, results: Path) -> Path:
    """Return the folder for results under ``results``: simulated ones are kept apart from real ones."""
    return results / "simulated" if backend.made_up else results
