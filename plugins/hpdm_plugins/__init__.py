"""Every built-in choice, registered through the same hooks as anyone's plugin.

Each submodule is a plugin of its own and imports none of the others; ``presets`` holds what studies extend.
"""

__all__ = ["PLUGIN_MODULES"]

PLUGIN_MODULES = (
    "fusions",
    "allocations",
    "coordinates",
    "noise",
    "objectives",
    "backbones",
    "dit",
    "optimizers",
    "solvers",
    "gaussian_world",
    "sample_clips",
    "video_folder",
    "ucf101",
    "synthetic",
    "shapes",
    "readers_pyav",
    "readers_skvideo",
    "extractors",
    "detectors",
    "metrics",
    "memorisation",
    "refinement",
    "attributes",
    "protocol_metric",
    "fake_counts",
)
