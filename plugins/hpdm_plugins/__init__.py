"""Every built-in choice, registered through the same hooks as anyone's plugin.

Each submodule is a plugin of its own and imports none of the others; ``presets`` holds what studies extend.
"""

__all__ = ["PLUGIN_MODULES"]

PLUGIN_MODULES = (
    "study.backends",
    "model.fusions",
    "model.allocations",
    "diffusion.coordinates",
    "diffusion.noise",
    "diffusion.objectives",
    "model.backbones",
    "model.dit",
    "training.optimizers",
    "diffusion.solvers",
    "data.gaussian_world",
    "data.sample_clips",
    "data.video_folder",
    "data.ucf101",
    "data.synthetic",
    "data.shapes",
    "data.readers_pyav",
    "data.readers_skvideo",
    "metrics.extractors",
    "metrics.detectors",
    "metrics.standard",
    "metrics.memorisation",
    "metrics.refinement",
    "metrics.attributes",
    "metrics.protocol_metric",
    "metrics.fake_counts",
)
