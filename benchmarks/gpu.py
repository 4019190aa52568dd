"""All checks and measurements that need a GPU, in one command, in order of importance.

    python benchmarks/gpu.py [--minutes 8] [--plan] [--only c,d] [--more] [--out FOLDER]
    python benchmarks/gpu.py --rehearse

Each task runs in its own process with its own time limit. A task that fails or runs out of time becomes a row of the
table, and the others go on. Results are written immediately to results/published/gpu/<card>/: results.jsonl (a line per
row, of all runs) and table.md (the newest of each row). Nothing is downloaded.

--rehearse runs every task at a toy size on the CPU, also without a GPU, and writes to a temporary folder. Without
--rehearse and without CUDA, the command says so and exits with code 2. The exit code is 1 when a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]  # the tree that this file is in, installed or not

import gpu_parts  # noqa: E402 - found by the lines above
import torch  # noqa: E402
from machine import facts  # noqa: E402

from hpdm_core.base.errors import InputError, report_errors  # noqa: E402
from hpdm_core.base.files import write_bytes  # noqa: E402
from hpdm_core.store.provenance import git_commit  # noqa: E402

LEAST = 15.0
"""A task is not started with fewer seconds left than this."""
SPARE = 5.0
"""Seconds reserved for writing the table."""
PATIENCE = 10
"""Factor by which the time limits of a rehearsal are longer: the CPU may be busy with other work."""

PARTS = {
    "a": "Correctness: the CPU in float64 against CUDA",
    "b": "Ceilings: matrix products and attention alone",
    "c": "Training at 64x256^2",
    "d": "Sampling at 64x256^2",
    "e": "Quality: what minutes of training give",
    "f": "Tests that ask for a card",
}


@dataclass(frozen=True)
class Task:
    """``name``: one of `gpu_parts.TASKS`, with a variant after a colon; ``expected`` and ``limit``: seconds; ``more``:
    only with ``--more``; ``toy``: whether it is part of a rehearsal, which needs one variant only.
    """

    name: str
    expected: float
    limit: float
    options: Mapping[str, Any] = field(default_factory=dict)
    more: bool = False
    toy: bool = True

    @property
    def part(self) -> str:
        """The letter of the part that it belongs to."""
        return self.name[0]


def _train(model: str, precision: str, expected: float, **more: Any) -> Task:
    compiled = bool(more.pop("compile", False))
    attention = more.pop("attention", None)
    said = gpu_parts.named(precision, attention)
    name = f"c.training:{model}, {said}{', compiled' if compiled else ''}"
    options = {"model": model, "precision": precision, "attention": attention, "compile": compiled}
    return Task(name, expected, 2.5 * expected, options, **more)


PLAN = (
    Task("a.network", 25, 90),
    Task("b.ceilings", 20, 60),
    _train("hpdm_s", "tf32", 35),
    _train("hpdm_l", "bf16", 45, toy=False),
    Task("a.same", 20, 60),
    Task("a.metrics", 20, 60),
    Task("d.sampling", 45, 120),
    Task("c.resolution", 60, 150),
    _train("hpdm_s", "tf32", 35, attention="bf16", toy=False),
    _train("hpdm_l", "tf32", 45, toy=False),
    Task("f.tests", 30, 90),
    Task("e.quality", 200, 260),
    _train("hpdm_s", "bf16", 90, compile=True, toy=False),
    Task("a.compiled", 60, 150),
    Task("b.peers", 30, 90),
    _train("hpdm_s", "bf16", 35, more=True, toy=False),
    _train("hpdm_m", "tf32", 40, more=True, toy=False),
    _train("hpdm_m", "bf16", 40, more=True, toy=False),
    _train("hpdm_s", "fp32", 45, more=True, toy=False),
    _train("hpdm_l", "bf16", 120, compile=True, more=True, toy=False),
    _train("hpdm_m", "bf16", 120, compile=True, more=True, toy=False),
    Task("d.sampling:bf16", 45, 120, {"precision": "bf16"}, more=True, toy=False),
)
"""In order of importance."""


def chosen(given: argparse.Namespace) -> list[Task]:
    """Return the tasks selected by the options."""
    letters = list(PARTS) if given.only is None else [each.strip() for each in given.only.split(",")]
    unknown = [each for each in letters if each not in PARTS]
    if unknown:
        raise InputError(f"--only: '{unknown[0]}' was given; allowed are {', '.join(PARTS)}")
    wanted = [task for task in PLAN if task.part in letters]
    if given.rehearse:
        return [task for task in wanted if task.toy]
    return [task for task in wanted if given.more or not task.more]


def show_plan(tasks: Sequence[Task]) -> None:
    """Print the parts, and the tasks with their expected minutes and their limits."""
    total = 0.0
    print(f"{'task':<40}{'expected':>12}{'limit':>10}{'until':>10}   (minutes)")
    for task in tasks:
        total += task.expected / 60
        expected, limit = f"{task.expected / 60:.1f}", f"{task.limit / 60:.1f}"
        print(f"{task.name:<40}{expected:>12}{limit:>10}{total:>10.1f}")
    for letter, title in PARTS.items():
        print(f"  {letter}  {title}")


def run_all(tasks: Sequence[Task], given: argparse.Namespace, out: Path, device: str) -> bool:
    """Run the tasks one after the other; return whether all checks passed."""
    begun = time.time()
    patience = PATIENCE if given.rehearse else 1
    end = begun + 60 * given.minutes * patience - SPARE
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    about = _about(device)
    gpu_parts.append(
        out, {"run": stamp, "task": "run", "device": device, "rehearsal": given.rehearse, **about}
    )
    log = out / "log.txt"
    log.unlink(missing_ok=True)
    for number, task in enumerate(tasks, start=1):
        left = end - time.time()
        until = time.time() + min(task.limit * patience, left)
        job = gpu_parts.Job(task.name, dict(task.options), device, given.rehearse, out, stamp, until)
        if left < (0 if given.rehearse else LEAST):
            job.say("not run", f"{given.minutes:g} minutes were up")
            continue
        print(f"[{time.time() - begun:5.0f} s] {number} of {len(tasks)}: {task.name}", flush=True)
        since = time.time()
        outcome = _run_one(job, log, rehearse=given.rehearse)
        if outcome is not None:
            job.say("failed", outcome, ok=False)
        job.say("took", time.time() - since, "s")
        _write_table(out, about)
    _write_table(out, about)
    rows = [row for row in _rows(out) if row["run"] == stamp]
    failed = [row for row in rows if row.get("ok") is False]
    for row in failed:
        print(f"NOT AS IT SHOULD BE  {row['task']}: {row['name']}: {_number(row['value'])} {row['note']}")
    print(f"{len(rows)} rows, {len(failed)} not as they should be; {out / 'table.md'}")
    return not failed


def _run_one(job: gpu_parts.Job, log: Path, *, rehearse: bool) -> str | None:
    """Run a task in its own process; return why it ended, if it could not record that itself."""
    # A rehearsal forks, to save the time of imports; CUDA does not work in a forked process.
    context = multiprocessing.get_context("fork" if rehearse else "spawn")
    process = context.Process(target=gpu_parts.run, args=(job, log), name=job.task)
    process.start()
    process.join(max(job.left, 0.1))
    late = process.is_alive()
    if process.pid is not None and (late or process.exitcode != 0):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == process.pid:  # it has started its own process group
                os.killpg(process.pid, signal.SIGKILL)
    if late:
        process.kill()
        process.join(10)
        return "stopped at its time limit"
    if process.exitcode not in (0, 1):
        return f"the process ended with code {process.exitcode}"
    if process.exitcode == 1 and not any(
        row["run"] == job.stamp and row["task"] == job.task and row["name"] == "failed"
        for row in _rows(job.out)
    ):
        return "the process did not begin"
    return None


def _prepare_to_fork() -> None:
    """Import once, for all tasks, what torch's optimizers import when the first is built, which takes seconds; and
    exclude loaded objects from garbage collection in the tasks.
    """
    importlib.import_module("torch._dynamo")
    gc.collect()
    gc.freeze()


def _about(device: str) -> dict[str, Any]:
    """Return card, driver, versions and commit."""
    found = {"commit": git_commit() or "unknown", "driver": None, "card": None, "cuda": torch.version.cuda}
    if device == "cuda":
        name, driver = _card()
        found |= {"card": name, "driver": driver}
    return found | {key: value for key, value in facts("cpu").items() if key != "device"}


def _card() -> tuple[str, str]:
    """Return the name and the driver of the first card from nvidia-smi, without initialising CUDA."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        shown = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
        name, driver = (each.strip() for each in shown.splitlines()[0].split(","))
        return name, driver
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return torch.cuda.get_device_name(0), "unknown"


