import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hpdm_core.model.fusion import ContextFusion, FusionShape, Source
from hpdm_core.pyramid import Pyramid
from hpdm_plugins.model.fusions import DeepFusion, DeepLevels, DeepPixels, NoFusion, ShallowConcat

PYRAMID = Pyramid(video=(16, 24, 40), patch=(4, 6, 10), token=(1, 1, 1), levels=3)
SHAPE = FusionShape(token_dim=8, grid=PYRAMID.grid, patch=PYRAMID.patch, levels_per_block=(1, 2, 3))
CHAINS = torch.tensor(
    [
        [[0, 0, 0], [2, 3, 5], [5, 8, 13]],
        [[0, 0, 0], [4, 6, 10], [12, 18, 30]],
        [[0, 0, 0], [1, 5, 2], [3, 12, 7]],
    ]
)  # [row, level, axis]


def coords(level):
    return PYRAMID.coords(level, CHAINS[:, level])


def source(level, tokens=None, *, seed=0):
    start = torch.Generator().manual_seed(seed + level)
    return Source(
        level=level,
        coords=coords(level),
        sigma=torch.rand(3, generator=start),
        sigma_embedding=torch.randn(3, 8, generator=start),
        noisy=torch.randn(3, 3, *PYRAMID.patch, generator=start),
        tokens=torch.randn(3, 240, 8, generator=start) if tokens is None else tokens,
    )


def places(level):
    """Token centres as features [B, N, 3]."""
    return coords(level).centres(PYRAMID.grid).transpose(1, 2)


def scrambled(fusion):
    start = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=start)
    return fusion


@pytest.mark.parametrize("level", [1, 2])
def test_context_of_coordinates_is_the_childs_own_coordinates(level):
    """Eq 8: axis order, half cells and nesting, wherever no parent border is within half a token."""
    fusion = DeepFusion(SHAPE)
    sources = [source(k, places(k)) for k in range(level)]
    context, own = fusion.mean(coords(level), sources), places(level)
    inside = torch.ones(3, 240, dtype=torch.bool)
    for k in range(level):
        axes = coords(level).within(coords(k), PYRAMID.grid)
        f, h, w = (
            (u * cells >= 0.5) & (u * cells <= cells - 0.5)
            for u, cells in zip(axes, PYRAMID.grid, strict=True)
        )
        inside &= (f[:, :, None, None] & h[:, None, :, None] & w[:, None, None, :]).flatten(1)
    assert inside.float().mean() > 0.4
    torch.testing.assert_close(context[inside], own[inside], atol=1e-5, rtol=0)


def test_context_is_the_mean_over_levels():
    fusion = DeepFusion(SHAPE)
    flat = [source(k, torch.full((3, 240, 8), float(value))) for k, value in enumerate((2, 5))]
    torch.testing.assert_close(fusion.mean(coords(2), flat), torch.full((3, 240, 8), 3.5))


@pytest.mark.parametrize("coordinates", [True, False])
def test_deep_fusion_is_one_linear_of_the_concatenation(coordinates):
    fusion = scrambled(DeepFusion(SHAPE, coordinates=coordinates))
    tokens = torch.randn(3, 240, 8)
    sources = [source(0), source(1)]
    context = fusion.token_context(2, 2, coords(2), sources)
    fused = fusion.fuse(2, 2, tokens, context, coords(2), torch.ones(3))
    parts = [tokens, fusion.mean(coords(2), sources)] + ([places(2)] if coordinates else [])
    torch.testing.assert_close(fused, fusion.maps["2"](torch.cat(parts, dim=-1)), atol=1e-5, rtol=1e-5)


def sampled(child, parent, features, grid):
    """``features`` [B, D, *grid] of level ``parent`` at the cells of level ``child``, by torch's own sampler."""
    f, h, w = (2 * axis - 1 for axis in coords(child).within(coords(parent), grid))
    axes = (w[:, None, None, :], h[:, None, :, None], f[:, :, None, None])
    places = torch.stack([axis.expand(3, *grid) for axis in axes], dim=-1)
    return F.grid_sample(features, places, align_corners=False, padding_mode="border")


