"""Sampling in other precisions than training, and compiled."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.assembly.compose import load_cell
from hpdm_core.assembly.runtime import compiler_problem
from hpdm_core.config.schema import Arithmetic
from hpdm_core.model.hpdm import HPDM
from hpdm_core.sampling import sample
from tests.small import rin

CELL: dict[str, Any] = {
    "model": {
        "video": [4, 8, 12],
        "patch": [2, 4, 6],
        "token": [1, 2, 2],
        "levels": 2,
        "token_dim": 16,
        "blocks": 2,
        "backbone": rin(),
    },
    "data": {"dataset": "gaussian_world"},
    "training": {"steps": 1, "batch": 1, "learning_rate": 1e-3},
    "sampling": {"solver": {"use": "edm", "steps": [3], "churn": [0.0], "sigma_eff_max": [5.0]}},
    "runtime": {"tile_batch": 5},
}


def lively(assembly: Assembly) -> HPDM:
    """Initial weights leave some paths silent (gains of 0); noise on all of them makes every path speak."""
    model, drawn = assembly.build_model(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=drawn)
    return model.requires_grad_(False)


def samples(*sets: str) -> list[Tensor]:
    assembly = load_cell(CELL, sets=sets)
    return sample(assembly, assembly.denoiser(lively(assembly)), [0, 1], [-1, -1])


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def test_each_precision_gives_the_samples_up_to_its_rounding() -> None:
    usual, exact = samples(), samples("sampling.precision=fp64")
    assert {video.dtype for video in exact} == {torch.float32}
    assert 0 < difference(usual, exact) < 1e-3
    for sets in (["precision=bf16"], ["attention=bf16"], ["precision=bf16", "attention=fp32"]):
        rough = samples(*(f"sampling.{each}" for each in sets))
        assert 1e-3 < difference(rough, exact) < 0.3, sets
    assert difference(samples("sampling.precision=fp32"), usual) == 0  # TF32 is of CUDA
    assert difference(samples("training.precision=bf16", "training.attention=fp32"), usual) == 0


def test_float64_is_float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = load_cell(CELL, sets=["sampling.precision=fp64"])
    denoiser = assembly.denoiser(lively(assembly))
    seen: set[torch.dtype] = set()
    estimate = denoiser._step

    def noted(level: int, z: Tensor, sigma: Tensor, coords: Any, *rest: Any) -> tuple[Tensor, Tensor]:
        made = estimate(level, z, sigma, coords, *rest)
        seen.update(tensor.dtype for tensor in (z, sigma, *made))
        return made

    monkeypatch.setattr(denoiser, "_step", noted)
    sample(assembly, denoiser, [0], [-1])
    assert seen == {torch.float64}


def test_a_denoiser_leaves_the_model_as_it_is_and_follows_its_weights() -> None:
    assembly = load_cell(CELL, sets=["sampling.precision=bf16"])
    model = lively(assembly)
    before = model.execution
    sampling = assembly.denoiser(model)
    evaluation = assembly.denoiser(model, Arithmetic())
    assert model.execution is before
    assert sampling.model.execution.matmul_dtype == torch.bfloat16
    assert evaluation.model.execution.matmul_dtype is None
    with torch.no_grad():
        model.output.weight.zero_()
    assert not sampling.model.output.weight.any() and not evaluation.model.output.weight.any()
    double = assembly.denoiser(model, Arithmetic(precision="fp64"))
    assert double.model.output.weight.dtype == torch.float64
    assert model.output.weight.dtype == torch.float32


def test_sampling_in_tf32_does_not_change_what_training_asked_for() -> None:
    asked = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        samples()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(asked)


def test_what_is_compiled_is_asked_for_stage_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr("torch.compile", lambda function, **options: compiled.append(options) or function)
    monkeypatch.setattr("hpdm_core.assembly.assembly.compiler_problem", lambda device: None)
    for value, count in (("false", 0), ("training", 0), ("sampling", 1), ("true", 2)):
        samples(f"runtime.compile={value}")
        assert len(compiled) == count
    assembly = load_cell(CELL, sets=["runtime.compile=true"])
    assembly.denoiser(lively(assembly), Arithmetic())  # evaluation stays as it is
    assert len(compiled) == 2


def test_without_a_compiler_sampling_goes_on_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hpdm_core.assembly.assembly.compiler_problem", lambda device: "no compiler")
    assert difference(samples("runtime.compile=sampling"), samples()) == 0
    (message,) = [
        record.getMessage() for record in caplog.records if record.name == "hpdm_core.assembly.assembly"
    ]
    assert message == "runtime.compile: no compiler; sampling continues without compilation"


@pytest.mark.slow
@pytest.mark.skipif(compiler_problem(torch.device("cpu")) is not None, reason="no C++ compiler")
@pytest.mark.parametrize("sets", [[], ["sampling.precision=bf16"], ["sampling.attention=bf16"]])
def test_compiled_sampling_gives_the_samples_as_they_are(sets: list[str]) -> None:
    """fullgraph raises at the first break of the graph, and where graphs are made without end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        made = samples("runtime.compile=sampling", *sets)
    usual = samples(*sets)
    if not sets:
        assert difference(made, usual) < 1e-4
        return
    # A compiler leaves out some roundings to bfloat16: both are as far from the truth.
    exact = samples("sampling.precision=fp64")
    assert 1e-3 < difference(made, exact) < 2 * difference(usual, exact)
