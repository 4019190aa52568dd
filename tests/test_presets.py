"""The presets: the paper's models have the paper's sizes, and studies at its scale resolve to its set-up."""

import itertools
from pathlib import Path

import pytest

from hpdm_core import Assembly, build_plugins, load_cell
from hpdm_core.assembly.compose import presets
from hpdm_core.assembly.keys import sample_key, train_key
from hpdm_core.report.efficiency import paper_table1
from hpdm_core.study.plan.cells import cells_of
from hpdm_core.study.plan.study_file import load_study
from hpdm_core.study.show.dry_run import describe_study
from hpdm_core.training.cost import count_parameters

STUDIES = Path(__file__).parents[1] / "studies"


@pytest.mark.parametrize(("size", "millions"), [("s", 177.87), ("m", 321.29), ("l", 724.53)])
def test_parameters_of_the_papers_models(size: str, millions: float) -> None:
    cell = load_cell(f"ucf101_hpdm_{size}")
    assert count_parameters(cell) / 1e6 == pytest.approx(millions, abs=0.05)
    assert cell.levels_per_block == (1, 1, 2, 2, 3, 3)
    assert cell.sigma_in == (4, 8, 16)


@pytest.mark.parametrize(("size", "steps"), [("s", 40_000), ("m", 40_000), ("l", 65_000)])
def test_training_of_the_papers_models(size: str, steps: int) -> None:
    training = load_cell(f"ucf101_hpdm_{size}").config.training
    assert (training.steps, training.batch, training.learning_rate, training.warmup) == (
        steps,
        768,
        0.005,
        10_000,
    )
    assert training.optimizer.use == "lamb"


def test_the_ablation_at_the_papers_scale() -> None:
    study = load_study(STUDIES / "dcf_ablation.yaml", sets=["extends=ucf101_hpdm_s"])
    assert list(study.configs) == [
        "default",
        "no_context",
        "shallow_fusion",
        "context_detach",
        "no_adaptive_computation",
        "no_coordinates",
    ]
    for config in study.configs.values():
        assert (config.training.steps, config.training.batch) == (50_000, 512)
        assert config.evaluation.samples == 512
        assert config.data.dataset.use == "ucf101"
        assert config.diffusion.noise_sampling.use == "independent"
    small = load_study(STUDIES / "dcf_ablation.yaml")
    assert small.seeds == (0, 1, 2)
    assert small.configs["default"].model.video == (8, 32, 32)


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_study_resolves(file: Path) -> None:
    study = load_study(file)
    assert study.name == file.stem
    assert study.baseline in study.configs


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_study_can_be_planned(file: Path, tmp_path: Path) -> None:
    """Keys and what is to be done of every cell, cost of the baseline's; nothing is written."""
    study = load_study(file)
    cells, _ = cells_of(study, tmp_path / "store")
    assert len({cell.identity for cell in cells}) == len(cells) == len(study.configs) * len(study.seeds)
    assert all(step.name for cell in cells for step in cell.missing())
    text = describe_study(load_study(file, only=[study.baseline]), tmp_path / "results")
    assert f"study '{file.stem}': {len(study.seeds)} cells" in text and "nothing was run" in text
    assert list(tmp_path.iterdir()) == []


def test_overlap_samples_one_model_eight_times() -> None:
    for sets in ([], ["extends=ucf101_hpdm_s"]):
        study = load_study(STUDIES / "overlap.yaml", sets=sets)
        trained = {train_key(config, study.plugins) for config in study.configs.values()}
        sampled = {sample_key("t", config, study.plugins) for config in study.configs.values()}
        assert len(trained) == 1 and len(sampled) == len(study.configs) == 8


def test_parent_noise_crosses_fusion_parents_and_input_scale() -> None:
    study = load_study(STUDIES / "parent_noise.yaml")
    crossed = {
        (config.model.context_fusion.use, config.diffusion.noise_sampling.use, arm.endswith("_falling"))
        for arm, config in study.configs.items()
        if arm != "deep_stream"
    }
    fusions, parents = ("deep", "shallow_concat"), ("independent", "clean_parents")
    assert crossed == set(itertools.product(fusions, parents, (False, True)))
    draws = {
        (config.diffusion.noise_sampling.options["mean"], config.diffusion.noise_sampling.options["std"])
        for config in study.configs.values()
    }
    assert draws == {(-0.7, 1.2)}
    scales = {
        arm.endswith("_falling"): Assembly(config, study.plugins).sigma_in
        for arm, config in study.configs.items()
    }
    assert scales == {False: (2, 2, 2), True: pytest.approx((2, 1.2, 0.72))}


def test_the_presets_are_found() -> None:
    sizes = ("s", "m", "l")
    names = {f"hpdm_{size}" for size in sizes} | {f"ucf101_hpdm_{size}" for size in sizes} | {"tiny_clips"}
    names |= {"efficiency", "efficiency_small", "small_clips", "small_shapes"}
    assert set(presets(build_plugins())) == names


@pytest.mark.parametrize(
    "name", ["tiny_clips", "small_clips", "ucf101_hpdm_s", "ucf101_hpdm_m", "ucf101_hpdm_l"]
)
def test_every_distance_of_a_preset_is_checked_for_what_it_does_not_see(name: str) -> None:
    metrics = load_cell(name).config.evaluation.metrics
    judged = {
        (part.use, part.options["extractor"]["use"]) for part in metrics if part.use in ("frechet", "kvd")
    }
    checked = {
        (part.options["distance"], part.options["extractor"]["use"])
        for part in metrics
        if part.use == "sensitivity"
    }
    assert checked == judged != set()


def test_table_1_measures_the_papers_rows_in_full_and_at_a_quarter_of_the_size() -> None:
    full = load_study(STUDIES / "table1_efficiency.yaml")
    small = load_study(STUDIES / "table1_efficiency.yaml", sets=["extends=efficiency_small"])
    assert set(full.configs) == set(small.configs) == set(paper_table1()["rows"])
    for arm, config in full.configs.items():
        model, reduced = config.model, small.configs[arm].model
        size = 512 if "64x512" in arm else 256
        patch = {"full": (64, size, size), "patch_32x128": (32, 128, 128), "patch_16x64": (16, 64, 64)}
        assert model.video == (64, size, size)
        assert model.patch == patch[arm.split("_at_")[0].removesuffix(f"_64x{size}")]
        assert reduced.video == tuple(side // 4 for side in model.video)
        assert reduced.patch == tuple(side // 4 for side in model.patch)
        assert (model.levels == 1) == arm.startswith("full")
        if not arm.startswith("full"):
            wanted = "linear" if arm.endswith("_adaptive") else "full"
            assert model.computation_allocation.use == reduced.computation_allocation.use == wanted
        assert {part.use for part in config.evaluation.metrics} == {"efficiency"}
