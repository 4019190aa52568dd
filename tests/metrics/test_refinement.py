"""The metrics refinement and seams: closed forms, and denoisers whose answers are known."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.assembly.compose import load_cell
from hpdm_core.data.dataset import Clip
from hpdm_core.pyramid import downsample
from hpdm_plugins.metrics.refinement import Refinement, Seams, faces_between_tiles

SIGMA_IN = (1.0, 2.0, 4.0)
SETS = [
    "model={video: [4, 16, 24], patch: [1, 4, 6], token: [1, 2, 2], levels: 3, classes: 0}",
    "sampling.solver={steps: [2], churn: [0.0], order: [1]}",
    "sampling.overlap=[h]",
    "evaluation={samples: 3, reals: 3}",
    "runtime.sample_batch=2",
]


@pytest.fixture
def cell() -> Assembly:
    return load_cell("tiny_clips", sets=SETS)


class Answers:
    """A denoiser that answers by ``answer(level, z, coords)``; notes how often each level was asked."""

    sigma_in = SIGMA_IN

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.levels: list[int] = []

    def encode(self, level: int, z: Tensor, *rest: Any) -> Any:
        return Rows()

    def contexts(self, level: int, coords: Any, sources: Any) -> None:
        return None

    def __call__(
        self, level: int, z: Tensor, sigma: Tensor, coords: Any, label: Any, contexts: Any, latents: Any
    ) -> tuple[Tensor, Tensor]:
        self.levels.append(level)
        return self.answer(level, z, coords), torch.zeros(len(z), 1, 1)


class Rows:
    def take(self, rows: Tensor) -> "Rows":
        return self

    @classmethod
    def cat(cls, parts: Any) -> "Rows":
        return cls()


def found(
    cell: Assembly, videos: Tensor, denoiser: Answers, **options: Any
) -> dict[tuple[str, int, str], float]:
    context: Any = SimpleNamespace(
        assembly=cell, denoiser=denoiser, clip=lambda stream, split, number: Clip(videos[number], -1)
    )
    metric = Refinement(clips=len(videos), split="held_out", **{"sigma_eff": 20.0, **options})
    return {
        (row["metric"].removeprefix("refinement."), row["level"], row["parents"]): row["value"]
        for row in metric.evaluate(context)
    }


def drawn(count: int) -> Tensor:
    return torch.rand(count, 3, 4, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def real_levels(cell: Assembly, videos: Tensor) -> list[Tensor]:
    return [downsample(videos, cell.pyramid.pitch(level), "area") for level in range(3)]


def test_who_knows_the_clip_makes_no_error(cell: Assembly) -> None:
    video = drawn(1)
    real = real_levels(cell, video)

    def oracle(level: int, z: Tensor, coords: Any) -> Tensor:
        size = torch.tensor(cell.pyramid.size(level))
        starts = (coords.offset * size).round().long().tolist()
        f, h, w = cell.pyramid.patch
        return torch.cat([real[level][:, :, a : a + f, b : b + h, c : c + w] for a, b, c in starts])

    rows = found(cell, video, Answers(oracle))
    for level in (1, 2):
        assert rows["error", level, "true"] < 1e-12
        assert (
            rows["psnr", level, "true"] == rows["psnr", level, "level 0"] == pytest.approx(106.02, abs=0.01)
        )
        assert 0 < rows["error_upsampled", level, "true"] < 0.4
    # The further away the real level, the less of it is left.
    assert rows["psnr_upsampled", 2, "level 0"] < rows["psnr_upsampled", 2, "true"] < 30
    assert rows["psnr_upsampled", 1, "level 0"] == rows["psnr_upsampled", 1, "true"]


def test_who_knows_nothing_makes_the_error_of_grey(cell: Assembly) -> None:
    videos = drawn(3)
    rows = found(cell, videos, Answers(lambda level, z, coords: torch.zeros_like(z)))
    for level, real in list(enumerate(real_levels(cell, videos)))[1:]:
        squares = real.double().square().mean(dim=(1, 2, 3, 4))
        assert rows["error", level, "true"] == pytest.approx(float(squares.mean()), rel=1e-6)
        assert rows["psnr", level, "true"] == pytest.approx(
            float((10 * (4 / squares).log10()).mean()), rel=1e-6
        )


def test_each_video_is_compared_with_itself_in_every_batch(cell: Assembly) -> None:
    """Without noise the scaled state is the clip."""
    rows = found(cell, drawn(3), Answers(lambda level, z, coords: SIGMA_IN[level] * z), sigma_eff=1e-6)
    assert rows["error", 1, "true"] < 1e-9 and rows["error", 2, "true"] < 1e-9


def test_only_what_is_asked_for_is_sampled(cell: Assembly) -> None:
    denoiser = Answers(lambda level, z, coords: torch.zeros_like(z))
    found(cell, drawn(1), denoiser)
    # Level 0 is given every time; level 1 is made from level 0 once, sampled once and estimated once: 2 calls each.
    size = cell.config.runtime.tile_batch
    batches = {level: -(-len(cell.pyramid.tiles(level, ("h",))) // size) for level in (1, 2)}
    assert [denoiser.levels.count(level) for level in range(3)] == [0, 6 * batches[1], 6 * batches[2]]


def test_faces_lie_where_tiles_begin_and_end(cell: Assembly) -> None:
    assert faces_between_tiles(cell, 0) == {"f": [], "h": [], "w": []}
    assert faces_between_tiles(cell, 1) == {"f": [1], "h": [2, 4, 6], "w": [6]}
    assert faces_between_tiles(cell, 2)["w"] == [6, 12, 18]


def seams(cell: Assembly, videos: list[Tensor], real: list[Tensor]) -> dict[tuple[str, int, str], float]:
    context: Any = SimpleNamespace(
        assembly=cell,
        has_held_out=True,
        samples=lambda level, numbers: videos[level][list(numbers)],
        reals=lambda split, numbers: ([each[list(numbers)] for each in real], [-1] * len(numbers)),
    )
    return {(row["metric"], row["level"], row["axis"]): row["value"] for row in Seams().evaluate(context)}


def test_seams_are_seen_where_tiles_meet_and_nowhere_else(cell: Assembly) -> None:
    sizes = [cell.pyramid.size(level) for level in range(3)]
    ramps = [
        (torch.arange(f)[:, None, None] + torch.arange(h)[:, None] + torch.arange(w))
        .to(torch.uint8)[None, ..., None]
        .expand(3, -1, -1, -1, 3)
        .contiguous()
        for f, h, w in sizes
    ]
    made = [ramp.clone() for ramp in ramps]
    made[2][:, :, :, 12:] += 10  # a step across one of the three faces on the width
    rows = seams(cell, made, ramps)
    assert {key[1] for key in rows} == {1, 2}  # on level 0 there is one tile
    for (metric, level, axis), value in rows.items():
        stepped = (metric, level, axis) == ("seams", 2, "w")
        assert value == pytest.approx((1 + 11 + 1) / 3 if stepped else 1.0), (metric, level, axis)
