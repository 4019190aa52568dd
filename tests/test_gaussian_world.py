"""The world of known answers: its law, its best denoiser, and the sampler held against both."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from hpdm_core.assembly.compose import load_cell
from hpdm_core.base.randomness import generator
from hpdm_core.config.schema import RuntimeConfig, SamplingConfig
from hpdm_core.data.dataset import ClipShape
from hpdm_core.metrics.held_out_loss import HeldOutLoss
from hpdm_core.pyramid import Pyramid, downsample, level_patch
from hpdm_core.sampling import sample
from hpdm_core.training.trainer import Trainer
from hpdm_plugins.data.gaussian_world import GaussianDenoiser, GaussianField, GaussianWorld
from hpdm_plugins.diffusion.solvers import EDM
from tests.small import rin

SIGMA_IN = (1.0, 2.0, 4.0)


@pytest.fixture(autouse=True)
def one_thread():
    """Many small products: threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(channels=1):
    """A world small enough for dense matrices: video 4x8x16, patch 2x4x8, 2 levels."""
    pyramid = Pyramid(video=(4, 8, 16), patch=(2, 4, 8), token=(1, 1, 1), levels=2, channels=channels)
    field = GaussianField(pyramid.video, exponent=4.0, std=0.25)
    return field, pyramid, GaussianDenoiser(field, pyramid, SIGMA_IN[:2])


def dense_covariance(field):
    """Covariance [P, P] of all pixels of the window, from the lags one by one."""
    lags = field.covariance((1, 1, 1), (1, 1, 1))
    pixels = torch.tensor(list(itertools.product(*(range(size) for size in field.size))))
    difference = (pixels[:, None] - pixels) % torch.tensor(field.torus)
    return lags[difference[..., 0], difference[..., 1], difference[..., 2]]


def as_matrix(field, pyramid, level, offset):
    """The linear map [N, P] from the window's pixels to a patch, by the pyramid's own downsampling."""
    count = math.prod(field.size)
    basis = torch.eye(count, dtype=torch.float64).view(count, 1, *field.size)
    return torch.stack([level_patch(unit, pyramid, level, offset, "area").flatten() for unit in basis], dim=1)


def test_draws_have_the_law():
    field, _, _ = small()
    draws = field.draw(generator(0, "law"), 1500).flatten(1)
    wanted = dense_covariance(field)
    assert wanted.diagonal().allclose(torch.tensor(0.25**2, dtype=torch.float64))
    empirical = draws.T @ draws / len(draws)
    spread = (wanted**2 + 0.25**4).sqrt() / math.sqrt(len(draws))  # of a covariance's estimate
    assert ((empirical - wanted) / spread).abs().max() < 5.5
    assert ((empirical - wanted) / spread).pow(2).mean() == pytest.approx(1, abs=0.3)
    assert wanted.min() < 0.5 * wanted.max()


def test_the_spectrum_falls_and_obeys_its_exponent():
    rough, smooth = (GaussianField((4, 8, 16), exponent=exponent, std=0.2) for exponent in (0.0, 6.0))
    assert rough.covariance((1, 1, 1), (1, 1, 1))[0, 0, 1].abs() < 1e-12  # white
    assert smooth.covariance((1, 1, 1), (1, 1, 1))[0, 0, 1] > 0.9 * 0.04
    assert smooth.power[0, 0, 2] / smooth.power[0, 0, 6] == pytest.approx(
        (10 / 2) ** 3
    )  # f = 1 and 3 per clip


def test_covariance_of_patches_is_that_of_the_downsampling():
    field, pyramid, denoiser = small()
    dense = dense_covariance(field)
    patches = [(0, (0, 0, 0)), (1, (1, 3, 5)), (1, (2, 0, 8))]
    for (level, offset), (other, other_offset) in itertools.product(patches, patches):
        wanted = (
            as_matrix(field, pyramid, level, offset)
            @ dense
            @ as_matrix(field, pyramid, other, other_offset).T
        )
        corners = [
            (k, tuple(o * p for o, p in zip(own, pyramid.pitch(k), strict=True)))
            for k, own in ((level, offset), (other, other_offset))
        ]
        assert torch.allclose(denoiser.covariance(*corners), wanted, atol=1e-12)


