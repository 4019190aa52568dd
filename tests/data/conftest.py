"""Small videos that the tests write, and a reader that serves them without a file."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from hpdm_core.base.randomness import generator
from hpdm_plugins.data.readers_pyav import PyAVReader


@pytest.fixture
def frames() -> Callable[..., Tensor]:
    """Noise that differs in every frame: uint8 [count, height, width, 3]."""

    def make(count: int = 10, height: int = 12, width: int = 20, seed: int = 0) -> Tensor:
        stream = generator("test_video", seed)
        return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=stream)

    return make


@pytest.fixture
def write() -> Callable[..., Path]:
    """Write frames, uint8 [F, H, W, 3], to a video file; ffv1 in bgr0 is lossless."""

    def make(
        path: Path,
        frames: Tensor,
        *,
        codec: str = "ffv1",
        pix_fmt: str = "bgr0",
        options: dict[str, str] | None = None,
        times: list[int] | None = None,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25, options=options or {})
            stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
            for number, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
                frame.pts = number if times is None else times[number]
                frame.time_base = Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return make


@pytest.fixture
def pyav() -> Iterator[PyAVReader]:
    yield PyAVReader()
