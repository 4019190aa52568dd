"""Fakes for sampling: an assembly without plugins, and denoisers whose answers are known."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpdm_core.config.schema import CellConfig
from hpdm_core.pyramid import Pyramid
from hpdm_plugins.diffusion.solvers import EDM

VIDEO, PATCH = (8, 24, 40), (2, 6, 10)  # all different, so that swapped axes show
SIGMA_IN = (1.0, 2.0, 4.0)


@dataclass(frozen=True)
class FakeEncoded:
    """What a fake remembers of a parent: its pixels as handed in, noise level, place, label."""

    level: int
    z: torch.Tensor
    sigma: torch.Tensor
    offset: torch.Tensor  # fractions of the video
    label: torch.Tensor

    def take(self, rows):
        return FakeEncoded(self.level, self.z[rows], self.sigma[rows], self.offset[rows], self.label[rows])

    @classmethod
    def cat(cls, parts):
        names = ("z", "sigma", "offset", "label")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(level=parts[0].level, **joined)


@dataclass
class FakeDenoiser:
    """Answers by ``answer(level, z, sigma, coords, contexts)``; notes every call."""

    answer: Callable[..., torch.Tensor]
    sigma_in: tuple[float, ...] = SIGMA_IN
    encoded: list[Any] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)

    def encode(self, level, z, sigma, coords, label, sources):
        assert [source.level for source in sources] == list(range(level))
        assert all(len(source.z) == len(z) for source in sources)
        made = FakeEncoded(level, z, sigma, coords.offset, label)
        self.encoded.append((made, sources))
        return made

    def contexts(self, level, coords, sources):
        assert [source.level for source in sources] == list(range(level))
        assert all(len(source.z) == len(coords.offset) for source in sources)
        self.asked.append((level, coords, sources))
        return sources

    def __call__(self, level, z, sigma, coords, label, contexts, latents):
        count = torch.zeros(len(z), 1, 1) if latents is None else latents + 1
        self.calls.append(SimpleNamespace(level=level, z=z, sigma=sigma, label=label, latents=latents))
        return self.answer(level, z, sigma, coords, contexts), count


@dataclass
class FakeAssembly:
    config: CellConfig
    pyramid: Pyramid
    solver: Any


@pytest.fixture
def make_denoiser():
    return FakeDenoiser


@pytest.fixture
def make_assembly():
    def make(
        *,
        video=VIDEO,
        patch=PATCH,
        levels=3,
        channels=1,
        sigma_in=SIGMA_IN,
        overlap=(),
        seed=0,
        sample_batch=16,
        tile_batch=64,
        context_sigma_eff=0.05,
        **solver,
    ):
        config = CellConfig.model_validate(
            {
                "model": {
                    "video": video,
                    "patch": patch,
                    "token": (1, 1, 1),
                    "levels": levels,
                    "channels": channels,
                    "token_dim": 8,
                    "blocks": 1,
                },
                "data": {"dataset": "none"},
                "training": {"steps": 1, "batch": 1, "learning_rate": 1e-3},
                "sampling": {"overlap": overlap, "context_sigma_eff": context_sigma_eff},
                "runtime": {"sample_batch": sample_batch, "tile_batch": tile_batch},
                "seed": seed,
            }
        )
        options = {"steps": (2,), "churn": (0.0,), "order": (1,), **solver}
        pyramid = Pyramid(video=video, patch=patch, token=(1, 1, 1), levels=levels, channels=channels)
        return FakeAssembly(config, pyramid, EDM(sigma_in[:levels], **options))

    return make