def noisy(field, pyramid, level, offsets, sigma_eff, *, stream, channels):
    """Draw a clip per row and return it with its patch's pixels, z and coords."""
    clips = torch.stack([field.draw(generator(stream, row), channels) for row in range(len(offsets))])
    return clips, *seen(clips, pyramid, level, offsets, sigma_eff, stream=stream)


def seen(clips, pyramid, level, offsets, sigma_eff, *, stream):
    clean = torch.stack(
        [
            level_patch(clip, pyramid, level, offset, "area")
            for clip, offset in zip(clips, offsets, strict=True)
        ]
    )
    noise = torch.randn(clean.shape, generator=generator(stream, "noise", level), dtype=torch.float64)
    sigma = torch.full((len(clean),), sigma_eff / SIGMA_IN[level], dtype=torch.float64)
    z = clean / SIGMA_IN[level] + sigma.view(-1, 1, 1, 1, 1) * noise
    return clean, z, sigma, pyramid.coords(level, torch.tensor(offsets))


def test_the_answer_is_the_regression_on_everything_seen():
    """Against one dense regression of the patch on all that is seen of it, without any of the tricks."""
    field, pyramid, denoiser = small(channels=2)
    offsets, parents = [(1, 3, 5), (0, 0, 0), (1, 3, 5)], [(0, 0, 0)] * 3
    clips, _, z0, sigma0, coords0 = noisy(field, pyramid, 0, parents, 0.1, stream="a", channels=2)
    _, z1, sigma1, coords1 = seen(clips, pyramid, 1, offsets, 0.3, stream="a")
    sources = [denoiser.encode(0, z0, sigma0, coords0, None, [])]
    made, _ = denoiser(1, z1, sigma1, coords1, None, denoiser.contexts(1, coords1, sources), None)

    dense = dense_covariance(field)
    top = as_matrix(field, pyramid, 0, (0, 0, 0))
    for row, offset in enumerate(offsets):
        own = as_matrix(field, pyramid, 1, offset)
        both = torch.cat([own, top])
        noise = torch.cat([torch.full((len(own),), 0.3**2), torch.full((len(top),), 0.1**2)]).double()
        gain = own @ dense @ both.T @ torch.linalg.inv(both @ dense @ both.T + torch.diag(noise))
        data = torch.cat([z1[row].flatten(1) * SIGMA_IN[1], z0[row].flatten(1) * SIGMA_IN[0]], dim=1)
        assert torch.allclose(made[row].flatten(1).double(), data @ gain.T, atol=1e-5)


def test_loss_meets_the_bound_and_others_do_not():
    field, pyramid, denoiser = small(channels=16)
    rows = 24
    clips, _, z0, sigma0, coords0 = noisy(
        field, pyramid, 0, [(0, 0, 0)] * rows, 0.05, stream="b", channels=16
    )
    offset = (2, 2, 4)
    clean, z1, sigma1, coords1 = seen(clips, pyramid, 1, [offset] * rows, 0.3, stream="b")
    contexts = denoiser.contexts(1, coords1, [denoiser.encode(0, z0, sigma0, coords0, None, [])])
    made, _ = denoiser(1, z1, sigma1, coords1, None, contexts, None)
    blind, _ = denoiser(1, z1, sigma1, coords1, None, None, None)
    bound = denoiser.bayes_loss(1, offset, sigma_eff=0.3, context_sigma_eff=0.05)

    def loss(answer):
        return (answer - clean).pow(2).mean().item()

    y = z1 * SIGMA_IN[1]
    assert loss(made) == pytest.approx(bound, rel=0.05)
    alone = denoiser.bayes_loss(1, offset, sigma_eff=0.3, context_sigma_eff=None)
    assert loss(blind) == pytest.approx(alone, rel=0.05)
    assert bound < 0.8 * alone  # parents tell a lot
    shrunk = y * 0.25**2 / (0.25**2 + 0.3**2)  # the best that treats each pixel alone
    for worse in (blind, shrunk, torch.zeros_like(clean), y, 0.7 * made, made.flip(-1)):
        assert loss(worse) > 1.1 * bound


