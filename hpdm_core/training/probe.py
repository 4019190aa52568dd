"""Measures the time and memory of one training step in a child process.

Running out of memory is a valid result of a probe: the child has its own limit (allocated memory on Linux, a
share of the GPU on CUDA) and reports when it reaches it. The step is the trainer's, on random pixels; making
batches is not included. On the CPU the child's allocator is set to keep freed memory: with the system's
defaults, the pages of a large model are mapped again at each step, which makes it up to three times slower.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hpdm_core.base.errors import TroubleError

if TYPE_CHECKING:
    import torch

    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.training.batches import Batch

__all__ = ["ALLOCATOR", "Probe", "largest_batch", "probe_training"]

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"}
"""Environment of the child: glibc keeps freed memory for the next step. Other C libraries ignore it."""

SETTLING = 1
CLOSE = 0.06
"""The search for the largest batch stops when a batch that is larger by this share is known not to fit."""


@dataclass(frozen=True)
class Probe:
    """The result of a probe: ``seconds`` per step (median), and the ``peak`` of memory in bytes.

    ``peak`` covers weights, gradients, moments, the weight average and activations. On CUDA it is the memory that
    PyTorch allocated, on the CPU the growth of the process since before the model was built (None if the system
    does not report it). Both are None when the probe ran out of memory.
    """

    outcome: Literal["ok", "oom"]
    batch: int
    seconds: float | None = None
    peak: int | None = None
    device: str = ""


def probe_training(assembly: Assembly, *, batch: int, steps: int = 3, memory: int | None = None) -> Probe:
    """Run ``steps`` training steps of ``batch`` videos in a child process, after one warm-up step.

    ``memory``: bytes that the child may allocate in addition to Python and the libraries; None for no limit.
    Raises `TroubleError` when the child fails for another reason than memory.
    """
    config = assembly.config.model_dump(mode="json")
    config["training"]["batch"] = batch
    spec = {"config": config, "plugins": list(assembly.plugins.names), "steps": steps, "memory": memory}
    environment = {
        **os.environ,
        **ALLOCATOR,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-m", "hpdm_core.training.probe"],
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):  # killed by the kernel for memory
        return Probe("oom", batch)
    if done.returncode == -signal.SIGABRT and "bad_alloc" in done.stderr:  # an uncaught C++ exception
        return Probe("oom", batch)
    try:
        made = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except (IndexError, ValueError):
        made = None
    if made is None:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise TroubleError(
            f"probe of {batch} video(s): the process ended with code {done.returncode}"
            + (f": {said[-1].strip()}" if said else "")
        )
    return Probe(**made)


def largest_batch(
    probe: Callable[[int], Probe], *, memory: int | None, most: int
) -> tuple[Probe | None, list[Probe]]:
    """Return the probe of the largest batch up to ``most`` that fits, and the list of all probes.

    The first value is None when one video does not fit. Memory grows linearly with the batch: after probes of one
    and two videos, the largest batch is extrapolated and probed, then bisected to within `CLOSE`. Without a known
    limit, the batch is doubled until it does not fit, then bisected.
    """
    probes: list[Probe] = []
    fits: Probe | None = None
    fails = most + 1
    batch = 1
    while True:
        found = probe(batch)
        probes.append(found)
        if found.outcome == "ok":
            fits = found
        else:
            fails = batch
        best = 0 if fits is None else fits.batch
        if fails - best <= max(1, int(CLOSE * best)):
            return fits, probes
        batch = max(
            best + 1, min(_guess(probes, memory) or 2 * best, (best + fails) // 2 if fails <= most else most)
        )


def _guess(probes: list[Probe], memory: int | None) -> int | None:
    """Return the batch at which memory reaches the limit, extrapolated from the two largest batches that fit."""
    fitted = sorted((found.batch, found.peak) for found in probes if found.peak is not None)
    if memory is None or len(fitted) < 2 or any(found.outcome == "oom" for found in probes):
        return None
    (small, less), (large, more) = fitted[-2:]
    each = (more - less) / (large - small)
    return max(large + 1, large + int(0.97 * (memory - more) / each)) if each > 0 else None


# The child


def _main() -> int:
    """Read a spec from standard input, measure, print one line of JSON."""
    spec = json.load(sys.stdin)
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.assembly.runtime import prepare_torch
    from hpdm_core.config.schema import CellConfig
    from hpdm_core.plugins import build_plugins

    config = CellConfig.model_validate(spec["config"])
    assembly = Assembly(config, build_plugins(spec["plugins"]))
    device = prepare_torch(config.runtime, config.training)
    batch = config.training.batch
    with contextlib.suppress(ImportError):
        _limit(device, spec["memory"])
    try:
        made = Probe("ok", batch, **_measure(assembly, device, spec["steps"]))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        made = Probe("oom", batch)
    print(json.dumps(asdict(made)))
    return 0


def _measure(assembly: Assembly, device: torch.device, steps: int) -> Mapping[str, Any]:
    import torch

    from hpdm_core.training.trainer import Trainer

    _load_libraries(device)
    before = _status("VmRSS")
    trainer = Trainer(assembly)
    seconds = []
    for step in range(1, SETTLING + steps + 1):
        batch = _random_batch(assembly, step)
        begun = time.perf_counter()
        trainer.step(batch)  # copies its losses to the CPU at the end, so the device has finished
        seconds.append(time.perf_counter() - begun)
    peak = trainer.memory.peak()
    if peak is not None and device.type != "cuda":
        peak = max(peak - before, 0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"seconds": statistics.median(seconds[SETTLING:]), "peak": peak, "device": name}


def _load_libraries(device: torch.device) -> None:
    """Run each kind of operation of a step once, so that memory of the libraries is not counted as the model's."""
    import torch
    from torch.nn import functional

    layer = torch.nn.Linear(64, 64, device=device)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    x = layer(torch.ones(1, 2, 64, 64, device=device))
    x = functional.gelu(functional.layer_norm(functional.scaled_dot_product_attention(x, x, x), (64,)))
    torch.matmul(x, x).square().mean().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    optimizer.step()


