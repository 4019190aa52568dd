"""The metric fake_counts and its figure: the paper's Figure 8 at a size of seconds."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hpdm_core.assembly.compose import load_cell
from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.evaluation.stage import evaluate_metric
from hpdm_core.metrics.distances.frechet import frechet_distance
from hpdm_core.metrics.networks.random3d import Random3D
from hpdm_core.report.curves import curves_figure, curves_of
from hpdm_core.sampling.cascade import sample
from hpdm_core.sampling.files import to_uint8, write_sample
from hpdm_core.study.__main__ import main as run_study
from hpdm_core.training import Trainer

ROOT = Path(__file__).parents[2]

METRIC = "{use: fake_counts, counts: [2, 4], extractor: %s}"


def small(extractor: str = "random3d", *more: str):
    return load_cell(
        "tiny_clips",
        sets=[
            "data.dataset={use: synthetic, classes: 3}",
            "model.video=[16, 32, 32]",
            "model.patch=[4, 8, 8]",
            "model.backbone={latent_layers: 1, latents: 4}",
            "training={steps: 3, batch: 1, keep: [1, 2]}",
            "sampling.solver={steps: [2, 1, 1], order: [1]}",
            f"evaluation={{samples: 4, reals: 5, metrics: [{METRIC % extractor}]}}",
            "runtime.sample_batch=3",
            *more,
        ],
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train stage with two kept checkpoints, and the samples of the trained model."""
    store = tmp_path_factory.mktemp("store")
    cell = small()
    attempt = store / "train" / "k" / "attempts" / "1"
    attempt.mkdir(parents=True)
    trainer = Trainer(cell, folder=attempt)
    trainer.run()
    shutil.copy(attempt / "model.safetensors", attempt.parents[1] / "model.safetensors")
    levels = sample(cell, cell.denoiser(trainer.ema_model), range(4), [0, 1, 2, 0])
    (store / "samples" / "s").mkdir(parents=True)
    for index in range(4):
        write_sample(store / "samples" / "s", index, [level[index] for level in levels], label=index % 3)
    return store


def measured(store: Path, cell=None):
    cell = cell or small()
    return evaluate_metric(
        cell,
        cell.config.evaluation.metrics[0],
        model_path=store / "train" / "k" / "model.safetensors",
        samples_folder=store / "samples" / "s",
        store_folder=store / "evaluations" / "e",
    )


def test_every_kept_checkpoint_is_measured_at_every_count(trained):
    result = measured(trained)
    assert [(row["metric"], row["level"]) for row in result["rows"]] == [
        (f"frechet[random3d] of {count} fakes", level) for level in range(3) for count in (2, 4)
    ]
    curves = result["details"]["curves"]
    assert curves["distance"] == "frechet[random3d]"
    points = {(point["step"], point["level"], point["fakes"]): point["value"] for point in curves["points"]}
    assert set(points) == {(s, level, n) for s in (1, 2, 3) for level in range(3) for n in (2, 4)}
    assert points[3, 2, 4] == result["rows"][-1]["value"]
    assert points[1, 2, 4] != points[2, 2, 4]
    # The finest level of step 1, anew and without the metric.
    cell = small()
    found = sorted(trained.rglob("00000001"))[0]
    from hpdm_core.training.checkpoint import load_weights, read_checkpoint

    model = cell.build_model()
    load_weights(model, read_checkpoint(found).ema, origin=found)
    fakes = sample(cell, cell.denoiser(model.eval()), range(2), [0, 1])[2]
    reals = np.stack([cell_real(cell, number) for number in range(5)])
    with torch.no_grad():
        fake_features = Random3D().features(to_uint8(fakes)).numpy()
    mean, spread = reals.mean(0), reals.std(0)
    scale = np.where(spread <= 1e-6 * np.maximum(1, np.abs(mean)), 1, spread)
    expected = frechet_distance((reals - mean) / scale, (fake_features - mean) / scale)
    assert points[1, 2, 2] == pytest.approx(expected, rel=1e-4)  # sampled in another batch


def cell_real(cell, number):
    from hpdm_core.base.randomness import generator

    clip = cell.dataset.draw("train", generator("evaluation", "reals", "train", number)).video
    return Random3D().features(to_uint8(clip)[None])[0].numpy()


def test_samples_of_checkpoints_are_not_drawn_twice(trained, monkeypatch):
    first = measured(trained)
    monkeypatch.setattr("hpdm_core.metrics.fake_counts._model_at", lambda *given: pytest.fail("drawn again"))
    assert measured(trained)["details"] == first["details"]


