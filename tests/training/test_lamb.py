"""LAMB against its formula."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import normal
from hpdm_core.training.optimizer.lamb import Lamb

SHAPES = {"weight": (3, 5), "bias": (4,), "latents": (2, 3, 4), "gain": (1,)}
BETAS, EPS, DECAY = (0.9, 0.99), 1e-8, 0.01


def make_parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(normal(shape, "start", name)) for name, shape in SHAPES.items()}


def gradient(step: int, name: str) -> torch.Tensor:
    return normal(SHAPES[name], "gradient", step, name) * (1 + step % 7)


def rate(step: int) -> float:
    return 0.005 * step / 50


def reference(steps: int) -> dict[str, np.ndarray]:
    """The published update, one tensor after another in float64."""
    final = {}
    for name, start in make_parameters().items():
        w = start.detach().numpy().astype(np.float64)
        m, v = np.zeros_like(w), np.zeros_like(w)
        for t in range(1, steps + 1):
            g = gradient(t, name).numpy().astype(np.float64)
            m = BETAS[0] * m + (1 - BETAS[0]) * g
            v = BETAS[1] * v + (1 - BETAS[1]) * g * g
            u = (m / (1 - BETAS[0] ** t)) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
            ratio = 1.0
            if w.ndim > 1:
                u = u + DECAY * w
                ratio = np.linalg.norm(w) / np.linalg.norm(u)
            w = w - rate(t) * ratio * u
        final[name] = w
    return final


def train(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for name, parameter in parameters.items():
            parameter.grad = gradient(step, name)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()


def test_fifty_steps_equal_a_float64_loop() -> None:
    parameters = make_parameters()
    train(parameters, Lamb(parameters.items(), 0.005), range(1, 51))
    for name, expected in reference(50).items():
        np.testing.assert_allclose(parameters[name].detach().numpy(), expected, rtol=2e-5, atol=2e-6)


def test_updating_in_parts_changes_no_bit_and_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = make_parameters(), make_parameters()
    train(whole, Lamb(whole.items(), 0.005), range(1, 4))
    monkeypatch.setattr("hpdm_core.training.optimizer.lamb.PART", 10)
    sizes: list[int] = []
    update = Lamb._update
    monkeypatch.setattr(Lamb, "_update", lambda self, *a: (sizes.append(len(a[1])), update(self, *a)))
    train(parts, Lamb(parts.items(), 0.005), range(1, 4))
    assert sum(sizes) == 3 * len(SHAPES) and len(sizes) > 6
    assert all(torch.equal(parts[name], whole[name]) for name in SHAPES)


def test_a_matrix_moves_by_exactly_lr_times_its_norm_and_a_vector_by_adam() -> None:
    parameters = make_parameters()
    before = copy.deepcopy(parameters)
    optimizer = Lamb(parameters.items(), 0.005)
    for name, parameter in parameters.items():
        parameter.grad = gradient(1, name)
    optimizer.step()
    for name, parameter in parameters.items():
        moved = (parameter - before[name]).detach()
        if parameter.ndim > 1:
            torch.testing.assert_close(moved.norm() / before[name].norm(), torch.tensor(0.005))
        else:
            torch.testing.assert_close(moved, -0.005 * gradient(1, name).sign())


def test_zero_norm_matrix_is_refused_by_name_and_zero_vector_is_not() -> None:
    bias = nn.Parameter(torch.zeros(4))
    Lamb([("bias", bias)], 0.1)
    with pytest.raises(InputError, match=r"'block\.out\.weight' \(shape \[2, 3\]\)"):
        Lamb([("bias", bias), ("block.out.weight", nn.Parameter(torch.zeros(2, 3)))], 0.1)


def test_zero_gradient_and_no_decay_give_ratio_one_and_no_movement() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = Lamb([("weight", weight)], 0.1, weight_decay=0.0)
    weight.grad = torch.zeros(2, 3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.ones(2, 3), rtol=0, atol=0)


def test_a_parameter_without_gradient_stays() -> None:
    used, unused = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    optimizer = Lamb([("used", used), ("unused", unused)], 0.1)
    used.grad = torch.ones(2, 3)
    optimizer.step()
    assert not torch.equal(used, torch.ones(2, 3))
    assert torch.equal(unused, torch.ones(2, 3))


def test_state_survives_a_safe_save_and_goes_on_bitwise() -> None:
    whole = make_parameters()
    train(whole, Lamb(whole.items(), 0.005), range(1, 13))

    parts = make_parameters()
    first = Lamb(parts.items(), 0.005)
    train(parts, first, range(1, 6))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = Lamb(parts.items(), 0.005)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    train(parts, second, range(6, 13))
    for name in SHAPES:
        assert torch.equal(parts[name], whole[name]), name


@pytest.mark.parametrize(
    ("weights", "moments"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_moments_are_float32_or_as_wide_as_the_weights(weights: torch.dtype, moments: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(2, 3, dtype=weights))
    optimizer = Lamb([("weight", weight)], 0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].dtype == moments
    assert weight.dtype == weights and float(weight[0, 0].detach()) == pytest.approx(0.9, rel=1e-2)
