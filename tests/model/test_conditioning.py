import math

import torch

from hpdm_core.model.conditioning import ClassEmbedding, PositionEmbedding, SigmaEmbedding, sinusoid


def test_a_sinusoid_is_normalised_over_its_features():
    codes = sinusoid(torch.tensor([0.0, 3.7, 1000.0]), 256)
    torch.testing.assert_close(codes.mean(dim=1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(codes.square().mean(dim=1), torch.ones(3))
    angle = 3.7 * 10_000 ** (-2 * 5 / 256)
    raw = torch.cat([f(3.7 * 10_000 ** (-2 * torch.arange(128) / 256)) for f in (torch.sin, torch.cos)])
    expected = (math.sin(angle) - raw.mean()) / (raw - raw.mean()).square().mean().sqrt()
    torch.testing.assert_close(codes[1, 5], expected)


def test_sigma_is_embedded_by_its_place_between_the_ends(gelu):
    embedding = SigmaEmbedding(12, levels=3, sigma_range=(0.002, 80.0))
    middle = math.sqrt(0.002 * 80)
    codes = sinusoid(torch.tensor([0.0, 500.0, 1000.0]), 256)
    hidden = codes @ embedding.up.weight.T + embedding.up.bias
    expected = (hidden * hidden.sigmoid()) @ embedding.down.weight.T + embedding.down.bias
    got = embedding(torch.tensor([0.002, middle, 80.0]), 2)
    torch.testing.assert_close(got, expected + embedding.levels.rows[2], atol=2e-3, rtol=0)


def test_no_noise_at_all_is_embedded_as_very_little():
    embedding = SigmaEmbedding(12, levels=1, sigma_range=(0.002, 80.0))
    nothing, little, less = embedding(torch.tensor([0.0, 0.002, 0.001]), 0)
    assert nothing.isfinite().all()
    assert not torch.equal(little, less)  # below the range noise levels still differ


def test_the_level_is_told():
    embedding = SigmaEmbedding(12, levels=2, sigma_range=(0.002, 80.0))
    sigma = torch.tensor([0.3])
    difference = embedding(sigma, 1) - embedding(sigma, 0)
    torch.testing.assert_close(difference[0], embedding.levels.rows[1] - embedding.levels.rows[0])


def test_no_label_differs_from_every_class():
    embedding = ClassEmbedding(4, 12)
    vectors = embedding(torch.tensor([-1, 0, 1, 2, 3]))
    assert not vectors[0].any()
    assert torch.equal(vectors[1:], embedding.table.rows)
    assert torch.cdist(vectors, vectors)[~torch.eye(5, dtype=torch.bool)].min() > 0


def test_positions_are_a_sum_over_axes():
    positions = PositionEmbedding((2, 3, 5), 4)
    codes = positions()
    assert codes.shape == (30, 4)
    token = 1 * 15 + 2 * 5 + 3
    expected = positions.f.rows[1] + positions.h.rows[2] + positions.w.rows[3]
    torch.testing.assert_close(codes[token], expected)
