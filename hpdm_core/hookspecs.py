"""The whole contract with plugins. Nothing else is in this file.

A plugin is a module (a file given with ``--plugin FILE`` or ``plugins:``, or a package's entry point in the group
``hpdm``) with functions marked ``@hookimpl``. There are two kinds of hooks.

``register_<plural>(register)`` registers parts; it is called once while a cell is built. In it, call
``register(name, factory, *, source)``, where ``source`` says where the idea comes from (paper, equation, author). A
part's options are the keyword-only parameters of its factory; they are validated by their annotations (no
``**kwargs``). The positional parameters are passed by the core and are listed below. A key is unique within its family.

``before_ / after_ / on_`` hooks are observers of a cell's lifecycle. They get detached tensors and must change nothing.
An observer's exception is logged once and noted in the result; it does not fail the cell. Observers are called at most
once per training step, and never per tile, block or level of a step. Arguments are positional and have no defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from hpdm_core.config.schema import CellConfig

hookspec = pluggy.HookspecMarker("hpdm")
hookimpl = pluggy.HookimplMarker("hpdm")


class Register(Protocol):
    """Adds one part under its name in the study file."""

    def __call__(self, name: str, factory: Callable[..., Any], *, source: str) -> None:
        """Add ``factory``; ``source``: where the idea comes from."""
        ...


class CellInfo(Protocol):
    """The cell (one arm with one seed) as observers see it."""

    arm: str
    seed: int
    study: str
    """The study's name; empty where there is none."""
    config: CellConfig

    @property
    def name(self) -> str:
        """The cell's displayed name: ``ARM, seed SEED``."""
        ...


@hookspec
def register_context_fusions(register: Register) -> None:
    """model.context_fusion: ``factory(shape: FusionShape, *, ...) -> ContextFusion``."""


@hookspec
def register_computation_allocations(register: Register) -> None:
    """model.computation_allocation: ``factory(blocks: int, levels: int, *, ...) -> Sequence[int]``."""


@hookspec
def register_coordinate_samplers(register: Register) -> None:
    """training.coordinate_sampling: ``factory(pyramid: Pyramid, *, ...) -> CoordinateSampler``."""


@hookspec
def register_noise_scalings(register: Register) -> None:
    """diffusion.noise_scaling: ``factory(levels: int, *, ...) -> Sequence[float]``, sigma_in per level."""


@hookspec
def register_noise_samplers(register: Register) -> None:
    """diffusion.noise_sampling: ``factory(sigma_in: Sequence[float], *, ...) -> NoiseSampler``."""


@hookspec
def register_objectives(register: Register) -> None:
    """diffusion.objective: ``factory(*, ...) -> Objective``."""


@hookspec
def register_backbones(register: Register) -> None:
    """model.backbone: ``factory(token_dim: int, blocks: int, *, ...) -> Backbone``.

    A factory with a third positional parameter named ``grid`` is passed the number of tokens of a patch per axis
    (f, h, w) there.
    """


@hookspec
def register_solvers(register: Register) -> None:
    """sampling.solver: ``factory(sigma_in: Sequence[float], *, ...) -> Solver``."""


@hookspec
def register_datasets(register: Register) -> None:
    """data.dataset: ``factory(clip: ClipShape, reader: VideoReader, *, ...) -> ClipDataset``."""


@hookspec
def register_video_readers(register: Register) -> None:
    """data.reader: ``factory(*, ...) -> VideoReader``."""


@hookspec
def register_feature_extractors(register: Register) -> None:
    """The extractor of a metric: ``factory(*, ...) -> FeatureExtractor``."""


@hookspec
def register_metrics(register: Register) -> None:
    """evaluation.metrics: ``factory(*, ...) -> Metric``."""


@hookspec
def register_optimizers(register: Register) -> None:
    """training.optimizer:
    ``factory(named_parameters: Iterable[tuple[str, Parameter]], lr: float, *, ...) -> Optimizer``.
    """


@hookspec
def register_backends(register: Register) -> None:
    """backend: ``factory(runner: JobRunner, *, ...) -> Backend``, where cells run."""


@hookspec
def before_cell_started(cell: CellInfo) -> None:
    """Before the first stage of a cell."""


@hookspec
def after_step_finished(cell: CellInfo, step: int, loss: Tensor) -> None:
    """After optimizer step ``step`` (from 1); ``loss`` [levels] is a detached copy."""


@hookspec
def after_checkpoint_saved(cell: CellInfo, path: Path) -> None:
    """After a checkpoint has its final name."""


@hookspec
def after_level_sampled(cell: CellInfo, level: int, videos: Tensor) -> None:
    """After a batch of videos of one level is finished; ``videos`` [B, C, F, H, W] in [-1, 1] is a copy."""


@hookspec
def after_cell_finished(cell: CellInfo, result: dict[str, Any]) -> None:
    """After the last stage of a cell; ``result`` maps a stage's name to its result."""


@hookspec
def on_cell_error(cell: CellInfo, error: BaseException) -> None:
    """When a stage of a cell has failed, before the error is reported."""


@hookspec
def after_study_finished(study: Path) -> None:
    """In the controller, after the report of the study in folder ``study`` is written."""
