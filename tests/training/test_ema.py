"""The weight average against its recursion."""

import torch
from torch import nn

from hpdm_core.base.randomness import normal
from hpdm_core.training.optimizer.ema import WeightAverage


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


def set_weights(model: nn.Module, step: int) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(normal(tensor.shape, "ema", step, name))
        else:
            tensor.fill_(step)


def test_every_tensor_follows_the_recursion() -> None:
    model = Toy()
    set_weights(model, 0)
    average = WeightAverage(model, halflife=3.0)
    expected = {name: tensor.double() for name, tensor in model.state_dict().items()}
    decay = 0.5 ** (1 / 3)
    for step in range(1, 9):
        set_weights(model, step)
        average.update(model)
        for name, tensor in model.state_dict().items():
            blended = decay * expected[name] + (1 - decay) * tensor.double()
            expected[name] = blended if tensor.is_floating_point() else tensor.double()
    assert set(expected) == set(average.average.state_dict())
    for name, tensor in average.average.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_after_the_halflife_half_of_the_start_is_left() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    average = WeightAverage(model, halflife=4)
    nn.init.zeros_(model.weight)
    for _ in range(4):
        average.update(model)
    torch.testing.assert_close(average.average.weight.item(), 0.5)


def test_the_average_is_apart_from_the_model() -> None:
    model = Toy()
    average = WeightAverage(model, halflife=2.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    assert all(torch.isfinite(tensor).all() for tensor in average.average.state_dict().values())
    assert not any(parameter.requires_grad for parameter in average.average.parameters())
    assert model.linear.weight.requires_grad
    assert not average.average.training
