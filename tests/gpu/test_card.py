"""What only a card can show: ``pytest -m gpu tests/gpu``, which `benchmarks/gpu.py` runs too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.assembly.compose import load_cell
from hpdm_core.assembly.runtime import prepare_torch
from hpdm_core.base.errors import DivergedError
from hpdm_core.model.hpdm import HPDM
from hpdm_core.sampling import sample
from hpdm_core.store.failures import kind_of
from hpdm_core.training.probe import _random_batch, probe_training
from hpdm_core.training.step import joint_loss
from hpdm_core.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA on this machine"),
]

GIB = 2**30
SMALL = (
    "data.dataset={use: synthetic, classes: 101}",
    "model.video=[8, 32, 32]",
    "model.patch=[2, 8, 8]",
    "model.token=[1, 2, 2]",
    "model.token_dim=64",
    "model.blocks=3",
    "model.backbone={use: rin, latent_dim: 32, latents: 16, latent_layers: 1, latent_heads: 2, "
    "latent_head_dim: 16, heads: 4}",
    "training.batch=4",
    "training.steps=4",
    "training.warmup=1",
    "training.learning_rate=0.005",
    "training.ema_halflife=2",
    "runtime.device=cuda",
    "runtime.checkpoint_every=2",
    "runtime.log_every=1",
)
CUDA = torch.device("cuda")


def cell(*sets: str) -> Assembly:
    return load_cell("hpdm_s", sets=[*SMALL, *sets])


def lively(model: HPDM) -> HPDM:
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.02 * torch.randn(parameter.shape, generator=drawn)).to(parameter)
    return model


def apart(found: Tensor, expected: Tensor) -> float:
    mine, theirs = found.double().cpu(), expected.double().cpu()
    return float((mine - theirs).norm() / theirs.norm())


@pytest.fixture
def matmul_precision() -> Callable[[], str]:
    before = torch.get_float32_matmul_precision()
    yield torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_a_probe_measures_and_keeps_to_its_limit() -> None:
    found = probe_training(cell(), batch=2, steps=1, memory=8 * GIB)
    assert found.outcome == "ok" and found.seconds and found.peak and found.device
    assert found.peak < 8 * GIB
    assert probe_training(cell(), batch=4096, steps=1, memory=GIB // 2).outcome == "oom"


@pytest.mark.parametrize(
    "kept", ["runtime.cache=contexts", "runtime.cache_memory=0"], ids=["device", "pinned"]
)
def test_sampling_from_cached_contexts_equals_sampling_without(kept: str) -> None:
    videos = []
    for chosen in (kept, "runtime.cache=none"):
        assembly = cell(
            "sampling.overlap=[h,w]", "sampling.solver.steps=[2]", "runtime.tile_batch=16", chosen
        )
        prepare_torch(assembly.config.runtime, assembly.config.training)
        model = lively(assembly.build_model(device="cuda")).requires_grad_(False).eval()
        videos.append(sample(assembly, assembly.denoiser(model), [0, 1], [0, 1]))
    for cached, fresh in zip(*videos, strict=True):
        assert bool(cached.isfinite().all())
        assert apart(cached, fresh) < 1e-2  # tf32


def test_training_goes_on_after_a_kill(tmp_path: Path) -> None:
    whole, killed, resumed = (tmp_path / name for name in ("whole", "killed", "resumed"))
    Trainer(cell(), folder=whole).run()
    shutil.copytree(whole / "checkpoints/00000002", killed / "checkpoints/00000002")
    assert Trainer(cell(), folder=resumed, previous=[killed]).run()["resumed_from"] == [2]
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert one.keys() == other.keys()
    for name, expected in one.items():
        assert apart(other[name], expected) < 1e-3 or float(expected.norm()) < 1e-6, name


def test_out_of_memory_on_the_card_is_told_from_other_failures() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2**44, device="cuda")
    assert kind_of(caught.value) == "out of memory"
    try:
        raise RuntimeError("the step failed") from caught.value
    except RuntimeError as error:
        assert kind_of(error) == "out of memory"
    assert kind_of(DivergedError("training: not finite")) == "diverged"
    assert float(torch.ones(8, device="cuda").sum()) == 8  # the card still works


def test_fp32_is_float32_and_tf32_is_not(matmul_precision: Callable[[], str]) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card has no TF32")
    drawn = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=drawn) for _ in range(2))
    exact = left.double() @ right.double()
    found = {}
    for precision, setting in (("fp32", "highest"), ("tf32", "high")):
        config = cell(f"training.precision={precision}").config
        prepare_torch(config.runtime, config.training)
        assert matmul_precision() == setting
        found[precision] = apart(left.to(CUDA) @ right.to(CUDA), exact)
    assert found["fp32"] < 1e-5 < found["tf32"] < 2e-3


def test_the_loss_on_the_card_is_that_of_the_cpu(matmul_precision: Callable[[], str]) -> None:
    assembly = cell("training.precision=fp32")
    prepare_torch(assembly.config.runtime, assembly.config.training)
    batch = _random_batch(assembly, 1)
    model = lively(assembly.build_model(device="cuda"))
    reference = assembly.build_model().double()
    reference.load_state_dict(model.state_dict())
    expected = joint_loss(assembly, reference, batch.to(torch.device("cpu"), torch.float64))
    found = joint_loss(assembly, model, batch.to(CUDA))
    for loss in (expected, found):
        loss.total.backward()
    assert apart(found.total.detach(), expected.total.detach()) < 1e-4
    gradients = [
        torch.cat([p.grad.double().cpu().flatten() for p in each.parameters() if p.grad is not None])
        for each in (model, reference)
    ]
    assert apart(*gradients) < 1e-4