def features_at(child, parent, tokens, grid):
    """Tokens [B, N, D] of a parent at a child's token centres."""
    return sampled(child, parent, tokens.transpose(1, 2).unflatten(2, grid), grid).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("coordinates", [True, False])
@pytest.mark.parametrize("grid", [PYRAMID.grid, (1, 1, 2)], ids=["many samples", "few samples"])
def test_deep_levels_is_one_linear_of_all_levels_side_by_side(coordinates, grid):
    """Nearest first, for a child that has all the ancestors that its block allows and for one with fewer."""
    tokens_per_patch = math.prod(grid)
    shape = FusionShape(token_dim=8, grid=grid, patch=PYRAMID.patch, levels_per_block=(1, 2, 3))
    fusion = scrambled(DeepLevels(shape, coordinates=coordinates))
    own, *features = (torch.randn(3, tokens_per_patch, 8) for _ in range(3))
    parents = [source(k, features[k]) for k in range(2)]
    for level, sources in ((1, parents[:1]), (2, parents)):
        context = fusion.token_context(2, level, coords(level), sources)
        fused = fusion.fuse(2, level, own, context, coords(level), torch.ones(3))
        nearest_first = [features_at(level, k, features[k], grid) for k in reversed(range(level))]
        missing = [torch.zeros(3, tokens_per_patch, 8)] * (2 - level)
        here = [coords(level).centres(grid).transpose(1, 2)] if coordinates else []
        parts = torch.cat([own, *nearest_first, *missing, *here], dim=-1)
        expected = torch.einsum("bni,oi->bno", parts, fusion.maps["2"].weight) + fusion.maps["2"].bias
        torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-5)


def test_deep_levels_has_as_many_maps_as_its_block_has_coarser_levels():
    shapes = {block: tuple(layer.weight.shape) for block, layer in DeepLevels(SHAPE).maps.items()}
    assert shapes == {"1": (8, 8 + 8 + 3), "2": (8, 8 + 2 * 8 + 3)}
    assert tuple(DeepLevels(SHAPE, coordinates=False).maps["2"].weight.shape) == (8, 24)


@pytest.mark.parametrize("fusion", [DeepFusion, DeepPixels, DeepLevels])
def test_deep_fusions_start_near_a_no_op(fusion):
    made = fusion(SHAPE)
    tokens, sources = torch.randn(3, 240, 8), [source(0), source(1)]
    fused = made.fuse(2, 2, tokens, made.token_context(2, 2, coords(2), sources), coords(2), torch.ones(3))
    assert 0 < (fused - tokens).square().mean() < 0.02 * tokens.square().mean()


def test_deep_pixels_is_deep_fusion_with_the_parents_pixels():
    deep, fusion = DeepFusion(SHAPE), DeepPixels(SHAPE)
    fusion.load_state_dict(scrambled(deep).state_dict())
    sources = [source(0), source(1)]
    contexts = [made.token_context(2, 2, coords(2), sources) for made in (deep, fusion)]
    assert torch.equal(*contexts)
    assert fusion.reads_tokens and (deep.extra_channels, fusion.extra_channels) == (0, 3)
    expected = sampled(2, 1, sources[1].noisy, PYRAMID.patch)
    blind = [replace(each, tokens=None) for each in sources]  # as the network calls it
    torch.testing.assert_close(fusion.pixel_context(2, coords(2), blind), expected, atol=1e-5, rtol=0)
    assert deep.pixel_context(2, coords(2), blind) is None
    grey = FusionShape(8, PYRAMID.grid, PYRAMID.patch, (1, 2, 3), channels=1)
    assert DeepPixels(grey).extra_channels == 1