def _random_batch(assembly: Assembly, step: int) -> Batch:
    """Return a batch with random pixels, and with noise levels and offsets drawn as in training."""
    import torch

    from hpdm_core.base.randomness import generator, normal
    from hpdm_core.training.batches import Batch

    config, slots = assembly.config, assembly.noise_sampler.slots
    videos = config.training.batch
    shape = (videos, config.model.channels, *config.model.patch)
    drawn = [assembly.noise_sampler.draw(generator("probe", "sigma", step, row)) for row in range(videos)]
    places = [
        assembly.coordinate_sampler.sample(generator("probe", "place", step, row)) for row in range(videos)
    ]
    share = config.training.self_conditioning
    conditioned = torch.rand(videos, generator=generator("probe", "latents", step)) < share
    return Batch(
        step=step,
        clean=[normal(shape, "probe", "clean", step, slot).clamp(-1, 1) for slot in range(len(slots))],
        noise=[normal(shape, "probe", "noise", step, slot) for slot in range(len(slots))],
        sigma=[torch.stack([sigma[slot] for sigma, _ in drawn]) for slot in range(len(slots))],
        in_loss=[torch.stack([used[slot] for _, used in drawn]) for slot in range(len(slots))],
        offsets=[torch.stack([place[slot.level] for place in places]) for slot in slots],
        label=torch.full((videos,), -1 if not config.model.classes else 0),
        conditioned=conditioned.nonzero().flatten(),
    )


def _limit(device: torch.device, memory: int | None) -> None:
    """Limit this process to ``memory`` more bytes than it has now; on CUDA, to ``memory`` bytes of the device."""
    if memory is None:
        return
    import torch

    if device.type == "cuda":
        # set_per_process_memory_fraction needs a device with an index.
        index = torch.cuda.current_device() if device.index is None else device.index
        whole = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(memory / whole, 1.0), index)
        return
    import resource  # not available on Windows, where a probe has no limit of its own

    limit = _status("VmData") + memory
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    said = str(error).lower()
    known = (
        "out of memory",
        "can't allocate memory",
        "cannot allocate memory",
        "bad_alloc",
        "bad alloc",
        "_alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED and similar
    )
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(
        words in said for words in known
    )


def _status(name: str) -> int:
    """Return the value ``name`` of /proc/self/status in bytes, 0 if it is not available."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


if __name__ == "__main__":
    sys.exit(_main())
