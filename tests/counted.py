"""What `hpdm_core.training.cost` counted before it shared calls: configurations, and tests/counted.json with their
figures.

``python tests/counted.py`` writes the figures anew: only where a change is meant to change them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.assembly.compose import load_cell
from hpdm_core.study.plan.study_file import load_study
from hpdm_core.training import cost

STUDIES = Path(__file__).parents[1] / "studies"
PUBLISHED = Path(__file__).parents[1] / "results" / "published"
FIGURES = Path(__file__).with_name("counted.json")
BARE = ("runtime.micro_batch=null", "runtime.activation_checkpointing=false")
"""Presets may say how a machine runs them; the figures are of the whole batch at once."""
PRESETS = ("tiny_clips", "ucf101_hpdm_s", "ucf101_hpdm_m", "ucf101_hpdm_l", "efficiency_small")
TINY = {
    "shared": ("diffusion.noise_sampling=shared",),
    "clean_parents": ("diffusion.noise_sampling=clean_parents",),
    "clean_stream": ("diffusion.noise_sampling=clean_stream",),
    "clean_stream_detached": (
        "diffusion.noise_sampling=clean_stream",
        "model.context_fusion={use: deep, detach: true}",
    ),
    "clean_stream_checkpointed": (
        "diffusion.noise_sampling=clean_stream",
        "runtime.activation_checkpointing=true",
        "runtime.micro_batch=3",
    ),
    "no_context_no_coordinates": ("model.context_fusion={use: none, coordinates: false}",),
    "shallow_no_coordinates": ("model.context_fusion={use: shallow_concat, coordinates: false}",),
    "shallow_checkpointed": (
        "model.context_fusion=shallow_concat",
        "runtime.activation_checkpointing=true",
    ),
    "micro_batch": ("runtime.micro_batch=3",),
    "checkpointed": ("runtime.activation_checkpointing=true",),
    "never_conditioned": ("training.self_conditioning=0.0",),
    "always_conditioned": ("training.self_conditioning=1.0", "training.batch=1"),
    "unlabelled_no_sigma": ("model.classes=0", "model.sigma_on_tokens=false"),
    "explicit_allocation": (
        "model.computation_allocation={use: explicit, levels_per_block: [2, 2, 3, 3, 3, 3]}",
    ),
    "effective_v": ("diffusion.objective=effective_v", "sampling.overlap=[f, h, w]"),
    "centre_frame": ("data.downsampling=centre_frame", "sampling.overlap=[w]"),
}
PAPERS = {
    "hpdm_s_micro_batch": ("ucf101_hpdm_s", ("runtime.micro_batch=2",)),
    "hpdm_s_checkpointed": (
        "ucf101_hpdm_s",
        ("runtime.micro_batch=4", "runtime.activation_checkpointing=true"),
    ),
    "hpdm_l_checkpointed": (
        "ucf101_hpdm_l",
        ("runtime.micro_batch=1", "runtime.activation_checkpointing=true"),
    ),
}


def configurations() -> Iterator[tuple[str, Assembly]]:
    """Yield every configuration whose figures are held, by name."""
    for preset in PRESETS[:-1]:
        yield preset, load_cell(preset, sets=BARE)
    for name, sets in TINY.items():
        yield f"tiny_clips/{name}", load_cell("tiny_clips", sets=[*BARE, *sets])
    for name, (preset, sets) in PAPERS.items():
        yield name, load_cell(preset, sets=[*BARE, *sets])
    for file, extends in (
        ("dcf_ablation", "tiny_clips"),
        ("dcf_ablation", "ucf101_hpdm_s"),
        ("table1_efficiency", None),
        ("table1_efficiency", "efficiency_small"),
    ):
        sets = [] if extends is None else [f"extends={extends}"]
        study = load_study(STUDIES / f"{file}.yaml", sets=[*sets, *BARE])
        for arm, config in study.configs.items():
            yield f"{file}/{extends or 'as it is'}/{arm}", Assembly(config, study.plugins)
    study = load_study(PUBLISHED / "overfit_rin" / "study.yaml", sets=BARE)
    yield "overfit/as it is/default", Assembly(study.configs["default"], study.plugins)


def counted(assembly: Assembly) -> dict[str, int]:
    """Return the figures of one configuration."""
    return {
        "parameters": cost.count_parameters(assembly),
        "training_flops": cost.training_flops(assembly),
        "training_memory": cost.training_memory(assembly),
        "sampling_flops": cost.sampling_flops(assembly),
        "sampling_flops_uncached": cost.sampling_flops(assembly, cached=False),
        "disk_bytes": cost.disk_bytes(assembly),
    }


if __name__ == "__main__":
    figures = {name: counted(assembly) for name, assembly in configurations()}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
