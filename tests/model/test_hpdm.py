import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hpdm_core.config.schema import ModelConfig
from hpdm_core.model.fusion import FusionShape
from hpdm_core.model.hpdm import HPDM, Contexts, Encoded
from hpdm_core.model.rin import RIN
from hpdm_core.pyramid import Pyramid
from hpdm_plugins.model.fusions import DeepFusion

ALL = ["deep", "deep_levels", "deep_pixels", "none", "shallow_concat"]


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("latent_dim", "millions"), [(256, 177.87), (512, 321.29), (1024, 724.53)])
def test_parameters_of_the_papers_three_models(latent_dim, millions):
    config = ModelConfig(
        video=(64, 256, 256), patch=(16, 64, 64), token=(1, 4, 4), classes=101, token_dim=1024, blocks=6
    )
    pyramid = Pyramid(video=config.video, patch=config.patch, token=config.token, levels=3)
    levels_per_block = (1, 1, 2, 2, 3, 3)
    with torch.device("meta"):
        model = HPDM(
            config,
            backbone=RIN(1024, 6, latent_dim=latent_dim),
            fusion=DeepFusion(FusionShape(1024, pyramid.grid, pyramid.patch, levels_per_block)),
            levels_per_block=levels_per_block,
            pyramid=pyramid,
            sigma_range=(0.002, 80.0),
        )
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.05
    )


@pytest.mark.parametrize("fusion", ALL)
def test_information_flows_from_coarse_to_fine_only(build, entries_for, fusion):
    model = build(fusion)
    entries = entries_for(model, requires_grad=True)
    outputs = [prediction for prediction, _ in model(entries)]

    def feels(level, source):
        (gradient,) = torch.autograd.grad(
            outputs[level].square().sum(), entries[source].noisy, retain_graph=True, allow_unused=True
        )
        return gradient is not None and bool(gradient.any())

    felt = {(level, source) for level in range(3) for source in range(3) if feels(level, source)}
    own = {(0, 0), (1, 1), (2, 2)}
    all_coarser = own | {(1, 0), (2, 0), (2, 1)}
    expected = {"none": own, "shallow_concat": own | {(1, 0), (2, 1)}}
    assert felt == expected.get(fusion, all_coarser)


def test_detached_context_passes_values_but_no_gradient(build, entries_for):
    detached, plain = build("deep", detach=True), build("deep")
    entries = entries_for(detached, requires_grad=True)
    values, expected = detached(entries)[2][0], plain(entries)[2][0]
    assert torch.equal(values, expected)
    for source in (0, 1):
        (gradient,) = torch.autograd.grad(values.sum(), entries[source].noisy, retain_graph=True)
        assert not gradient.any()


@pytest.mark.parametrize("fusion", ALL)
def test_dropping_the_finest_level_changes_nothing_above(build, entries_for, fusion):
    model = build(fusion)
    entries = entries_for(model)
    whole, part = model(entries), model(entries[:2])
    for (prediction, latents), (expected, expected_latents) in zip(part, whole, strict=False):
        close(prediction, expected)
        close(latents, expected_latents)


@pytest.mark.parametrize("fusion", ALL)
@pytest.mark.parametrize("levels_per_block", [(1, 1, 2, 2, 3, 3), (3, 3)])
def test_one_entry_with_contexts_equals_the_joint_pass(build, entries_for, fusion, levels_per_block):
    """Without self-conditioning both encoding passes are the joint pass."""
    model = build(fusion, recall=False, levels_per_block=levels_per_block)
    entries = entries_for(model)
    joint = model(entries)
    encoded = [model.encode(replace(entries[0], sources=()))]
    encoded.append(model.encode(replace(entries[1], sources=()), encoded))
    for level in (1, 2):
        context = model.contexts(level, entries[level].coords, encoded[:level])
        ((prediction, latents),) = model([replace(entries[level], sources=())], [context])
        close(prediction, joint[level][0])
        close(latents, joint[level][1])


