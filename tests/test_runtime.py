"""Device and threads."""

import pytest
import torch

from hpdm_core.config.schema import RuntimeConfig
from hpdm_core.errors import InputError
from hpdm_core.runtime import available_devices, prepare_torch


def test_cpu_with_threads_and_flushed_denormals() -> None:
    before = torch.get_num_threads()
    try:
        assert prepare_torch(RuntimeConfig(device="cpu", threads=2)) == torch.device("cpu")
        assert torch.get_num_threads() == 2
        prepare_torch(RuntimeConfig(device="cpu"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.tensor([1e-38]).mul_(1e-3).item() == 0.0


@pytest.mark.parametrize("device", ["cuda:9999", "tpu", "meta"])
def test_an_absent_device_is_refused_with_what_there_is(device: str) -> None:
    with pytest.raises(
        InputError, match=rf"runtime.device: '{device}' is not available .* allowed here: cpu"
    ):
        prepare_torch(RuntimeConfig(device=device))


def test_the_cpu_is_always_there() -> None:
    assert available_devices()[0] == "cpu"
