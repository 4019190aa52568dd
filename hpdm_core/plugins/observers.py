"""Calls lifecycle hooks. An error in an observer is logged and recorded in the result; it does not stop the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpdm_core.hookspecs import CellInfo
    from hpdm_core.plugins.manager import Plugins

__all__ = ["Observers"]

log = logging.getLogger(__name__)


class Observers:
    """Calls the lifecycle hooks of ``plugins`` for ``cell``; with ``cell`` None, hooks about a cell are not called.

    The first error of an observer in a hook is logged, all are counted. After an error the other observers are
    still called, and the observer itself is called again the next time. `errors` is written into a stage's result.
    """

    def __init__(self, plugins: Plugins, cell: CellInfo | None) -> None:
        self.plugins = plugins
        self.cell = cell
        self._counts: dict[tuple[str, str], int] = {}
        self._messages: dict[tuple[str, str], str] = {}

    @property
    def errors(self) -> list[str]:
        """One line per observer and hook that raised: plugin, hook, first error, number of errors."""
        return [f"{self._messages[key]} ({count}x)" for key, count in self._counts.items()]

    def call(self, hook: str, **arguments: Any) -> None:
        """Call every observer of ``hook`` with ``cell`` and ``arguments``, the last registered first."""
        if self.cell is None:
            return
        self._call(hook, {"cell": self.cell, **arguments})

    def study_finished(self, study: Path) -> None:
        """Call the observers of ``after_study_finished``, which has no cell."""
        self._call("after_study_finished", {"study": study})

    def _call(self, hook: str, given: Mapping[str, Any]) -> None:
        observers = getattr(self.plugins.hook, hook).get_hookimpls()  # wrappers are refused when loaded
        for observer in reversed(observers):
            chosen = [given[name] for name in observer.argnames]
            self._guard(observer.plugin_name, hook, lambda o=observer, c=chosen: o.function(*c))

    def _guard(self, plugin: str, hook: str, run: Any) -> None:
        try:
            run()
        except Exception as error:
            key = (plugin, hook)
            if key not in self._counts:
                self._messages[key] = f"plugin '{plugin}', {hook}: {type(error).__name__}: {error}"
                log.warning("%s (an observer's error does not stop the run; shown once)", self._messages[key])
            self._counts[key] = self._counts.get(key, 0) + 1
