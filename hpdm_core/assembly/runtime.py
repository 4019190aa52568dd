"""Machine-dependent settings of a run: device, threads and arithmetic of torch, compiler, free memory."""

import contextlib
import functools
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hpdm_core.base.errors import InputError, did_you_mean
from hpdm_core.config.schema import Arithmetic, RuntimeConfig
from hpdm_core.model.execution import Execution

__all__ = [
    "available_devices",
    "compiler_problem",
    "execution_of",
    "free_memory",
    "pinned",
    "prepare_torch",
    "products_as_in",
    "state_dtype",
]

log = logging.getLogger(__name__)

MUCH = 2**60
"""Bytes; more than any machine has."""

TF32 = ("tf32", "bf16")
"""Precisions whose float32 matrix products are rounded to TF32 on CUDA."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables of PyTorch's CUDA allocator settings: since torch 2.9, and before."""

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""With this set, cuBLAS uses a separate workspace per stream and is deterministic. cuBLAS reads it when it starts."""

_taken: list[tuple[bool, bool, bool, str | None]] = []
"""The process's settings from before determinism was enabled; empty while it is not enabled."""


def state_dtype(arithmetic: Arithmetic) -> torch.dtype:
    """Return the type of weights, moments and averages while training, and of a level's state while sampling."""
    return torch.float64 if arithmetic.precision == "fp64" else torch.float32


def execution_of(arithmetic: Arithmetic, *, checkpointing: bool = False) -> Execution:
    """Return how a backbone's blocks run under ``arithmetic``."""
    attention = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[arithmetic.attention]
    return Execution(
        matmul_dtype=torch.bfloat16 if arithmetic.precision == "bf16" else None,
        attention_dtype=attention,
        checkpointing=checkpointing,
    )


@contextlib.contextmanager
def products_as_in(arithmetic: Arithmetic, device: torch.device) -> Iterator[None]:
    """Within the block, use the precision of float32 matrix products on CUDA that ``arithmetic`` asks for."""
    before = torch.get_float32_matmul_precision()
    _set_products(arithmetic, device)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _set_products(arithmetic: Arithmetic, device: torch.device) -> None:
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if arithmetic.precision in TF32 else "highest")


def available_devices() -> list[str]:
    """Return the names that ``runtime.device`` may have on this machine, "cpu" first."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def prepare_torch(runtime: RuntimeConfig, arithmetic: Arithmetic) -> torch.device:
    """Configure torch for the whole process as ``runtime`` asks, and return the device.

    Call it before other uses of torch in the process, because threads inherit the setting that denormal numbers
    are flushed to zero. (Without it, decaying optimizer moments become denormal and slow a CPU down many times.)
    On CUDA, float32 matrix products use TF32 unless ``arithmetic`` says otherwise, as the paper's throughput
    implies (paper: mixed precision was worse; weights and sums stay float32). PyTorch's allocator uses expandable
    segments on CUDA, unless the environment configures it: self-conditioning changes shapes from step to step,
    which would fragment fixed segments. With several processes, each uses its own GPU, which
    `hpdm_core.base.distributed.joined` has set. Raises `InputError` for a device that this machine does not have.
    """
    allowed = available_devices()
    if runtime.device not in allowed:
        raise InputError(
            f"runtime.device: '{runtime.device}' is not available on this machine; allowed here: "
            f"{', '.join(allowed)}{did_you_mean(runtime.device, allowed)}"
        )
    torch.set_flush_denormal(True)
    _ask_for_determinism(runtime.deterministic)
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    device = torch.device(runtime.device)
    if device.type == "cuda" and not any(name in os.environ for name in ALLOCATOR):
        name = ALLOCATOR[0] if _torch_version() >= (2, 9) else ALLOCATOR[1]
        os.environ[name] = "expandable_segments:True"  # read at the first allocation
    _set_products(arithmetic, device)
    return device


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _ask_for_determinism(wanted: bool) -> None:
    """Enable deterministic algorithms in torch, or restore the settings from before they were enabled.

    An operation without a deterministic algorithm then raises RuntimeError
    (https://docs.pytorch.org/docs/stable/notes/randomness.html).
    """
    if wanted and not _taken:
        enabled = torch.are_deterministic_algorithms_enabled()
        lenient = torch.is_deterministic_algorithms_warn_only_enabled()
        benchmark = torch.backends.cudnn.benchmark
        _taken.append((enabled, lenient, benchmark, os.environ.get(CUBLAS_WORKSPACE)))
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif not wanted and _taken:
        enabled, lenient, benchmark, workspace = _taken.pop()
        torch.use_deterministic_algorithms(enabled, warn_only=lenient)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop(CUBLAS_WORKSPACE, None)


def compiler_problem(device: torch.device) -> str | None:
    """Return why torch.compile does not work for ``device`` on this machine; None if it works."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "no Triton that works with this GPU"
    from torch._inductor import cpp_builder, exc

    try:
        found = cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError) as error:
        return str(error).strip().partition("\n")[0] or "no C++ compiler"
    return None if shutil.which(found) else f"no C++ compiler '{found}'"


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on ``device``; `MUCH` if the system does not report it.

    On CUDA, this is the driver's free memory plus the memory that PyTorch's allocator holds unused. On the CPU, it
    is the machine's available memory, or less if the control groups of this process leave less.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return MUCH
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), MUCH)
    return min([free, *_free_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def pinned(tensor: Tensor) -> Tensor:
    """Return a copy of a CPU tensor in pinned memory, which allows asynchronous copies to a GPU.

    If the system has no more pinned memory (locked memory is limited), ``tensor`` itself is returned; copies from it
    are slower. The first time, this is logged.
    """
    try:
        return tensor.pin_memory()
    except RuntimeError:
        _say_not_pinned()
        return tensor


@functools.cache
def _say_not_pinned() -> None:
    log.warning("the system has no more pinned memory: ordinary memory is used, and copies are slower")


def _free_in_groups(groups: Path, root: Path) -> list[int]:
    """Return the free bytes in each control group of this process (of a SLURM job or a container).

    ``groups``: the kernel's list of the process's control groups; ``root``: their mount point, of version 1 or 2.
    """
    found = []
    with contextlib.suppress(OSError):
        for line in groups.read_text(encoding="ascii").splitlines():
            _, kind, name = line.split(":", 2)
            if kind not in ("", "memory"):
                continue
            top, most, used = root / kind, "memory.limit_in_bytes", "memory.usage_in_bytes"
            if not kind:
                most, used = "memory.max", "memory.current"
            here = top / name.lstrip("/")
            for group in (here, *here.parents):
                if group == top.parent:
                    break
                with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
                    limit = int((group / most).read_text())
                    statistics = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
                    cache = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
                    found.append(max(limit - int((group / used).read_text()) + cache, 0))
    return found
