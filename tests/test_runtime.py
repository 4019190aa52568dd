"""Device, threads, and what float32 means on CUDA."""

import os
from collections.abc import Iterator

import pytest
import torch

from hpdm_core.assembly.compose import load_cell
from hpdm_core.assembly.runtime import (
    ALLOCATOR,
    CUBLAS_WORKSPACE,
    available_devices,
    prepare_torch,
    products_as_in,
)
from hpdm_core.base.errors import InputError
from hpdm_core.config.schema import Arithmetic, RuntimeConfig
from hpdm_core.training.trainer import Trainer

TRAINING = [
    "model.video=[8,32,32]",
    "model.patch=[2,8,8]",
    "data.dataset=synthetic",
    "model.classes=4",
    "training.steps=3",
    "training.batch=2",
    "training.self_conditioning=0.9",
    "runtime.deterministic=true",
]


def test_cpu_with_threads_and_flushed_denormals() -> None:
    before = torch.get_num_threads()
    try:
        assert prepare_torch(RuntimeConfig(device="cpu", threads=2), Arithmetic()) == torch.device("cpu")
        assert torch.get_num_threads() == 2
        prepare_torch(RuntimeConfig(device="cpu"), Arithmetic())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.tensor([1e-38]).mul_(1e-3).item() == 0.0


@pytest.mark.parametrize("device", ["cuda:9999", "tpu", "meta"])
def test_an_absent_device_is_refused_with_what_there_is(device: str) -> None:
    with pytest.raises(
        InputError, match=rf"runtime.device: '{device}' is not available .* allowed here: cpu"
    ):
        prepare_torch(RuntimeConfig(device=device), Arithmetic())


def test_the_cpu_is_always_there() -> None:
    assert available_devices()[0] == "cpu"


@pytest.fixture
def products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("precision", "asked"), [("tf32", "high"), ("bf16", "high"), ("fp32", "highest"), ("fp64", "highest")]
)
def test_float32_products_on_cuda_are_what_the_stage_asks_for(
    precision: str, asked: str, monkeypatch: pytest.MonkeyPatch, products: None
) -> None:
    monkeypatch.setattr("hpdm_core.assembly.runtime.available_devices", lambda: ["cpu", "cuda"])
    arithmetic = Arithmetic.model_validate({"precision": precision})
    torch.set_float32_matmul_precision("medium")
    with products_as_in(arithmetic, torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == asked
    assert torch.get_float32_matmul_precision() == "medium"
    prepare_torch(RuntimeConfig(device="cuda"), arithmetic)
    assert torch.get_float32_matmul_precision() == asked


def test_memory_on_cuda_is_kept_in_segments_that_grow_unless_the_user_said_otherwise(
    monkeypatch: pytest.MonkeyPatch, products: None
) -> None:
    monkeypatch.setattr("hpdm_core.assembly.runtime.available_devices", lambda: ["cpu", "cuda"])
    environment: dict[str, str] = {}
    monkeypatch.setattr("os.environ", environment)
    prepare_torch(RuntimeConfig(device="cpu"), Arithmetic())
    assert environment == {}
    prepare_torch(RuntimeConfig(device="cuda"), Arithmetic())
    assert list(environment.values()) == ["expandable_segments:True"]
    assert set(environment) < set(ALLOCATOR)
    for name in ALLOCATOR:
        environment.clear()
        environment[name] = "max_split_size_mb:64"
        prepare_torch(RuntimeConfig(device="cuda"), Arithmetic())
        assert environment == {name: "max_split_size_mb:64"}


@pytest.fixture
def own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings of torch that a test may change."""
    monkeypatch.delenv(CUBLAS_WORKSPACE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    prepare_torch(RuntimeConfig(), Arithmetic())
    torch.use_deterministic_algorithms(False)


def settings() -> tuple[bool, bool, bool, str | None]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get(CUBLAS_WORKSPACE),
    )


@pytest.mark.parametrize("lenient", [False, True], ids=["unset before", "set to warn before"])
def test_determinism_is_asked_for_and_what_was_set_is_given_back(own_settings: None, lenient: bool) -> None:
    torch.use_deterministic_algorithms(lenient, warn_only=lenient)
    prepare_torch(RuntimeConfig(), Arithmetic())
    assert settings() == (lenient, lenient, True, None)
    for _ in range(2):  # the second of two such cells in one process changes nothing
        prepare_torch(RuntimeConfig(deterministic=True), Arithmetic())
        assert settings() == (True, False, False, ":4096:8")
    prepare_torch(RuntimeConfig(), Arithmetic())
    assert settings() == (lenient, lenient, True, None)


def test_a_workspace_that_is_set_stays(own_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":16:8")
    prepare_torch(RuntimeConfig(deterministic=True), Arithmetic())
    assert os.environ[CUBLAS_WORKSPACE] == ":16:8"
    prepare_torch(RuntimeConfig(), Arithmetic())
    assert os.environ[CUBLAS_WORKSPACE] == ":16:8"


def test_a_training_under_it_gives_the_same_bits_twice(own_settings: None) -> None:
    cell = load_cell("efficiency_small", sets=TRAINING)
    trained = []
    for _ in range(2):
        trainer = Trainer(cell)
        trainer.run()
        assert settings() == (True, False, False, ":4096:8")
        trained.append(trainer.model.state_dict())
    assert all(torch.equal(trained[0][name], tensor) for name, tensor in trained[1].items())
