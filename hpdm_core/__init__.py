"""HPDM: Hierarchical Patch Diffusion Models, built as a framework for ablations.

The names below are what plugins and scripts need. They are imported when first used, so that
``import hpdm_core`` itself costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hpdm_core.base.errors import HpdmError
from hpdm_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.assembly.compose import load_cell
    from hpdm_core.config.content import Content
    from hpdm_core.config.schema import CellConfig, Part
    from hpdm_core.model.fusion import ContextFusion, FusionShape, Source
    from hpdm_core.plugins import Plugins, build_plugins
    from hpdm_core.pyramid import Coords, Pyramid
    from hpdm_core.training import Trainer

__all__ = [
    "Assembly",
    "CellConfig",
    "Content",
    "ContextFusion",
    "Coords",
    "FusionShape",
    "HpdmError",
    "Part",
    "Plugins",
    "Pyramid",
    "Source",
    "Trainer",
    "build_plugins",
    "hookimpl",
    "load_cell",
]

_HOMES = {
    "Assembly": "assembly.assembly",
    "CellConfig": "config.schema",
    "Content": "config.content",
    "ContextFusion": "model.fusion",
    "Coords": "pyramid",
    "FusionShape": "model.fusion",
    "Part": "config.schema",
    "Plugins": "plugins",
    "Pyramid": "pyramid",
    "Source": "model.fusion",
    "Trainer": "training",
    "build_plugins": "plugins",
    "load_cell": "assembly.compose",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hpdm_core' has no attribute '{name}'")
    return getattr(importlib.import_module(f"hpdm_core.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
