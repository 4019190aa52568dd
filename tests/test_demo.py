"""The trained model that ships: it is small, says where it comes from, and draws what it is asked for."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.base.errors import report_errors
from hpdm_core.sampling import command
from hpdm_core.sampling.cascade import sample
from hpdm_core.study.plan.cells import cells_of
from hpdm_core.study.plan.study_file import load_study
from hpdm_core.training.trained import Trained, load_trained, shipped
from hpdm_core.training.trainer import load_ema_model
from hpdm_plugins.metrics.attributes import Reader, figures

ROOT = Path(__file__).parents[1]
CLASSES = 36


@pytest.fixture(scope="module")
def demo() -> Trained:
    return load_trained("demo")


def test_it_is_small_and_says_where_it_comes_from(demo: Trained) -> None:
    assert shipped()["demo"] == demo.weights
    assert demo.weights.stat().st_size < 4e6
    header = demo.header
    assert header["precision"] == "float16" and header["weights"] == "exponential moving average"
    assert re.fullmatch(r"[0-9a-f]{40}", demo.provenance["git"])  # of a clean checkout
    assert demo.provenance["versions"]["torch"] and demo.provenance["machine"]["cores"]
    assert (demo.spec["study"], demo.spec["arm"]) == ("shapes_ablation", "default")
    assert "-m hpdm_core.study studies/shapes_ablation.yaml --only default" in header["made_by"]
    assert "-m hpdm_core.export" in header["made_by"]
    assert str(ROOT).encode() not in demo.weights.read_bytes()


def test_the_command_that_it_names_trains_this_model(demo: Trained, tmp_path: Path) -> None:
    study, _, export = demo.header["made_by"].partition(" && ")
    words = shlex.split(study)
    sets = [value for flag, value in pairwise(words) if flag == "--set"]
    only = [value for flag, value in pairwise(words) if flag == "--only"]
    ((cell,), _) = cells_of(load_study(ROOT / words[3], sets=sets, only=only), tmp_path / "store")
    assert cell.keys.train == demo.header["key"]
    assert f"results/store/train/{cell.keys.train} " in export


def test_its_videos_show_what_was_asked_for(demo: Trained) -> None:
    assembly: Assembly = demo.assembly()
    denoiser = assembly.denoiser(load_ema_model(assembly, demo.weights))
    labels = list(range(CLASSES))
    levels = sample(assembly, denoiser, labels, labels)
    downsampling = assembly.config.data.downsampling
    readings = [
        Reader(assembly.pyramid, level, downsampling).read(videos) for level, videos in enumerate(levels)
    ]
    found = {name: float(values.mean()) for name, values in figures(readings, labels, 32)[-1].items()}
    assert found["wrong"] <= 0.33, found  # chance: 0.97
    assert found["wrong_colour"] == 0 and found["wrong_direction"] <= 0.1, found
    assert torch.isfinite(levels[-1]).all()


def test_the_picture_in_the_readme_is_what_the_command_makes(tmp_path: Path) -> None:
    (words,) = re.findall(
        r"^    python -m hpdm_core.sample (demo .*)$", (ROOT / "README.md").read_text(), re.M
    )
    assert "](docs/demo.gif)" in (ROOT / "README.md").read_text()
    assert report_errors(command.main, [*words.split()[:-1], str(tmp_path)]) == 0
    made, shown = tmp_path / "samples.gif", ROOT / "docs" / "demo.gif"
    assert shown.stat().st_size < 1e6
    frames = [_frames(path) for path in (made, shown)]
    assert frames[0].shape == frames[1].shape
    # Another machine rounds otherwise, and 40 calls of a network carry that on.
    assert np.abs(frames[0] - frames[1]).mean() < 4


def _frames(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.stack(
            [np.asarray(frame.convert("RGB"), dtype=float) for frame in ImageSequence.Iterator(opened)]
        )
