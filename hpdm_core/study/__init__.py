"""The study engine: planning a study's cells, the ledger, the controller and its backends, and the worker.

Import each module by its full name (``hpdm_core.study.worker.run_cell`` and so on). This file imports nothing, so a
worker does not load the controller.
"""

__all__: list[str] = []
