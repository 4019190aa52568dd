"""The metric memorisation: closed forms, and a cascade that gives the windows back."""

from types import SimpleNamespace

import pytest
import torch

from hpdm_core import load_cell
from hpdm_core.base.errors import InputError
from hpdm_core.data.dataset import Clip
from hpdm_core.pyramid import downsample
from hpdm_core.sampling.files import to_uint8
from hpdm_plugins.metrics import memorisation
from hpdm_plugins.metrics.memorisation import Memorisation, psnr


def test_psnr_has_its_closed_form() -> None:
    video = torch.zeros(1, 3, 2, 4, 4)
    targets = torch.stack(
        [torch.full((3, 2, 4, 4), 0.2), torch.full((3, 2, 4, 4), -0.02), torch.zeros(3, 2, 4, 4)]
    )
    assert psnr(video, targets).tolist() == [pytest.approx([20, 40, 106.02], abs=0.01)]


class FixedWindows:
    classes = ()

    def __init__(self, videos: torch.Tensor) -> None:
        self.videos = videos

    def distinct(self, split: str) -> list[Clip]:
        return [Clip(video, -1) for video in self.videos]


@pytest.fixture
def cell():
    sets = [
        "model={video: [4, 16, 16], patch: [1, 4, 4], token: [1, 2, 2], levels: 3, classes: 0}",
        "evaluation.samples=3",
    ]
    made = load_cell("tiny_clips", sets=sets)
    drawn = torch.rand(4, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made.__dict__["dataset"] = FixedWindows(drawn)
    return made


def rows_of(cell, made: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], float]:
    """The metric's rows where the stored samples are ``made`` and the cascade gives windows back, one swapped."""
    windows = [downsample(cell.dataset.videos, cell.pyramid.pitch(level), "area") for level in range(3)]
    swapped = [1, 0, 2, 3]

    def follow(assembly, denoiser, indices, labels, *, given):
        assert torch.equal(given[0], windows[0]) and labels == [-1] * 4
        return [windows[0], windows[1], windows[2][swapped]]

    monkeypatch.setattr(memorisation, "sample", follow)
    context = SimpleNamespace(
        assembly=cell,
        denoiser=None,
        samples=lambda level, indices: torch.stack([to_uint8(made[level][i]) for i in indices]),
    )
    rows = Memorisation(follow=8).evaluate(context)
    return {(row["metric"].removeprefix("memorisation."), row["level"]): row["value"] for row in rows}


def test_what_is_given_back_is_recognised(cell, monkeypatch) -> None:
    videos = cell.dataset.videos[[2, 2, 0]]
    made = [downsample(videos, cell.pyramid.pitch(level), "area") for level in range(3)]
    found = rows_of(cell, made, monkeypatch)
    for level in range(3):
        assert found["psnr", level] > 45  # rounding to uint8
        assert found["windows_found", level] == 2
    for level in (1, 2):
        assert found["upsampled_sample_psnr", level] == pytest.approx(
            found["upsampled_window_psnr", level], abs=0.05
        )
        assert found["upsampled_window_psnr", level] < 25
    assert found["follows", 1] == 1 and found["follows", 2] == 0.5


def test_grey_is_no_window(cell, monkeypatch) -> None:
    grey = [torch.zeros(3, 3, *cell.pyramid.size(level)) for level in range(3)]
    found = rows_of(cell, grey, monkeypatch)
    assert found["psnr", 2] < 12


def test_data_without_fixed_windows_is_refused() -> None:
    cell = load_cell("tiny_clips", sets=["data.dataset={use: synthetic, classes: 3}"])
    with pytest.raises(InputError, match="'synthetic' has no fixed set of windows"):
        Memorisation().evaluate(SimpleNamespace(assembly=cell))


def test_against_training_clips_a_copy_is_told_from_what_is_as_far_as_held_out_clips(cell) -> None:
    drawn = [
        torch.rand(20, 3, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (1, 2)
    ]
    levels = [
        [
            torch.stack([to_uint8(video) for video in downsample(videos, cell.pyramid.pitch(level), "area")])
            for level in range(3)
        ]
        for videos in drawn
    ]
    trained, held_out = levels
    made = [
        torch.cat([each[:1], torch.zeros_like(each[:1]), torch.full_like(each[:1], 255)]) for each in trained
    ]
    context = SimpleNamespace(
        assembly=cell,
        has_held_out=True,
        reals=lambda split, numbers: (
            [level[list(numbers)] for level in (trained if split == "train" else held_out)],
            [],
        ),
        samples=lambda level, indices: made[level][list(indices)],
    )
    metric = Memorisation(clips=True)
    sized = cell.config.model_copy(
        update={"evaluation": cell.config.evaluation.model_copy(update={"reals": 20})}
    )
    cell.__dict__["config"] = sized
    rows = {(row["metric"], row["level"]): row["value"] for row in metric.evaluate(context)}
    for level in range(3):
        real = [
            psnr(_float(held_out[level][i : i + 1]), _float(trained[level])).max().item() for i in range(3)
        ]
        assert rows["memorisation.psnr_held_out", level] == pytest.approx(sum(real) / 3)
        assert rows["memorisation.copied", level] == pytest.approx(1 / 3)
        assert rows["memorisation.psnr", level] > 35  # 106 for the copy, a third of it
    assert "training_clips" in metric.protocol(cell) and "training_clips" not in Memorisation().protocol(cell)

    context.has_held_out = False
    with pytest.raises(InputError, match="'sample_clips' has no held-out clips here"):
        metric.evaluate(context)


def _float(videos: torch.Tensor) -> torch.Tensor:
    return videos.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