def test_noise_free_parents_are_no_trouble():
    _, _, denoiser = small()
    clear = denoiser.bayes_loss(1, (1, 2, 4), sigma_eff=1.0, context_sigma_eff=0.0)
    hazy = denoiser.bayes_loss(1, (1, 2, 4), sigma_eff=1.0, context_sigma_eff=0.02)
    assert 0 < clear < hazy
    assert denoiser.bayes_loss(0, (0, 0, 0), sigma_eff=1e-9, context_sigma_eff=None) < 1e-17


def sampled_world(*, channels, videos, levels, patch=(2, 4, 6), overlap=()):
    """Sample with the exact denoiser; every channel is a draw of its own."""
    video = tuple(size * 2 ** (levels - 1) for size in patch)
    pyramid = Pyramid(video=video, patch=patch, token=(1, 1, 1), levels=levels, channels=channels)
    field = GaussianField(video, exponent=4.0, std=0.2)  # [-1, 1] is 5 deviations: clipping does nothing
    denoiser = GaussianDenoiser(field, pyramid, SIGMA_IN[:levels])
    config = SimpleNamespace(
        model=SimpleNamespace(levels=levels, channels=channels),
        data=SimpleNamespace(downsampling="area"),
        sampling=SamplingConfig(overlap=overlap, context_sigma_eff=0.02),
        runtime=RuntimeConfig(sample_batch=videos, tile_batch=128),
        seed=3,
    )
    options = {
        "steps": (32,),
        "order": (2,),
        "sigma_eff_max": (20.0,),
        "sigma_eff_min": (0.002,),
        "churn": (0.0,),
    }
    assembly = SimpleNamespace(config=config, pyramid=pyramid, solver=EDM(SIGMA_IN[:levels], **options))
    return denoiser, sample(assembly, denoiser, range(videos), [-1] * videos)


def test_overlap_makes_tiles_agree():
    """Across a border of tiles neighbours differ as they should with overlap, too much without it."""
    errors = {}
    for overlap in ((), ("w",)):
        denoiser, levels = sampled_world(channels=32, videos=2, levels=2, overlap=overlap)
        step = (levels[1][..., 6] - levels[1][..., 5]).pow(2).mean().item()
        lags = denoiser.field.covariance((1, 1, 1), (1, 1, 1))
        errors[overlap] = step / (2 * (lags[0, 0, 0] - lags[0, 0, 1])).item()
    assert errors[()] > 1.3
    assert abs(errors[("w",)] - 1) < 0.5 * abs(errors[()] - 1)


def test_dataset_draws_clips_of_the_law():
    world = GaussianWorld(ClipShape(4, 8, 16, 3), None)
    clip = world.draw("train", generator(0, "clip"))
    assert clip.video.shape == (3, 4, 8, 16) and clip.video.dtype == torch.float32 and clip.label == -1
    assert torch.equal(clip.video, world.draw("held_out", generator(0, "clip")).video)
    assert not torch.equal(clip.video, world.draw("train", generator(1, "clip")).video)
    many = torch.stack([world.draw("train", generator(2, i)).video for i in range(100)])
    assert many.abs().max() <= 1
    assert many.std().item() == pytest.approx(0.25, rel=0.03)
    per_channel = many[:, 0] * many[:, 1]
    assert abs(per_channel.mean().item()) < 0.1 * 0.25**2  # channels are independent
    assert downsample(many, (2, 2, 2), "area").std() < many.std()
    assert world.distinct("train") is None and world.classes == ()
    assert world.describe()["exponent"] == 4.0


