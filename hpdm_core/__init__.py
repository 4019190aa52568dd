"""HPDM: Hierarchical Patch Diffusion Models, built as a framework for ablations."""

from hpdm_core.errors import HpdmError
from hpdm_core.hookspecs import hookimpl

__all__ = ["HpdmError", "hookimpl"]
