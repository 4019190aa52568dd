"""The tiled cascade against oracles: fakes whose right answer is known."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.base.randomness import normal
from hpdm_core.pyramid import crop, downsample
from hpdm_core.sampling import sample
from hpdm_core.sampling.cache import NoContexts
from hpdm_core.sampling.cascade import label_of, tiled_denoise
from hpdm_core.sampling.tiles import Layout, tile_batches

SUBSETS = [set(axes) for n in range(4) for axes in itertools.combinations("fhw", n)]


def own_offsets(pyramid, level, offset):
    """Fractions of the video -> the level's own pixels."""
    return (offset.double() * torch.tensor(pyramid.size(level))).round().long()


def names(axes):
    return "".join(sorted(axes)) or "none"


@pytest.mark.parametrize("overlap", SUBSETS, ids=names)
def test_oracle_cascade_returns_the_video(overlap, make_assembly, make_denoiser):
    """The answer is the patch at its coordinates, so whatever is cut, placed or averaged wrongly shows."""
    assembly = make_assembly(overlap=tuple(overlap), context_sigma_eff=0.0)
    pyramid = assembly.pyramid
    full = torch.rand(1, 1, *pyramid.video, generator=torch.Generator().manual_seed(1)) * 2 - 1
    wanted = [downsample(full, pyramid.pitch(level), "area") for level in range(3)]

    def cut(level, offset):
        own = own_offsets(pyramid, level, offset)
        return crop(wanted[level].expand(len(own), -1, -1, -1, -1), own, pyramid.patch)

    def answer(level, z, sigma, coords, contexts):
        for source in (
            contexts or ()
        ):  # the parents show the finished video where they say they lie, around the child
            assert torch.allclose(
                source.z * denoiser.sigma_in[source.level], cut(source.level, source.offset), atol=1e-5
            )
            extent = torch.tensor(pyramid.scale(source.level))
            assert bool((source.offset <= coords.offset + 1e-6).all())
            assert bool((source.offset + extent >= coords.offset + coords.scale - 1e-6).all())
        assert len(contexts or ()) == level
        return cut(level, coords.offset)

    denoiser = make_denoiser(answer)
    made = sample(assembly, denoiser, [0, 1], [-1, -1])
    for level in range(3):
        assert made[level].shape == (2, 1, *pyramid.size(level))
        assert torch.allclose(made[level], wanted[level].expand_as(made[level]), atol=1e-5)


def squash(level, z, sigma, coords, contexts):
    """tanh of the tile's mean, everywhere: depends on the whole tile."""
    mean = z.mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.tanh(mean).expand_as(z)


def test_tiles_are_averaged_at_every_step(make_assembly, make_denoiser):
    """Against a plain numpy loop; blending finished tiles at the end gives something else."""
    assembly = make_assembly(
        video=(4, 6, 10), patch=(2, 6, 10), levels=2, overlap=("f",), steps=(3,), sigma_eff_max=(3.0,)
    )
    made = sample(assembly, make_denoiser(squash), [5], [-1])[1][0, 0].double().numpy()

    sigmas = assembly.solver.sigmas(1)
    start = normal((1, 4, 6, 10), 0, "sampling", 5, 1, 0)[0].double().numpy() * sigmas[0]
    tiles = [slice(0, 2), slice(1, 3), slice(2, 4)]
    z = start.copy()
    for sigma, following in itertools.pairwise(sigmas):
        total, counts = np.zeros_like(z), np.zeros_like(z)
        for tile in tiles:
            total[tile] += np.tanh(z[tile].mean())
            counts[tile] += 1
        z = z + (following - sigma) * (z - total / counts / 2.0) / sigma
    assert np.abs(made - 2.0 * z).max() < 1e-5

    ends, counts = np.zeros_like(z), np.zeros_like(z)
    for tile in tiles:
        part = start[tile].copy()
        for sigma, following in itertools.pairwise(sigmas):
            part = part + (following - sigma) * (part - np.tanh(part.mean()) / 2.0) / sigma
        ends[tile] += 2.0 * part
        counts[tile] += 1
    assert np.abs(made - ends / counts).max() > 1e-3


