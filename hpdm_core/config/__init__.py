"""Study files: YAML, presets, overrides, validated frozen models, canonical JSON, keys."""

from hpdm_core.config.schema import CellConfig, Part

__all__ = ["CellConfig", "Part"]
