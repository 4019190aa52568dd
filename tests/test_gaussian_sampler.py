"""The sampler in the Gaussian world, at 4x8x8 patches and 3 levels: every step is linear, so its whole map is
known.

A reference of its own, written from the formulas in float64 and dense matrices, with its own tiles, parents, noise
levels and steps, gives what the sampler must return for the same noise, digit by digit. The same formulas, mode by
mode, give the covariance of what it returns: the field's, but for the error of finite steps, which falls as the
order of the solver says.
"""

import itertools
import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hpdm_core.base.randomness import normal
from hpdm_core.config.schema import RuntimeConfig, SamplingConfig
from hpdm_core.pyramid import Pyramid
from hpdm_core.sampling import sample
from hpdm_plugins.data.gaussian_world import GaussianDenoiser, GaussianField
from hpdm_plugins.diffusion.solvers import EDM

SIGMA_IN = (1.0, 2.0, 4.0)
PATCH = (4, 8, 8)
PIXELS = math.prod(PATCH)
LEVELS = 3
SEED = 3
CONTEXT = 0.01
MIXED = {
    "steps": (6, 4, 3),
    "order": (2, 1, 2),
    "sigma_eff_max": (12.0, 4.0, 2.0),
    "sigma_eff_min": (0.0008, 0.0016, 0.004),
    "rho": 6.0,
    "churn": (3.0, 0.0, 1.0),
    "churn_min": 0.004,
    "churn_max": 2.0,
    "churn_noise": 1.01,
}


@pytest.fixture(autouse=True)
def one_thread_in_double():
    """Many small products, and all of the sampler in float64."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@cache
def world(channels: int) -> GaussianDenoiser:
    """The exact denoiser; [-1, 1] is 50 deviations of a pixel: clipping does nothing."""
    video = tuple(size * 2 ** (LEVELS - 1) for size in PATCH)
    pyramid = Pyramid(video=video, patch=PATCH, token=(1, 1, 1), levels=LEVELS, channels=channels)
    return GaussianDenoiser(GaussianField(video, exponent=4.0, std=0.02), pyramid, SIGMA_IN)


def sampled(solver: EDM, *, channels: int, videos: int, overlap: tuple[str, ...] = ()) -> list[Tensor]:
    denoiser = world(channels)
    config = SimpleNamespace(
        model=SimpleNamespace(levels=LEVELS, channels=channels),
        data=SimpleNamespace(downsampling="area"),
        sampling=SamplingConfig(overlap=overlap, context_sigma_eff=CONTEXT),
        runtime=RuntimeConfig(sample_batch=videos, tile_batch=100),
        seed=SEED,
    )
    assembly = SimpleNamespace(config=config, pyramid=denoiser.pyramid, solver=solver)
    return sample(assembly, denoiser, range(videos), [-1] * videos)


# The reference


def noise_levels(level: int, options: dict) -> list[float]:
    """Karras et al. 2022, Eq. 5, given in data units, returned in those of the process."""
    steps, rho = options["steps"][level], options["rho"]
    high, low = (options[f"sigma_eff_{end}"][level] / SIGMA_IN[level] for end in ("max", "min"))
    return [
        (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        for i in range(steps)
    ] + [0.0]


def follow(level: int, options: dict, slope, noise) -> Tensor:
    """Karras et al. 2022, Algorithm 2: ``slope(z, sigma)`` is dz/dsigma, ``noise(i)`` the i-th field."""
    sigmas = noise_levels(level, options)
    steps = len(sigmas) - 1
    z = sigmas[0] * noise(0)
    for i in range(steps):
        churned = options["churn_min"] <= sigmas[i] <= options["churn_max"]
        gamma = min(options["churn"][level] / steps, math.sqrt(2) - 1) if churned else 0.0
        hat = (1 + gamma) * sigmas[i]
        z = z + options["churn_noise"] * math.sqrt(hat**2 - sigmas[i] ** 2) * noise(i + 1)
        first = slope(z, hat)
        ahead = z + (sigmas[i + 1] - hat) * first
        if options["order"][level] == 2 and i + 1 < steps:
            ahead = z + (sigmas[i + 1] - hat) * (first + slope(ahead, sigmas[i + 1])) / 2
        z = ahead
    return z


def parent(offset: tuple[int, int, int], level: int) -> tuple[int, int, int]:
    """The patch of the level below, centred on the child as nearly as it lies within the video; own pixels."""
    return tuple(
        min(max(math.floor((at + size / 2) / 2 - size / 2), 0), size * 2 ** (level - 1) - size)
        for at, size in zip(offset, PATCH, strict=True)
    )


def chain(offset: tuple[int, int, int], level: int) -> list[tuple[int, tuple[int, int, int]]]:
    """(level, offset) of all ancestors, coarsest first."""
    if level == 0:
        return []
    above = parent(offset, level)
    return [*chain(above, level - 1), (level - 1, above)]


def corner(offset: tuple[int, int, int], level: int) -> tuple[int, int, int]:
    return tuple(at * 2 ** (LEVELS - 1 - level) for at in offset)


def law(denoiser: GaussianDenoiser, level: int, offset: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The patch given its noisy ancestors: gain [N, K N] and covariance [N, N]; dense, by one inverse."""
    here = corner(offset, level)
    # only differences matter: equal constellations share one result
    lags = tuple(
        (k, tuple(a - b for a, b in zip(corner(at, k), here, strict=True))) for k, at in chain(offset, level)
    )
    return _law(denoiser, level, lags)