@pytest.mark.parametrize("overlap", SUBSETS, ids=names)
def test_averaging_an_identity_returns_the_state(overlap, make_assembly, make_denoiser):
    assembly = make_assembly(overlap=tuple(overlap), channels=2)
    layout = Layout(assembly.pyramid, "area", torch.tensor([-1, -1, -1]))
    tiles = assembly.pyramid.tiles(2, overlap)
    batches = tile_batches(2, tiles, layout, size=50)
    assert sum(len(batch) for batch in batches) == 3 * len(tiles)
    identity = make_denoiser(lambda level, z, sigma, coords, contexts: z)
    denoise = tiled_denoise(identity, batches, NoContexts())
    state = torch.randn(3, 2, 8, 24, 40, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(denoise(state, 1.0), state, atol=1e-6)


def through_parents(level, z, sigma, coords, contexts):
    """Mixes the tile's pixels by a matrix product, and listens to the parents."""
    rows = z.flatten(1)
    size = rows.shape[1]
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(level)) / size**0.5
    heard = sum((source.z.flatten(1) @ matrix for source in contexts or ()), torch.zeros_like(rows))
    return torch.tanh(rows @ matrix + heard).view_as(z)


def test_a_sample_is_the_same_in_any_batch(make_assembly, make_denoiser):
    def run(indices, **runtime):
        assembly = make_assembly(
            overlap=("h", "w"), sigma_eff_max=(5.0,), steps=(3,), churn=(1.0,), **runtime
        )
        return sample(assembly, make_denoiser(through_parents), indices, [-1] * len(indices))

    together = run([0, 1, 2, 3], sample_batch=4)
    again = run([0, 1, 2, 3], sample_batch=4)
    others = run([7, 1, 2, 5], sample_batch=4)
    alone = run([2], sample_batch=4)
    halves = run([0, 1, 2, 3], sample_batch=3, tile_batch=7)
    for level in range(3):
        assert torch.equal(together[level], again[level])
        assert torch.equal(together[level][1:3], others[level][1:3])  # neighbours do not matter, bit by bit
        assert torch.allclose(together[level][2:3], alone[level], atol=1e-5)
        assert torch.allclose(together[level], halves[level], atol=1e-5)
        assert not torch.allclose(together[level][0], together[level][1], atol=1e-2)


def test_the_seed_changes_everything(make_assembly, make_denoiser):
    first, second = (
        sample(make_assembly(seed=seed), make_denoiser(through_parents), [0], [-1]) for seed in (0, 1)
    )
    for level in range(3):
        assert not torch.allclose(first[level], second[level], atol=1e-2)


def test_a_step_receives_the_latents_of_the_step_before(make_assembly, make_denoiser):
    """The fake returns latents + 1: call k of a tile sees k - 1, whatever the batching; each level anew."""
    assembly = make_assembly(
        video=(2, 12, 20), patch=(2, 6, 10), levels=2, steps=(3,), order=(2, 1), tile_batch=3, overlap=("w",)
    )
    denoiser = make_denoiser(squash)
    sample(assembly, denoiser, [0, 1], [-1, -1])
    calls = [call for call in denoiser.calls if call.level == 1]
    batches = 4  # 2 x 3 tiles x 2 videos in batches of 3
    assert len(calls) == 3 * batches
    assert all(call.latents is None for call in calls[:batches])
    assert all(bool((call.latents == 0).all()) for call in calls[batches : 2 * batches])
    assert all(bool((call.latents == 1).all()) for call in calls[2 * batches :])
    coarse = [call.latents for call in denoiser.calls if call.level == 0]
    assert coarse[0] is None and [int(latents.max()) for latents in coarse[1:]] == [
        0,
        1,
        2,
        3,
    ]  # both calls of Heun