@pytest.mark.parametrize("fusion", ALL)
@pytest.mark.parametrize(
    ("levels_per_block", "rows"),
    # Of (1, 1, 2, 2, 3, 3): level 0 feeds level 2 in blocks 4 and 5 and so runs up to 4; level 1 runs 2 to 4.
    [((1, 1, 2, 2, 3, 3), [2, 2, 4, 4, 6, 2]), ((3, 3), [6, 2]), ((2, 1, 3), [4, 2, 2])],
)
def test_an_entry_that_is_only_context_stops_where_it_is_read_last(
    build, entries_for, spy, fusion, levels_per_block, rows
):
    model = build(fusion, levels_per_block=levels_per_block)
    entries = entries_for(model)
    expected = model(entries)[2]
    only = [replace(entries[0], context_only=True), replace(entries[1], context_only=True), entries[2]]
    seen = spy(model.backbone)
    first, second, (prediction, latents) = model(only)
    assert first == second == (None, None)
    close(prediction, expected[0])
    close(latents, expected[1])
    if not model.fusion.reads_tokens:
        rows = [2 if count == 3 else 0 for count in levels_per_block]
    assert [sum(each for at, each in seen.calls if at == block) for block in range(len(rows))] == rows


def test_encoding_is_two_passes_self_conditioned_each_on_finished_parents(build, entries_for):
    model = build()
    entries = entries_for(model)
    first = replace(entries[0], latents=model([entries[0]])[0][1])
    second = replace(entries[1], latents=model([first, entries[1]])[1][1])
    third = replace(entries[2], latents=torch.randn(2, 7, 10))
    joint = model([first, second, third])
    e0 = model.encode(entries[0])
    e1 = model.encode(replace(entries[1], sources=()), [e0])
    ((prediction, _),) = model([replace(third, sources=())], [model.contexts(2, third.coords, [e0, e1])])
    close(prediction, joint[2][0])
    assert not torch.allclose(
        prediction, model(entries)[2][0], atol=1e-3
    )  # it does depend on the second pass


def test_latents_come_in_and_go_out(build, entries_for):
    model = build()
    entries = entries_for(model)
    plain = model(entries)
    again = model(
        [replace(entry, latents=latents) for entry, (_, latents) in zip(entries, plain, strict=True)]
    )
    zeros = model([replace(entry, latents=torch.zeros(2, 7, 10)) for entry in entries])
    for level in range(3):
        assert plain[level][1].shape == (2, 7, 10)
        assert not torch.allclose(again[level][0], plain[level][0], atol=1e-3)
        close(zeros[level][0], plain[level][0])


def test_blocks_run_the_levels_that_they_are_allocated(build, entries_for, spy):
    model = build()
    entries = entries_for(model)
    seen = spy(model.backbone)
    model(entries)
    assert seen.calls == [(0, 2), (1, 2), (2, 4), (3, 4), (4, 6), (5, 6)]
    assert seen.starts == [(False, 2)] * 3


def test_encoding_runs_no_block_more_than_a_child_needs(build, entries_for, spy):
    model = build()
    entries = [replace(entry, sources=()) for entry in entries_for(model)]
    seen = spy(model.backbone)
    e0 = model.encode(entries[0])
    assert [block for block, _ in seen.calls] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert sorted(e0.tokens) == [2, 3, 4, 5]
    seen.calls.clear()
    e1 = model.encode(entries[1], [e0])
    assert [block for block, _ in seen.calls] == [2, 3, 4, 5, 2, 3, 4]
    assert sorted(e1.tokens) == [4, 5]
    seen.calls.clear()
    fewer = model.encode(entries[0], blocks=[2])
    assert [block for block, _ in seen.calls] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert torch.equal(fewer.tokens[2], e0.tokens[2])
    seen.calls.clear()
    model([entries[2]], [model.contexts(2, entries[2].coords, [e0, e1])])
    assert [block for block, _ in seen.calls] == [4, 5]
    with pytest.raises(ValueError, match=r"blocks \[3\] do not run level 2"):
        model.encode(entries[2], [e0, e1], blocks=[3, 4])


