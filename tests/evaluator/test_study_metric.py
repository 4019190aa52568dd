"""The metric `protocol` in a study: fitted to levels, measured on files or drawn clips, replaced without weights."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from hpdm_core.assembly.compose import load_cell
from hpdm_core.base.errors import InputError, report_errors
from hpdm_core.config.schema import Part
from hpdm_core.evaluation.stage import evaluate_metric
from hpdm_core.evaluation.study_metric import ProtocolMetric, lacking
from hpdm_core.metrics.networks.i3d import I3D
from hpdm_core.plugins import build_plugins
from hpdm_core.sampling.files import write_sample
from hpdm_core.study.__main__ import main as study

SIZES = [(16, 64, 64), (32, 128, 128), (64, 256, 256)]


def fitted(name, *, level=None, samples=20_000, sizes=SIZES):
    config = SimpleNamespace(
        model=SimpleNamespace(video=sizes[-1]), evaluation=SimpleNamespace(samples=samples, reals=9)
    )
    metric = ProtocolMetric(name, level=level, replicates=0, substitutes=())
    return metric.fitted(config, build_plugins(), sizes)


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("hpdm/fvd512_16x64x64", 0),
        ("hpdm/fvd512_32x128x128", 1),
        ("hpdm/fvd512_64x256x256", 2),
        ("hpdm/fvd10k_16f", 2),
        ("hpdm/is10k_ucf", 2),
        ("stylegan_v/fvd2048_16f", 2),
    ],
)
def test_a_record_finds_its_level_at_the_papers_size(name, level):
    found = fitted(name)
    assert (found.level, found.modified) == (level, ())


def test_what_does_not_fit_is_marked_or_refused():
    assert fitted("hpdm/fvd512_16x64x64", samples=100).modified == ("fakes.count 512 -> 100",)
    other = fitted("hpdm/fvd512_16x64x64", level=1)
    assert other.modified == ("reals.prepare.average [4, 4, 4] -> [2, 2, 2]",)
    small = [(4, 16, 16), (8, 32, 32), (16, 64, 64)]
    with pytest.raises(InputError, match="measured on 256x256 pixels; the cell's levels are 4x16x16"):
        fitted("hpdm/fvd10k_16f", sizes=small)
    with pytest.raises(InputError, match="clips of 128 frames, level 2 has 16"):
        fitted("stylegan_v/fvd2048_128f", sizes=small)
    with pytest.raises(InputError, match="allowed are 0 to 2"):
        fitted("hpdm/fvd10k_16f", level=3)
    assert fitted("stylegan_v/fvd2048_16f", sizes=small).record.reals.prepare.size == (64, 64)
    # A record that draws frames of its fakes at random: samples are measured from their first.
    assert fitted("cdfvd_i3d/fvd2048_16f").modified == ("fakes.offset random -> start",)
    assert fitted("cdfvd_i3d/fvd2048_16f", sizes=small).modified == ()


def cell_on(dataset, given, *, bootstrap=0):
    """A cell of 16x32x32 videos of ``dataset`` whose one metric is the protocol in the file ``given``."""
    part = json.dumps({"use": "protocol", "name": str(given), "bootstrap": bootstrap})
    return load_cell(
        "tiny_clips",
        sets=[
            f"data.dataset={dataset}",
            "model.video=[16, 32, 32]",
            "model.patch=[4, 8, 8]",
            "evaluation.samples=2",
            "evaluation.reals=4",
            f"evaluation.metrics=[{part}]",
        ],
    )


@pytest.fixture
def cell(ucf, protocol):
    """A cell on the small UCF-101, and a protocol that fits its finest level."""
    given = protocol(
        detector={"use": "i3d", "weights": "mine.pt", "resize": "squash"},
        title="FVD",
        frames=9,
        reals__count=2,
        reals__prepare={"size": [32, 32], "resize": "bilinear_antialias", "crop": "centre"},
        fakes__count=2,
    )
    return cell_on(f"{{use: ucf101, root: {ucf}}}", given)


@pytest.fixture
def samples(cell, tmp_path):
    folder = tmp_path / "store" / "samples" / "k"
    folder.mkdir(parents=True)
    for index in range(2):
        levels = [
            torch.rand(3, *cell.pyramid.size(level), generator=torch.Generator().manual_seed(index)) * 2 - 1
            for level in range(3)
        ]
        write_sample(folder, index, levels, label=0)
    return folder


def weights(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.manual_seed(0)
    torch.save(I3D().state_dict(), folder / "mine.pt")
    monkeypatch.setenv("HPDM_WEIGHTS", str(folder))


def test_reals_are_the_data_sets_files_by_the_records_rule(
    cell, samples, tmp_path, monkeypatch, ucf, fakes, run
):
    weights(tmp_path, monkeypatch)
    (part,) = cell.config.evaluation.metrics
    store = tmp_path / "store" / "evaluations" / "k"
    result = evaluate_metric(cell, part, samples_folder=samples, store_folder=store)
    (row,) = result["rows"]
    assert row["metric"] == "FVD [unknown weights]" and row["level"] == 2 and row["value"] > 0
    assert row["record"].startswith("small/random3d_16f, ")
    assert result["protocol"]["modified"] == [] and result["protocol"]["reals"]["clips"] == 2
    # The evaluator of folders says the same, to the last bit.
    folder = tmp_path / "generated"
    folder.mkdir()
    from hpdm_core.sampling.files import read_level

    for index in range(2):
        np.save(folder / f"{index}.npy", read_level(samples, [index], 2)[0].numpy())
    out = tmp_path / "out.json"
    name = part.options["name"]
    assert run("--real", ucf, "--fake", folder, "--protocol", name, "--bootstrap", 0, "--out", out) == 0
    assert json.loads(out.read_text())["results"][0]["value"] == row["value"]


def test_all_reals_but_one_are_not_all_reals(samples, protocol, ucf, tmp_path, monkeypatch):
    from hpdm_core.data.readers import ReadError
    from hpdm_core.evaluation import extraction
    from hpdm_core.evaluation.folders import reading

    def read(choice, prepare, **more):
        if choice.video.name.endswith("Bikes_g02_c01.avi"):
            raise ReadError(choice.video.path, "is damaged at 0.3 s")
        return reading.read_clip(choice, prepare, **more)

    given = protocol(frames=8, reals__prepare={"size": [32, 32]}, fakes__count=2)
    cell = cell_on(f"{{use: ucf101, root: {ucf}}}", given)
    (metric,) = cell.config.evaluation.metrics
    store = tmp_path / "store" / "evaluations" / "k"
    monkeypatch.setattr(extraction, "read_clip", read)
    result = evaluate_metric(cell, metric, samples_folder=samples, store_folder=store)
    assert result["protocol"]["modified"] == ["reals: 1 unreadable"]
    assert "(modified)" in result["rows"][0]["record"]


def test_a_data_set_without_files_is_drawn_from_and_says_so(protocol, tmp_path, samples):
    given = protocol(frames=8, reals__prepare={"size": [32, 32]}, fakes__count=2)
    cell = cell_on("{use: synthetic, classes: 3}", given, bootstrap=5)
    store = tmp_path / "store" / "evaluations" / "k"
    result = evaluate_metric(
        cell, cell.config.evaluation.metrics[0], samples_folder=samples, store_folder=store
    )
    (row,) = result["rows"]
    assert "(modified)" in row["record"]
    assert result["details"]["warning"] == "4 clips for 272 features: a covariance is singular"
    assert result["protocol"]["modified"] == ["reals: 4 random windows that the data set 'synthetic' draws"]
    assert result["details"]["interval"]["low"] <= row["value"] <= result["details"]["interval"]["high"]
    assert len(list((tmp_path / "store" / "features").iterdir())) == 1
    again = evaluate_metric(
        cell, cell.config.evaluation.metrics[0], samples_folder=samples, store_folder=store
    )
    assert again["rows"] == result["rows"]
    strided = protocol(frames=8, reals__prepare={"size": [32, 32]}, reals__stride=4, fakes__count=2)
    strided.replace(given)
    with pytest.raises(InputError, match="frames, stride 4; 'synthetic' draws clips of 16"):
        evaluate_metric(cell, cell.config.evaluation.metrics[0], samples_folder=samples, store_folder=store)


def test_without_weights_others_stand_in_under_their_own_names(cell, samples):
    (part,) = cell.config.evaluation.metrics
    result = evaluate_metric(cell, part, samples_folder=samples)
    names = {row["metric"].removesuffix(".floor") for row in result["rows"]}
    assert names == {"frechet[random3d]", "frechet[statistics]"}
    assert "mine.pt" in result["protocol"]["not_measured"]
    assert set(result["protocol"]["stands_in"]) == names
    said = lacking([cell.config, cell.config], cell.plugins)
    assert len(said) == 1 and "--evaluate-only" in said[0]
    others = (Part(use="frechet"), Part(use="frechet", options={"extractor": "statistics"}))
    evaluation = cell.config.evaluation.model_copy(update={"metrics": (part, *others)})
    cell.config = cell.config.model_copy(update={"evaluation": evaluation})
    assert evaluate_metric(cell, part, samples_folder=samples)["rows"] == []  # they are there anyway


GATED = """
from hpdm_core import hookimpl
from hpdm_core.metrics.networks.weights import identify, locate


