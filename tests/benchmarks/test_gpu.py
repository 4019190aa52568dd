"""`benchmarks/gpu.py` without a GPU: rehearsed whole, planned, refused, and what a task that goes wrong leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=580,
        check=False,
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds to it
    import gpu

    yield gpu


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rehearsal")
    published = set((ROOT / "results" / "published").rglob("*"))
    done = command("--rehearse", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    assert set((ROOT / "results" / "published").rglob("*")) == published
    return out


def test_every_part_is_rehearsed_and_nothing_goes_wrong(rehearsed: Path) -> None:
    rows = [json.loads(line) for line in (rehearsed / "results.jsonl").read_text().splitlines()]
    first, *rows = rows
    assert (
        first["task"] == "run" and first["rehearsal"] and {"commit", "driver", "torch", "card"} <= set(first)
    )
    assert {row["task"][0] for row in rows} == set("abcdef")
    assert not [row for row in rows if row["ok"] is False]
    checked = {row["name"] for row in rows if row["ok"]}
    assert {"gradient, fp32", "contexts, tf32", "tile step, bf16", "three steps of lamb, fp32"} <= checked
    assert {"weights of a resumed run", "sampling, contexts kept in host memory", "I3D, tf32"} <= checked
    named = {(row["task"], row["name"]): row["value"] for row in rows}
    assert named["c.training:hpdm_s, tf32", "speed"] > 0
    assert 0 < named["c.training:hpdm_s, tf32", "share of fusion"] < 1
    assert named["d.sampling", "ideal gain of the cache, finest level"] > 1
    assert named["c.resolution", "speed against full resolution"] > 0
    for name in ("quality.mp4", "quality.png"):
        assert (rehearsed / name).stat().st_size > 1000


def test_the_table_names_every_row_and_says_that_it_is_a_rehearsal(rehearsed: Path) -> None:
    table = (rehearsed / "table.md").read_text()
    assert table.startswith("# Rehearsal on a CPU") and torch.__version__ in table
    for line in (rehearsed / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "name" in row:
            assert f"| {row['task']} | {row['name']} |" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so_and_ends_with_2() -> None:
    done = command("--only", "a")
    assert done.returncode == 2 and "no CUDA on this machine" in done.stdout


def test_the_plan_fits_into_its_minutes_and_only_picks(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--plan", "--only", "c,d"]) == 0
    shown = capsys.readouterr().out
    assert "c.training:hpdm_l, bf16" in shown and "d.sampling" in shown and "a.network" not in shown
    tasks = gpu.chosen(SimpleNamespace(only=None, more=False, rehearse=False))
    assert all(task.name.partition(":")[0] in gpu.gpu_parts.TASKS for task in gpu.PLAN)
    assert {task.part for task in tasks} == set(gpu.PARTS)
    assert len(gpu.chosen(SimpleNamespace(only=None, more=True, rehearse=False))) > len(tasks)
    with pytest.raises(gpu.InputError, match="--only: 'x' was given; allowed are a, b, c, d, e, f"):
        gpu.main(["--plan", "--only", "x"])


def test_on_a_card_a_task_is_run_in_a_fresh_process(gpu: ModuleType, tmp_path: Path) -> None:
    until = time.time() + 120
    job = gpu.gpu_parts.Job("b.peers", {}, "cpu", True, tmp_path, "now", until)
    assert gpu._run_one(job, tmp_path / "log.txt", rehearse=False) is None
    (row,) = gpu._rows(tmp_path)
    assert row["name"].startswith("RIN block") and row["run"] == "now"


def test_a_task_that_fails_or_hangs_is_a_row_and_the_rest_goes_on(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(job: Any) -> None:
        job.say("before", 1.0)
        raise ValueError("broken\nin two lines")

    def hangs(job: Any) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        job.say("its own child", float(child.pid))
        time.sleep(60)

    def dies(job: Any) -> None:
        os._exit(7)

    def wrong(job: Any) -> None:
        job.say("a difference", 0.5, limit=0.1)
        job.say("no number", float("nan"), limit=0.1)

    tasks = {"a.fails": fails, "b.hangs": hangs, "c.dies": dies, "d.wrong": wrong, "e.late": wrong}
    monkeypatch.setattr(gpu.gpu_parts, "TASKS", tasks)
    plan = [gpu.Task(name, 1, 0.3 if name == "b.hangs" else 60) for name in tasks]
    given = SimpleNamespace(minutes=5.0, rehearse=True)
    begun = time.monotonic()
    assert not gpu.run_all(plan[:4], given, tmp_path, "cpu")
    assert time.monotonic() - begun < 50
    rows = {(row["task"], row["name"]): row for row in gpu._rows(tmp_path)}
    assert rows["a.fails", "before"]["value"] == 1.0
    assert rows["a.fails", "failed"]["value"] == "ValueError: broken"
    assert rows["b.hangs", "failed"]["value"] == "stopped at its time limit"
    status = Path(f"/proc/{int(rows['b.hangs', 'its own child']['value'])}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"
    assert rows["c.dies", "failed"]["value"] == "the process ended with code 7"
    assert rows["d.wrong", "a difference"]["ok"] is rows["d.wrong", "no number"]["ok"] is False
    assert "**no**" in (tmp_path / "table.md").read_text()
    assert gpu.run_all(plan[4:], SimpleNamespace(minutes=0.001, rehearse=True), tmp_path, "cpu")
    last = gpu._rows(tmp_path)[-1]
    assert (last["task"], last["name"]) == ("e.late", "not run")