def _rows(out: Path) -> list[dict[str, Any]]:
    """Return the written rows of all runs, without truncated lines."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if "name" in row:
                    rows.append(row)
    return rows


def _write_table(out: Path, about: Mapping[str, Any]) -> None:
    """Write the table, part by part: of each task the rows of its newest run, of each name the newest row."""
    rows = _rows(out)
    newest = {row["task"]: row["run"] for row in rows if row["name"] != "not run"}
    shown = [row for row in rows if newest.get(row["task"], row["run"]) == row["run"]]
    lines = [
        f"# {about['card'] or 'Rehearsal on a CPU: the numbers mean nothing'}",
        "",
        f"Driver {about['driver']}, CUDA {about['cuda']}, torch {about['torch']}, Python {about['python']}, "
        f"commit {about['commit']}. Written by `python benchmarks/gpu.py`.",
        "",
        "Differences are norms of the difference over the norm of the expected value, which is float64 on the CPU "
        "unless the row says otherwise. Times are medians after a warm-up.",
    ]
    for letter, title in PARTS.items():
        mine = [row for row in shown if row["task"].startswith(letter)]
        if not mine:
            continue
        lines += [
            "",
            f"## {letter}. {title}",
            "",
            "| task | what | value | at most | as it should be | note |",
        ]
        lines += ["|---|---|---|---|---|---|"]
        for row in mine:
            ok = {True: "yes", False: "**no**", None: ""}[row["ok"]]
            limit = "" if row["limit"] is None else f"{row['limit']:g}"
            cells = (
                row["task"],
                row["name"],
                f"{_number(row['value'])} {row['unit']}",
                limit,
                ok,
                row["note"],
            )
            lines.append("| " + " | ".join(str(cell).replace("|", "/").strip() for cell in cells) + " |")
    write_bytes(out / "table.md", ("\n".join(lines) + "\n").encode())


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "" if value is None else str(value)
    return "NaN" if math.isnan(value) else f"{value:.4g}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all tasks together (default: 8)")
    parser.add_argument("--plan", action="store_true", help="print the tasks and their minutes, run nothing")
    parser.add_argument("--only", metavar="PARTS", help="letters of parts, such as c,d")
    parser.add_argument("--more", action="store_true", help="also run the other models and precisions")
    parser.add_argument(
        "--rehearse", action="store_true", help="run at toy sizes on the CPU, write to a temporary folder"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="instead of results/published/gpu/<card>")
    given = parser.parse_args(arguments)
    if not given.minutes > 0:
        raise InputError(f"--minutes {given.minutes:g}: allowed is more than 0")
    tasks = chosen(given)
    if given.plan:
        show_plan(tasks)
        return 0
    if given.rehearse:
        _prepare_to_fork()
        with tempfile.TemporaryDirectory(prefix="hpdm-gpu-") as folder:
            out = given.out or Path(folder)
            out.mkdir(parents=True, exist_ok=True)
            return 0 if run_all(tasks, given, out, "cpu") else 1
    if not torch.cuda.is_available():
        print("no CUDA on this machine: nothing was measured (--rehearse runs every part on the CPU)")
        return 2
    slug = re.sub(r"[^a-z0-9]+", "-", _card()[0].lower()).strip("-")
    out = given.out or ROOT / "results" / "published" / "gpu" / slug
    out.mkdir(parents=True, exist_ok=True)
    return 0 if run_all(tasks, given, out, "cuda") else 1


if __name__ == "__main__":
    sys.exit(report_errors(main))