class Gated:
    name, scaling = "gated", "none"

    def features(self, videos):
        return videos.double().flatten(1)[:, :5]

    def describe(self):
        return {"extractor": "gated", "dimension": 5, "weights": identify(locate("mine.pt", of="gated")).key()}


@hookimpl
def register_feature_extractors(register):
    register("gated", Gated, source="this test")
"""


def test_a_study_is_completed_when_the_weights_arrive(ucf, protocol, tmp_path, monkeypatch, capsys):
    (tmp_path / "gated.py").write_text(GATED)
    given = protocol(
        detector={"use": "gated"},
        title="frechet[gated]",
        frames=9,
        reals__count=2,
        reals__prepare={"size": [32, 32]},
        fakes__count=2,
    )
    file = tmp_path / "late.yaml"
    content = {
        "extends": "tiny_clips",
        "plugins": ["gated.py"],
        "data": {"dataset": {"use": "ucf101", "root": str(ucf)}},
        "model": {"video": [16, 32, 32], "patch": [4, 8, 8], "backbone": {"latent_layers": 1, "latents": 4}},
        "training": {"steps": 1, "batch": 1},
        "sampling": {"solver": {"steps": [1], "order": [1]}},
        "evaluation": {
            "samples": 2,
            "reals": 4,
            "metrics": [{"use": "protocol", "name": str(given), "bootstrap": 0}],
        },
        "backend": "inline",
    }
    file.write_text(yaml.safe_dump(content))
    command = [str(file), "--results", str(tmp_path / "results")]
    assert report_errors(study, [*command, "--evaluate-only"]) == 2
    assert "--evaluate-only: none of 1 cells is trained" in capsys.readouterr().err
    assert report_errors(study, command) == 0
    said = capsys.readouterr().out
    assert said.count("cannot be measured") == 1
    table = tmp_path / "results" / "late" / "report" / "table.md"
    assert "frechet[random3d]" in table.read_text() and "frechet[gated]" not in table.read_text()
    torch.save({"weight": torch.ones(2)}, tmp_path / "mine.pt")
    monkeypatch.setenv("HPDM_WEIGHTS", str(tmp_path))
    trained = list((tmp_path / "results" / "store" / "train").rglob("model.safetensors"))
    before = [path.stat().st_mtime_ns for path in trained]
    assert report_errors(study, [*command, "--evaluate-only"]) == 0
    assert "cannot be measured" not in capsys.readouterr().out
    assert "frechet[gated], small/random3d_16f" in table.read_text()
    assert [path.stat().st_mtime_ns for path in trained] == before
