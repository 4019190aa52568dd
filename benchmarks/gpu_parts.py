"""The tasks of `benchmarks/gpu.py`, which imports this module: one function per task, each run in its own process.

A task writes each row as soon as it has the result (`Job.say`), so that finished rows are kept when time runs out. At a
toy size (``Job.toy``) every task runs on a CPU; the numbers are then meaningless.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from sections import Laps
from torch import Tensor
from train_step import MATMUL, PRESET_SETS, Clock, step_parts

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.assembly.compose import load_cell
from hpdm_core.assembly.runtime import compiler_problem, execution_of, prepare_torch
from hpdm_core.metrics.distances.frechet import frechet_distance
from hpdm_core.metrics.networks.detectors import reference_arithmetic
from hpdm_core.metrics.networks.i3d import I3D, SIDE
from hpdm_core.metrics.networks.random3d import Random3D
from hpdm_core.model.hpdm import HPDM
from hpdm_core.sampling import sample
from hpdm_core.sampling.cascade import label_of
from hpdm_core.sampling.files import contact_sheet, to_uint8, write_mp4
from hpdm_core.training import cost
from hpdm_core.training.batches import Batch
from hpdm_core.training.probe import Probe, _is_out_of_memory, _random_batch, largest_batch
from hpdm_core.training.step import joint_loss
from hpdm_core.training.trainer import Trainer, load_ema_model

__all__ = ["TASKS", "Job", "append", "run"]

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
LIMITS = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 5e-2}
"""Largest allowed relative norm of the difference from float64, for a loss, gradient or denoised tile. fp32: well under
1e-4. tf32 has about 3e-4 and bf16 about 4e-3 per matrix product, and here some dozen follow one another."""
SETS = (*PRESET_SETS, "diffusion.noise_scaling={use: exponential, first: 4.0, ratio: 2.0}")
NARROW = (
    "model.video=[8, 16, 16]",
    "model.patch=[2, 4, 4]",
    "model.token=[1, 2, 2]",
    "model.token_dim=16",
    "model.blocks=3",
    "model.backbone={use: rin, latent_dim: 8, latents: 6, latent_layers: 1, latent_heads: 2, "
    "latent_head_dim: 4, heads: 2, latent_mlp_ratio: 2, token_mlp_ratio: 2}",
)
MIDDLE = (
    "model.video=[16, 64, 64]",
    "model.patch=[4, 16, 16]",
    "model.token=[1, 2, 2]",
    "model.token_dim=256",
    "model.blocks=4",
    "model.backbone={use: rin, latent_dim: 128, latents: 64, latent_layers: 2, latent_heads: 4, "
    "latent_head_dim: 64, heads: 4, latent_mlp_ratio: 4, token_mlp_ratio: 2}",
)
"""A network that a CPU runs in float64 within seconds."""


SINGLE = (
    "model.video=[2, 4, 4]",
    "model.patch=[2, 4, 4]",
    "model.levels=1",
    "model.blocks=1",
    "model.context_fusion=none",
)
"""One patch through one block."""


def precision_sets(precision: str, attention: str | None = None) -> list[str]:
    """Return overrides for the precision of training and sampling; ``attention`` None: the same precision."""
    chosen = {"precision": precision, "attention": attention or "null"}
    return [f"{stage}.{name}={value}" for stage in ("training", "sampling") for name, value in chosen.items()]


def named(precision: str, attention: str | None) -> str:
    """Return the displayed name of a precision."""
    return precision if attention is None else f"{precision}, attention {attention}"


@dataclass(frozen=True)
class Job:
    """One task of one run: its device, its deadline (`time.time`), and the folder of its rows."""

    task: str
    options: Mapping[str, Any]
    device: str
    toy: bool
    out: Path
    stamp: str
    until: float

    def say(
        self,
        name: str,
        value: float | str | None,
        unit: str = "",
        *,
        limit: float | None = None,
        ok: bool | None = None,
        note: str = "",
        **more: Any,
    ) -> None:
        """Write one row. With ``limit``, the check passes if the value is at most ``limit``; otherwise ``ok`` says
        whether it passed. ``more`` is written to the JSON line only.
        """
        if limit is not None:
            ok = isinstance(value, float) and value <= limit  # False for NaN
        row = {"task": self.task, "name": name, "value": value, "unit": unit}
        append(self.out, {"run": self.stamp, **row, "limit": limit, "ok": ok, "note": note, **more})

    def cell(self, source: str, *sets: str) -> Assembly:
        """Return a cell on this job's device; at a toy size a narrow one for any preset."""
        narrow = NARROW if self.toy else ()
        return load_cell(source, sets=[*SETS, f"runtime.device={self.device}", *narrow, *sets])

    @property
    def left(self) -> float:
        """Seconds until this task is stopped."""
        return self.until - time.time()


