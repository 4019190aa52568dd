"""Allocations, noise scalings and samplers, coordinate samplers; all parts of these rooms register."""

import collections
import itertools
import math

import pytest
import torch

from hpdm_core.base.randomness import generator
from hpdm_core.plugins.families import FAMILIES
from hpdm_core.pyramid import Pyramid
from hpdm_plugins.diffusion import coordinates, noise, objectives
from hpdm_plugins.model import allocations, backbones, fusions

SMALL = Pyramid(video=(8, 24, 40), patch=(2, 6, 10), token=(1, 3, 5), levels=3)
UCF = Pyramid(video=(64, 256, 256), patch=(16, 64, 64), token=(1, 4, 4), levels=3)


@pytest.mark.parametrize(
    ("blocks", "levels", "expected"),
    [
        (6, 3, (1, 1, 2, 2, 3, 3)),
        (6, 4, (1, 2, 2, 3, 3, 4)),
        (1, 3, (3,)),
        (4, 1, (1, 1, 1, 1)),
        (2, 3, (1, 3)),
    ],
)
def test_the_linear_allocation(blocks, levels, expected):
    assert allocations.linear(blocks, levels) == expected


def test_the_other_allocations():
    assert allocations.full(4, 3) == (3, 3, 3, 3)
    assert allocations.explicit(3, 2, levels_per_block=(1, 1, 2)) == (1, 1, 2)


def test_noise_scalings():
    assert noise.constant(3) == (4.0, 4.0, 4.0)
    assert noise.exponential(3) == (4.0, 8.0, 16.0)
    assert noise.exponential(2, first=1.0, ratio=3.0) == (1.0, 3.0)


def draws(sampler, count=4000):
    made = [sampler.draw(generator(7, "sigma", 0, index)) for index in range(count)]
    return torch.stack([sigma for sigma, _ in made]), torch.stack([in_loss for _, in_loss in made])


