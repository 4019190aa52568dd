"""The installed plugins, one thread, and options for the parts that need some or are large by default."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpdm_core.metrics.networks.c3d import C3D
from hpdm_core.metrics.networks.i3d import I3D
from hpdm_core.metrics.networks.state_dicts import C3D_NAMINGS, I3D_NAMINGS
from hpdm_core.metrics.networks.weights import uninitialised
from hpdm_core.plugins import Plugins, build_plugins
from hpdm_core.testing.data import write_clip
from hpdm_core.testing.weights import export, randomise, write_state_dict


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return build_plugins()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Everything here is tiny: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with three clips each, of different sizes, so that no window equals another's."""
    root = tmp_path_factory.mktemp("clips")
    for label, name in enumerate(("apples", "pears")):
        (root / name).mkdir()
        for number in range(3):
            height = 24 + 12 * label + 4 * number
            write_clip(root / name / f"{number}.mp4", frames=24, height=height, width=48)
    return root


@pytest.fixture(scope="session")
def ucf101_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official layout with two classes and two groups each; group 1 is held out in fold 1."""
    root = tmp_path_factory.mktemp("ucf")
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    classes = ("ApplyEyeMakeup", "YoYo")
    (lists / "classInd.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(classes, start=1)))
    train, held_out = [], []
    for label, name in enumerate(classes):
        (root / "UCF-101" / name).mkdir(parents=True)
        for group in (1, 2):
            file = f"{name}/v_{name}_g{group:02d}_c01.avi"
            height = 24 + 12 * label + 6 * group
            write_clip(root / "UCF-101" / file, frames=24, height=height, width=48, codec="mpeg4")
            (held_out if group == 1 else train).append(f"{file} {label + 1}" if group == 2 else file)
    (lists / "trainlist01.txt").write_text("\n".join(train) + "\n")
    (lists / "testlist01.txt").write_text("\n".join(held_out) + "\n")
    return root


@pytest.fixture(scope="session")
def i3d_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = uninitialised(I3D)
    randomise(network)
    file = tmp_path_factory.mktemp("weights") / "i3d.npz"
    return write_state_dict(export(network, I3D_NAMINGS["tensorflow"]), file)


@pytest.fixture(scope="session")
def c3d_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mean clip lies beside."""
    network = uninitialised(C3D)
    randomise(network)
    folder = tmp_path_factory.mktemp("weights")
    np.savez(folder / "mean.npz", mean=np.full((3, 16, 128, 171), 100, dtype=np.float32))
    return write_state_dict(export(network, C3D_NAMINGS["chainer"]), folder / "c3d.npz")


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A protocol for the small cell that metrics are tried on."""
    file = tmp_path_factory.mktemp("protocols") / "small.yaml"
    file.write_text(
        "{name: mine/small, title: 'frechet[random3d]', source: here, measure: frechet, detector: random3d, frames: 4, "
        "reals: {count: 6, split: train, offset: random, short: drop, prepare: {size: as_fakes, resize: "
        "bilinear_antialias, crop: centre}}, fakes: {count: 3}}\n"
    )
    return file


@pytest.fixture
def options_of(request: pytest.FixtureRequest) -> Callable[[str, str], dict[str, Any]]:
    """Options of built-in parts that have required ones, or whose defaults are the paper's sizes."""

    def made(family: str, key: str) -> dict[str, Any]:
        match f"{family}/{key}":
            case "computation_allocations/explicit":
                return {"levels_per_block": [1, 1, 2, 2, 3, 3]}
            case "backbones/rin":
                return {
                    "latent_dim": 12,
                    "latents": 6,
                    "latent_layers": 2,
                    "latent_heads": 2,
                    "latent_head_dim": 5,
                    "heads": 2,
                }
            case "backbones/dit":
                return {"heads": 2}
            case "metrics/efficiency":
                # Out of memory at once: times that are measured are not the same twice.
                return {"most": 1, "steps": 1, "memory": 0.001}
            case "metrics/fake_counts":
                return {"counts": [2, 3], "extractor": "random3d"}
            case "metrics/protocol":
                return {"name": str(request.getfixturevalue("record")), "bootstrap": 5}
            case "datasets/video_folder":
                return {"root": str(request.getfixturevalue("class_folders"))}
            case "datasets/ucf101":
                return {"root": str(request.getfixturevalue("ucf101_tree"))}
            case "feature_extractors/i3d":
                return {"weights": str(request.getfixturevalue("i3d_weights"))}
            case "feature_extractors/c3d":
                file = request.getfixturevalue("c3d_weights")
                return {"weights": str(file), "mean": str(file.with_name("mean.npz"))}
        return {}

    return made
