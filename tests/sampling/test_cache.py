"""Contexts that are kept, wherever they lie, give the same samples as contexts made anew at each step."""

import errno
import os
from pathlib import Path

import pytest
import torch

from hpdm_core.assembly.compose import load_cell
from hpdm_core.plugins import build_plugins
from hpdm_core.sampling import cache, sample
from hpdm_core.sampling.cache import GIB
from tests.small import rin

FOREIGN = Path(__file__).parent.parent / "conformance" / "foreign_fusions.py"


def fusions():
    own = [(key, ()) for key in build_plugins().keys("context_fusions")]
    known = {key for key, _ in own}
    added = build_plugins([str(FOREIGN)]).keys("context_fusions")
    return own + [(key, (str(FOREIGN),)) for key in added if key not in known]


@pytest.fixture(scope="module")
def make_cell():
    def make(fusion="deep", plugins=(), **runtime):
        cell = {
            "model": {
                "video": [8, 16, 24],
                "patch": [2, 4, 6],
                "token": [1, 2, 2],
                "token_dim": 16,
                "blocks": 3,
                "backbone": rin(),
                "context_fusion": fusion,
            },
            "diffusion": {"noise_scaling": {"use": "exponential", "first": 1.0, "ratio": 2.0}},
            "data": {"dataset": "gaussian_world"},
            "training": {"steps": 1, "batch": 1, "learning_rate": 1e-3},
            "sampling": {
                "solver": {"use": "edm", "steps": [2], "churn": [0.0], "sigma_eff_max": [5.0]},
                "overlap": ["h", "w"],
            },
            "runtime": {"sample_batch": 4, "tile_batch": 30, **runtime},
        }
        return load_cell(cell, plugins=plugins)

    return make


def drawn(assembly):
    """Samples of a network in which every path speaks, and how many patches it encoded."""
    model = assembly.build_model()
    start = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=start)
    denoiser = assembly.denoiser(model)
    encode, rows = denoiser.encode, []

    def counted(level, z, *rest):
        rows.append(len(z))
        return encode(level, z, *rest)

    denoiser.encode = counted
    return sample(assembly, denoiser, [0, 1], [-1, -1]), sum(rows)


def assert_same(made, expected):
    for level, (mine, theirs) in enumerate(zip(made, expected, strict=True)):
        assert torch.allclose(mine, theirs, atol=1e-4), f"level {level}"
        assert theirs.std() > 0.05


@pytest.mark.parametrize(("fusion", "plugins"), fusions())
def test_every_fusion_gives_the_same_with_and_without_a_cache(fusion, plugins, make_cell):
    expected, anew = drawn(make_cell(fusion, plugins, cache="none"))
    kept, once = drawn(make_cell(fusion, plugins, cache="contexts"))
    assert_same(kept, expected)
    assert anew == 2 * once  # two steps
    elsewhere, _ = drawn(make_cell(fusion, plugins, cache="contexts", cache_memory=0.0))
    assert_same(elsewhere, expected)


@pytest.fixture
def caches(monkeypatch):
    """The caches that are made, level by level."""
    made = []

    class Noted(cache.CachedContexts):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr("hpdm_core.sampling.cascade.CachedContexts", Noted)
    return made


def test_a_tenth_of_the_memory_holds_a_tenth_and_files_the_rest(make_cell, caches):
    expected, _ = drawn(make_cell())
    whole = caches[1].nbytes
    assert whole["file"] == 0 and not caches[1].recomputed
    caches.clear()
    made, _ = drawn(make_cell(cache_memory=0.1 * whole["device"] / GIB))
    assert_same(made, expected)
    assert caches[1].nbytes["device"] <= 0.1 * whole["device"]
    assert sum(caches[1].nbytes.values()) == whole["device"]
    assert not caches[1].recomputed


def test_with_no_room_on_the_disk_either_parents_are_run_again(make_cell, caches, monkeypatch):
    expected, anew = drawn(make_cell(cache="none"))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    caches.clear()
    made, encoded = drawn(make_cell(cache_memory=0.0))
    assert_same(made, expected)
    assert len(caches[1].recomputed) > 1 and caches[1].nbytes["file"] == 0
    assert encoded > anew


def test_parents_are_not_all_in_memory_at_once(make_cell, caches, monkeypatch):
    most = []
    place = cache.CachedContexts._place

    def noted(self, contexts, parents):
        most.append(parents)
        return place(self, contexts, parents)

    monkeypatch.setattr(cache.CachedContexts, "_place", noted)
    drawn(make_cell())
    together = max(most)
    most.clear()
    drawn(make_cell(cache_memory=0.0))
    assert max(most) < 0.8 * together


def test_contexts_in_a_file_leave_no_name_behind(make_cell, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    held = cache._mapped(torch.arange(6.0).view(2, 3))
    assert torch.equal(held, torch.arange(6.0).view(2, 3))
    assert not list(tmp_path.iterdir())


def test_foreign_fusions_are_among_them():
    assert len(fusions()) > len(build_plugins().keys("context_fusions"))