def test_features_of_another_extractor_file_are_not_taken(trained, monkeypatch):
    measured(trained)
    monkeypatch.setattr(
        "hpdm_core.evaluation.context.plugin_hashes", lambda *given: {"feature_extractors/random3d": "edited"}
    )
    monkeypatch.setattr("hpdm_core.metrics.fake_counts._model_at", lambda *given: pytest.fail("drawn again"))
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        measured(trained)


def test_a_checkpoint_that_is_gone_is_one_line(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "features", ignore_errors=True)
    for folder in (tmp_path / "store").rglob("00000002"):
        shutil.rmtree(folder)
    with pytest.raises(TroubleError, match="no checkpoint of step 2"):
        measured(tmp_path / "store")


def test_without_weights_another_extractor_stands_in(trained, monkeypatch):
    monkeypatch.delenv("HPDM_WEIGHTS", raising=False)
    result = measured(trained, small("i3d"))
    assert result["metric"] == "fake_counts[i3d]"
    assert {row["metric"] for row in result["rows"]} == {f"frechet[random3d] of {n} fakes" for n in (2, 4)}
    assert "i3d_torchscript.pt" in result["protocol"]["not_measured"]


def test_more_fakes_than_samples_are_refused():
    cell = small("random3d", "evaluation.samples=3")
    metric = cell.make("metrics", cell.config.evaluation.metrics[0])
    with pytest.raises(InputError, match=r"counts \[2, 4\]; allowed are 2 to evaluation.samples, 3"):
        metric.protocol(cell)


@dataclasses.dataclass
class Results:
    cells: list
    arms: tuple = ("a",)
    study: str = "fig8"
    levels: tuple = ((0, "4x16x16"), (1, "8x32x32"))


def cell_with(points, arm="a"):
    details = {"curves": {"distance": "frechet[random3d]", "points": points}}
    return SimpleNamespace(arm=arm, evaluations={"k": {"details": details}, "other": {}})


def point(step, level, fakes, value):
    return {"step": step, "level": level, "fakes": fakes, "value": value}


def test_curves_are_means_over_seeds():
    cells = [
        cell_with([point(1, 0, 8, 4.0), point(2, 0, 8, 2.0)]),
        cell_with([point(1, 0, 8, 6.0), point(2, 0, 4, 9.0)]),
    ]
    few, many = curves_of(Results(cells))
    assert (few.fakes, few.values, few.seeds) == (4, {2: 9.0}, 1)
    assert (many.fakes, many.values, many.seeds) == (8, {1: 5.0, 2: 2.0}, 2)


def test_the_figure_has_a_panel_per_level_and_none_without_curves():
    assert curves_figure(Results([SimpleNamespace(arm="a", evaluations={})])) is None
    one = [point(step, 0, n, 10.0 / step + n) for step in (1, 2) for n in (2, 4)]
    two = one + [point(step, 1, n, 1000.0 ** (step - 1)) for step in (1, 2) for n in (2, 4)]
    narrow, wide = (
        Image.open(io.BytesIO(curves_figure(Results([cell_with(points)])))) for points in (one, two)
    )
    assert wide.size[0] > narrow.size[0] + 300 and wide.size[1] == narrow.size[1]
    assert (
        len(
            set(
                wide.convert("RGB").getdata()
                if not hasattr(wide, "get_flattened_data")
                else wide.convert("RGB").get_flattened_data()
            )
        )
        > 20
    )


def test_the_study_draws_its_figure(tmp_path, capsys):
    sets = [
        "data.dataset={use: synthetic, classes: 3}",
        "model.video=[16, 32, 32]",
        "model.patch=[4, 8, 8]",
        "model.backbone={latent_layers: 1, latents: 4}",
        "training={steps: 2, batch: 1, keep: [1]}",
        "sampling.solver={steps: [1], order: [1]}",
        "evaluation={samples: 3, reals: 3, metrics: [{use: fake_counts, counts: [2, 3]}]}",
        "runtime.threads=1",
        "backend=inline",
    ]
    study = [str(ROOT / "studies" / "fig8_fvd_samples.yaml"), "--results", str(tmp_path)]
    assert run_study([*study, *(word for each in sets for word in ("--set", each))]) == 0
    assert "frechet[random3d] of 3 fakes" in capsys.readouterr().out
    with Image.open(tmp_path / "fig8_fvd_samples" / "report" / "fakes.png") as picture:
        assert picture.size[0] > 1000


def test_the_study_is_the_papers_at_its_scale():
    cell = load_cell(ROOT / "studies" / "fig8_fvd_samples.yaml", sets=["extends=ucf101_hpdm_s"])
    (part, _) = cell.config.evaluation.metrics
    assert part.options["counts"] == [128, 256, 512, 2048, 10000]  # the caption of Figure 8
    assert part.options["extractor"]["use"] == "i3d"
    assert max(cell.config.training.keep) < cell.config.training.steps
