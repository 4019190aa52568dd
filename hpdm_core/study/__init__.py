"""The study engine: cells, their stages by key, the ledger, the controller and its backends.

Modules are imported one by one (``hpdm_core.store.stages`` and so on); nothing is loaded here, so that a
worker that needs the store alone does not pay for the controller.
"""

__all__: list[str] = []
