"""I3D's architecture: counts, shapes and padding. The sizes are computed on torch's meta device, for free."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from hpdm_core.base.errors import InputError
from hpdm_core.metrics.networks import i3d
from hpdm_core.metrics.networks.i3d import ENDPOINTS, I3D, MIXED

CHANNELS = (64, 64, 64, 192, 192, 256, 480, 480, 512, 512, 512, 528, 832, 832, 832, 1024)
STRIDES = {  # time, then height and width
    "Conv3d_1a_7x7": (2, 2),
    "MaxPool3d_2a_3x3": (1, 2),
    "MaxPool3d_3a_3x3": (1, 2),
    "MaxPool3d_4a_3x3": (2, 2),
    "MaxPool3d_5a_2x2": (2, 2),
}
PUBLISHED = {  # 16 frames of 224 x 224
    "Conv3d_1a_7x7": (64, 8, 112, 112),
    "MaxPool3d_2a_3x3": (64, 8, 56, 56),
    "Conv3d_2c_3x3": (192, 8, 56, 56),
    "MaxPool3d_3a_3x3": (192, 8, 28, 28),
    "Mixed_3b": (256, 8, 28, 28),
    "Mixed_3c": (480, 8, 28, 28),
    "MaxPool3d_4a_3x3": (480, 4, 14, 14),
    "Mixed_4e": (528, 4, 14, 14),
    "Mixed_4f": (832, 4, 14, 14),
    "MaxPool3d_5a_2x2": (832, 2, 7, 7),
    "Mixed_5c": (1024, 2, 7, 7),
}


@pytest.fixture(scope="module")
def sizes_only() -> I3D:
    with torch.device("meta"):
        return I3D()


def test_it_has_the_published_counts(sizes_only: I3D) -> None:
    units = [module for module in sizes_only.modules() if isinstance(module, nn.BatchNorm3d)]
    convolutions = [module for module in sizes_only.modules() if isinstance(module, nn.Conv3d)]
    assert (len(units), len(convolutions)) == (57, 58)
    assert sum(value.numel() for value in sizes_only.parameters()) == 12_697_264
    keys = sizes_only.state_dict().keys()
    assert len(keys) == 344
    assert sum(not key.endswith("num_batches_tracked") for key in keys) == 287
    assert [unit.bias is None for unit in convolutions].count(True) == 57


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5])
def test_epsilon_is_that_of_every_unit(epsilon: float) -> None:
    with torch.device("meta"):
        network = I3D(epsilon=epsilon)
    assert {unit.eps for unit in network.modules() if isinstance(unit, nn.BatchNorm3d)} == {epsilon}


def test_every_published_shape(sizes_only: I3D) -> None:
    found = sizes_only.endpoints(torch.empty(1, 3, 16, 224, 224, device="meta"))
    assert tuple(found) == ENDPOINTS
    assert {name: tuple(found[name].shape[1:]) for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("side", [112, 224, 256])
@pytest.mark.parametrize("frames", [9, 16, 64])
def test_every_endpoint_is_reached_at_other_sizes(sizes_only: I3D, frames: int, side: int) -> None:
    found = sizes_only.endpoints(torch.empty(1, 3, frames, side, side + 6, device="meta"))
    time, height, width = frames, side, side + 6
    for name, channels in zip(ENDPOINTS, CHANNELS, strict=True):
        in_time, in_space = STRIDES.get(name, (1, 1))
        time, height, width = -(-time // in_time), -(-height // in_space), -(-width // in_space)
        assert tuple(found[name].shape) == (1, channels, time, height, width), name


@pytest.mark.parametrize(("frames", "steps"), [(9, 1), (16, 1), (17, 2), (64, 7), (128, 15)])
def test_logits_at_224(sizes_only: I3D, frames: int, steps: int) -> None:
    videos = torch.empty(2, 3, frames, 224, 224, device="meta")
    assert sizes_only(videos).shape == (2, 400)
    last = sizes_only.endpoints(videos)["Mixed_5c"]
    assert last.shape[2] - 1 == steps
    assert len(sizes_only.endpoints(videos, "Mixed_3b")) == 6


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 256, 256), "256x256 pixels; its logits are defined at 224x224"),
        ((1, 3, 16, 224, 112), "224x112 pixels"),
        ((1, 3, 8, 224, 224), "clips of 8 frames; it needs at least 9"),
        ((1, 1, 16, 224, 224), r"shape \[1, 1, 16, 224, 224\]"),
        ((3, 16, 224, 224), r"shape \[3, 16, 224, 224\]"),
    ],
)
def test_other_sizes_are_one_clear_error(sizes_only: I3D, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sizes_only(torch.empty(shape, device="meta"))


def test_an_unknown_endpoint_is_refused(sizes_only: I3D) -> None:
    with pytest.raises(InputError, match="no endpoint 'Mixed_6a'"):
        sizes_only.endpoints(torch.empty(1, 3, 16, 32, 32, device="meta"), "Mixed_6a")


@pytest.mark.parametrize("size", range(7, 15))
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 2), (3, 1), (2, 2), (1, 1)])
def test_padding_is_tensorflows_same_rule(size: int, kernel: int, stride: int) -> None:
    """Window i of SAME begins at i * stride - front; counted with a convolution of ones over ones."""
    wanted = -(-size // stride)
    total = max((wanted - 1) * stride + kernel - size, 0)  # the definition in TensorFlow's documentation
    covered = []
    for index in range(wanted):
        start = index * stride - total // 2
        covered.append(sum(0 <= place < size for place in range(start, start + kernel)))
    line = torch.ones(1, 1, size, 1, 1)
    padded = i3d._same(line, (kernel, 1, 1), (stride, 1, 1))
    counts = functional.conv3d(padded, torch.ones(1, 1, kernel, 1, 1), stride=(stride, 1, 1))
    assert counts.flatten().tolist() == covered
    across = functional.conv3d(
        i3d._same(line.transpose(2, 4), (1, 1, kernel), (1, 1, stride)),
        torch.ones(1, 1, 1, 1, kernel),
        stride=(1, 1, stride),
    )
    assert across.flatten().tolist() == covered


@pytest.mark.parametrize("size", [(9, 13, 12), (4, 7, 7), (5, 6, 8)])
@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((3, 3, 3), (1, 1, 1))],
)
def test_pooling_is_the_maximum_over_every_window(
    size: tuple[int, int, int], kernel: tuple[int, int, int], stride: tuple[int, int, int]
) -> None:
    hidden = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    padded = i3d._same(hidden, kernel, stride)
    assert torch.equal(i3d._Pool(kernel, stride)(hidden), functional.max_pool3d(padded, kernel, stride))


def test_branches_stand_in_order() -> None:
    """With silent convolutions a unit gives the ReLU of its bias: the order of channels is seen."""
    widths = MIXED["Mixed_3b"]
    block = i3d._Mixed(widths, epsilon=1e-3).eval()
    for number, name in enumerate(("b0", "b1b", "b2b", "b3b"), start=1):
        unit = block.get_submodule(name)
        nn.init.zeros_(unit.conv3d.weight)
        nn.init.constant_(unit.bn.bias, float(number))
    made = block(torch.rand(1, 192, 2, 3, 3))
    counts = [widths[place] for place in (1, 3, 5, 6)]
    wanted = torch.arange(1.0, 5.0).repeat_interleave(torch.tensor(counts)).tolist()
    assert made[0, :, 0, 0, 0].tolist() == wanted


def test_a_unit_normalises_with_its_epsilon_and_without_batch_statistics() -> None:
    network = I3D(epsilon=0.25)
    unit = network.Mixed_5c.b0
    assert not unit.bn.training
    nn.init.constant_(unit.bn.running_mean, 0.5)
    nn.init.constant_(unit.bn.running_var, 0.75)
    hidden = torch.rand(1, 832, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = ((unit.conv3d(hidden) - 0.5) / (0.75 + 0.25) ** 0.5).relu()
        assert torch.allclose(unit(hidden), wanted, atol=1e-6)


def test_logits_are_the_mean_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Average over 2 x 7 x 7, the linear map, then the mean over the steps that are left."""
    monkeypatch.setattr(i3d, "ENDPOINTS", ())
    monkeypatch.setattr(i3d, "_check", lambda videos: None)
    network = I3D()
    hidden = torch.randn(2, 1024, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        steps = [hidden[:, :, step : step + 2].mean(dim=(2, 3, 4)) for step in range(3)]
        weight, bias = network.logits.conv3d.weight.flatten(1), network.logits.conv3d.bias
        wanted = torch.stack([step @ weight.T + bias for step in steps]).mean(dim=0)
        assert torch.allclose(network(hidden), wanted, atol=1e-5)
