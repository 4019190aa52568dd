"""The three foreign fusions keep the contract and are sampled from cached contexts; the core is as it is."""

import ast
from pathlib import Path

import pytest
import torch

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.base.randomness import normal
from hpdm_core.config.schema import (
    CellConfig,
    DataConfig,
    ModelConfig,
    Part,
    RuntimeConfig,
    SamplingConfig,
    TrainingConfig,
)
from hpdm_core.plugins import build_plugins
from hpdm_core.sampling.cascade import sample
from hpdm_core.testing import ContextFusionCases

FILE = Path(__file__).with_name("foreign_fusions.py")
FUSIONS = ("cross_attention", "sigma_gate", "frequency_split")
RIN = {
    "latent_dim": 12,
    "latents": 6,
    "latent_layers": 1,
    "latent_heads": 2,
    "latent_head_dim": 6,
    "heads": 2,
}


@pytest.fixture(scope="module")
def foreign():
    return build_plugins([str(FILE)])


@pytest.mark.parametrize("check", ContextFusionCases.checks())
@pytest.mark.parametrize("key", FUSIONS)
def test_foreign_fusions_conform(foreign, key, check):
    case = ContextFusionCases()
    case.plugins, case.key = foreign, key
    getattr(case, check)()


def test_foreign_fusions_are_small_and_stand_outside():
    tree = ast.parse(FILE.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(classes) == len(FUSIONS)
    assert max(node.end_lineno - node.lineno + 1 for node in classes) <= 40
    imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.startswith("hpdm")} == {"hpdm_core"}


class Uncached:
    """A denoiser that computes every tile's contexts anew at every step."""

    def __init__(self, inner):
        self.inner = inner
        self.sigma_in = inner.sigma_in

    def encode(self, *arguments):
        return self.inner.encode(*arguments)

    def contexts(self, *arguments):
        return arguments

    def __call__(self, level, z, sigma, coords, label, contexts, latents):
        fresh = None if contexts is None else self.inner.contexts(*contexts)
        return self.inner(level, z, sigma, coords, label, fresh, latents)


@pytest.fixture(params=FUSIONS)
def assembly(request, foreign):
    config = CellConfig(
        model=ModelConfig(
            video=(8, 24, 40),
            patch=(2, 6, 10),
            token=(1, 3, 5),
            levels=3,
            token_dim=16,
            blocks=3,
            backbone=Part(use="rin", options=RIN),
            context_fusion=Part(use=request.param),
        ),
        data=DataConfig(dataset=Part(use="synthetic")),
        training=TrainingConfig(steps=1, batch=1, learning_rate=1e-3),
        sampling=SamplingConfig(solver=Part(use="edm", options={"steps": [3, 3, 2]}), overlap=("h",)),
        runtime=RuntimeConfig(tile_batch=50),
    )
    return Assembly(config, foreign)


@pytest.fixture
def denoiser(assembly):
    model = assembly.build_model()
    with torch.no_grad():
        for name, parameter in model.fusion.named_parameters():
            parameter.add_(0.2 * normal(parameter.shape, 0, "moved", name))
    return assembly.denoiser(model)


def test_cached_sampling_equals_uncached(assembly, denoiser):
    cached = sample(assembly, denoiser, [0, 1], [-1, -1])
    uncached = sample(assembly, Uncached(denoiser), [0, 1], [-1, -1])
    for level, (one, other) in enumerate(zip(cached, uncached, strict=True)):
        assert one.shape == (2, 3, *assembly.pyramid.size(level))
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_contexts_are_made_once_however_many_steps(assembly, denoiser, monkeypatch):
    calls = {"pixel_context": 0, "token_context": 0, "fuse": 0}

    def count(name):
        method = getattr(denoiser.model.fusion, name)

        def counted(*arguments):
            calls[name] += 1
            return method(*arguments)

        monkeypatch.setattr(denoiser.model.fusion, name, counted)

    for name in calls:
        count(name)
    found = []
    for steps in (2, 6):
        calls.update(dict.fromkeys(calls, 0))
        solver = assembly.plugins.make(
            "solvers", Part(use="edm", options={"steps": [steps]}), assembly.sigma_in
        )
        monkeypatch.setitem(assembly.__dict__, "solver", solver)
        sample(assembly, denoiser, [0], [-1])
        found.append(dict(calls))
    few, many = found
    assert few["pixel_context"] == many["pixel_context"] > 0
    assert few["token_context"] == many["token_context"] > 0
    assert many["fuse"] > few["fuse"]


def test_finer_levels_follow_the_coarsest(assembly, denoiser):
    sizes = (1, 3, *assembly.pyramid.size(0))
    dark, light = (
        sample(assembly, denoiser, [0], [-1], given={0: torch.full(sizes, x)}) for x in (-0.9, 0.9)
    )
    assert (dark[1] - light[1]).abs().max() > 1e-3
    assert (dark[2] - light[2]).abs().max() > 1e-4