@cache
def _law(denoiser: GaussianDenoiser, level: int, lags) -> tuple[Tensor, Tensor]:
    own = (level, (0, 0, 0))
    prior = denoiser.covariance(own, own)
    if not lags:
        return torch.zeros(PIXELS, 0), prior
    joint = torch.cat([torch.cat([denoiser.covariance(a, b) for b in lags], dim=1) for a in lags])
    cross = torch.cat([denoiser.covariance(own, place) for place in lags], dim=1)
    gain = cross @ torch.linalg.inv(joint + CONTEXT**2 * torch.eye(len(joint)))
    return gain, prior - gain @ cross.T


def reference(options: dict, *, channels: int, index: int, overlap: tuple[str, ...] = ()) -> list[Tensor]:
    """What the sampler must return for video ``index``: one tensor [C, F, H, W] per level."""
    denoiser = world(channels)
    made: list[Tensor] = []
    noisy: list[Tensor] = []
    for level in range(LEVELS):
        shape = (channels, *(size * 2**level for size in PATCH))
        strides = [size // 2 if axis in overlap else size for axis, size in zip("fhw", PATCH, strict=True)]
        tiles = list(
            itertools.product(
                *(
                    range(0, size * 2**level - size + 1, stride)
                    for size, stride in zip(PATCH, strides, strict=True)
                )
            )
        )
        scale = SIGMA_IN[level]

        def cut(video: Tensor, offset: tuple[int, int, int]) -> Tensor:
            places = (slice(at, at + size) for at, size in zip(offset, PATCH, strict=True))
            return video[:, *places]

        means = {}
        for tile in tiles:
            gain, _ = law(denoiser, level, tile)
            seen = [cut(noisy[k], at).flatten(1) for k, at in chain(tile, level)]
            means[tile] = torch.cat(seen, dim=1) @ gain.T if seen else torch.zeros(channels, PIXELS)

        def slope(
            z: Tensor, sigma: float, level=level, tiles=tiles, means=means, scale=scale, cut=cut
        ) -> Tensor:
            total, count = torch.zeros_like(z), torch.zeros_like(z)
            shrinks = {}
            for tile in tiles:
                left = law(denoiser, level, tile)[1]
                if id(left) not in shrinks:
                    eye = (scale * sigma) ** 2 * torch.eye(PIXELS)
                    shrinks[id(left)] = torch.linalg.solve(left + eye, left)  # symmetric: both commute
                given = scale * cut(z, tile).flatten(1)
                clean = means[tile] + (given - means[tile]) @ shrinks[id(left)]
                cut(total, tile).add_(clean.view(channels, *PATCH))
                cut(count, tile).add_(1.0)
            return (z - total / count / scale) / sigma

        def noise(i: int, level=level, shape=shape) -> Tensor:
            return normal(shape, SEED, "sampling", index, level, i)

        made.append(scale * follow(level, options, slope, noise))
        noisy.append(made[-1] + CONTEXT * normal(shape, SEED, "context_noise", index, level))
    return made


@pytest.mark.parametrize(
    ("overlap", "videos"), [((), 2), pytest.param(("h", "w"), 1, marks=pytest.mark.slow)]
)
def test_the_samplers_map_is_the_linear_algebras(overlap, videos):
    """Churn and both orders: for the same noise the same numbers, to 1e-6 of their size."""
    levels = sampled(EDM(SIGMA_IN, **MIXED), channels=2, videos=videos, overlap=overlap)
    for index in range(videos):
        for level, wanted in enumerate(reference(MIXED, channels=2, index=index, overlap=overlap)):
            given = levels[level][index]
            assert given.dtype == torch.float64 and given.shape == wanted.shape
            assert wanted.abs().max() < 1
            assert (given - wanted).abs().max() < 1e-6 * wanted.std()


# Mode by mode


def gains(level: int, options: dict, variances: Tensor) -> tuple[Tensor, Tensor]:
    """What a mode of posterior ``variances`` [n] becomes: the variance that noise leaves it with, and the factor
    on its mean.
    """
    scale, fields = SIGMA_IN[level], options["steps"][level] + 1
    parts = torch.eye(fields + 1)  # each field, and the mean, as a coordinate

    def slope(z: Tensor, sigma: float) -> Tensor:
        variance = (scale * sigma) ** 2
        return (z - parts[-1] / scale) * (variance / (variances + variance))[:, None] / sigma

    start = torch.zeros(len(variances), fields + 1)
    z = scale * follow(level, options, slope, lambda i: start + parts[i])
    return z[:, :-1].pow(2).sum(dim=1), z[:, -1]


def corner_maps(options: dict) -> tuple[list[Tensor], list[Tensor]]:
    """The corner tile of each level as a map of independent unit noise, and as a parent: with noise on it.

    In the corner parents are tiles themselves, so that the chain is the whole story.
    """
    denoiser = world(1)
    clean: list[Tensor] = []
    noisy: list[Tensor] = []
    for level in range(LEVELS):
        gain, left = law(denoiser, level, (0, 0, 0))
        variances, basis = torch.linalg.eigh(left)
        spread, factor = gains(level, options, variances.clamp(min=0))
        row = torch.zeros(PIXELS, 2 * LEVELS * PIXELS)
        own = slice(2 * level * PIXELS, (2 * level + 1) * PIXELS)
        row[:, own] = basis * spread.sqrt()
        if noisy:
            row += (basis * factor) @ basis.T @ gain @ torch.cat(noisy)
        clean.append(row)
        context = row.clone()
        context[:, own.stop : own.stop + PIXELS] += CONTEXT * torch.eye(PIXELS)
        noisy.append(context)
    return clean, noisy


def field_covariance() -> Tensor:
    """Covariance [3 N, 3 N] of the corner tiles of all levels."""
    places = [(level, (0, 0, 0)) for level in range(LEVELS)]
    return torch.cat([torch.cat([world(1).covariance(a, b) for b in places], dim=1) for a in places])


def options_of(steps: int, order: int, *, churn: float = 0.0) -> dict:
    return {
        "steps": (steps,) * LEVELS,
        "order": (order,) * LEVELS,
        "sigma_eff_max": (2e4,) * LEVELS,
        "sigma_eff_min": (2e-5,) * LEVELS,
        "rho": 7.0,
        "churn": (churn,) * LEVELS,
        "churn_min": 0.0,
        "churn_max": math.inf,
        "churn_noise": 1.0,
    }


@pytest.mark.parametrize("order", [1, 2])
def test_the_covariance_goes_to_the_fields_as_the_solvers_order_says(order):
    """Of the finest level and its noisy parents together, and of each level: what the chain determines exactly.

    (A child knows its parents by their noisy selves alone, so that clean parents tell a little less of it.)
    """
    exact = field_covariance()
    context = CONTEXT**2 * torch.eye(PIXELS)
    seen = exact + torch.block_diag(context, context, torch.zeros(PIXELS, PIXELS))
    errors, marginals = [], []
    for steps in (64, 128, 256, 512):
        clean, noisy = corner_maps(options_of(steps, order))
        made = torch.cat([*noisy[:-1], clean[-1]])
        errors.append(((made @ made.T - seen).norm() / seen.norm()).item())
        own = [exact[k * PIXELS : (k + 1) * PIXELS, k * PIXELS : (k + 1) * PIXELS] for k in range(LEVELS)]
        pairs = zip(clean, own, strict=True)
        marginals.append([((row @ row.T - part).norm() / part.norm()).item() for row, part in pairs])
    for before, after in itertools.pairwise(errors):
        assert before / after == pytest.approx(2**order, rel=0.15)
    assert errors[-1] < (2e-3 if order == 2 else 0.05)
    assert max(marginals[-1]) < 1.2 * max(marginals[0]) / 8**order


@pytest.mark.parametrize("level", range(LEVELS))
@pytest.mark.parametrize("options", [MIXED, options_of(9, 2, churn=4.0), options_of(6, 1)])
def test_the_solver_does_to_a_mode_what_the_formulas_say(level, options):
    """Unit vectors through the solver itself: the start, each step's fresh noise, and the mean."""
    variances = torch.logspace(-6, 1, 15)
    solver = EDM(SIGMA_IN, **options)
    fields = options["steps"][level] + 1
    scale = SIGMA_IN[level]

    def through(which: int, mean: float) -> Tensor:
        def denoise(z: Tensor, sigma: float) -> Tensor:
            shrink = variances / (variances + (scale * sigma) ** 2)
            return mean + (scale * z - mean) * shrink

        return solver.solve(level, denoise, lambda i: torch.full_like(variances, float(i == which)))

    spread = sum(through(which, 0.0) ** 2 for which in range(fields))
    wanted, factor = gains(level, options, variances)
    assert torch.allclose(spread, wanted, rtol=1e-9, atol=1e-15)
    assert torch.allclose(through(-1, 1.0), factor, rtol=1e-9)


def corners(levels: list[Tensor]) -> Tensor:
    """All eight corner tiles of every channel of every video, mirrored onto the first: draws [n, 3 N]."""
    frames, height, width = PATCH
    draws = []
    for mirrored in itertools.product((False, True), repeat=3):
        axes = [axis for axis, flip in zip((-3, -2, -1), mirrored, strict=True) if flip]
        parts = [video.flip(axes)[..., :frames, :height, :width] for video in levels]
        draws.append(torch.cat([part.flatten(2) for part in parts], dim=-1).flatten(0, 1))
    return torch.cat(draws)


def check_draws(options: dict, *, channels: int, videos: int) -> None:
    """The law of drawn videos is the one that the formulas give, within the error of so many draws.

    Along a principal direction the variance of n draws, over the true one, is 1 with deviation sqrt(2 / n). The
    corners of one video hang together, so that n lies between its number of channels and eight times that.
    """
    solver = EDM(SIGMA_IN, **options)
    draws = corners(sampled(solver, channels=channels, videos=videos))
    maps = torch.cat(corner_maps(options)[0])
    made = maps @ maps.T
    least, most = channels * videos, len(draws)
    variances, basis = torch.linalg.eigh(made)
    ratios = (draws @ basis).pow(2).mean(dim=0) / variances
    kept = ratios[variances > 1e-12]
    assert len(kept) > 0.9 * LEVELS * PIXELS
    assert kept.mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / most / len(kept)) + 0.002)
    assert math.sqrt(2 / most) * 0.9 < kept.std().item() < math.sqrt(2 / least)
    assert (kept - 1).abs().max() < 5.5 * math.sqrt(2 / least)
    empirical = draws.T @ draws / len(draws)
    for a, b in itertools.product(range(LEVELS), repeat=2):
        block = (slice(a * PIXELS, (a + 1) * PIXELS), slice(b * PIXELS, (b + 1) * PIXELS))
        # E |empirical - C|^2 = (tr A tr B + |C|^2) / n for the block C of two parts with covariances A and B
        traces = made[block[0], block[0]].trace() * made[block[1], block[1]].trace()
        expected = math.sqrt((traces + made[block].norm() ** 2) / least)
        assert (empirical[block] - made[block]).norm() < 1.5 * expected


def test_draws_have_the_covariance():
    check_draws(
        {**MIXED, "steps": (12, 8, 8), "order": (2, 2, 2), "churn": (4.0, 0.0, 0.0)}, channels=24, videos=2
    )


@pytest.mark.slow
def test_many_draws_of_many_steps_have_the_fields_covariance():
    options = {**options_of(32, 2), "sigma_eff_max": (20.0,) * LEVELS, "sigma_eff_min": (2e-4,) * LEVELS}
    check_draws(options, channels=32, videos=2)
    for level, row in enumerate(corner_maps(options)[0]):
        exact = world(1).covariance((level, (0, 0, 0)), (level, (0, 0, 0)))
        assert ((row @ row.T - exact).norm() / exact.norm()).item() < 0.05
