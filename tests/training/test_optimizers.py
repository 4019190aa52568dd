"""The built-in adamw; lamb is tested by its formula in test_lamb.py."""

import io

import torch
from torch import nn

from hpdm_core.base.randomness import normal
from hpdm_plugins.training.optimizers import adamw, lamb


def make() -> list[tuple[str, nn.Parameter]]:
    return [("weight", nn.Parameter(normal((37, 11), "w"))), ("bias", nn.Parameter(normal((11,), "b")))]


def train(named: list[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for name, parameter in named:
            parameter.grad = normal(parameter.shape, "g", step, name)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / step
        optimizer.step()


def test_decay_applies_to_matrices_only() -> None:
    named = make()
    start = {name: parameter.detach().clone() for name, parameter in named}
    optimizer = adamw(named, 0.1, weight_decay=0.5)
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(named[0][1].detach(), start["weight"] * 0.95)
    assert torch.equal(named[1][1].detach(), start["bias"])


def test_defaults_are_the_recipe() -> None:
    for factory in (adamw, lamb):
        optimizer = factory(make(), 0.1)
        assert all(group["betas"] == (0.9, 0.99) and group["eps"] == 1e-8 for group in optimizer.param_groups)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_fused_adamw_equals_the_plain_one_and_resumes_bitwise() -> None:
    whole = make()
    optimizer = adamw(whole, 0.01)
    assert all(group["fused"] for group in optimizer.param_groups)
    train(whole, optimizer, range(1, 13))

    plain = make()
    groups = [
        {"params": [plain[0][1]], "weight_decay": 0.01},
        {"params": [plain[1][1]], "weight_decay": 0.0},
    ]
    train(plain, torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), foreach=False), range(1, 13))
    torch.testing.assert_close(whole[0][1], plain[0][1])

    parts = make()
    first = adamw(parts, 0.01)
    train(parts, first, range(1, 6))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = adamw(parts, 0.01)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    train(parts, second, range(6, 13))
    for (name, got), (_, expected) in zip(parts, whole, strict=True):
        assert torch.equal(got, expected), name