def append(folder: Path, row: Mapping[str, Any]) -> None:
    """Add a line to ``results.jsonl`` in a single write, so that it is complete or absent also after a kill."""
    line = json.dumps(row, allow_nan=True, default=str) + "\n"
    target = os.open(folder / "results.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(target, line.encode())
        os.fsync(target)
    finally:
        os.close(target)


def run(job: Job, log: Path) -> None:
    """Run a task in this process, made for it: output goes to ``log``; an error gives a row and exit code 1."""
    os.setsid()  # its own process group, so that its child processes are killed with it
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if job.toy:
        torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            TASKS[job.task.partition(":")[0]](job)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        said = str(error).strip().splitlines() or [""]
        job.say("failed", f"{type(error).__name__}: {said[0]}"[:300], ok=False)
        sys.exit(1)


# Helpers


def lively(model: HPDM) -> HPDM:
    """Add noise to all weights, so that none of them is zero as after initialisation."""
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.02 * torch.randn(parameter.shape, generator=drawn)).to(parameter)
    return model


def apart(found: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> float:
    """Return the norm of the difference over the norm of ``expected``, in float64; NaN if any value is NaN."""
    mine, theirs = (
        torch.cat([each.detach().double().cpu().flatten() for each in _listed(given)])
        for given in (found, expected)
    )
    return float((mine - theirs).norm() / theirs.norm())


def _listed(given: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [given] if isinstance(given, Tensor) else given


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next tensors get, so that uninitialised values show."""
    if device.type == "cuda":
        held = [torch.full((2**26,), math.nan, device=device) for _ in range(8)]
        held += [torch.full((2**size,), math.nan, device=device) for size in range(8, 20)]
        del held


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Within the block, float32 matrix products and convolutions on CUDA use float32 or TF32, by ``precision``."""
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device, *, rounds: int, warm: int = 3) -> float:
    """Return the median seconds of ``work`` after a warm-up; on CUDA measured by events."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            work()
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def peak_memory(device: torch.device) -> int | None:
    """Return the peak of allocated bytes since the last reset, None on a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """Free unused memory and reset the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def gib(size: int | None) -> float | None:
    return None if size is None else size / GIB


# a. Correctness


def network(job: Job) -> None:
    """Compare the device with the CPU in float64: loss, gradients, optimizer, contexts, tile."""
    assembly = job.cell("hpdm_s", *(() if job.toy else MIDDLE), "training.batch=3")
    device = prepare_torch(assembly.config.runtime, assembly.config.training)
    batch = _random_batch(assembly, 1)
    batch = replace(batch, conditioned=torch.tensor([0, 2]), label=torch.tensor([3, -1, 0]))
    reference = lively(assembly.build_model()).double()
    expected = joint_loss(assembly, reference, batch.to(torch.device("cpu"), torch.float64))
    expected.total.backward()
    gradients = [_gradient(parameter) for parameter in reference.parameters()]
    exact = job.cell("hpdm_s", *(() if job.toy else MIDDLE), "training.batch=3", *precision_sets("fp64"))
    denoised = _chain(exact, reference, torch.device("cpu"), torch.float64)
    for precision, attention in (("fp32", None), ("tf32", None), ("tf32", "bf16"), ("bf16", None)):
        poison(device)
        limit, said = LIMITS[attention or precision], named(precision, attention)
        cell = job.cell(
            "hpdm_s", *(() if job.toy else MIDDLE), "training.batch=3", *precision_sets(precision, attention)
        )
        model = cell.build_model(device=device)
        model.load_state_dict(reference.state_dict())
        model.execution = execution_of(cell.config.training)
        with products(precision):
            loss = joint_loss(cell, model, batch.to(device))
            loss.total.backward()
            found = _chain(cell, model, device, torch.float32)
        job.say(f"joint loss, {said}", apart(loss.total, expected.total), limit=limit)
        mine = [_gradient(parameter) for parameter in model.parameters()]
        job.say(f"gradient, {said}", apart(mine, gradients), limit=limit)
        for name, value in found.items():
            job.say(f"{name}, {said}", apart(value, denoised[name]), limit=limit)
    for name in ("lamb", "adamw"):
        moved = [
            _moved(job, assembly, name, reference, gradients, device=where, dtype=dtype)
            for where, dtype in ((torch.device("cpu"), torch.float64), (device, torch.float32))
        ]
        job.say(f"three steps of {name}, fp32", apart(moved[1], moved[0]), limit=1e-4)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


def _chain(assembly: Assembly, model: HPDM, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Denoise two tiles of the finest level from contexts of their parents; return contexts and tiles."""
    pyramid, denoiser = assembly.pyramid, assembly.denoiser(model)
    finest = pyramid.levels - 1
    tiles = pyramid.tiles(finest, ())
    ends = [tiles[0], tiles[-1]]
    label = torch.tensor([1, -1], device=device)
    drawn = torch.Generator().manual_seed(1)
    sources: list[Any] = []
    for level in range(finest):
        places = [pyramid.chain(finest, tile)[level] for tile in ends]
        z = torch.randn(2, pyramid.channels, *pyramid.patch, generator=drawn).to(device, dtype)
        sigma = torch.full((2,), 0.05 / denoiser.sigma_in[level], device=device, dtype=dtype)
        coords = pyramid.coords(level, torch.tensor(places)).to(device)
        sources.append(denoiser.encode(level, z, sigma, coords, label, sources))
    coords = pyramid.coords(finest, torch.tensor(ends)).to(device)
    contexts = denoiser.contexts(finest, coords, sources)
    z = torch.randn(2, pyramid.channels, *pyramid.patch, generator=drawn).to(device, dtype)
    sigma = torch.full((2,), 1.0 / denoiser.sigma_in[finest], device=device, dtype=dtype)
    first, latents = denoiser(finest, z, sigma, coords, label, contexts, None)
    second, _ = denoiser(finest, z, sigma, coords, label, contexts, latents)
    made = [each for each in contexts.tokens.values() if each is not None]
    return {"contexts": made, "tile step": [first, second]}


def _moved(
    job: Job,
    assembly: Assembly,
    optimizer: str,
    start: HPDM,
    gradients: Sequence[Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return how far three steps of an optimizer with given gradients move the weights."""
    model = copy.deepcopy(start).to(device, dtype)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    part = job.cell("hpdm_s", f"training.optimizer={optimizer}").config.training.optimizer
    made = assembly.make("optimizers", part, list(model.named_parameters()), 0.01)
    for step in range(3):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = ((1 + step) * gradient.float()).to(parameter)
        made.step()
    return [now.detach() - then for now, then in zip(model.parameters(), before, strict=True)]


def metrics(job: Job) -> None:
    """Compare I3D and random3d on the device with the CPU, and a Frechet distance of their features."""
    device = torch.device(job.device)
    frames, side, clips = (3, 32, 1) if job.toy else (16, SIDE, 2)
    drawn = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    small, large = Random3D(), I3D().requires_grad_(False)

    def logits(network: I3D, videos: Tensor) -> Tensor:
        return network.endpoints(videos, "Mixed_3b")["Mixed_3b"] if job.toy else network(videos)

    videos = torch.randint(0, 256, (16, 16, 64, 64, 3), generator=drawn, dtype=torch.uint8)
    videos[8:] //= 2
    expected = small.features(videos)
    for precision in ("fp32", "tf32"):
        poison(device)
        with products(precision):
            found = small.features(videos.to(device))
        limit = 1e-4 if precision == "fp32" else 3e-3
        job.say(f"random3d, {precision}", apart(found, expected), limit=limit)
        distances = [frechet_distance(each[:8].numpy(), each[8:].numpy()) for each in (found, expected)]
        difference = abs(distances[0] / distances[1] - 1)
        job.say(f"Frechet distance on random3d, {precision}", difference, limit=10 * limit)
    clip = torch.rand(clips, 3, frames, side, side, generator=drawn) * 2 - 1
    with torch.no_grad():
        wanted = logits(copy.deepcopy(large).double(), clip.double())
        large.to(device)
        poison(device)
        with reference_arithmetic(device):
            job.say("I3D, fp32", apart(logits(large, clip.to(device)), wanted), limit=1e-4)
        with products("tf32"):
            job.say("I3D, tf32", apart(logits(large, clip.to(device)), wanted), limit=LIMITS["tf32"])


def same(job: Job) -> None:
    """Compare a resumed run with an uninterrupted one, and sampling with contexts on the device, on the host, and
    uncached.
    """
    sets = (
        *precision_sets("fp32"),
        "training.batch=4",
        "training.steps=4",
        "training.warmup=1",
        "training.ema_halflife=2",
        "runtime.checkpoint_every=2",
        "runtime.log_every=1",
    )
    assembly = job.cell("hpdm_s", *(() if job.toy else MIDDLE), *sets)
    with tempfile.TemporaryDirectory() as name:
        whole, killed, resumed = (Path(name) / each for each in ("whole", "killed", "resumed"))
        Trainer(assembly, folder=whole).run()
        done = "checkpoints/00000002"
        shutil.copytree(whole / done, killed / done)
        result = Trainer(assembly, folder=resumed, previous=[killed]).run()
        ends = [_weights(folder / "model.safetensors") for folder in (whole, resumed)]
        job.say("resumed from step", str(result["resumed_from"]), ok=result["resumed_from"] == [2])
        bits = all(torch.equal(*pair) for pair in zip(*ends, strict=True))
        job.say("weights of a resumed run", apart(ends[1], ends[0]), limit=1e-4, note=_bits(bits))
        model = lively(load_ema_model(assembly, resumed / "model.safetensors"))
    videos = {}
    ways = {
        "kept on the device": "runtime.cache=contexts",
        "kept in host memory": "runtime.cache_memory=0",
        "not kept": "runtime.cache=none",
    }
    for way, chosen in ways.items():
        cell = job.cell(
            "hpdm_s",
            *(() if job.toy else MIDDLE),
            *precision_sets("fp32"),
            *(() if job.toy else ("sampling.overlap=[h,w]",)),
            "sampling.solver.steps=[2]",
            "runtime.tile_batch=16",
            chosen,
        )
        prepare_torch(cell.config.runtime, cell.config.training)
        poison(torch.device(job.device))
        videos[way] = sample(cell, cell.denoiser(model), [0, 1], [0, 1])
    for way in ("kept on the device", "kept in host memory"):
        job.say(f"sampling, contexts {way}", apart(videos[way], videos["not kept"]), limit=1e-4)


def _weights(path: Path) -> list[Tensor]:
    from safetensors.torch import load_file

    return [tensor for _, tensor in sorted(load_file(path).items())]


def _bits(equal: bool) -> str:
    return "the same bits" if equal else "other bits"


def compiled(job: Job) -> None:
    """Compare the compiled joint loss with the eager one."""
    assembly = job.cell(
        "hpdm_s", *(SINGLE if job.toy else MIDDLE), *precision_sets("fp32"), "training.batch=3"
    )
    device = prepare_torch(assembly.config.runtime, assembly.config.training)
    problem = compiler_problem(device)
    if problem is not None:
        job.say("compiler", problem, ok=job.toy)
        return
    model = lively(assembly.build_model(device=device))
    _ = assembly.objective, assembly.noise_sampler, assembly.sigma_in  # as the trainer does before compiling
    batch = _random_batch(assembly, 1).to(device)
    backend = (
        "eager" if job.toy else "inductor"
    )  # traces the graph without generating code, which would take half a minute on a CPU
    function = torch.compile(joint_loss, fullgraph=True, backend=backend)
    results = []
    for each in (joint_loss, function):
        poison(device)
        model.zero_grad()
        begun = time.perf_counter()
        loss = each(assembly, model, batch)
        loss.total.backward()
        synchronise(device)
        took = time.perf_counter() - begun
        results.append((loss.total.detach(), [_gradient(parameter) for parameter in model.parameters()]))
    job.say("first compiled step", took, "s", note=backend)
    job.say("loss, compiled against eager, fp32", apart(results[1][0], results[0][0]), limit=1e-4)
    job.say("gradient, compiled against eager, fp32", apart(results[1][1], results[0][1]), limit=1e-4)


# b. Ceilings


def ceilings(job: Job) -> None:
    """FLOP/s of a large matrix product and of attention alone, at the model's shapes."""
    device = torch.device(job.device)
    size = 64 if job.toy else MATMUL["cuda"]
    rounds = 3 if job.toy else 20
    types = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
    for precision, dtype in types.items():
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.full((size, size), math.nan, device=device, dtype=dtype)
        with products(precision):
            took = seconds(lambda: torch.mm(left, right, out=out), device, rounds=rounds)  # noqa: B023
        job.say(f"matrix product, {precision}", 2 * size**3 / took / 1e12, "TFLOP/s", note=f"{size}^3")
        with products(precision):
            row = torch.mm(left[:16], right)
        exact = left[:16].double() @ right.double()
        limit = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 1e-2}[precision]
        job.say(f"matrix product against float64, {precision}", apart(row, exact), limit=limit)
        job.say(f"and its whole against these rows, {precision}", apart(out[:16], exact), limit=limit)
    tokens, latents = (32, 8) if job.toy else (4096, 768)
    batch = 1 if job.toy else 8
    shapes = {  # queries, keys, heads, width of a head
        "patch read": (latents, tokens, 16, 64),
        "latents": (latents, latents, 24, 128),
        "patch write": (tokens, latents, 16, 64),
    }
    for (name, (queries, keys, heads, width)), (precision, dtype) in itertools.product(
        shapes.items(), types.items()
    ):
        q, k, v = (
            torch.randn(batch, heads, rows, width, device=device, dtype=dtype, requires_grad=True)
            for rows in (queries, keys, keys)
        )
        upstream = torch.randn(batch, heads, queries, width, device=device, dtype=dtype)

        def both(q: Tensor = q, k: Tensor = k, v: Tensor = v, upstream: Tensor = upstream) -> None:
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), upstream)

        def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            with torch.no_grad():
                F.scaled_dot_product_attention(q, k, v)

        flops = 4 * batch * heads * queries * keys * width
        with products(precision):
            alone, whole = (seconds(work, device, rounds=rounds) for work in (forward, both))
        title = f"attention, {name}, {precision}"
        note = f"{queries} queries, {keys} keys, {heads} heads of {width}, batch {batch}"
        job.say(f"{title}, forward", flops / alone / 1e12, "TFLOP/s", note=note)
        # Backward: five matrix products against two in the forward pass, including recomputation in fused kernels.
        job.say(f"{title}, forward and backward", 3.5 * flops / whole / 1e12, "TFLOP/s", note=note)