def test_parents_whose_features_nobody_reads_are_not_run(build, entries_for, spy):
    model = build("shallow_concat")
    entries = entries_for(model)
    seen = spy(model.backbone)
    model.encode(entries[0])
    assert seen.calls == []


def test_rows_do_not_mix(build, entries_for):
    model = build()
    entries = entries_for(model, batch=3)
    expected = model(entries)
    rows = torch.tensor([2, 0])
    taken = [
        replace(e, noisy=e.noisy[rows], sigma=e.sigma[rows], coords=e.coords.take(rows), label=e.label[rows])
        for e in entries
    ]
    for (prediction, latents), (whole, whole_latents) in zip(model(taken), expected, strict=True):
        close(prediction, whole[rows])
        close(latents, whole_latents[rows])


def test_encoded_and_contexts_rows_can_be_gathered(build, entries_for):
    model = build("shallow_concat")  # has both kinds of context
    deep = build("deep")
    for network in (model, deep):
        entries = [replace(entry, sources=()) for entry in entries_for(network, batch=3)]
        e0 = network.encode(entries[0])
        rows = torch.tensor([1, 1, 0])
        direct = network.contexts(1, entries[1].coords.take(rows), [e0.take(rows)])
        gathered = network.contexts(1, entries[1].coords, [e0]).take(rows).to("cpu")
        joined = network.contexts(
            1, entries[1].coords.take(rows), [Encoded.cat([e0.take(rows[:1]), e0.take(rows[1:])]).to("cpu")]
        )
        for other in (gathered, joined):
            if direct.pixel is not None:
                close(other.pixel, direct.pixel)
            assert other.tokens.keys() == direct.tokens.keys() == {2, 3, 4, 5}
            for block, made in direct.tokens.items():
                assert (made is None) == (other.tokens[block] is None)
                if made is not None:
                    close(other.tokens[block], made)


@pytest.mark.parametrize("token", [(2, 3, 5), (1, 2, 2)])  # all different inside a token, and between tokens
def test_tokens_are_boxes_of_pixels_in_row_major_order(build, entries_for, token):
    model = build(sigma_on_tokens=False, token=token)
    (entry, *_) = entries_for(model)
    tokens = model._begin([entry], None)[0].tokens
    a, b, c = token
    for index, (f, h, w) in enumerate(itertools.product(*map(range, model.pyramid.grid))):
        box = entry.noisy[:, :, a * f : a * f + a, b * h : b * h + b, c * w : c * w + c]
        flat = box.permute(0, 2, 3, 4, 1).flatten(1)  # frames, rows, columns, colours
        expected = model.tokenizer_norm(flat @ model.tokenizer.weight.T + model.tokenizer.bias)
        close(tokens[:, index], expected + model.positions()[index])