def test_each_parent_is_encoded_once_and_each_tile_asked_once(make_assembly, make_denoiser):
    assembly = make_assembly(overlap=("h", "w"), steps=(4,), tile_batch=9)
    pyramid = assembly.pyramid
    denoiser = make_denoiser(squash)
    sample(assembly, denoiser, [0, 1], [3, 5])

    tiles = {level: pyramid.tiles(level, ("h", "w")) for level in (1, 2)}
    distinct = len({pyramid.parent(2, tile) for tile in tiles[2]})
    assert 1 < distinct < len(tiles[2])
    seen = [
        (made.level, tuple(own), int(label))
        for made, _ in denoiser.encoded
        for own, label in zip(
            own_offsets(pyramid, made.level, made.offset).tolist(), made.label.tolist(), strict=True
        )
    ]
    assert sum(level == 1 for level, *_ in seen) == 2 * distinct
    assert sum(level == 0 for level, *_ in seen) == 2 * 2  # once for level 1, once for level 2
    assert len({row for row in seen if row[0] == 1}) == 2 * distinct  # each with either video's label
    for level in (1, 2):
        rows = [len(coords.offset) for asked, coords, _ in denoiser.asked if asked == level]
        assert sum(rows) == 2 * len(tiles[level])
    for made, sources in denoiser.encoded:  # a parent is encoded with its own parents
        if made.level == 1:
            assert torch.equal(sources[0].label, made.label)
    for _, coords, sources in denoiser.asked:  # a tile is handed its own chain
        level = len(sources)
        for row, own in enumerate(own_offsets(pyramid, level, coords.offset).tolist()):
            given = [
                tuple(own_offsets(pyramid, k, source.offset)[row].tolist())
                for k, source in enumerate(sources)
            ]
            assert tuple(given) == pyramid.chain(level, tuple(own))


def test_parents_of_a_level_share_one_field_of_noise(make_assembly, make_denoiser):
    """Where parents overlap they agree, also those for different levels; the noise is as strong as told."""
    assembly = make_assembly(context_sigma_eff=0.5, overlap=("h",))
    pyramid = assembly.pyramid
    denoiser = make_denoiser(lambda level, z, sigma, coords, contexts: torch.zeros_like(z))
    sample(assembly, denoiser, [4], [-1])
    for level in (0, 1):
        canvas = torch.full(pyramid.size(level), torch.nan)
        for made, _ in denoiser.encoded:
            if made.level == level:
                assert torch.allclose(made.sigma, torch.tensor(0.5 / denoiser.sigma_in[level]))
                for (f, h, w), z in zip(
                    own_offsets(pyramid, level, made.offset).tolist(), made.z, strict=True
                ):
                    view = canvas[f : f + 2, h : h + 6, w : w + 10]
                    known = ~view.isnan()
                    assert torch.equal(view[known], z[0][known])
                    view.copy_(z[0])
        wanted = (
            normal((1, *pyramid.size(level)), 0, "context_noise", 4, level)[0]
            * 0.5
            / denoiser.sigma_in[level]
        )
        known = ~canvas.isnan()
        assert known.float().mean() > 0.9
        assert torch.allclose(canvas[known], wanted[known], atol=1e-6)


def test_given_levels_are_taken_as_they_are(make_assembly, make_denoiser):
    assembly = make_assembly()
    seen: list[tuple[int, Tensor]] = []
    first = torch.rand(2, 1, 2, 6, 10) * 2 - 1
    denoiser = make_denoiser(through_parents)
    made = sample(
        assembly,
        denoiser,
        [0, 1],
        [-1, -1],
        given={0: first},
        observe=lambda level, videos: seen.append((level, videos)),
    )
    assert torch.equal(made[0], first)
    assert {call.level for call in denoiser.calls} == {1, 2}
    assert [level for level, _ in seen] == [1, 2]
    parents = next(encoded for encoded, _ in denoiser.encoded if encoded.level == 0)
    assert torch.allclose(parents.z, first, atol=0.3) and not torch.allclose(parents.z, first, atol=0.01)


