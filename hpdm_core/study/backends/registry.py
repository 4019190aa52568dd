"""Where cells run, by name: in this process, in processes of this machine, or on a SLURM cluster.

The interface that a backend follows stands in `hpdm_core.study.backends.interface`, the states and classes of
failure in `hpdm_core.study.controller.states`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

from hpdm_core.base.errors import InputError, did_you_mean
from hpdm_core.study.backends.inline import Inline, InlineOptions, Work
from hpdm_core.study.backends.interface import Backend
from hpdm_core.study.backends.local import Local, LocalOptions
from hpdm_core.study.backends.simulated import Simulated, SimulatedOptions
from hpdm_core.study.backends.slurm import Slurm, SlurmOptions

__all__ = ["BACKENDS", "make_backend"]

BACKENDS: Mapping[str, type[BaseModel]] = {
    "inline": InlineOptions,
    "local": LocalOptions,
    "slurm": SlurmOptions,
    "simulated": SimulatedOptions,
}
"""Name in a study file -> the options that the backend takes."""


def make_backend(
    name: str, options: Mapping[str, Any], *, work: Work, tick: Callable[[], None], slots: int | None = None
) -> Backend:
    """Build the backend ``name`` of `BACKENDS`; ``slots`` overrides how many jobs may be under way at a time.

    ``work`` is what a job does; ``tick`` is called every second or so by a backend that runs jobs in this
    process.
    """
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise InputError(f"backend: unknown '{name}'{did_you_mean(name, BACKENDS)}; allowed: {known}")
    checked = BACKENDS[name].model_validate(dict(options))
    if isinstance(checked, InlineOptions):
        return Inline(checked, work=work, tick=tick)
    if isinstance(checked, SimulatedOptions):
        return Simulated(checked if slots is None else checked.model_copy(update={"slots": slots}))
    made: Local | Slurm
    if isinstance(checked, LocalOptions):
        made = Local(checked, work=work)
    else:
        assert isinstance(checked, SlurmOptions), f"no backend for {type(checked).__name__}"
        made = Slurm(checked, work=work)
    if slots is not None:
        made.slots = slots
    return made
