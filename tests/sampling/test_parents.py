"""The ancestors of tiles: each encoded once, kept as long as asked, each row its own."""

import itertools

import pytest
import torch

from hpdm_core.sampling.parents import Ancestors
from hpdm_core.sampling.tiles import Layout, parent_by_parent, tile_batches


@pytest.fixture
def level_two(make_assembly, make_denoiser):
    """Tiles of level 2 of two videos, and their ancestors, whose pixels tell where they come from."""
    assembly = make_assembly(overlap=("h", "w"))
    layout = Layout(assembly.pyramid, "area", torch.tensor([3, 4]))
    offsets = parent_by_parent(2, assembly.pyramid.tiles(2, ("h", "w")), layout)
    states = [torch.randn(2, 1, *assembly.pyramid.size(k)) for k in range(2)]
    denoiser = make_denoiser(None)
    ancestors = Ancestors(denoiser, layout, states, [0.1, 0.2], size=7)
    return assembly.pyramid, denoiser, ancestors, states, offsets, tile_batches(2, offsets, layout, size=10)


def test_each_row_gets_its_own_ancestors(level_two):
    pyramid, _, ancestors, states, offsets, batches = level_two
    ancestors.encode(batches)
    for batch in batches:
        sources = ancestors.contexts(batch)
        for row, (tile, video) in enumerate(zip(batch.tiles.tolist(), batch.videos.tolist(), strict=True)):
            for k, (f, h, w) in enumerate(pyramid.chain(2, offsets[tile])):
                expected = states[k][video, :, f : f + 2, h : h + 6, w : w + 10]
                assert torch.equal(sources[k].z[row], expected)
                assert sources[k].label[row] == 3 + video
                assert sources[k].sigma[row] == torch.tensor([0.1, 0.2][k])


def test_each_ancestor_is_encoded_once_in_full_batches(level_two):
    pyramid, denoiser, ancestors, _, offsets, batches = level_two
    ancestors.encode(batches)
    ancestors.encode(batches)
    rows = [len(made.z) for made, _ in denoiser.encoded if made.level == 1]
    assert sum(rows) == 2 * len({pyramid.chain(2, offset) for offset in offsets})
    assert set(rows[:-1]) == {7}
    assert sum(len(made.z) for made, _ in denoiser.encoded if made.level == 0) == 2


def test_what_is_dropped_is_encoded_again_and_what_is_kept_is_not(level_two):
    _, denoiser, ancestors, _, _, batches = level_two
    ancestors.encode(batches)
    ancestors.keep(batches[:1])
    count = len(denoiser.encoded)
    ancestors.encode(batches[:1])
    assert len(denoiser.encoded) == count
    ancestors.keep([])
    ancestors.encode(batches[:1])
    assert len(denoiser.encoded) > count


def test_tiles_follow_their_parents(level_two):
    pyramid, _, _, _, offsets, _ = level_two
    chains = [pyramid.chain(2, offset) for offset in offsets]
    changes = sum(first != second for first, second in itertools.pairwise(chains))
    assert changes + 1 == len(set(chains)) < len(offsets)
    assert sorted(offsets) == sorted(pyramid.tiles(2, ("h", "w")))
