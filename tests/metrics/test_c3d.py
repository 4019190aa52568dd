import numpy as np
import pytest
import torch
from torch import Tensor

from hpdm_core.base.errors import InputError
from hpdm_core.metrics.networks.c3d import C3D, MEAN_BGR, crop_mean, load_mean
from hpdm_core.metrics.networks.weights import uninitialised
from hpdm_core.testing.weights import randomise

SHAPES = {
    "conv1a": (64, 16, 112, 112),
    "pool1": (64, 16, 56, 56),
    "conv2a": (128, 16, 56, 56),
    "pool2": (128, 8, 28, 28),
    "conv3a": (256, 8, 28, 28),
    "conv3b": (256, 8, 28, 28),
    "pool3": (256, 4, 14, 14),
    "conv4a": (512, 4, 14, 14),
    "conv4b": (512, 4, 14, 14),
    "pool4": (512, 2, 7, 7),
    "conv5a": (512, 2, 7, 7),
    "conv5b": (512, 2, 7, 7),
    "pool5": (512, 1, 4, 4),
    "fc6": (4096,),
    "fc7": (4096,),
    "fc8": (101,),
}


@pytest.fixture(scope="module")
def network() -> C3D:
    made = uninitialised(C3D)
    randomise(made)
    return made


@pytest.fixture(scope="module")
def layers(network: C3D) -> dict[str, Tensor]:
    videos = 40 * torch.randn(1, 3, 16, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network.layers(videos)


def test_it_has_the_published_counts_and_shapes(network: C3D, layers: dict[str, Tensor]) -> None:
    assert sum(value.numel() for value in network.parameters()) == 78_409_573
    assert {name: tuple(value.shape[1:]) for name, value in layers.items()} == SHAPES


def test_the_last_pooling_reaches_over_the_edge(layers: dict[str, Tensor]) -> None:
    """Windows start at 0, 2, 4, 6 in both directions; the last holds one row or column."""
    given, made = layers["conv5b"][0].numpy(), layers["pool5"][0].numpy()
    for row in range(4):
        for column in range(4):
            window = given[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert np.array_equal(made[:, 0, row, column], window.max(axis=(1, 2, 3)))


def test_every_layer_is_rectified_but_the_logits(layers: dict[str, Tensor]) -> None:
    for name, value in layers.items():
        assert (value.min() < 0) == (name == "fc8"), name


def test_the_classifier_reads_channels_then_time_then_rows(network: C3D, layers: dict[str, Tensor]) -> None:
    flat = layers["pool5"][0].permute(0, 1, 2, 3).reshape(-1)
    with torch.no_grad():
        fc6 = (network.fc6.weight @ flat + network.fc6.bias).relu()
        fc7 = (network.fc7.weight @ fc6 + network.fc7.bias).relu()
        logits = network.fc8.weight @ fc7 + network.fc8.bias
    assert torch.allclose(layers["fc7"][0], fc7, rtol=1e-4, atol=1e-2)
    assert torch.allclose(layers["fc8"][0], logits, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 3, 15, 112, 112), (1, 3, 64, 112, 112), (1, 3, 16, 128, 128)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        network = C3D()
    with pytest.raises(InputError, match="exactly 16 frames"):
        network(torch.empty(shape, device="meta"))


def mean_clip(width: int) -> np.ndarray:
    """A value that says where it came from: 10000 * colour + 1000 * frame ... in 3 x 16 x 128 x width."""
    colour, frame, row, column = np.ogrid[:3, :16, :128, :width]
    return (colour * 1e6 + frame * 3e4 + row * 200 + column).astype(np.float32)


@pytest.mark.parametrize("shape", [(3, 16, 128, 171), (1, 3, 16, 128, 171), (3, 1, 16, 128, 171), (-1,)])
@pytest.mark.parametrize(("crop", "left"), [("tgan", 29), ("tgan2", 8)])
def test_the_mean_clip_in_every_layout(shape: tuple[int, ...], crop: str, left: int) -> None:
    whole = mean_clip(171)
    made = crop_mean(whole.reshape(shape), crop)
    assert np.array_equal(made.numpy(), whole[:, :, 8:120, left : left + 112])


@pytest.mark.parametrize("crop", ["tgan", "tgan2"])
def test_a_mean_clip_cut_to_a_square_is_cut_at_its_middle(crop: str) -> None:
    whole = mean_clip(171)
    made = crop_mean(whole[..., 21:149], crop)
    assert np.array_equal(made.numpy(), whole[:, :, 8:120, 29:141])


def test_a_mean_clip_of_the_right_size_and_a_constant_one() -> None:
    small = mean_clip(112)[:, :, :112]
    assert np.array_equal(crop_mean(small, "tgan2").numpy(), small)
    constant = crop_mean(None, "constant")
    assert constant.shape == (3, 1, 1, 1)
    assert constant.flatten().tolist() == pytest.approx(MEAN_BGR)


def test_a_mean_clip_from_its_file(tmp_path) -> None:
    whole = mean_clip(171)
    np.savez(tmp_path / "mean2.npz", mean=whole)
    np.save(tmp_path / "mean2.npy", whole)
    for name in ("mean2.npz", "mean2.npy"):
        made = load_mean(tmp_path / name, "tgan")
        assert np.array_equal(made.numpy(), whole[:, :, 8:120, 29:141])


def test_a_wrong_mean_clip_is_one_sentence(tmp_path) -> None:
    with pytest.raises(InputError, match=r"shape \[3, 16, 100, 100\]"):
        crop_mean(np.zeros((3, 16, 100, 100)), "tgan")
    with pytest.raises(InputError, match="not finite"):
        crop_mean(np.full((3, 16, 128, 171), np.nan), "tgan")
    with pytest.raises(InputError, match="no crop 'middle'"):
        crop_mean(mean_clip(171), "middle")
    np.savez(tmp_path / "other.npz", average=np.zeros(3))
    with pytest.raises(InputError, match="no array 'mean' in it; it holds average"):
        load_mean(tmp_path / "other.npz", "tgan")
    np.savez(tmp_path / "objects.npz", mean=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="pickled objects, which are refused"):
        load_mean(tmp_path / "objects.npz", "tgan")