@pytest.mark.parametrize("token", [(2, 3, 5), (1, 2, 2)])
def test_a_prediction_is_put_where_its_token_stands(build, token):
    model = build(token=token)
    a, b, c = token
    tokens = torch.randn(2, 60 * 2 // (a * b * c), 24)
    prediction = model._detokenize(tokens)
    volumes = F.linear(model.output_norm(tokens), model.output.weight, model.output.bias)
    for index, (f, h, w) in enumerate(itertools.product(*map(range, model.pyramid.grid))):
        for cell, (i, j, k, colour) in enumerate(itertools.product(range(a), range(b), range(c), range(3))):
            assert torch.equal(
                prediction[:, colour, a * f + i, b * h + j, c * w + k], volumes[:, index, cell]
            )


def test_the_sigma_embedding_stands_on_the_tokens_where_asked_for(build, entries_for):
    with_it, without = build(), build(sigma_on_tokens=False)
    (entry, *_) = entries_for(with_it)
    difference = with_it._begin([entry], None)[0].tokens - without._begin([entry], None)[0].tokens
    close(difference, with_it.sigma_embedding(entry.sigma, 0)[:, None].expand_as(difference))


def test_missing_pixel_context_is_zeros(build, entries_for):
    model = build("shallow_concat")
    (entry, *_) = entries_for(model)
    assert model.tokenizer.in_features == 2 * 3 * 4
    given = Contexts(pixel=torch.zeros(2, 3, 2, 6, 10))
    close(model([entry])[0][0], model([entry], [given])[0][0])
    given = Contexts(pixel=torch.ones(2, 3, 2, 6, 10))
    assert not torch.allclose(model([entry])[0][0], model([entry], [given])[0][0], atol=1e-3)


def test_no_label_is_one_token_of_zeros_and_none_without_classes(build, entries_for):
    model = build()
    (entry, *_) = entries_for(model)
    hidden = replace(entry, label=torch.tensor([-1, -1]))
    assert torch.equal(model([hidden])[0][0], model([replace(entry, label=None)])[0][0])
    labelled, null = model([entry])[0][0], model([hidden])[0][0]
    assert not torch.allclose(labelled[0], null[0], atol=1e-4)  # row 0 has class 3
    close(labelled[1], null[1])  # row 1 has none
    bare = build(classes=0)
    assert bare._begin([entry], None)[0].condition.shape == (2, 1, 24)
    assert bare([entry])[0][0].shape == (2, 3, 2, 6, 10)


def test_one_level_is_a_plain_rin(build, entries_for):
    model = build(levels_per_block=(1, 1))
    (entry,) = entries_for(model)
    state = model._begin([entry], None)[0]
    tokens, latents = state.tokens, model.backbone.start(None, 2)
    for block in range(2):
        tokens, latents = model.backbone.run(block, tokens, latents, state.condition)
    assert not list(model.fusion.parameters())
    ((prediction, got),) = model([entry])
    close(prediction, model._detokenize(tokens))
    close(got, latents)


def test_wrong_sources_are_refused(build, entries_for):
    model = build()
    entries = entries_for(model)
    with pytest.raises(ValueError, match=r"level 2 has sources of levels \[0\]; allowed is \[0, 1\]"):
        model([entries[0], entries[1], replace(entries[2], sources=(0,))])
    with pytest.raises(ValueError, match=r"level 1 has sources of levels \[\]"):
        model([replace(entries[1], sources=())])
    with pytest.raises(ValueError, match="1 contexts for 3 entries"):
        model(entries, [None])
    with pytest.raises(ValueError, match=r"level 1 has sources of levels \[\]"):
        model.contexts(1, entries[1].coords, [])


def test_an_entry_may_come_twice(build, entries_for):
    """A noise sampler may add a clean stream: slots refer to their own sources, in any order of entries."""
    model = build()
    entries, others = entries_for(model, seed=0), entries_for(model, seed=1)
    shifted = [replace(e, sources=tuple(source + 3 for source in e.sources)) for e in others]
    together = model([*entries, *shifted])
    for got, expected in zip(together, [*model(entries), *model(others)], strict=True):
        close(got[0], expected[0])


def test_shapes_alone_run_on_the_meta_device(build, entries_for):
    """Costs are counted there; no number of a tensor may be asked for."""
    for fusion in ALL:
        model = build(fusion)
        entries = [
            replace(
                e,
                noisy=e.noisy.to("meta"),
                sigma=e.sigma.to("meta"),
                coords=model.pyramid.coords(e.level, torch.zeros(2, 3, dtype=torch.int64, device="meta")),
                label=e.label.to("meta"),
            )
            for e in entries_for(model)
        ]
        assert [prediction.shape for prediction, _ in model.to("meta")(entries)] == [(2, 3, 2, 6, 10)] * 3
