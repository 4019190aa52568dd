import math

import pytest
import torch

from hpdm_core.diffusion import c_in, network_input, noise_clean, plan, sigma_eff
from hpdm_plugins.diffusion.objectives import EffectiveV, SnapV

OBJECTIVES = [SnapV(), SnapV(weighting="v"), EffectiveV(), SnapV(sigma_data=0.2), EffectiveV(sigma_data=0.5)]
SIGMAS_IN = [1.0, 4.0, 8.0, 16.0]


def fields(rows, *, seed=0):
    start = torch.Generator().manual_seed(seed)
    shape = (rows, 3, 2, 6, 10)
    return (torch.randn(shape, generator=start, dtype=torch.float64) for _ in range(2))


def coefficients(objective, sigma, sigma_in):
    """(c_skip, c_out) read off the decoder."""
    one = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    s = torch.tensor([sigma], dtype=torch.float64)
    return (
        objective.denoised(one, 0 * one, s, sigma_in).item(),
        objective.denoised(0 * one, one, s, sigma_in).item(),
    )


@pytest.mark.parametrize(
    ("sigma", "sigma_in", "scale", "skip", "out", "weight"),
    [(0.3, 4, 2.560738, 2.941176, -0.921204, 10.27768), (0.03, 16, 14.42437, 15.77287, -0.473399, 249.231)],
)
def test_values_of_snap_v(sigma, sigma_in, scale, skip, out, weight):
    s = torch.tensor([sigma], dtype=torch.float64)
    assert c_in(s, sigma_in).item() == pytest.approx(scale, rel=1e-6)
    assert coefficients(SnapV(), sigma, sigma_in) == pytest.approx((skip, out), rel=1e-5)
    assert SnapV().weight(s, sigma_in).item() == pytest.approx(weight, rel=1e-5)


def test_more_values_of_snap_v_and_of_effective_v():
    one = torch.tensor([1.0], dtype=torch.float64)
    assert coefficients(SnapV(), 1.0, 8)[1] == pytest.approx(-1.257079, rel=1e-6)
    assert SnapV().weight(one, 8).item() == pytest.approx(3.16049, rel=1e-5)
    assert sigma_eff(0.3 * one, 4).item() == pytest.approx(1.2)
    skip, out = coefficients(EffectiveV(), 0.3, 4)
    assert out == pytest.approx(-0.768221, rel=1e-6)
    assert skip / 4 == pytest.approx(0.409836, rel=1e-5)  # 1 / (1 + sigma_eff^2)


@pytest.mark.parametrize(
    "objective", OBJECTIVES, ids=["snap_c", "snap_v", "effective", "snap_.2", "effective_.5"]
)
@pytest.mark.parametrize("sigma_in", SIGMAS_IN)
def test_a_perfect_answer_gives_the_clean_patch_back(objective, sigma_in):
    sigma = torch.logspace(math.log10(0.002), math.log10(80), 9, dtype=torch.float64)
    clean, noise = fields(9)
    z = noise_clean(clean, noise, sigma, sigma_in)
    answer = objective.target(clean, noise, sigma, sigma_in)
    torch.testing.assert_close(objective.denoised(z, answer, sigma, sigma_in), clean, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sigma_in", SIGMAS_IN)
def test_the_network_sees_unit_variance(sigma_in):
    sigma = torch.logspace(math.log10(0.002), math.log10(80), 5)
    start = torch.Generator().manual_seed(3)
    clean, noise = (torch.randn(5, 3, 20, 40, 40, generator=start) for _ in range(2))
    seen = network_input(noise_clean(clean, noise, sigma, sigma_in), sigma, sigma_in)
    torch.testing.assert_close(seen.flatten(1).std(dim=1), torch.ones(5), atol=0.01, rtol=0)


@pytest.mark.parametrize("sigma_in", SIGMAS_IN)
def test_the_weighted_loss_is_the_weighted_error_of_the_denoised_patch(sigma_in):
    sigma = torch.tensor([0.01, 0.3, 1.0, 20.0], dtype=torch.float64)
    clean, noise = fields(4, seed=1)
    error, _ = fields(4, seed=2)
    z = noise_clean(clean, noise, sigma, sigma_in)
    for objective, weight_of_x in [
        (SnapV(), 1 + sigma**-2),
        (EffectiveV(), 1 + (sigma_in * sigma) ** -2),
        (SnapV(sigma_data=0.2), 25 + sigma**-2),
        (EffectiveV(sigma_data=0.5), 4 + (sigma_in * sigma) ** -2),
    ]:
        answer = objective.target(clean, noise, sigma, sigma_in) + error
        loss = objective.weight(sigma, sigma_in) * error.square().flatten(1).mean(dim=1)
        off = objective.denoised(z, answer, sigma, sigma_in) - clean
        torch.testing.assert_close(loss, weight_of_x * off.square().flatten(1).mean(dim=1), rtol=1e-8, atol=0)


@pytest.mark.parametrize("sigma_data", [0.2, 1.0])
def test_at_input_scale_one_both_objectives_are_edm_for_any_sigma_data(sigma_data):
    # EDM, Table 1 (VE notation): c_skip = d^2 / (s^2 + d^2), c_out = s d / sqrt(s^2 + d^2), here with v's sign.
    for objective in (SnapV(sigma_data=sigma_data), EffectiveV(sigma_data=sigma_data)):
        for sigma in (0.05, 0.2, 3.0):
            total = sigma**2 + sigma_data**2
            expected = (sigma_data**2 / total, -sigma * sigma_data / math.sqrt(total))
            assert coefficients(objective, sigma, 1.0) == pytest.approx(expected, rel=1e-12)


def test_general_snap_v_follows_its_closed_form():
    # c_skip = sigma_in d^2 / (sigma_in sigma^2 + d^2), c_out = -sigma_in sigma d sqrt(sigma^2 + d^2) / (the same)
    sigma, sigma_in, d = 0.3, 4.0, 0.5
    below = sigma_in * sigma**2 + d**2
    expected = (sigma_in * d**2 / below, -sigma_in * sigma * d * math.sqrt(sigma**2 + d**2) / below)
    assert coefficients(SnapV(sigma_data=d), sigma, sigma_in) == pytest.approx(expected, rel=1e-12)
    weight = ((sigma**2 + d**2) / (sigma**2 + d**2 / sigma_in)) ** 2
    s = torch.tensor([sigma], dtype=torch.float64)
    assert SnapV(sigma_data=d).weight(s, sigma_in).item() == pytest.approx(weight, rel=1e-12)


def test_the_target_has_unit_variance_where_data_has_the_given_deviation():
    clean, noise = (torch.randn(1, 3, 20, 40, 40, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    for objective in (SnapV(sigma_data=0.2), EffectiveV(sigma_data=0.2)):
        for sigma in (0.02, 0.2, 2.0):
            target = objective.target(0.2 * clean, noise, torch.tensor([sigma]), 1.0)
            assert target.std().item() == pytest.approx(1.0, abs=0.01)


def test_the_flat_weighting_counts_every_answer_the_same():
    sigma = torch.tensor([0.01, 3.0])
    assert SnapV(weighting="v").weight(sigma, 16.0).tolist() == [1.0, 1.0]
    assert EffectiveV().weight(sigma, 16.0).tolist() == [1.0, 1.0]


def test_the_papers_plan_feeds_each_level_with_all_coarser_ones():
    assert [(slot.level, slot.sources) for slot in plan(3)] == [(0, ()), (1, (0,)), (2, (0, 1))]
