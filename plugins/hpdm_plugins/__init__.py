"""All built-in parts, registered through the same hooks as third-party plugins.

Each submodule is a separate plugin and imports none of the others; ``presets`` holds configurations that studies
extend.
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
