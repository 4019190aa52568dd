"""dit: a plain transformer as backbone, and what the network does with a backbone that has no state."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.base.errors import InputError
from hpdm_core.base.randomness import normal
from hpdm_core.config.schema import CellConfig
from hpdm_core.model.execution import Execution
from hpdm_core.model.initialise import initialise
from hpdm_core.plugins import build_plugins
from hpdm_core.sampling import sample
from hpdm_core.training import Trainer
from hpdm_core.training.batches import TrainingBatches
from hpdm_core.training.step import joint_loss, make_entries, self_conditioning_latents
from hpdm_plugins.model.dit import BASE, DiT, DiTBlock, rotated, rotations

PLUGINS = build_plugins()
GRID = (2, 3, 4)


def assembly(optimizer: Any = "adamw", dit: Any = None, **model: Any) -> Assembly:
    """A tiny cell whose grid is 2x2x2, with sizes that all differ where they can."""
    cell = {
        "model": {
            "video": (8, 16, 24),
            "patch": (2, 4, 6),
            "token": (1, 2, 3),
            "levels": 3,
            "classes": 4,
            "token_dim": 18,
            "blocks": 3,
            "backbone": {"use": "dit", "heads": 3, **(dit or {})},
            **model,
        },
        "data": {"dataset": "synthetic"},
        "training": {
            "steps": 5,
            "batch": 2,
            "learning_rate": 0.01,
            "self_conditioning": 0.0,
            "optimizer": optimizer,
        },
        "sampling": {"solver": {"use": "edm", "steps": [2], "churn": [0.0], "sigma_eff_max": [5.0]}},
        "runtime": {"threads": 1, "checkpoint_every": 2, "tile_batch": 30},
    }
    return Assembly(CellConfig.model_validate(cell), PLUGINS)


def moved(module: torch.nn.Module, *, size: float = 0.3) -> Any:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter += size * normal(parameter.shape, 0, "moved", name).to(parameter.dtype)
    return module


def linear(weights: Any, name: str, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, weights[f"{name}.weight"]) + weights[f"{name}.bias"]


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(x: Tensor, grid: tuple[int, int, int], pairs_per_axis: int) -> Tensor:
    """x [B, heads, N, d] with its pairs as complex numbers, turned place by place and axis by axis."""
    made = torch.complex(*x.chunk(2, dim=-1)).unflatten(2, grid)
    for f in range(grid[0]):
        for h in range(grid[1]):
            for w in range(grid[2]):
                for axis, place in enumerate((f, h, w)):
                    for pair in range(pairs_per_axis):
                        angle = torch.tensor(place * BASE ** (-pair / pairs_per_axis))
                        made[:, :, f, h, w, axis * pairs_per_axis + pair] *= torch.polar(
                            torch.ones(()), angle
                        )
    made = made.flatten(2, 4)
    return torch.cat([made.real, made.imag], dim=-1)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_a_block_equals_a_plain_reference(gelu, rotary: bool, qk_norm: bool) -> None:
    """Width 28 in 2 heads: 7 pairs, 2 for each axis and one that is left as it is."""
    block = moved(DiTBlock(28, heads=2, mlp_ratio=3, qk_norm=qk_norm).double())
    turns = rotations(GRID, 7).double() if rotary else None
    tokens, condition = normal((2, 24, 28), 1).double(), normal((2, 28), 2).double()
    got = block(tokens, condition, turns)

    weights = dict(block.named_parameters())
    silu = condition / (1 + (-condition).exp())
    made = norm(linear(weights, "modulation", silu))
    made = made * weights["modulation_gain.weight"] + weights["modulation_gain.bias"]
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (each[:, None] for each in made.split(28, dim=-1))
    x = norm(tokens) * (1 + scale) + shift
    q, k, v = (linear(weights, name, x).reshape(2, 24, 2, 14).transpose(1, 2) for name in "qkv")
    if qk_norm:
        q, k = (
            norm(each) * weights[f"{name}_norm.weight"] + weights[f"{name}_norm.bias"]
            for name, each in (("q", q), ("k", k))
        )
    if rotary:
        q, k = turned(q, GRID, 2), turned(k, GRID, 2)
    shares = (torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(14)).softmax(-1)
    gathered = torch.einsum("bhnm,bhmd->bhnd", shares, v).transpose(1, 2).flatten(2)
    expected = tokens + gate * linear(weights, "o", gathered)
    x = norm(expected) * (1 + mlp_scale) + mlp_shift
    expected = expected + mlp_gate * linear(weights, "down", gelu(linear(weights, "up", x)))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotary_attention_sees_differences_of_places_alone(axis: int) -> None:
    grid, pairs = (3, 4, 5), 9
    turns = rotations(grid, pairs)
    query, key = normal((2 * pairs,), 1), normal((2 * pairs,), 2)
    q = rotated(query.expand(60, -1), turns).unflatten(0, grid)
    k = rotated(key.expand(60, -1), turns).unflatten(0, grid)

    def score(one: list[int], other: list[int]) -> float:
        return float(q[tuple(one)] @ k[tuple(other)])

    for distance in (0, 1):
        here, there = [0, 0, 2], [0, distance, 2]
        first = score(here, there)
        here[axis], there[axis] = here[axis] + 1, there[axis] + 1
        assert score(here, there) == pytest.approx(first, abs=1e-5)
        there[axis] += 1
        assert score(here, there) != pytest.approx(first, abs=1e-3)


def test_an_axis_of_one_cell_takes_no_pairs() -> None:
    cosine, sine = rotations((1, 2, 3), 4)
    assert torch.equal(cosine[0], torch.ones(4))  # the first token is where places are counted from
    slow = 1 / math.sqrt(BASE)
    last = torch.tensor([1.0, slow, 2.0, 2 * slow])
    torch.testing.assert_close(torch.atan2(sine, cosine)[-1], last)
    assert torch.equal(rotations((1, 1, 1), 2), torch.tensor([[[1.0, 1]], [[0.0, 0]]]))


def test_the_start_is_the_identity() -> None:
    backbone = DiT(18, 2, GRID, heads=3)
    initialise(backbone, seed=0)
    tokens, condition = normal((2, 24, 18), 1), normal((2, 2, 18), 2)
    for block in range(2):
        made, latents = backbone.run(block, tokens, None, condition)
        assert torch.equal(made, tokens) and latents is None


def test_the_number_of_weights() -> None:
    def count(**options: Any) -> int:
        return sum(each.numel() for each in DiT(24, 2, GRID, heads=4, **options).parameters())

    width = 24
    modulation = 6 * width * (width + 1) + 2 * 6 * width
    attention = 4 * width * (width + 1)
    assert count() == 2 * (modulation + attention + 2 * 4 * width * width + 5 * width)
    assert count(mlp_ratio=2) == 2 * (modulation + attention + 2 * 2 * width * width + 3 * width)
    assert count(qk_norm=True) - count() == 2 * 2 * 2 * (width // 4)
    assert count(rotary=False) == count()


@pytest.mark.parametrize(("optimizer", "zero_residual"), [("adamw", False), ("adamw", True), ("lamb", False)])
def test_gradients_reach_every_weight_after_the_first_steps(optimizer: str, zero_residual: bool) -> None:
    """The gates open in the first step; with an output of zeros, in the second."""
    made = assembly(optimizer, {"qk_norm": True}, zero_residual=zero_residual)
    model = made.build_model()
    parameters = list(model.named_parameters())
    stepper = made.make("optimizers", made.config.training.optimizer, parameters, 0.01)
    batches = TrainingBatches(made, range(2))
    for step in range(1, 4 if zero_residual else 3):
        stepper.zero_grad()
        joint_loss(made, model, batches(step)).total.backward()  # type: ignore[no-untyped-call]
        reached = {name for name, each in parameters if each.grad is not None and each.grad.any()}
        inside = {name for name, _ in parameters if name.startswith("backbone.")}
        if step == 1:
            assert not any(name.endswith("o.weight") for name in reached & inside)
        stepper.step()
    assert inside - reached == set()


@pytest.mark.parametrize("fusion", ["deep", "deep_levels", "deep_pixels"])
def test_one_level_from_contexts_equals_the_joint_pass(fusion: str) -> None:
    made = assembly(context_fusion=fusion)
    model = moved(made.build_model())
    entries = make_entries(made, TrainingBatches(made, range(2))(1))
    with torch.no_grad():
        joint = model(entries)
        encoded: list[Any] = []
        for level, entry in enumerate(entries):
            alone = replace(entry, sources=())
            contexts = model.contexts(level, entry.coords, encoded) if level else None
            ((prediction, latents),) = model([alone], [contexts])
            torch.testing.assert_close(prediction, joint[level][0], atol=1e-5, rtol=1e-4)
            assert latents is None and joint[level][1] is None
            encoded.append(model.encode(alone, encoded))


def test_samples_are_the_same_with_and_without_a_cache() -> None:
    made = assembly()
    denoiser = made.denoiser(moved(made.build_model(), size=0.1))
    one = sample(made, denoiser, [0, 1], [0, 3])
    changed = {"runtime": made.config.runtime.model_copy(update={"cache": "none"})}
    uncached = Assembly(made.config.model_copy(update=changed), PLUGINS)
    for cached, fresh in zip(one, sample(uncached, denoiser, [0, 1], [0, 3]), strict=True):
        assert torch.isfinite(cached).all()
        torch.testing.assert_close(cached, fresh, atol=1e-4, rtol=1e-4)


def test_without_state_there_is_one_pass(spy) -> None:
    made = assembly(computation_allocation="full")
    model = made.build_model()
    entries = make_entries(made, TrainingBatches(made, range(2))(1))
    seen = spy(model.backbone)
    model.encode(entries[0])
    assert [block for block, _ in seen.calls] == [0, 1]  # as far as a child needs
    rows = torch.tensor([0])
    assert self_conditioning_latents(model, entries, rows, always=True) == [None] * len(entries)


def test_a_share_of_self_conditioning_is_refused() -> None:
    made = assembly()
    training = made.config.training.model_copy(update={"self_conditioning": 0.5})
    with pytest.raises(
        InputError, match=r"training\.self_conditioning: 0\.5 .* model\.backbone 'dit' .* allowed is 0"
    ):
        Assembly(made.config.model_copy(update={"training": training}), PLUGINS).build_model()


@pytest.mark.parametrize(
    ("heads", "options", "words"),
    [
        (5, {}, r"heads: 5 does not divide model\.token_dim 24"),
        (
            6,
            {},
            r"6 heads of model\.token_dim 24 have 4 channels each; .* on 3 axes is an even number of 6 or",
        ),
        (8, {}, "have 3 channels each"),
    ],
)
def test_heads_that_do_not_fit(heads: int, options: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        DiT(24, 1, GRID, heads=heads, **options)
    if 24 % heads == 0:
        DiT(24, 1, GRID, heads=heads, rotary=False)
    DiT(24, 1, (1, 1, 1), heads=24)  # a single token has no place


def test_bf16_and_blocks_that_are_run_again() -> None:
    made = assembly(dit={"qk_norm": True})
    model = moved(made.build_model(), size=0.1)
    batch = TrainingBatches(made, range(2))(1)

    def gradients(execution: Execution) -> dict[str, Tensor]:
        model.execution = execution
        model.zero_grad()
        joint_loss(made, model, batch).total.backward()  # type: ignore[no-untyped-call]
        return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}

    exact = gradients(Execution())
    again = gradients(Execution(checkpointing=True))
    assert all(torch.equal(again[name], each) for name, each in exact.items())
    rough = gradients(Execution(matmul_dtype=torch.bfloat16))
    errors = [float((rough[name] - each).norm() / each.norm()) for name, each in exact.items() if each.any()]
    assert 1e-4 < sum(errors) / len(errors) < 0.05
    assert {each.dtype for each in rough.values()} == {torch.float32}


class Killed(Exception):
    pass


def test_killed_and_started_again_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    straight = Trainer(assembly(), folder=tmp_path / "straight")
    straight.run()

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        Trainer(assembly(), folder=tmp_path / "first").run(stop)
    second = Trainer(assembly(), folder=tmp_path / "second", previous=[tmp_path / "first"])
    result = second.run()
    assert result["resumed_from"] == [2]
    for one, other in ((straight.model, second.model), (straight.ema_model, second.ema_model)):
        wanted, found = one.state_dict(), other.state_dict()
        assert list(wanted) == list(found)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not any("turns" in name for name in wanted)  # no weight, and not stored
