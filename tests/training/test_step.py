"""The joint pass: entries, self-conditioning and the loss."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.diffusion import Slot
from hpdm_core.model.hpdm import HPDM, Patches
from hpdm_core.training.batches import Batch, TrainingBatches
from hpdm_core.training.step import joint_loss, make_entries, self_conditioning_latents

Make = Callable[..., Assembly]


def start(assembly: Assembly) -> tuple[HPDM, Batch]:
    """Return the model with self-conditioning switched on (its gain starts at 0), and a batch."""
    model = assembly.build_model()
    torch.nn.init.ones_(model.backbone.recall_gain.weight)
    return model, TrainingBatches(assembly)(1)


class Calls:
    """Notes every call of a model's forward."""

    def __init__(self, model: HPDM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entries: list[list[Patches]] = []
        self.gradients: list[bool] = []
        self.results: list[list[Any]] = []
        self._forward = model.forward
        monkeypatch.setattr(model, "forward", self)

    def __call__(self, entries: Any, contexts: Any = None) -> Any:
        self.entries.append(list(entries))
        self.gradients.append(torch.is_grad_enabled())
        self.results.append(self._forward(entries, contexts))
        return self.results[-1]


def test_entries_are_c_in_times_z_of_unit_variance(assemble: Make) -> None:
    assembly = assemble()
    batch = TrainingBatches(assembly)(1)
    entries = make_entries(assembly, batch)
    assert [entry.level for entry in entries] == [0, 1, 2]
    assert [entry.sources for entry in entries] == [(), (0,), (0, 1)]
    for index, (entry, sigma_in) in enumerate(zip(entries, assembly.sigma_in, strict=True)):
        sigma = batch.sigma[index][:, None, None, None, None]
        z = batch.clean[index] / sigma_in + sigma * batch.noise[index]
        torch.testing.assert_close(entry.noisy, z / (sigma_in**-2 + sigma**2).sqrt())
        size = torch.tensor(assembly.pyramid.size(entry.level))
        torch.testing.assert_close(entry.coords.offset, batch.offsets[index] / size)
        assert entry.latents is None


def test_first_pass_sees_kept_rows_only_without_gradient_and_second_gets_its_latents(
    assemble: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly = assemble()
    model, batch = start(assembly)
    batch = replace(batch, conditioned=torch.tensor([0, 2]))
    calls = Calls(model, monkeypatch)
    joint_loss(assembly, model, batch).total.backward()
    assert calls.gradients == [False, True]
    first, second = calls.entries
    for level in range(3):
        assert first[level].latents is None
        assert torch.equal(first[level].noisy, second[level].noisy[[0, 2]])
        assert torch.equal(first[level].label, batch.label[[0, 2]])
        assert torch.equal(second[level].label, batch.label)
        latents = second[level].latents
        assert latents is not None
        assert not latents.requires_grad
        assert torch.equal(latents[[0, 2]], calls.results[0][level][1])
        assert latents[[0, 2]].abs().sum() > 0
        assert latents[1].abs().sum() == 0


def test_one_label_mask_for_all_levels_and_both_passes(
    assemble: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly = assemble(training={"batch": 16, "label_dropout": 0.5, "self_conditioning": 1.0})
    model, batch = start(assembly)
    assert model.class_embedding is not None
    seen: list[torch.Tensor] = []
    model.class_embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    joint_loss(assembly, model, batch)
    assert len(seen) == 6
    assert all(torch.equal(label, batch.label) for label in seen)
    assert 0 < (batch.label == -1).sum() < 16


def test_null_label_differs_from_every_class(assemble: Make) -> None:
    model = assemble().build_model()
    assert model.class_embedding is not None
    embedded = model.class_embedding(torch.tensor([-1, 0, 1, 2, 3]))
    assert (torch.cdist(embedded, embedded) + torch.eye(5) > 1e-3).all()


def test_without_kept_rows_there_is_one_pass_equal_to_zero_latents(
    assemble: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly = assemble(training={"self_conditioning": 0.0})
    model, batch = start(assembly)
    entries = make_entries(assembly, batch)
    calls = Calls(model, monkeypatch)
    loss = joint_loss(assembly, model, batch)
    assert calls.gradients == [True]
    zeros = [replace(entry, latents=torch.zeros(3, 5, 8)) for entry in entries]
    for (prediction, _), (expected, _) in zip(calls.results[0], model(zeros), strict=True):
        torch.testing.assert_close(prediction, expected)
    kept = joint_loss(assembly, model, replace(batch, conditioned=torch.tensor([0, 1, 2])))
    assert not torch.allclose(loss.total, kept.total)


def test_latents_are_per_row(assemble: Make) -> None:
    """A row's latents do not depend on which other rows are kept."""
    assembly = assemble()
    model, batch = start(assembly)
    entries = make_entries(assembly, batch)
    all_rows = self_conditioning_latents(model, entries, torch.tensor([0, 1, 2]))
    one_row = self_conditioning_latents(model, entries, torch.tensor([1]))
    for some, whole in zip(one_row, all_rows, strict=True):
        assert some is not None
        assert whole is not None
        torch.testing.assert_close(some[1], whole[1])


def by_hand(assembly: Assembly, model: HPDM, batch: Batch) -> list[list[float]]:
    """w(sigma) * mean (F - v)^2 per slot and row."""
    entries = make_entries(assembly, batch)
    latents = self_conditioning_latents(model, entries, batch.conditioned)
    entries = [replace(entry, latents=kept) for entry, kept in zip(entries, latents, strict=True)]
    rows = []
    for index, (prediction, _) in enumerate(model(entries)):
        sigma_in = assembly.sigma_in[entries[index].level]
        sigma, clean, noise = batch.sigma[index], batch.clean[index], batch.noise[index]
        target = assembly.objective.target(clean, noise, sigma, sigma_in)
        weight = assembly.objective.weight(sigma, sigma_in)
        rows.append([float(weight[i] * (prediction[i] - target[i]).pow(2).mean()) for i in range(len(sigma))])
    return rows


@torch.no_grad()
def test_the_loss_is_the_mean_of_the_slots_means(assemble: Make) -> None:
    assembly = assemble()
    model, batch = start(assembly)
    rows = by_hand(assembly, model, batch)
    loss = joint_loss(assembly, model, batch)
    means = [sum(row) / 3 for row in rows]
    assert loss.levels.tolist() == pytest.approx(means, rel=1e-5)
    assert loss.total.item() == pytest.approx(sum(means) / 3, rel=1e-5)


@torch.no_grad()
def test_masked_rows_and_slots_that_are_only_context_do_not_count(assemble: Make) -> None:
    assembly = assemble()
    model, batch = start(assembly)
    rows = by_hand(assembly, model, batch)
    in_loss = [torch.tensor(mask) for mask in ([False] * 3, [True, False, True], [True] * 3)]
    loss = joint_loss(assembly, model, replace(batch, in_loss=in_loss))
    means = [(rows[1][0] + rows[1][2]) / 2, sum(rows[2]) / 3]
    assert loss.levels[0].isnan()
    assert loss.levels[1:].tolist() == pytest.approx(means, rel=1e-5)
    assert loss.total.item() == pytest.approx(sum(means) / 2, rel=1e-5)


@torch.no_grad()
def test_two_slots_of_a_level_are_reported_as_their_mean(
    assemble: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly = assemble()
    sampler = assembly.noise_sampler
    sampler.slots = (*sampler.slots, Slot(level=1, sources=(0,)))
    monkeypatch.setattr(
        sampler, "draw", lambda generator: (torch.rand(4, generator=generator), torch.ones(4).bool())
    )
    model, batch = start(assembly)
    means = [sum(row) / 3 for row in by_hand(assembly, model, batch)]
    loss = joint_loss(assembly, model, batch)
    assert loss.levels.tolist() == pytest.approx([means[0], (means[1] + means[3]) / 2, means[2]], rel=1e-5)
    assert loss.total.item() == pytest.approx(sum(means) / 4, rel=1e-5)


def test_masked_rows_send_no_gradient(assemble: Make) -> None:
    assembly = assemble(model={"context_fusion": "none"})
    model, batch = start(assembly)
    nothing = torch.zeros(3, dtype=torch.bool)
    joint_loss(assembly, model, replace(batch, in_loss=[nothing] * 3)).total.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
