"""The machine's side of a run: device, threads and arithmetic settings of torch."""

import torch

from hpdm_core.config.schema import RuntimeConfig
from hpdm_core.errors import InputError, did_you_mean

__all__ = ["available_devices", "prepare_torch"]


def available_devices() -> list[str]:
    """Return the names that ``runtime.device`` may have on this machine, "cpu" first."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def prepare_torch(runtime: RuntimeConfig) -> torch.device:
    """Set torch up as ``runtime`` asks, for the whole process, and return the device.

    Call it before other work of torch in the process: threads inherit the setting that small numbers are
    flushed to zero (without it, the decaying tails of optimizer moments slow a CPU down many times). On CUDA
    float32 matrix products use TF32, as the paper's throughput implies (paper: mixed precision was worse;
    weights and sums stay float32). Raises `InputError` for a device that this machine lacks.
    """
    allowed = available_devices()
    if runtime.device not in allowed:
        raise InputError(
            f"runtime.device: '{runtime.device}' is not available on this machine; allowed here: "
            f"{', '.join(allowed)}{did_you_mean(runtime.device, allowed)}"
        )
    torch.set_flush_denormal(True)
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    device = torch.device(runtime.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device
