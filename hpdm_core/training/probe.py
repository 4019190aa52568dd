"""How fast one training step is, and how much memory it takes: measured in a process of its own.

A probe that runs out of memory is an answer, not a crash: the child has a limit of its own (what it may
allocate on Linux, a share of the GPU on CUDA), and says so when it meets it. The step is the trainer's own,
on random pixels: making batches is not in it. On the CPU the child's allocator is told to keep what is freed:
with the system's defaults the pages of a large model are mapped anew at each step, which makes it look up to
three times slower than it is.
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
"""A batch is the largest when one larger by this share is known not to fit."""


@dataclass(frozen=True)
class Probe:
    """What was found: ``seconds`` per step (median), and the ``peak`` of memory in bytes.

    ``peak`` is what PyTorch had allocated on CUDA, and on the CPU what the process grew by since before the
    model was built (None where the system does not tell): weights, gradients, moments, the weight average
    and activations. Both are None out of memory.
    """

    outcome: Literal["ok", "oom"]
    batch: int
    seconds: float | None = None
    peak: int | None = None
    device: str = ""


def probe_training(assembly: Assembly, *, batch: int, steps: int = 3, memory: int | None = None) -> Probe:
    """Run ``steps`` training steps of ``batch`` videos in a child process, after one that is not counted.

    ``memory``: bytes that the child may allocate besides what Python and the libraries take; None for no
    limit. Raises `TroubleError` when the child fails for another reason than memory.
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
    if done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):  # by the kernel, when memory is short
        return Probe("oom", batch)
    if done.returncode == -signal.SIGABRT and "bad_alloc" in done.stderr:  # thrown where nothing catches it
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
    """Return the probe of the largest batch up to ``most`` that fits, None when one video does not, and all.

    Memory grows evenly with the batch: after one video and two, the rest is a guess that is checked, and
    halved in between until it is close. Without a limit that is known, batches double first.
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
    """Return the batch whose memory reaches the limit, by the two largest batches that fitted."""
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
        trainer._step(batch)  # ends with figures on the CPU, for which the device has been waited for
        seconds.append(time.perf_counter() - begun)
    peak = trainer.memory.peak()
    if peak is not None and device.type != "cuda":
        peak = max(peak - before, 0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"seconds": statistics.median(seconds[SETTLING:]), "peak": peak, "device": name}


def _load_libraries(device: torch.device) -> None:
    """Use once what a step uses, so that memory of the libraries' own does not count as the model's."""
    import torch
    from torch.nn import functional

    layer = torch.nn.Linear(64, 64, device=device)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    x = layer(torch.ones(1, 2, 64, 64, device=device))
    x = functional.gelu(functional.layer_norm(functional.scaled_dot_product_attention(x, x, x), (64,)))
    torch.matmul(x, x).square().mean().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    optimizer.step()


def _random_batch(assembly: Assembly, step: int) -> Batch:
    """Return a batch of noise for pixels, with noise levels and places as in training."""
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
    """Hold this process to ``memory`` bytes on top of what it has; on CUDA, of the device's memory."""
    if memory is None:
        return
    import torch

    if device.type == "cuda":
        # Alone among torch's functions that take a device this one wants a number.
        index = torch.cuda.current_device() if device.index is None else device.index
        whole = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(memory / whole, 1.0), index)
        return
    import resource  # not on Windows: there a probe has no limit of its own

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
        "_alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED and its arm_keys
    )
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(
        words in said for words in known
    )


def _status(name: str) -> int:
    """Return a size in bytes of this process from /proc, 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


if __name__ == "__main__":
    sys.exit(_main())