def test_observer_and_progress(make_assembly, make_denoiser):
    assembly = make_assembly(sample_batch=2)
    seen, told = [], []
    made = sample(
        assembly,
        make_denoiser(squash),
        [0, 1, 2],
        [-1] * 3,
        observe=lambda level, videos: seen.append((level, videos)),
        progress=told.append,
    )
    assert [(level, len(videos)) for level, videos in seen] == [
        (0, 2),
        (1, 2),
        (2, 2),
        (0, 1),
        (1, 1),
        (2, 1),
    ]
    for level in range(3):
        assert torch.equal(
            torch.cat([videos for seen_level, videos in seen if seen_level == level]), made[level]
        )
    assert len(told) == 2 * 3 * 2  # batches, levels, calls
    assert told[0] == {"videos": 0, "of": 3, "level": 0, "levels": 3, "call": 1, "calls": 2}
    assert told[-1] == {"videos": 2, "of": 3, "level": 2, "levels": 3, "call": 2, "calls": 2}


def test_an_observer_that_writes_into_what_it_sees_changes_nothing(make_assembly, make_denoiser):
    assembly = make_assembly()
    plain = sample(assembly, make_denoiser(through_parents), [0], [-1])
    watched = sample(
        assembly,
        make_denoiser(through_parents),
        [0],
        [-1],
        observe=lambda level, videos: videos.zero_(),
    )
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
    assert plain[0].abs().max() > 0


def test_only_the_finished_level_is_clipped(make_assembly, make_denoiser):
    """An answer of 3 is integrated as 3 and clipped to 1 at the end; the parents are the clipped ones."""
    assembly = make_assembly(levels=2, video=(2, 12, 20), context_sigma_eff=0.0)
    denoiser = make_denoiser(lambda level, z, sigma, coords, contexts: torch.full_like(z, 3.0))
    made = sample(assembly, denoiser, [0], [-1])
    assert torch.equal(made[0], torch.ones_like(made[0]))
    assert torch.equal(denoiser.encoded[0][0].z, torch.ones(1, 1, 2, 6, 10))
    before_last = denoiser.calls[1].z * denoiser.sigma_in[0]
    assert before_last.mean().item() == pytest.approx(3.0, abs=0.1)


def test_labels_reach_their_rows(make_assembly, make_denoiser):
    denoiser = make_denoiser(lambda level, z, sigma, coords, contexts: torch.zeros_like(z))

    def answer(level, z, sigma, coords, contexts):
        label = denoiser.calls[-1].label
        return (label.float() / 10).view(-1, 1, 1, 1, 1).expand_as(z)

    denoiser.answer = answer
    made = sample(make_assembly(tile_batch=5), denoiser, [0, 1, 2], [7, 2, 5])
    for level in range(3):
        for row, value in enumerate((0.7, 0.2, 0.5)):
            assert torch.allclose(made[level][row], torch.tensor(value), atol=1e-5)


def test_label_of_a_sample():
    assert [label_of(index, 3) for index in range(5)] == [0, 1, 2, 0, 1]
    assert label_of(4, 0) == -1


def test_values_that_are_not_finite_are_reported(make_assembly, make_denoiser):
    denoiser = make_denoiser(
        lambda level, z, sigma, coords, contexts: z * (float("nan") if level == 1 else 1.0)
    )
    with pytest.raises(TroubleError, match=r"level 1 .* not finite, in samples 3 to 4"):
        sample(make_assembly(), denoiser, [3, 4], [-1, -1])


def test_what_does_not_fit_is_refused(make_assembly, make_denoiser):
    assembly, denoiser = make_assembly(), make_denoiser(squash)
    with pytest.raises(InputError, match="2 samples with 1 labels"):
        sample(assembly, denoiser, [0, 1], [-1])
    with pytest.raises(
        InputError, match=r"given level 0 has shape \(1, 1, 2, 6, 9\); allowed is \(1, 1, 2, 6, 10\)"
    ):
        sample(assembly, denoiser, [0], [-1], given={0: torch.zeros(1, 1, 2, 6, 9)})
    with pytest.raises(InputError, match="given level 3; allowed is 0 to 2"):
        sample(assembly, denoiser, [0], [-1], given={3: torch.zeros(1)})


def test_no_samples_are_no_videos(make_assembly, make_denoiser):
    made = sample(make_assembly(), make_denoiser(squash), [], [])
    assert [tuple(videos.shape) for videos in made] == [
        (0, 1, 2, 6, 10),
        (0, 1, 4, 12, 20),
        (0, 1, 8, 24, 40),
    ]
