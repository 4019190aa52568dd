import pytest
import torch
import torch.nn.functional as F

from hpdm_core.model.interpolation import cover, sample_tokens

GRID, CHILD = (4, 6, 10), (3, 5, 7)


def by_grid_sample(tokens, positions):
    f, h, w = positions
    shape = (tokens.shape[0], *CHILD)
    axes = [w[:, None, None, :], h[:, None, :, None], f[:, :, None, None]]
    grid = torch.stack([axis.expand(shape) for axis in axes], dim=-1)
    volume = tokens.transpose(1, 2).unflatten(2, GRID)
    sampled = F.grid_sample(volume, 2 * grid - 1, align_corners=False, padding_mode="border")
    return sampled.flatten(2).transpose(1, 2)


def case(extent, *, seed=0):
    start = torch.Generator().manual_seed(seed)
    tokens = torch.randn(3, 4 * 6 * 10, 11, generator=start)
    corners = torch.rand(3, 3, generator=start) * (1 - extent)
    corners[2] = torch.tensor([0.0, 1 - extent, 1 - extent])  # both borders
    positions = [
        corners[:, axis, None] + extent * (torch.arange(cells) + 0.5) / cells
        for axis, cells in enumerate(CHILD)
    ]
    return tokens, positions, torch.randn(3, 3 * 5 * 7, 11, generator=start)


@pytest.mark.parametrize("told", [False, True], ids=["extent looked for", "extent told"])
@pytest.mark.parametrize("extent", [1.0, 0.5, 0.25, 0.3, 1.2])
@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_the_library_in_value_and_gradient(extent, told, seed):
    tokens, positions, upstream = case(extent, seed=seed)
    ours, theirs = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    value = sample_tokens(ours, GRID, positions, (extent,) * 3 if told else None)
    expected = by_grid_sample(theirs, positions)
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)
    value.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=0)


def test_only_the_covered_part_is_touched():
    tokens, _, _ = case(0.25)
    positions = [torch.full((3, cells), 0.5) for cells in CHILD]
    tokens = tokens.unflatten(1, GRID)
    tokens[:, 0], tokens[:, :, 0], tokens[..., 0, :] = torch.nan, torch.nan, torch.nan
    assert sample_tokens(tokens.flatten(1, 3), GRID, positions).isfinite().all()


def test_rows_do_not_mix():
    tokens, positions, _ = case(0.5)
    expected = sample_tokens(tokens, GRID, positions)
    for row in range(3):
        alone = sample_tokens(tokens[row, None], GRID, [axis[row, None] for axis in positions])
        torch.testing.assert_close(alone[0], expected[row])


@pytest.mark.parametrize("extent", [0.5, 0.25, 0.3])
@pytest.mark.parametrize("phase", [0.0, 1e-7, -1e-7, 0.25, 0.5, 0.75, 0.99999])
def test_the_told_extent_covers_every_sample_wherever_it_begins(extent, phase):
    """Each sample's weights sum to one, so none of the cells that it needs lies outside the box."""
    size, samples = 16, 16
    first = (2 + phase + 0.5) / size  # the first sample, in the parent's unit frame
    axis = (first + extent * torch.arange(samples) / samples)[None]
    found = cover([axis] * 3, (size,) * 3, (extent,) * 3)
    assert found.cells < (extent * size + 3) ** 3
    for weights in found.weights:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, samples), atol=2e-5, rtol=0)


def test_a_linear_map_may_be_applied_before_sampling():
    tokens, positions, _ = case(0.5)
    layer = torch.nn.Linear(11, 7)
    found = cover(positions, GRID, (0.5,) * 3)
    assert found.cells < 4 * 6 * 10
    expected = layer(sample_tokens(tokens, GRID, positions))
    torch.testing.assert_close(found.sample(layer(found.cut(tokens))), expected, atol=1e-5, rtol=0)
