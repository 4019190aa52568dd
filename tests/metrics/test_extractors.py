import hashlib

import pytest
import torch
from torch import Tensor

from hpdm_core.base.errors import InputError
from hpdm_core.metrics.corruptions import CORRUPTIONS
from hpdm_core.metrics.distances.statistics import Statistics
from hpdm_core.metrics.networks.random3d import Random3D

EXTRACTORS = (Random3D(), Statistics())


def videos(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("extractor", EXTRACTORS, ids=lambda extractor: extractor.name)
@pytest.mark.parametrize("shape", [(2, 5, 12, 10, 3), (2, 1, 2, 2, 3), (2, 2, 1, 1, 3), (2, 3, 8, 6, 1)])
def test_any_size_gives_finite_features_of_one_width(
    extractor: Random3D | Statistics, shape: tuple[int, ...]
) -> None:
    made = extractor.features(videos(*shape))
    assert made.shape == (2, extractor.describe()["dimension"])
    assert made.dtype == torch.float64
    assert made.isfinite().all()


@pytest.mark.parametrize("extractor", EXTRACTORS, ids=lambda extractor: extractor.name)
def test_rows_do_not_depend_on_their_neighbours(extractor: Random3D | Statistics) -> None:
    batch = videos(3, 4, 8, 10, 3)
    alone = torch.cat([extractor.features(batch[row : row + 1]) for row in range(3)])
    assert torch.allclose(extractor.features(batch), alone, atol=1e-5)


@pytest.mark.parametrize("extractor", EXTRACTORS, ids=lambda extractor: extractor.name)
def test_two_channels_are_refused(extractor: Random3D | Statistics) -> None:
    with pytest.raises(InputError, match="2 channels"):
        extractor.features(videos(1, 4, 8, 8, 2))


def test_random_weights_are_the_same_for_everyone() -> None:
    torch.manual_seed(99)
    digest = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in Random3D().weights)).hexdigest()
    assert digest == Random3D().describe()["weights"]
    assert digest.startswith("06e52f5c3823")  # published results name it: a change needs a new version


def test_random_features_are_float32_whatever_the_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, seen = videos(2, 4, 8, 10, 3), []
    real = torch.nn.functional.conv3d

    def noted(*given: Tensor, **options: object) -> Tensor:
        seen.append((torch.backends.cudnn.allow_tf32, torch.is_grad_enabled()))
        return real(*given, **options)

    monkeypatch.setattr(torch.nn.functional, "conv3d", noted)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    plain = Random3D().features(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Random3D().features(batch), plain)
    assert set(seen) == {(False, False)}


def test_random_features_see_the_order_of_frames() -> None:
    ramp = torch.linspace(0, 255, 6).reshape(1, 6, 1, 1, 1).expand(1, 6, 8, 8, 3).to(torch.uint8)
    forward = Random3D().features(ramp)
    shuffled = Random3D().features(ramp[:, [3, 0, 5, 1, 4, 2]])
    assert (forward - shuffled).abs().max() > 0.1


def test_statistics_are_what_they_say() -> None:
    video = torch.zeros(1, 3, 4, 8, 3, dtype=torch.uint8)
    video[:, :, :, :, 0] = 255  # red
    video[:, 1] = 255  # the middle frame is white
    made = Statistics().features(video)[0]
    pixels = video.double() / 127.5 - 1
    assert made[0] == pytest.approx(float(pixels.std(correction=0)))
    assert made[1:3].tolist() == [0.0, 0.0]  # no edges along x or y
    assert made[3] == pytest.approx(2 * 2 / 3)  # two channels of three change by 2 at each of both steps
    assert made[4] == pytest.approx(4 * 2 / 3)  # and turn around
    assert made[-3:].tolist() == pytest.approx([1.0, -1 / 3, -1 / 3])


def test_horizontal_and_vertical_edges_are_told_apart() -> None:
    video = torch.zeros(1, 2, 4, 6, 3, dtype=torch.uint8)
    video[..., 3:, :] = 255
    made = Statistics().features(video)[0]
    assert made[1] == pytest.approx(2 / 5)
    assert made[2] == 0


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_keeps_the_shape_and_changes_the_clip(name: str) -> None:
    clip = videos(5, 9, 10, 3)
    before = clip.clone()
    made = CORRUPTIONS[name](clip, torch.Generator().manual_seed(0))
    assert made.shape == clip.shape
    assert made.dtype == torch.uint8
    assert not torch.equal(made, clip)
    assert torch.equal(clip, before)


def test_shuffled_frames_are_the_same_frames() -> None:
    clip = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 2, 2, 3)
    for seed in range(50):
        order = CORRUPTIONS["shuffle"](clip, torch.Generator().manual_seed(seed))[:, 0, 0, 0].tolist()
        assert sorted(order) == [0, 1, 2, 3]
        assert order != [0, 1, 2, 3]


def test_swapped_tiles_hold_the_same_pixels() -> None:
    clip = videos(2, 6, 8, 3)
    made = CORRUPTIONS["swap_tiles"](clip, torch.Generator().manual_seed(0))
    assert torch.equal(made.flatten(1, 2).sort(dim=1).values, clip.flatten(1, 2).sort(dim=1).values)


def test_a_frozen_clip_is_one_of_its_frames() -> None:
    clip = videos(4, 3, 3, 3)
    made = CORRUPTIONS["freeze"](clip, torch.Generator().manual_seed(0))
    assert (made == made[0]).all()
    assert any(torch.equal(made[0], frame) for frame in clip)
