"""The built-in backbone `rin` (HPDM builds on RIN, 2212.11972)."""

from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.model.rin import RIN

__all__ = ["register_backbones"]


@hookimpl
def register_backbones(register: Register) -> None:
    """Add the built-in backbones."""
    register("rin", RIN, source="RIN (2212.11972), Snap Video (2402.14797), widths fitted to HPDM's Table 8")
