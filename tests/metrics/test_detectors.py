"""What goes into the networks and what comes out. Most tests put something cheap in the network's place."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpdm_core.base.errors import InputError
from hpdm_core.metrics.distances.frechet import frechet_distance
from hpdm_core.metrics.distances.inception_score import inception_score
from hpdm_core.metrics.features import extract
from hpdm_core.metrics.networks.c3d import C3D
from hpdm_core.metrics.networks.detectors import C3DDetector, I3DDetector
from hpdm_core.metrics.networks.i3d import I3D
from hpdm_core.metrics.networks.state_dicts import C3D_NAMINGS, I3D_NAMINGS
from hpdm_core.metrics.networks.weights import (
    FOLDER_VARIABLE,
    KNOWN_FILES,
    MissingWeights,
    git_blob_sha1,
    uninitialised,
)
from hpdm_core.testing.weights import export, randomise, write_state_dict, write_torchscript

FRAMES = 9


def clips(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Recorder(nn.Module):
    """Keeps what it is given, and how torch stood; gives logits that depend on it."""

    def __init__(self, width: int = 400) -> None:
        super().__init__()
        self.width = width
        self.calls: list[tuple[Tensor, dict[str, bool]]] = []
        self.settings: list[tuple[object, ...]] = []

    def forward(self, x: Tensor, **flags: bool) -> Tensor:
        self.calls.append((x, flags))
        self.settings.append(
            (
                torch.get_float32_matmul_precision(),
                torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.backends.cudnn.allow_tf32,
                torch.backends.cudnn.benchmark,
            )
        )
        return x.float().mean(dim=(1, 2, 3, 4))[:, None] * torch.arange(1.0, self.width + 1)

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        return {"fc8": self(x)[:, :101], "fc7": -self(x)[:, :1]}


def i3d_with(network: nn.Module, *, scripted: bool = False, **options) -> I3DDetector:
    made = I3DDetector(**options)
    made.__dict__["_network"] = (network, scripted)
    return made


def c3d_with(network: nn.Module, mean: Tensor | None, **options) -> C3DDetector:
    made = C3DDetector(**options)
    made.__dict__["_network"] = (network, mean)
    return made


# I3D, what goes in


@pytest.mark.parametrize(("given", "low", "high"), [("-1..1", -1.0, 1.0), ("-0.5..0.5", -0.5, 0.5)])
def test_grey_levels_become_the_networks_range(given: str, low: float, high: float) -> None:
    network = Recorder()
    videos = torch.zeros(1, FRAMES, 20, 30, 3, dtype=torch.uint8)
    videos[:, :, 10:] = 255
    i3d_with(network, input_range=given).features(videos)
    seen = network.calls[0][0]
    assert seen.shape == (1, 3, FRAMES, 224, 224)
    assert (seen.min().item(), seen.max().item()) == pytest.approx((low, high), abs=1e-6)
    assert seen[0, 0, 0, 0, 0] == low  # black above, rows are rows
    assert seen[0, 0, 0, -1, 0] == high


def test_the_resize_rule_is_the_options() -> None:
    videos = clips(1, FRAMES, 20, 40, 3)
    seen = {}
    for rule in ("squash", "legacy_bilinear", "short_side_then_crop"):
        network = Recorder()
        i3d_with(network, resize=rule).features(videos)
        seen[rule] = network.calls[0][0]
    assert not torch.allclose(seen["squash"], seen["legacy_bilinear"], atol=1e-2)
    middle = videos[:, :, :, 10:30]  # the middle square of the enlarged picture comes from it alone
    network = Recorder()
    i3d_with(network).features(middle)
    inside = (..., slice(20, -20), slice(20, -20))
    assert torch.allclose(seen["short_side_then_crop"][inside], network.calls[0][0][inside], atol=1e-5)


def test_grey_videos_are_repeated_to_three_channels() -> None:
    network = Recorder()
    i3d_with(network).features(clips(1, FRAMES, 8, 8, 1))
    seen = network.calls[0][0]
    assert torch.equal(seen[:, 0], seen[:, 2])


def test_a_program_gets_whole_videos_and_does_the_rest_itself() -> None:
    network = Recorder()
    videos = clips(2, FRAMES, 20, 40, 3)
    i3d_with(network, scripted=True).features(videos)
    assert len(network.calls) == 2
    seen, flags = network.calls[1]
    assert seen.dtype == torch.uint8
    assert torch.equal(seen[0], videos[1].permute(3, 0, 1, 2))
    assert flags == {"rescale": True, "resize": True, "return_features": True}


def test_a_program_gets_prepared_videos_under_another_rule() -> None:
    scripted, eager = Recorder(), Recorder()
    videos = clips(1, FRAMES, 20, 40, 3)
    i3d_with(scripted, scripted=True, resize="short_side_then_crop").features(videos)
    i3d_with(eager, resize="short_side_then_crop").features(videos)
    assert torch.equal(scripted.calls[0][0], eager.calls[0][0])
    assert scripted.calls[0][1] == {"rescale": False, "resize": False, "return_features": True}


def test_arithmetic_is_plain_float32_whatever_the_process_does() -> None:
    network = Recorder()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            i3d_with(network).features(clips(1, FRAMES, 8, 8, 3))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert network.settings == [("highest", False, False, False, False)]


@pytest.mark.parametrize("frames", [1, 8])
def test_short_clips_are_refused(frames: int) -> None:
    with pytest.raises(InputError, match=f"clips of {frames} frames; it needs at least 9"):
        i3d_with(Recorder()).features(clips(1, frames, 8, 8, 3))


@pytest.mark.parametrize("width", [399, 1024])
def test_a_file_that_gives_no_logits_is_refused(width: int) -> None:
    with pytest.raises(InputError, match=rf"returned \[1, {width}\]; wanted is \[1, 400\]"):
        i3d_with(Recorder(width)).features(clips(1, FRAMES, 8, 8, 3))


def test_floats_are_refused() -> None:
    with pytest.raises(InputError, match="allowed is uint8"):
        i3d_with(Recorder()).features(clips(1, FRAMES, 8, 8, 3).float())
    with pytest.raises(InputError, match="allowed is uint8"):
        i3d_with(Recorder(), scripted=True).features(clips(1, FRAMES, 8, 8, 3).float())


# I3D, the real thing


@pytest.fixture(scope="module")
def network() -> I3D:
    made = uninitialised(I3D)
    randomise(made)
    return made


@pytest.fixture(scope="module")
def state_file(network: I3D, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "mine.pt"
    return write_state_dict(export(network, I3D_NAMINGS["kinetics_i3d_pytorch"]), file)


@pytest.fixture(scope="module")
def script_file(network: I3D, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_torchscript(network, tmp_path_factory.mktemp("weights") / "mine.pt", frames=FRAMES)


def test_a_program_of_the_same_weights_gives_the_same_features(state_file: Path, script_file: Path) -> None:
    videos = clips(1, FRAMES, 32, 48, 3)
    eager = I3DDetector(weights=str(state_file)).features(videos)
    scripted = I3DDetector(weights=str(script_file), trust_weights=True).features(videos)
    assert eager.shape == (1, 400)
    assert eager.dtype == torch.float64
    assert eager.std() > 0.1
    assert torch.allclose(eager, scripted, rtol=1e-5, atol=1e-5)


def test_a_program_of_unknown_hash_is_not_run(script_file: Path) -> None:
    with pytest.raises(InputError, match="--trust-weights"):
        I3DDetector(weights=str(script_file)).features(clips(1, FRAMES, 8, 8, 3))


def test_the_network_is_in_evaluation_mode_and_asks_for_no_gradients(state_file: Path) -> None:
    network, scripted = I3DDetector(weights=str(state_file), epsilon=1e-5)._network
    assert not scripted
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert network.epsilon == 1e-5


def test_the_description_follows_the_weights_and_not_their_place(state_file: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copy(state_file, tmp_path / "other.pt"))
    described = I3DDetector(weights=str(state_file)).describe()
    assert json.loads(json.dumps(described)) == described
    assert I3DDetector(weights=str(moved)).describe() == described
    assert described["dimension"] == 400
    assert described["path"] == "eager"
    assert "unknown origin" in described["weights"]["warning"]
    for option in ({"epsilon": 1e-5}, {"resize": "legacy_bilinear"}, {"input_range": "-0.5..0.5"}):
        assert I3DDetector(weights=str(state_file), **option).describe() != described


def test_only_known_weights_may_be_called_fvd(state_file: Path, monkeypatch) -> None:
    detector = I3DDetector(weights=str(state_file))
    assert not detector.identity.fvd
    blob = git_blob_sha1(state_file.read_bytes())
    for name, fvd in (("rgb_imagenet.pt", False), ("i3d_pretrained_400.pt", True)):
        with monkeypatch.context() as patch:
            patch.setitem(KNOWN_FILES, name, replace(KNOWN_FILES[name], git_sha1=blob))
            from hpdm_core.metrics.networks import weights

            weights._identify.cache_clear()
            assert detector.identity.fvd == fvd
            assert detector.describe()["weights"]["known"] == name
    weights._identify.cache_clear()


def test_missing_weights_are_said_before_anything_runs(monkeypatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    for detector in (I3DDetector(), C3DDetector()):
        with pytest.raises(MissingWeights, match="was not found"):
            detector.describe()
        with pytest.raises(MissingWeights, match="was not found"):
            detector.features(clips(1, 16, 8, 8, 3))


@pytest.mark.slow
def test_eight_black_against_eight_white_clips_leave_the_means(state_file: Path) -> None:
    """The published check in form: without spread the distance is that of the two means."""
    detector = I3DDetector(weights=str(state_file))
    black, white = (
        extract([np.full((FRAMES, 64, 64, 3), grey, dtype=np.uint8)] * 8, detector, batch_size=3)
        for grey in (0, 255)
    )
    assert np.ptp(black, axis=0).max() == 0.0
    wanted = ((black[0] - white[0]) ** 2).sum()
    assert wanted > 1
    assert frechet_distance(black, white) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.slow
def test_uniform_noise_is_as_far_apart_for_both_ways_of_running(state_file: Path, script_file: Path) -> None:
    """The published check in form: it holds to 1e-6 between two implementations of the same network."""
    found = []
    for file, trust in ((state_file, False), (script_file, True)):
        detector = I3DDetector(weights=str(file), trust_weights=trust)
        sets = [extract(clips(4, FRAMES, 64, 64, 3, seed=seed), detector) for seed in (1, 2)]
        found.append(frechet_distance(*sets))
    assert found[0] > 0
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


# C3D


def test_c3d_gets_blue_first_on_its_scale_less_the_mean() -> None:
    videos = torch.zeros(1, 16, 20, 30, 3, dtype=torch.uint8)
    videos[..., 0] = 255  # red
    mean = torch.arange(3.0).reshape(3, 1, 1, 1) + 10  # 10 for blue, 12 for red
    for scale in (255, 256):
        network = Recorder()
        c3d_with(network, mean, scale=scale).features(videos)
        seen = network.calls[0][0]
        assert seen.shape == (1, 3, 16, 112, 112)
        assert seen[0, :, 0, 0, 0].tolist() == pytest.approx([-10, -11, scale - 12], abs=1e-4)


def test_c3d_gives_logits_or_the_layer_before() -> None:
    mean = torch.zeros(3, 1, 1, 1)
    videos = clips(2, 16, 8, 8, 3)
    logits = c3d_with(Recorder(), mean).features(videos)
    assert (logits.shape, logits.dtype) == ((2, 101), torch.float64)
    assert c3d_with(Recorder(), mean, layer="fc7").features(videos).shape == (2, 1)


@pytest.mark.parametrize("frames", [15, 64])
def test_c3d_takes_sixteen_frames(frames: int) -> None:
    with pytest.raises(InputError, match=f"clips of {frames} frames; it takes exactly 16"):
        c3d_with(Recorder(), None).features(clips(1, frames, 8, 8, 3))


def test_probabilities_of_a_program_become_logarithms() -> None:
    """Certain predictions of all classes in turn, with zeros: the score is the number of classes."""

    class Certain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.uint8
            assert x.shape == (1, 3, 16, 8, 8)
            return nn.functional.one_hot(x[:, 0, 0, 0, 0].long(), 101).float()

    videos = torch.zeros(101, 16, 8, 8, 3, dtype=torch.uint8)
    videos[:, 0, 0, 0, 0] = torch.arange(101)
    logs = c3d_with(Certain(), None).features(videos)
    assert logs.isfinite().all()
    assert inception_score(logs.numpy()).mean == pytest.approx(101, rel=1e-9)


@pytest.mark.parametrize("output", [torch.randn(1, 101), torch.full((1, 101), 0.5), torch.ones(1, 1)])
def test_a_program_that_gives_no_probabilities_is_refused(output: Tensor) -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return output

    with pytest.raises(InputError, match="c3d: the weights file returned"):
        c3d_with(Other(), None).features(clips(1, 16, 8, 8, 3))


@pytest.mark.slow
def test_c3d_reads_both_of_its_files(tmp_path: Path, monkeypatch) -> None:
    """And is what its layers say on what its preprocessing gives."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    network = uninitialised(C3D)
    randomise(network)
    write_state_dict(export(network, C3D_NAMINGS["chainer"]), tmp_path / "conv3d_deepnetA_ucf.npz")
    detector = C3DDetector()
    with pytest.raises(MissingWeights, match=r"c3d, its mean clip: 'mean2\.npz' is not in"):
        detector.describe()
    assert C3DDetector(mean_crop="constant").describe()["mean"] is None
    whole = np.random.default_rng(0).uniform(60, 120, (3, 16, 128, 171)).astype(np.float32)
    np.savez(tmp_path / "mean2.npz", mean=whole)
    described = detector.describe()
    assert described["dimension"] == 101
    assert C3DDetector(mean_crop="tgan").describe() != described
    videos = clips(1, 16, 112, 112, 3)
    given = videos[0].permute(3, 0, 1, 2).flip(0).float() * (256 / 255)
    with torch.no_grad():
        wanted = network((given - torch.from_numpy(whole[:, :, 8:120, 8:120]))[None])
    assert torch.allclose(detector.features(videos), wanted.double(), rtol=1e-4, atol=1e-3)
