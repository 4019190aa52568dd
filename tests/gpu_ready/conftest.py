"""CUDA pretended: tensors that say they are on a GPU and hold no numbers, on a machine that has none.

`torch._subclasses.fake_tensor.FakeTensorMode` gives shapes, types and devices of every operation's result, and
raises where an operation is given tensors of two devices. What a build of torch for CPUs lacks for it is a
guard that switches between GPUs: indexing, ``Tensor.to`` and attention ask for one before they are pretended.
Torch's own guard that does nothing takes its place, in a library of one line that is compiled here; no
operation of torch is replaced. A build for CUDA has its guard.

The backward pass asks the CUDA runtime for its streams, in either build, and can not be pretended.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.assembly.compose import load_cell

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""
CUDA = torch.device("cuda", 0)
HPDM_S = (
    "data.dataset={use: synthetic, classes: 101}",
    "diffusion.noise_scaling={use: exponential, first: 4.0, ratio: 2.0}",
    "training.steps=1000",
    "training.batch=2",
    "training.learning_rate=0.005",
    "training.warmup=100",
    "training.optimizer=lamb",
    "training.self_conditioning=1",
    "runtime.device=cuda",
    # Every kind of block and level, and no more of a kind than it takes: what is pretended takes its time.
    "model.blocks=3",
    "model.backbone.latent_layers=1",
)
ATEN = torch.ops.aten
INDEXING = (ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_)
MIXED = (*INDEXING, ATEN.copy_)
"""Operations that take tensors of two devices."""


class Pretended(TorchDispatchMode):
    """Tensors on the GPU are pretended, those on the CPU are real. `found` counts what the host waits for.

    That is: numbers read from the GPU, copies from it, and copies to it that are not ``non_blocking``, the
    index of a tensor on the GPU that lies on the CPU among them. A number that is read is 1. A mask as an index,
    whose result's size would be waited for, raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.found: Counter[str] = Counter()

    def __enter__(self) -> Pretended:
        self.lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(device=...): first on the CPU, then a copy
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch._C._set_only_lift_cpu_tensors(self.lifted)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        given = [each for each in tree_leaves((args, options)) if isinstance(each, Tensor)]
        device = options.get("device")
        to_gpu = device is not None and torch.device(device).type == "cuda"
        if not to_gpu and not any(isinstance(each, FakeTensor) for each in given):
            return func(*args, **options)
        # Torch raises at this where it runs its own rule of a result's device; convolutions have none.
        if func.overloadpacket not in MIXED and len({each.device for each in given if each.ndim}) > 1:
            raise RuntimeError(f"{func} of tensors on {', '.join(str(each.device) for each in given)}")
        answer = self._read(func.overloadpacket, args)
        if answer is not None:
            return answer
        with self.fake:
            made = func(*args, **options)
        self._count_copies(func.overloadpacket, args, options, made)
        return made

    def _read(self, packet: Any, args: tuple[Any, ...]) -> Any:
        """Return the answer of an operation that reads numbers, None for any other."""
        if packet is ATEN._local_scalar_dense:
            self.found["item"] += _on_gpu(args[0])
            return _one(args[0])
        if packet is ATEN.equal:
            self.found["equal"] += _on_gpu(args[0])
            return True
        if packet is ATEN.nonzero:
            self.found["nonzero"] += _on_gpu(args[0])
            return args[0].new_zeros(1, args[0].ndim, dtype=torch.long)
        return None

    def listed(self, tensor: FakeTensor) -> Any:
        """``Tensor.tolist``, which waits once, whatever the length."""
        self.found["tolist"] += _on_gpu(tensor)
        return _ones(tensor, tuple(tensor.shape))

    def _count_copies(self, packet: Any, args: tuple[Any, ...], options: dict[str, Any], made: Any) -> None:
        if packet in INDEXING:
            rows = [each for each in args[1] if each is not None]
            self.found["to the GPU"] += sum(_on_gpu(args[0]) and not _on_gpu(each) for each in rows)
        elif packet in (ATEN._to_copy, ATEN.copy_):
            source, target = (args[0], made) if packet is ATEN._to_copy else (args[1], args[0])
            free = options.get("non_blocking", packet is ATEN.copy_ and len(args) > 2 and args[2])
            if _on_gpu(source) and not _on_gpu(target):
                self.found["to the CPU"] += 1
            elif _on_gpu(target) and not _on_gpu(source) and not free:
                self.found["to the GPU"] += 1


def _on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _one(like: Tensor) -> Any:
    if like.dtype == torch.bool:
        return True
    return 1.0 if like.is_floating_point() else 1


def _ones(like: Tensor, shape: tuple[int, ...]) -> Any:
    return [_ones(like, shape[1:]) for _ in range(shape[0])] if shape else _one(like)


def on_gpu(module: nn.Module) -> nn.Module:
    """Replace all of a module's tensors by pretended ones on the GPU, in place; return it."""
    module.to = lambda *_: module  # there already; pretended parameters can not be swapped for others
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
                part._parameters[name] = nn.Parameter(made, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
    return module


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    made = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
    return memo.setdefault(id(tensor), made)


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A build for CPUs is given the guard that it lacks, once per process."""
    if torch.backends.cuda.is_built():
        return
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("a build of torch for CPUs needs a C++ compiler to pretend a GPU")
    folder = tmp_path_factory.mktemp("guard")
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    root = Path(torch.__file__).parent
    command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}", str(source)]
    subprocess.run([*command, "-o", str(library), f"-L{root / 'lib'}", "-lc10"], check=True)
    ctypes.CDLL(str(library))


@pytest.fixture
def pretend(guarded: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """Within a test a GPU is there, as far as torch and `hpdm_core` ask; gives what the host waited for."""
    monkeypatch.setattr("hpdm_core.assembly.runtime.available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr("torch.cuda._lazy_init", lambda: None)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda *_: None)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda *_: 1)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda *_: (2**36, 2**36))
    build = Assembly.build_model

    def built(assembly: Assembly, *, device: Any = "cpu") -> Any:
        # Weights are drawn on the CPU and checked as they are drawn: of pretended ones there is nothing to check.
        made = build(assembly, device="meta")
        return on_gpu(made) if torch.device(device).type == "cuda" else made

    monkeypatch.setattr(Assembly, "build_model", built)
    monkeypatch.setattr(FakeTensor, "__deepcopy__", _copied, raising=False)  # torch's looks for memory
    precision = torch.get_float32_matmul_precision()
    mode = Pretended()
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: mode.listed(tensor), raising=False)
    # Streams are the CUDA runtime's own. What lies in host memory comes and goes as on the CPU.
    monkeypatch.setattr("hpdm_core.sampling.cache._HostCopies", lambda device: None)
    with mode:
        yield mode
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def hpdm_s(pretend: Pretended) -> Callable[..., Assembly]:
    """Make HPDM-S on the pretended GPU, with further ``KEY=VALUE``."""
    return lambda *sets: load_cell("hpdm_s", sets=[*HPDM_S, *sets])


@pytest.fixture
def put() -> Callable[[nn.Module], nn.Module]:
    """Put a network on the pretended GPU."""
    return on_gpu