def test_independent_noise_is_lognormal_and_independent_across_levels():
    sigma, in_loss = draws(noise.Independent((4.0, 8.0, 16.0)))
    logs = sigma.log()
    torch.testing.assert_close(logs.mean(dim=0), torch.full((3,), -1.2), atol=0.06, rtol=0)
    torch.testing.assert_close(logs.std(dim=0), torch.full((3,), 1.2), atol=0.05, rtol=0)
    off_diagonal = torch.corrcoef(logs.T)[~torch.eye(3, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 0.05
    assert in_loss.all()


def test_shared_noise_is_level_zeros_draw_on_every_level():
    sampler, paper = noise.Shared((4.0, 8.0, 16.0), mean=0.5), noise.Independent((4.0, 8.0, 16.0), mean=0.5)
    sigma, in_loss = sampler.draw(generator(1, "sigma"))
    assert sigma.tolist() == [paper.draw(generator(1, "sigma"))[0][0].item()] * 3
    assert in_loss.all()


def test_clean_parents_stand_below_a_random_target_in_a_share_of_the_videos():
    scales = (4.0, 8.0, 16.0)
    sigma, in_loss = draws(noise.CleanParents(scales))
    paper, _ = draws(noise.Independent(scales))
    below = (~in_loss).sum(dim=1)  # the number of clean levels is the target
    counts = collections.Counter(below.tolist())
    assert set(counts) == {0, 1, 2}
    assert counts[0] / len(sigma) == pytest.approx(0.75, abs=0.03)
    assert counts[1] / len(sigma) == pytest.approx(0.125, abs=0.02)
    clean = torch.tensor([0.05 / scale for scale in scales])
    for levels in (1, 2):
        rows = below == levels
        torch.testing.assert_close(sigma[rows][:, :levels], clean[:levels].expand(int(rows.sum()), -1))
        assert (~in_loss[rows])[:, :levels].all()
    assert torch.equal(sigma[in_loss], paper[in_loss])  # what counts is drawn as in the paper's recipe


def test_clean_parents_need_a_parent():
    sigma, in_loss = noise.CleanParents((4.0,), share=1.0).draw(generator(0))
    assert in_loss.tolist() == [True]
    assert sigma.shape == (1,)


def test_a_clean_stream_feeds_every_level_in_every_draw():
    sampler = noise.CleanStream((4.0, 8.0, 16.0), mean=0.5, std=0.7)
    assert [(slot.level, slot.sources) for slot in sampler.slots] == [
        (0, ()),
        (0, ()),
        (1, (0,)),
        (1, (0,)),
        (2, (0, 2)),
    ]
    sigma, in_loss = draws(sampler)
    assert in_loss.unique(dim=0).tolist() == [[False, True, False, True, True]]
    clean = sigma[:, [0, 2]]
    torch.testing.assert_close(clean, torch.tensor([0.05 / 4, 0.05 / 8]).expand_as(clean))
    logs = sigma[:, [1, 3, 4]].log()
    assert logs.mean().item() == pytest.approx(0.5, abs=0.03)
    assert logs.std().item() == pytest.approx(0.7, abs=0.03)
    assert logs.T.corrcoef().fill_diagonal_(0).abs().max() < 0.05


def test_a_clean_stream_of_one_level_is_that_level():
    sampler = noise.CleanStream((4.0,))
    assert [(slot.level, slot.sources) for slot in sampler.slots] == [(0, ())]
    assert sampler.draw(generator(0))[1].tolist() == [True]


@pytest.mark.parametrize("overlap", [(), ("h", "w")])
def test_sampled_tiles_are_what_tiled_sampling_visits(overlap):
    sampler = coordinates.SampledTiles(SMALL, overlap=overlap)
    tiles = {level: set(SMALL.tiles(level, overlap)) for level in (1, 2)}
    visited = {level: set() for level in (1, 2)}
    for index in range(4000):
        rows = [tuple(row) for row in sampler.sample(generator(3, "offsets", 0, index)).tolist()]
        finest = rows[2] in tiles[2] and SMALL.chain(2, rows[2]) == tuple(rows[:2])
        middle = rows[1] in tiles[1] and rows[2] in tiles[2]
        assert finest or middle
        for level in (1, 2):
            if rows[level] in tiles[level] and SMALL.chain(level, rows[level]) == tuple(rows[:level]):
                visited[level].add(rows[level])
    assert visited == tiles


def test_sampled_tiles_of_one_level_are_the_whole_video():
    pyramid = Pyramid((4, 8, 8), (4, 8, 8), (1, 2, 2), 1)
    assert coordinates.SampledTiles(pyramid).sample(generator(0)).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    "sampler", [coordinates.NestedUniform, coordinates.NestedTopDown, coordinates.SampledTiles]
)
@pytest.mark.parametrize("pyramid", [SMALL, Pyramid((6, 36, 40), (6, 4, 10), (2, 1, 5), 3)])
def test_offsets_are_nested_and_on_their_lattices(sampler, pyramid):
    made = sampler(pyramid)
    for index in range(200):
        offsets = made.sample(generator(3, "offsets", 0, index))
        assert offsets.dtype == torch.int64
        assert offsets.shape == (3, 3)
        assert offsets[0].tolist() == [0, 0, 0]
        for level, axis in itertools.product((1, 2), range(3)):
            q, patch = pyramid.ratio[axis], pyramid.patch[axis]
            above, below = int(offsets[level - 1, axis]), int(offsets[level, axis])
            assert above * q <= below <= above * q + (q - 1) * patch


def frequencies(sampler, count=6000):
    """How often each (level, axis, offset) was drawn."""
    seen = collections.Counter()
    for index in range(count):
        offsets = sampler.sample(generator(5, "offsets", 0, index)).tolist()
        seen.update((level, axis, offsets[level][axis]) for level in range(3) for axis in range(3))
    return {key: number / count for key, number in seen.items()}


def test_nested_uniform_draws_the_finest_offset_evenly():
    seen = frequencies(coordinates.NestedUniform(SMALL))
    for axis, (size, patch) in enumerate(zip(SMALL.video, SMALL.patch, strict=True)):
        places = size - patch + 1
        shares = [seen.get((2, axis, offset), 0) for offset in range(places)]
        spread = 5 * math.sqrt(1 / places / 6000)
        assert all(abs(share - 1 / places) < spread for share in shares)


def test_nested_uniform_draws_an_ancestor_evenly_among_those_that_contain_the_patch():
    sampler = coordinates.NestedUniform(SMALL)
    parents = collections.defaultdict(collections.Counter)
    for index in range(6000):
        offsets = sampler.sample(generator(6, "offsets", 0, index))
        parents[int(offsets[2, 1])][int(offsets[1, 1])] += 1
    for child, seen in parents.items():
        expected = [above for above in range(7) if above * 2 <= child and child + 6 <= (above + 6) * 2]
        assert set(seen) <= set(expected)
        total = sum(seen.values())
        spread = 5 * math.sqrt(total / len(expected))
        assert all(abs(seen[above] - total / len(expected)) < spread for above in expected)


def test_nested_topdown_starves_the_border():
    """P(first frame offset) is (1 / 3)^2: 3 places on each of two levels; even would be 1 / 7."""
    seen = frequencies(coordinates.NestedTopDown(SMALL))
    assert seen[2, 0, 0] == pytest.approx(1 / 9, abs=0.015)
    assert seen[2, 1, 0] == pytest.approx(1 / 49, abs=0.007)
    assert seen[1, 2, 4] == pytest.approx(1 / 11, abs=0.015)


def test_the_papers_setup_has_49_first_frames():
    """P(frame offset 0) = 1/49 when even, 1/289 top-down."""
    count = 6000
    starts = {}
    for name, sampler in [("even", coordinates.NestedUniform(UCF)), ("top", coordinates.NestedTopDown(UCF))]:
        made = [int(sampler.sample(generator(9, index))[2, 0]) for index in range(count)]
        assert max(made) == 48
        starts[name] = made.count(0) / count
    assert starts["even"] == pytest.approx(1 / 49, abs=0.008)
    assert starts["top"] == pytest.approx(1 / 289, abs=0.003)


@pytest.mark.parametrize("module", [allocations, backbones, coordinates, fusions, noise, objectives])
def test_every_built_in_part_is_registered_with_its_source(module):
    hooks = [name for name in vars(module) if name.startswith("register_")]
    known = {family.hook for family in FAMILIES.values()}
    assert hooks
    for hook in hooks:
        assert hook in known
        seen = {}

        def register(name, factory, *, source, seen=seen):
            seen[name] = source

        getattr(module, hook)(register)
        assert seen
        assert all(seen.values())