def tiny_cell(steps, sets=()):
    """A network of a few thousand weights in this world: 2 levels, patches of 2x4x4."""
    return load_cell(
        {
            "model": {
                "video": [4, 8, 8],
                "patch": [2, 4, 4],
                "token": [1, 1, 1],
                "levels": 2,
                "channels": 1,
                "token_dim": 16,
                "blocks": 2,
                "backbone": rin(latents=8),
            },
            "diffusion": {
                "noise_scaling": {"use": "exponential", "first": 1.0, "ratio": 2.0},
                "noise_sampling": "clean_parents",
            },
            "data": {"dataset": "gaussian_world"},
            "training": {"steps": steps, "batch": 16, "learning_rate": 4e-3, "warmup": 5},
            "runtime": {"prefetch": 0, "threads": 1},
        },
        sets=sets,
    )


def held_out(assembly, denoiser, patches=48):
    """The metric's rows as {(parents, level, sigma_eff): loss}: the same patches and noise for all."""
    metric = HeldOutLoss(patches=patches, split="held_out", sigmas=(0.1, 0.3, 1.0), self_conditioning=True)
    context = SimpleNamespace(
        assembly=assembly,
        denoiser=denoiser,
        device=torch.device("cpu"),
        details={},
        clip=lambda stream, split, number: assembly.dataset.draw(
            split, generator("evaluation", stream, split, number)
        ),
    )
    return {
        (row["parents"], row["level"], row["sigma_eff"]): row["value"]
        for row in metric.evaluate(context)
        if row["sigma_eff"] is not None
    }


def test_training_approaches_the_best_loss_and_never_passes_it():
    """Paired with the exact denoiser on the same patches and noise; a loss below it would be a leak."""
    excess, bayes = {}, {}
    for steps in (4, 60):
        assembly = tiny_cell(steps)
        exact = GaussianDenoiser(assembly.dataset.field, assembly.pyramid, assembly.sigma_in)
        bayes = held_out(assembly, exact)
        trainer = Trainer(assembly)
        trainer.run()
        trained = held_out(assembly, assembly.denoiser(trainer.ema_model))
        excess[steps] = {key: trained[key] / bayes[key] - 1 for key in bayes}
    assert min(excess[60].values()) > -0.01 and min(excess[4].values()) > -0.01
    means = {steps: sum(values.values()) / len(values) for steps, values in excess.items()}
    assert 0 < means[60] < 0.5 * means[4]
    assert all(bayes["clean", 1, sigma] < bayes["noisy", 1, sigma] for sigma in (0.1, 0.3, 1.0))


@pytest.mark.slow
def test_longer_training_comes_close_to_the_best_loss():
    assembly = tiny_cell(800)
    bayes = held_out(assembly, GaussianDenoiser(assembly.dataset.field, assembly.pyramid, assembly.sigma_in))
    trainer = Trainer(assembly)
    trainer.run()
    trained = held_out(assembly, assembly.denoiser(trainer.ema_model))
    excess = [trained[key] / bayes[key] - 1 for key in bayes]
    assert min(excess) > -0.01
    assert sum(excess) / len(excess) < 0.35


@pytest.mark.slow
def test_training_at_three_levels_approaches_the_best_loss_and_never_passes_it():
    """Patches of 4x8x8 in a video of 16x32x32: the same, where a child has two parents."""
    sizes = ["model.video=[16, 32, 32]", "model.patch=[4, 8, 8]", "model.token=[1, 2, 2]", "model.levels=3"]
    widths = ["model.blocks=3", "model.token_dim=32"]
    excess, bayes = {}, None
    for steps in (8, 100):
        assembly = tiny_cell(steps, [*sizes, *widths])
        assert assembly.levels_per_block == (1, 2, 3)
        if bayes is None:
            exact = GaussianDenoiser(assembly.dataset.field, assembly.pyramid, assembly.sigma_in)
            bayes = held_out(assembly, exact, patches=12)
        trainer = Trainer(assembly)
        trainer.run()
        trained = held_out(assembly, assembly.denoiser(trainer.ema_model), patches=12)
        excess[steps] = {key: trained[key] / bayes[key] - 1 for key in bayes}
    assert {level for _, level, _ in excess[8]} == {0, 1, 2}
    assert min(min(values.values()) for values in excess.values()) > -0.01
    for level in range(3):
        before, after = (
            sum(value for key, value in values.items() if key[1] == level) for values in excess.values()
        )
        assert 0 < after < 0.8 * before
