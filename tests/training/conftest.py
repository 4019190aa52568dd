"""A tiny cell with sizes that all differ, and plugins that watch it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.config.schema import CellConfig
from hpdm_core.plugins import Plugins, build_plugins
from hpdm_core.plugins.observers import Observers
from tests.small import rin

TINY: dict[str, Any] = {
    "model": {
        "video": (8, 16, 24),
        "patch": (2, 4, 6),
        "token": (1, 2, 3),
        "levels": 3,
        "classes": 4,
        "token_dim": 12,
        "blocks": 3,
        "backbone": rin(8, latents=5),
    },
    "data": {"dataset": "synthetic"},
    "training": {
        "coordinate_sampling": "nested_topdown",
        "steps": 9,
        "batch": 3,
        "learning_rate": 0.002,
        "warmup": 2,
    },
    "runtime": {"threads": 1, "checkpoint_every": 2, "log_every": 2},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    made = dict(base)
    for key, value in changes.items():
        whole = key in (
            "optimizer",
            "backbone",
            "noise_sampling",
            "noise_scaling",
            "dataset",
            "context_fusion",
        )
        made[key] = merged(made.get(key, {}), value) if isinstance(value, dict) and not whole else value
    return made


def make_assembly(plugins: Plugins, **changes: Any) -> Assembly:
    return Assembly(CellConfig.model_validate(merged(TINY, changes)), plugins)


@pytest.fixture(scope="session")
def assemble() -> Callable[..., Assembly]:
    """Make the tiny cell, changed by ``section={...}``; ``objects`` are further plugins."""
    plugins = build_plugins()

    def make(*, objects: tuple[Any, ...] = (), **changes: Any) -> Assembly:
        return make_assembly(build_plugins(objects=objects) if objects else plugins, **changes)

    return make


@pytest.fixture
def watched() -> Callable[[Assembly], Any]:
    """Make what a trainer needs of a cell."""

    def make(assembly: Assembly) -> Any:
        cell = SimpleNamespace(name="arm=default,seed=0")
        cell.observers = Observers(assembly.plugins, cell)  # type: ignore[arg-type]
        return cell

    return make