def peers(job: Job) -> None:
    """Run `benchmarks/peers.py`, if the script and the peer are installed."""
    script = ROOT / "benchmarks" / "peers.py"
    if not script.exists():
        job.say("RIN block against its peer", "benchmarks/peers.py is not there")
        return
    if importlib.util.find_spec("rin_pytorch") is None:
        job.say("RIN block against its peer", "rin-pytorch is not installed")
        return
    done = _command([sys.executable, str(script), "--json", "--device", job.device], job)
    if done.returncode:
        job.say("RIN block against its peer", _last(done.stderr), ok=False)
        return
    found = json.loads(_last(done.stdout))
    for name, value in found.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            job.say(f"RIN block against its peer: {name}", float(value))


def _command(words: Sequence[str], job: Job) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        list(words),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        timeout=max(job.left - 2, 1),
        check=False,
    )


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


# c. Training


@dataclass
class Measured:
    """Measurements of a network's training: at the largest batch that fits, and the memory for one video."""

    trainer: Trainer
    batch: int
    step: float
    peak: int | None
    one: int | None
    first: float
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Videos per second."""
        return self.batch / self.step


def training(job: Job) -> None:
    """Speed, shares, utilisation and memory of one model at one precision, with the largest micro-batch that fits."""
    model, precision = job.options["model"], job.options["precision"]
    use_compiler = bool(job.options.get("compile")) and not job.toy
    sets = precision_sets(precision)
    found = _train(job, model, sets)
    if found is not None and use_compiler:
        # Do not search the batch size again: each would be compiled separately.
        batch, device, eager = found.batch, found.trainer.device, found.rate
        del found
        release(device)
        sets = [*sets, "runtime.compile=true"]
        found = _train(job, model, sets, only=batch)
        if found is not None:
            job.say(
                "speed, compiled against eager", found.rate / eager, "x", note=f"eager {eager:.3g} videos/s"
            )
    if found is None:
        job.say("a step of one video", "out of memory", ok=False)
        return
    device = found.trainer.device
    job.say("speed", found.rate, "videos/s", note=f"micro-batch {found.batch}")
    job.say("step", found.step, "s", note=f"first step {found.first:.1f} s")
    job.say("peak memory", gib(found.peak), "GiB", note=f"micro-batch {found.batch}")
    job.say("peak memory of one video", gib(found.one), "GiB")
    shares = {name: took / sum(found.parts.values()) for name, took in found.parts.items()}
    job.say("time by part", _shares(shares), note="each part waited for")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ceiling = _ceiling(device, dtype, precision, toy=job.toy)
    if not use_compiler:
        laps = Laps(device)
        batch = _batch_of(job, model, sets, found.batch)
        for _ in range(2):
            sections = step_parts(found.trainer, batch, laps)
        total = sum(sections.values())
        job.say("time by section", _shares({name: each / total for name, each in sections.items()}))
        job.say("share of fusion", sections["fusion"] / total)
    flops = cost.training_flops(job.cell(model, *sets)) * found.batch
    rate = flops / found.step
    note = (
        f"{flops / found.batch / 1e12:.2f} TFLOP per video, counted; product at {ceiling / 1e12:.0f} TFLOP/s"
    )
    job.say("utilisation", rate / ceiling, note=note)


def resolution(job: Job) -> None:
    """Compare HPDM-L in patches with the same network at full resolution: the two ratios of Table 1."""
    whole = [] if job.toy else ["model.video=[64, 256, 256]"]
    video = "[8, 16, 16]" if job.toy else "[64, 256, 256]"
    arms = {
        "patches": [*whole, "model.computation_allocation=linear"],
        "full": [f"model.video={video}", f"model.patch={video}", "model.levels=1"],
    }
    for checkpointing in (False, True):
        runtime = [
            *precision_sets("tf32"),
            f"runtime.activation_checkpointing={str(checkpointing).lower()}",
        ]
        note = "with activation checkpointing, both" if checkpointing else ""
        found = {}
        for arm, sets in arms.items():
            made = _train(job, "hpdm_l", [*sets, *runtime], most=64)
            if made is None:
                job.say(f"{arm}: a step of one video", "out of memory", note=note)
                break
            job.say(f"{arm}: speed", made.rate, "videos/s", note=f"micro-batch {made.batch}. {note}")
            job.say(f"{arm}: peak memory of one video", gib(made.one), "GiB", note=note)
            found[arm] = (made.rate, made.one)
            device = made.trainer.device
            del made
            release(device)
        if len(found) == 2:
            ours, full = found["patches"], found["full"]
            job.say("speed against full resolution", ours[0] / full[0], "x", note=f"paper 5.4. {note}")
            if ours[1] and full[1]:
                job.say("memory against full resolution", ours[1] / full[1], "x", note=f"paper 0.22. {note}")
            return


def _batch_of(job: Job, model: str, sets: Sequence[str], videos: int) -> Batch:
    batch = _random_batch(job.cell(model, *sets, f"training.batch={videos}"), 1)
    # Fix the number of self-conditioned rows to its expected value.
    return replace(batch, conditioned=torch.arange(math.ceil(0.9 * videos)))


def _train(
    job: Job, model: str, sets: Sequence[str], *, most: int = 256, only: int | None = None
) -> Measured | None:
    """Find the largest micro-batch that fits, or use ``only``, and time its steps; None if not even one video fits."""
    trainer = Trainer(job.cell(model, *sets, "training.self_conditioning=0.9"))
    device = trainer.device
    memory = None if device.type == "cpu" else int(0.95 * torch.cuda.mem_get_info(device)[1])
    firsts: list[float] = []

    def probe(videos: int) -> Probe:
        release(device)
        try:
            batch = _batch_of(job, model, sets, videos)
            begun = time.perf_counter()
            trainer.step(batch)
            trainer.step(batch)  # the first step allocates the optimizer's moments
            firsts.append(time.perf_counter() - begun)
            return Probe("ok", videos, seconds=firsts[-1], peak=peak_memory(device) or 0)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        trainer.optimizer.zero_grad(set_to_none=True)
        return Probe("oom", videos)

    if only is None:
        best, probes = largest_batch(probe, memory=memory, most=2 if job.toy else most)
    else:
        probes = [probe(only)]
        best = probes[0] if probes[0].outcome == "ok" else None
    job.say(
        "micro-batches tried",
        ", ".join(f"{each.batch} {each.outcome}" for each in probes),
        note=f"of {model} {' '.join(sets)}",
    )
    if best is None:
        return None
    batch = _batch_of(job, model, sets, best.batch)
    release(device)
    clock, times = Clock(device), []
    for number in range(1 + (1 if job.toy else 5)):
        clock.lap()
        trainer.step(batch)
        if number:
            times.append(clock.lap())
        if job.left < 4 * (times[-1] if times else 1):
            break
    step = statistics.median(times) if times else (best.seconds or math.nan) / 2
    on_gpu = device.type == "cuda"
    return Measured(
        trainer=trainer,
        batch=best.batch,
        step=step,
        peak=peak_memory(device) if on_gpu else None,
        one=next((each.peak for each in probes if each.batch == 1), None) if on_gpu else None,
        first=firsts[0] if firsts else math.nan,
        parts=_staged(trainer, batch),
    )


def _staged(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """Return the seconds of each stage of one step, which waits for the device between stages."""
    clock, spent = Clock(trainer.device), dict.fromkeys(STAGES, 0.0)
    loss, clip, update = trainer.joint_loss, trainer.strategy.clip, trainer.average.update

    def forward(*arguments: Any, **options: Any) -> Any:
        spent["rest"] += clock.lap()
        made = loss(*arguments, **options)
        spent["forward"] += clock.lap()
        return made

    def clipped(*arguments: Any) -> float:
        spent["backward"] += clock.lap()
        return clip(*arguments)

    def updated(model: Any) -> None:
        spent["optimizer"] += clock.lap()
        update(model)
        spent["EMA"] += clock.lap()

    trainer.joint_loss = forward
    trainer.strategy.clip = clipped  # type: ignore[method-assign]
    trainer.average.update = updated  # type: ignore[method-assign]
    try:
        clock.lap()
        moved = batch.to(trainer.device, trainer.dtype)
        spent["data to device"] += clock.lap()
        trainer.step(moved)
        spent["rest"] += clock.lap()
    finally:
        trainer.joint_loss = loss
        trainer.strategy.clip = clip  # type: ignore[method-assign]
        trainer.average.update = update  # type: ignore[method-assign]
    return spent


STAGES = ("data to device", "forward", "backward", "optimizer", "EMA", "rest")


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def _ceiling(device: torch.device, dtype: torch.dtype, precision: str, *, toy: bool) -> float:
    size = 64 if toy else MATMUL["cuda"]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    with products(precision):
        return 2 * size**3 / seconds(lambda: left @ right, device, rounds=10)


# d. Sampling


def sampling(job: Job) -> None:
    """Seconds per video of HPDM-S with h/w overlap, with and without cached contexts."""
    precision = precision_sets(job.options.get("precision", "tf32"))
    solver = "sampling.solver={use: edm, steps: [128, 64, 32], order: [2, 1, 1], churn: [40.0, 0.0, 0.0]}"
    sets = [*precision, f"sampling.overlap={'[]' if job.toy else '[h,w]'}", "runtime.tile_batch=64"]
    full = job.cell("hpdm_s", *sets, solver)
    few = 2 if job.toy else 5
    steps = [f"sampling.solver.steps=[{few}]", "sampling.solver.order=[1]", "sampling.solver.churn=[0.0]"]
    device = prepare_torch(full.config.runtime, full.config.training)
    model = lively(full.build_model(device=device)).requires_grad_(False).eval()
    levels = range(full.pyramid.levels)
    whole: dict[str, list[float]] = {}
    videos = {}
    for way, chosen in (("cached", "contexts"), ("uncached", "none")):
        cell = job.cell("hpdm_s", *sets, *steps, f"runtime.cache={chosen}")
        poison(device)
        release(device)
        videos[way], once, each = _timed_sample(cell, model, device)
        calls = [full.solver.calls(level) for level in levels]
        # Without the cache, contexts are computed in each call and are part of its time.
        whole[way] = [once[level] + calls[level] * each[level] for level in levels]
        for level in levels:
            tiles = len(full.pyramid.tiles(level, full.config.sampling.overlap))
            note = f"{tiles} tiles; contexts {once[level]:.2f} s once, then {calls[level]} calls"
            job.say(f"level {level}, {way}: a call", each[level], "s", note=note)
        job.say(f"a video, {way}", sum(whole[way]), "s", note=f"extrapolated from {few} calls per level")
        job.say(f"peak memory, {way}", gib(peak_memory(device)), "GiB")
    finest = levels[-1]
    job.say("cached against uncached, outputs", apart(videos["cached"], videos["uncached"]), limit=1e-2)
    gain = whole["uncached"][finest] / whole["cached"][finest]
    job.say("gain of the cache, finest level", gain, "x", note="paper 1.4")
    job.say("gain of the cache, whole video", sum(whole["uncached"]) / sum(whole["cached"]), "x")
    for name, value in _ideal_gains(job, sets, full).items():
        job.say(f"ideal gain of the cache, {name}", value, "x", note="by counted FLOPs")


def _timed_sample(
    cell: Assembly, model: HPDM, device: torch.device
) -> tuple[list[Tensor], list[float], list[float]]:
    """Sample one video; return its levels, and for each level the seconds before its first call and per call."""
    levels = cell.pyramid.levels
    stamps: list[list[float]] = [[] for _ in range(levels)]
    begun = [0.0] * levels

    def now() -> float:
        synchronise(device)
        return time.perf_counter()

    def noted(numbers: dict[str, int]) -> None:
        stamps[numbers["level"]].append(now())

    def finished(level: int, _: Tensor) -> None:
        if level + 1 < levels:
            begun[level + 1] = now()

    labels = [label_of(0, cell.config.model.classes)]
    denoiser = cell.denoiser(model)
    sample(cell, denoiser, [0], labels)  # warm-up
    for each in stamps:
        each.clear()
    begun[0] = now()
    made = sample(cell, denoiser, [0], labels, observe=finished, progress=noted)
    each = [statistics.median(b - a for a, b in itertools.pairwise(times)) for times in stamps]
    once = [max(times[0] - start - call, 0.0) for times, start, call in zip(stamps, begun, each, strict=True)]
    return made, once, each


def _ideal_gains(job: Job, sets: Sequence[str], full: Assembly) -> dict[str, float]:
    """Return the speed-ups by caching if only matrix products took time: ratios of FLOPs."""
    finest = full.pyramid.levels - 1

    def flops(last: int, *, cached: bool) -> int:
        steps = ", ".join(["1"] * finest + [str(last)])
        cell = job.cell(
            "hpdm_s",
            *sets,
            f"sampling.solver={{use: edm, steps: [{steps}], order: [1], churn: [0.0]}}",
        )
        return cost.sampling_flops(cell, cached=cached)

    # FLOPs of one more call at the finest level, and of what is computed once with the cache.
    kept, fresh = (flops(2, cached=cached) - flops(1, cached=cached) for cached in (True, False))
    calls = full.solver.calls(finest)
    return {
        "finest level": calls * fresh / (calls * kept + fresh - kept),
        "whole video": cost.sampling_flops(full, cached=False) / cost.sampling_flops(full, cached=True),
    }


# e. Quality


def quality(job: Job) -> None:
    """Train on the built-in sample clips for most of the time left, sample, and write a video and a contact sheet."""
    share = min(180.0, 0.7 * job.left)
    base = [
        "data.dataset={use: sample_clips, crop: centre, flip: false}",
        "diffusion.noise_sampling={use: clean_stream, mean: -0.7, std: 1.2}",
        "diffusion.noise_scaling={use: exponential, first: 2.0, ratio: 0.6}",
        "diffusion.objective={use: effective_v, sigma_data: 0.4}",
        "training.coordinate_sampling=sampled_tiles",
        "training.self_conditioning=0",
        "training.label_dropout=0",
        "training.optimizer=adamw",
        "training.warmup=100",
        "model.classes=3",
        "model.table_std=0.5",
        "model.computation_allocation={use: explicit, levels_per_block: [1, 2, 3]}",
        "sampling.solver={use: edm, steps: [32, 16, 16], order: [2, 1, 1], churn: [0.0], "
        "sigma_eff_max: [20.0, 10.0, 10.0], sigma_eff_min: [0.05, 0.1, 0.1]}",
        "runtime.sample_batch=12",
        f"runtime.device={job.device}",
    ]
    size = TOY_QUALITY if job.toy else QUALITY

    def cell(steps: int, workers: int) -> Assembly:
        more = [f"training.steps={steps}", f"runtime.workers={workers}", "runtime.prefetch=2"]
        return load_cell("tiny_clips", sets=[*base, *size, *more])

    workers = 0 if job.toy else min(12, max((os.cpu_count() or 1) - 2, 0))
    with tempfile.TemporaryDirectory() as name:
        try:
            pace = _pace(cell(8 if job.toy else 60, workers))
        except (OSError, RuntimeError) as error:  # for example too little shared memory
            job.say("worker processes", f"{type(error).__name__}: {error}"[:200], note="goes on without")
            workers = 0
            pace = _pace(cell(8, workers))
        steps = 8 if job.toy else max(int(share / pace), 200)
        assembly = cell(steps, workers)
        trainer = Trainer(assembly, folder=Path(name))
        result = trainer.run()
        job.say("steps trained", float(steps), note=f"{pace * 1e3:.0f} ms each")
        job.say("parameters", result["parameters"] / 1e6, "million")
        job.say("loss per level", ", ".join(f"{each:.4f}" for each in result["loss"] if each is not None))
        denoiser = assembly.denoiser(load_ema_model(assembly, Path(name) / "model.safetensors"))
    count = 2 if job.toy else 12
    labels = [label_of(index, 3) for index in range(count)]
    begun = time.perf_counter()
    levels = sample(assembly, denoiser, range(count), labels)
    job.say("sampling", (time.perf_counter() - begun) / count, "s/video", note=f"{count} together")
    shown = [[to_uint8(level[row]) for level in levels] for row in range(count)]
    contact_sheet(job.out / "quality.png", shown)
    grid = rearrange(torch.stack([row[-1] for row in shown]), "(a b) f h w c -> f (a h) (b w) c", a=2)
    write_mp4(job.out / "quality.mp4", grid, fps=12.0)
    job.say("to look at", "quality.mp4, quality.png", note="samples, the three clips in turn")


QUALITY = (
    "model.video=[16, 64, 64]",
    "model.patch=[16, 16, 16]",
    "model.token=[8, 1, 1]",
    "model.levels=3",
    "model.token_dim=512",
    "model.blocks=3",
    "model.backbone={use: rin, latent_dim: 512, latents: 64, latent_layers: 2, latent_heads: 8, "
    "latent_head_dim: 64, heads: 8, latent_mlp_ratio: 2, token_mlp_ratio: 2}",
    "training.batch=48",
    "training.learning_rate=0.0015",
    "training.ema_halflife=200",
)
TOY_QUALITY = (
    "model.video=[4, 16, 16]",
    "model.patch=[4, 4, 4]",
    "model.token=[4, 1, 1]",
    "model.levels=3",
    "model.token_dim=16",
    "model.blocks=3",
    "model.backbone={use: rin, latent_dim: 16, latents: 4, latent_layers: 1, latent_heads: 2, "
    "latent_head_dim: 8, heads: 2}",
    "training.batch=4",
    "training.learning_rate=0.0015",
    "training.ema_halflife=4",
    "sampling.solver.steps=[2]",
)


def _pace(assembly: Assembly) -> float:
    """Return the seconds of a step, including making batches as in training."""
    trainer = Trainer(assembly)
    trainer.run()
    settled = trainer.durations[len(trainer.durations) // 2 :]
    return statistics.fmean(settled)


# f. Tests that ask for a card


def tests(job: Job) -> None:
    """``pytest -m gpu tests/gpu``."""
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    done = _command(words, job)
    print(done.stdout, done.stderr, sep="\n")
    line = re.sub(r"^=+ | =+$", "", _last(done.stdout)) or _last(done.stderr)
    for failed in re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE):
        job.say("failed test", failed[:300], ok=False)
    ok = done.returncode == 0 and ("passed" in line or job.toy)  # all skipped fails on a card
    job.say("tests/gpu", line, ok=ok)


TASKS: dict[str, Callable[[Job], None]] = {
    "a.network": network,
    "a.metrics": metrics,
    "a.same": same,
    "a.compiled": compiled,
    "b.ceilings": ceilings,
    "b.peers": peers,
    "c.training": training,
    "c.resolution": resolution,
    "d.sampling": sampling,
    "e.quality": quality,
    "f.tests": tests,
}
"""Name -> function; a job's task may add a variant after a colon."""
