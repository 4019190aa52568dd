"""The solver against closed forms for Gaussian data."""

import math

import pytest
import torch

from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import normal
from hpdm_core.solver import integrate, karras_sigmas
from hpdm_plugins.diffusion.solvers import EDM

STD, SIGMA_IN = 0.5, 4.0


def gaussian(z, sigma):
    """E[x | z] for x ~ N(0, STD^2), z = x / SIGMA_IN + sigma * noise."""
    variance = (STD / SIGMA_IN) ** 2
    return SIGMA_IN * z * variance / (variance + sigma**2)


def ode_solution(z, sigma):
    """Where the probability flow leads from z at sigma: z follows its deviation sqrt(s^2 + sigma^2)."""
    scaled = STD / SIGMA_IN
    return SIGMA_IN * z * scaled / math.sqrt(scaled**2 + sigma**2)


def error(steps, order):
    sigmas = karras_sigmas(steps, 10.0, 1e-4, 7.0)
    start = torch.ones(1, dtype=torch.float64)
    made = integrate(gaussian, lambda i: start, sigmas=sigmas, sigma_in=SIGMA_IN, order=order)
    return abs(made / ode_solution(start * sigmas[0], sigmas[0]) - 1).item()


def test_sigmas_are_those_of_the_formula():
    made = karras_sigmas(5, 80.0, 0.002, 7.0)
    assert made[0] == pytest.approx(80) and made[4] == pytest.approx(0.002) and made[5] == 0
    assert made[2] == pytest.approx(((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7)
    assert karras_sigmas(1, 80.0, 0.002, 7.0) == (pytest.approx(80.0), 0.0)


@pytest.mark.parametrize(("order", "rate"), [(1, 2.0), (2, 4.0)])
def test_order_of_convergence(order, rate):
    coarse, fine, finest = (error(steps, order) for steps in (100, 200, 400))
    assert coarse / fine == pytest.approx(rate, rel=0.12)
    assert fine / finest == pytest.approx(rate, rel=0.12)
    assert finest < 0.03 ** (order)


def test_last_step_returns_the_denoised():
    answer = torch.linspace(-1, 1, 7)
    for order in (1, 2):
        made = integrate(
            lambda z, sigma: answer,
            lambda i: torch.ones(7),
            sigmas=(2.0, 0.5, 0.0),
            sigma_in=SIGMA_IN,
            order=order,
        )
        assert torch.allclose(made, answer, atol=1e-6)


def test_one_heun_step_by_hand():
    # z0 = 2, x = SIGMA_IN * 0.1 * z: slope = (z - 0.1 z) / sigma
    made = integrate(
        lambda z, sigma: SIGMA_IN * 0.1 * z,
        lambda i: torch.ones((), dtype=torch.float64),
        sigmas=(2.0, 1.0, 0.0),
        sigma_in=SIGMA_IN,
        order=2,
    )
    slope = 0.9 * 2 / 2
    ahead = 2 - slope
    z = 2 - 0.5 * (slope + 0.9 * ahead / 1)
    assert made.item() == pytest.approx(SIGMA_IN * 0.1 * z)


def test_churn_leaves_the_variance_right_and_is_noise():
    sigmas = karras_sigmas(200, 20.0, 1e-3, 7.0)
    asked = []

    def noise(i):
        asked.append(i)
        return normal((100_000,), 0, "churn", i).double()

    made = integrate(
        gaussian, noise, sigmas=sigmas, sigma_in=SIGMA_IN, order=2, churn=20.0, churn_range=(0.01, 5.0)
    )
    assert made.std().item() == pytest.approx(STD, rel=0.01)
    start = noise(0)
    correlation = (made * start).mean() / made.std() / start.std()
    assert correlation < 0.3  # without churn it is 1: the flow is deterministic
    assert asked[0] == 0
    inside = [i + 1 for i, sigma in enumerate(sigmas[:-1]) if 0.01 <= sigma <= 5.0]
    assert asked[1:-1] == inside


def test_churn_adds_what_the_formula_says():
    seen = []

    def spy(z, sigma):
        seen.append((z.item(), sigma))
        return z * 0

    one = torch.ones((), dtype=torch.float64)
    integrate(
        spy,
        lambda i: one * (i + 1),
        sigmas=(2.0, 1.0, 0.0),
        sigma_in=1.0,
        order=1,
        churn=0.4,
        churn_noise=1.1,
    )
    raised = 2.0 * 1.2  # gamma = 0.4 / 2 steps
    assert seen[0][1] == pytest.approx(raised)
    assert seen[0][0] == pytest.approx(2.0 + math.sqrt(raised**2 - 4.0) * 1.1 * 2)
    seen.clear()
    integrate(spy, lambda i: one, sigmas=(2.0, 1.0, 0.0), sigma_in=1.0, order=1, churn=40.0)
    assert seen[0][1] == pytest.approx(2.0 * math.sqrt(2))  # gamma is bounded by sqrt(2) - 1


def test_options_per_level():
    solver = EDM((1.0, 2.0, 4.0, 8.0), steps=(8, 4), sigma_eff_max=(40.0,), order=(2, 1), churn=(3.0, 0.0))
    assert solver.steps == (8, 4, 4, 4)
    assert solver.order == (2, 1, 1, 1)
    assert solver.churn == (3.0, 0.0, 0.0, 0.0)
    assert [solver.calls(level) for level in range(4)] == [15, 4, 4, 4]
    assert solver.sigmas(2)[0] == pytest.approx(10.0)  # sigma_eff 40 / sigma_in 4
    assert solver.sigmas(3)[-2] == pytest.approx(0.01 / 8)
    assert EDM((1.0,)).steps == (128,)  # the defaults are for three levels and serve fewer


def test_solves_by_level():
    solver = EDM((1.0, 2.0), steps=(3, 2), order=(2, 1), churn=(1.0, 0.0), sigma_eff_max=(10.0,))
    for level, calls in ((0, 5), (1, 2)):
        seen, asked = [], []

        def denoise(z, sigma, seen=seen):
            seen.append(sigma)
            return torch.tanh(z)

        def noise(i, asked=asked):
            asked.append(i)
            return torch.ones(3)

        solver.solve(level, denoise, noise)
        assert len(seen) == calls == solver.calls(level)
        assert (len(asked) > 1) == (level == 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": ()}, "steps: .* has 0 values"),
        ({"steps": (4, 4, 4, 4)}, "steps: .* has 4 values; allowed is 1 to 2"),
        ({"steps": (4, 0)}, "steps: .* positive integer"),
        ({"order": (3,)}, "order: .*1 .Euler. or 2 .Heun."),
        ({"churn": (-1.0,)}, "churn: .* 0 or more"),
        ({"sigma_eff_max": (math.inf,)}, "sigma_eff_max: .* positive"),
        ({"sigma_eff_min": (0.0,)}, "sigma_eff_min: .* positive"),
        ({"sigma_eff_min": (0.01, 90.0)}, "sigma_eff_min: 90 on level 1; .* which is 80"),
        ({"rho": 0.0}, "rho: 0; allowed is a positive"),
        ({"churn_min": 60.0}, "churn_min: 60; .* churn_max"),
        ({"churn_noise": 0.0}, "churn_noise: 0;"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        EDM((1.0, 2.0), **options)
