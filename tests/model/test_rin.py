import math

import pytest
import torch
import torch.nn.functional as F

from hpdm_core.base.errors import InputError
from hpdm_core.model import layers
from hpdm_core.model.rin import RIN, RINBlock


def scrambled(module, *, seed=0):
    start = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=start, dtype=torch.float64)
    return module


def norm(weights, prefix, x):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * weights[f"{prefix}.weight"] + weights[f"{prefix}.bias"]


def linear(weights, prefix, x):
    return torch.einsum("bni,oi->bno", x, weights[f"{prefix}.weight"]) + weights[f"{prefix}.bias"]


def attention(weights, prefix, query, source, heads):
    def split(x):
        return x.reshape(*x.shape[:2], heads, -1)

    q = split(linear(weights, f"{prefix}.q", query))
    k = split(linear(weights, f"{prefix}.k", source))
    v = split(linear(weights, f"{prefix}.v", source))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
    shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
    gathered = torch.einsum("bhnm,bmhd->bnhd", shares, v).flatten(2)
    return linear(weights, f"{prefix}.o", gathered)


def gather(weights, prefix, x, source, heads, gelu):
    query = norm(weights, f"{prefix}.query_norm", x)
    keys = query if source is None else norm(weights, f"{prefix}.source_norm", source)
    x = x + attention(weights, f"{prefix}.attention", query, keys, heads)
    hidden = gelu(linear(weights, f"{prefix}.mlp.up", norm(weights, f"{prefix}.mlp_norm", x)))
    return x + linear(weights, f"{prefix}.mlp.down", hidden)


def test_a_block_equals_a_plain_reference(gelu):
    """Condition read, patch read, latent layers, patch write, each with its MLP; all widths differ."""
    block = scrambled(
        RINBlock(
            24,
            10,
            heads=4,
            latent_layers=2,
            latent_heads=3,
            latent_head_dim=6,
            latent_mlp_ratio=3,
            token_mlp_ratio=2,
        )
    )
    start = torch.Generator().manual_seed(1)
    tokens, latents, condition = (
        torch.randn(shape, generator=start, dtype=torch.float64)
        for shape in ((2, 30, 24), (2, 7, 10), (2, 2, 24))
    )
    got_tokens, got_latents = block(tokens, latents, condition)

    weights = dict(block.named_parameters())
    latents = gather(weights, "condition_read", latents, condition, 4, gelu)
    latents = gather(weights, "patch_read", latents, tokens, 4, gelu)
    for layer in range(2):
        latents = gather(weights, f"process.{layer}", latents, None, 3, gelu)
    tokens = gather(weights, "patch_write", tokens, latents, 4, gelu)
    torch.testing.assert_close(got_latents, latents)
    torch.testing.assert_close(got_tokens, tokens)


def test_the_widths_of_a_block():
    block = RINBlock(
        24,
        10,
        heads=4,
        latent_layers=1,
        latent_heads=3,
        latent_head_dim=6,
        latent_mlp_ratio=3,
        token_mlp_ratio=2,
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    assert shapes["patch_read.attention.q.weight"] == (24, 10)
    assert shapes["patch_read.attention.o.weight"] == (10, 24)
    assert shapes["process.0.attention.q.weight"] == (
        18,
        10,
    )  # latent heads x head width, not the latents' width
    assert shapes["patch_write.attention.k.weight"] == (24, 10)
    assert shapes["patch_write.mlp.up.weight"] == (48, 24)
    assert shapes["condition_read.mlp.up.weight"] == (30, 10)


def small():
    return RIN(24, 1, latent_dim=10, latents=7, latent_layers=1, latent_heads=3, latent_head_dim=4, heads=4)


def test_self_conditioning_starts_as_a_no_op():
    backbone = small()
    previous = torch.randn(3, 7, 10)
    expected = backbone.latents.rows.expand(3, -1, -1)
    assert torch.equal(backbone.start(previous, 3), expected)
    assert torch.equal(backbone.start(None, 3), expected)


def test_self_conditioning_equals_a_hand_computed_value(gelu):
    backbone = scrambled(small())
    with torch.no_grad():
        backbone.recall_gain.weight.fill_(1.0)
    weights = dict(backbone.named_parameters())
    for previous in (torch.randn(3, 7, 10, dtype=torch.float64), torch.zeros(3, 7, 10, dtype=torch.float64)):
        hidden = gelu(linear(weights, "recall.up", norm(weights, "recall_norm", previous)))
        recalled = previous + linear(weights, "recall.down", hidden)
        expected = backbone.latents.rows + norm(weights, "recall_gain", recalled)
        torch.testing.assert_close(backbone.start(previous, 3), expected)
    torch.testing.assert_close(backbone.start(None, 3), expected)  # none stands for zeros
    assert not torch.allclose(expected, backbone.latents.rows.expand(3, -1, -1), atol=0.1)


def test_heads_must_divide_the_width():
    with pytest.raises(InputError, match=r"heads: 5 does not divide model\.token_dim 24"):
        RIN(24, 1, heads=5)


def gradients(layer, *inputs):
    leaves = [each.clone().requires_grad_() for each in inputs]
    value = layer(*leaves)
    value.square().sum().backward()
    made = [value.detach(), *(leaf.grad for leaf in leaves), *(weight.grad for weight in layer.parameters())]
    layer.zero_grad()
    return made


def test_many_keys_of_a_head_lie_together(monkeypatch):
    """Where they do not, fused attention on the CPU is slower; the result is the same."""
    seen = []
    attend = F.scaled_dot_product_attention

    def spy(q, k, v):
        seen.append((k.is_contiguous(), v.is_contiguous()))
        return attend(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attention = scrambled(layers.Attention(6, 8, heads=2, head_dim=4))
    query, source = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 6), (2, 9, 8)))
    few = gradients(attention, query, source)
    monkeypatch.setattr(layers, "FEW_KEYS", 8)
    for one, other in zip(gradients(attention, query, source), few, strict=True):
        torch.testing.assert_close(one, other)
    assert seen == [(False, False), (True, True)]
