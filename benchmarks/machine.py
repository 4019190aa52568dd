"""Facts about the machine, which every benchmark records. Imported by the other benchmarks."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

__all__ = ["facts"]


def facts(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Return device, processor, cores, threads and versions, as JSON."""
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """Return the processor's name, if the system provides it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 - a device file
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