def test_deep_fusion_has_one_map_per_block_with_more_than_one_level():
    maps = DeepFusion(SHAPE).maps
    assert {block: tuple(layer.weight.shape) for block, layer in maps.items()} == {"1": (8, 19), "2": (8, 19)}
    assert tuple(DeepFusion(SHAPE, coordinates=False).maps["1"].weight.shape) == (8, 16)
    assert tuple(NoFusion(SHAPE).maps["1"].weight.shape) == (8, 11)
    assert NoFusion(SHAPE, coordinates=False).maps is None


@pytest.mark.parametrize("fusion", [DeepFusion, DeepPixels, DeepLevels])
def test_detached_features_still_train_the_map(fusion):
    fusion = fusion(SHAPE, detach=True)
    tokens = torch.randn(3, 240, 8, requires_grad=True)
    fusion.token_context(1, 1, coords(1), [source(0, tokens)]).square().sum().backward()
    assert tokens.grad is None
    assert fusion.maps["1"].weight.grad[:, 8:].any()


def test_deep_fusion_says_what_is_missing():
    fusion = DeepFusion(SHAPE)
    blind = Source(0, coords(0), torch.ones(3), torch.ones(3, 8), torch.ones(3, 3, 4, 6, 10))
    with pytest.raises(ValueError, match="no tokens of level 0"):
        fusion.token_context(1, 1, coords(1), [blind])
    with pytest.raises(ValueError, match="no sources"):
        fusion.token_context(1, 1, coords(1), [])
    with pytest.raises(ValueError, match="no context"):
        fusion.fuse(1, 1, torch.ones(3, 240, 8), None, coords(1), torch.ones(3))


def test_shallow_context_is_the_parents_pixels_at_the_childs():
    fusion = ShallowConcat(SHAPE)
    parent = source(1)
    f, h, w = (2 * axis - 1 for axis in coords(2).within(parent.coords, PYRAMID.patch))
    shape = (3, *PYRAMID.patch)
    grid = torch.stack(
        [axis.expand(shape) for axis in (w[:, None, None, :], h[:, None, :, None], f[:, :, None, None])],
        dim=-1,
    )
    expected = F.grid_sample(parent.noisy, grid, align_corners=False, padding_mode="border")
    assert fusion.extra_channels == 3
    torch.testing.assert_close(
        fusion.pixel_context(2, coords(2), [source(0), parent]), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("coordinates", [True, False])
def test_shallow_fusion_adds_the_parents_noise_level_once(coordinates):
    fusion = scrambled(ShallowConcat(SHAPE, coordinates=coordinates))
    tokens, sources = torch.randn(3, 240, 8), [source(0)]
    contexts = {block: fusion.token_context(block, 1, coords(1), sources) for block in (1, 2)}
    assert contexts[2] is None
    for block in (1, 2):
        expected = tokens + sources[0].sigma_embedding[:, None] if block == 1 else tokens
        if coordinates:
            expected = fusion.maps[str(block)](torch.cat([expected, places(1)], dim=-1))
        fused = fusion.fuse(block, 1, tokens, contexts[block], coords(1), torch.ones(3))
        torch.testing.assert_close(fused, expected)


def test_no_fusion_tells_the_place_or_nothing():
    tokens = torch.randn(3, 240, 8)
    fusion = scrambled(NoFusion(SHAPE))
    expected = fusion.maps["1"](torch.cat([tokens, places(1)], dim=-1))
    torch.testing.assert_close(
        fusion.fuse(1, 1, tokens, None, coords(1), torch.ones(3)), expected, atol=1e-5, rtol=1e-5
    )
    for nothing in (NoFusion(SHAPE, coordinates=False), ContextFusion()):
        assert torch.equal(nothing.fuse(1, 1, tokens, None, coords(1), torch.ones(3)), tokens)
        assert nothing.token_context(1, 1, coords(1), [source(0)]) is None
        assert nothing.pixel_context(1, coords(1), [source(0)]) is None
