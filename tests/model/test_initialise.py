import math

import pytest
import torch
from torch import nn

from hpdm_core.model.fusion import ContextFusion
from hpdm_core.model.initialise import initialise


def parameters(model):
    return dict(model.named_parameters())


def test_arms_start_equal_in_every_parameter_of_equal_name_and_shape(build):
    deep, none = parameters(build("deep", scramble=False)), parameters(build("none", scramble=False))
    longer = parameters(build("deep", scramble=False, levels_per_block=(1, 1, 1, 2, 2, 3, 3)))
    for other in (none, longer):
        shared = [name for name in deep if name in other and deep[name].shape == other[name].shape]
        assert len(shared) > 100
        assert all(torch.equal(deep[name], other[name]) for name in shared)


def test_another_seed_and_another_name_start_elsewhere(build):
    one, two = (parameters(build(scramble=False, seed=seed)) for seed in (1, 2))
    name = "backbone.blocks.{}.patch_read.attention.q.weight"
    assert not torch.equal(one[name.format(0)], two[name.format(0)])
    assert not torch.equal(one[name.format(0)], one[name.format(1)])


def test_the_start_does_not_depend_on_what_was_drawn_before(build):
    torch.manual_seed(1)
    one = parameters(build(scramble=False))
    torch.manual_seed(2)
    two = parameters(build(scramble=False))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_distributions_are_rins(build):
    model = build(scramble=False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "maps" not in name:
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), name
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
            assert (module.weight == (0.0 if name.endswith("recall_gain") else 1.0)).all(), name
            assert not module.bias.any(), name
    for name, parameter in model.named_parameters():
        if name.endswith("rows"):
            assert parameter.abs().max() <= 0.04, name
            assert 0.012 < parameter.std() < 0.022, name  # 0.88 * 0.02 for a cut at two deviations


def test_a_fusion_starts_near_a_no_op(build):
    model = build(scramble=False)
    weight = model.fusion.maps["3"].weight
    assert torch.equal(weight[:, :24], torch.eye(24))
    assert weight[:, 24:].std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.fusion.maps["3"].bias.any()


def test_a_plugins_own_layers_keep_what_they_drew(build):
    class Foreign(ContextFusion):
        def __init__(self, shape):
            super().__init__()
            self.layer = nn.Linear(shape.token_dim, shape.token_dim)
            nn.init.constant_(self.layer.weight, 7.0)

    assert (build(Foreign, scramble=False).fusion.layer.weight == 7).all()


def test_the_start_can_be_that_of_small_models(build):
    usual, small = build(scramble=False), build(scramble=False)
    initialise(small, seed=0, table_std=0.5, zero_residual=True)
    initialise(usual, seed=0)
    for name, parameter in small.named_parameters():
        if (
            name.endswith(("attention.o.weight", "mlp.down.weight", "recall.down.weight"))
            or name == "output.weight"
        ):
            assert not parameter.any(), name
        elif name.endswith("rows"):
            torch.testing.assert_close(parameter, 25 * usual.get_parameter(name))
        else:
            assert torch.equal(parameter, usual.get_parameter(name)), name
