"""The commands of docs/cluster.md, one after the other, on the cluster."""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm

PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
# What a cluster of two virtual nodes without GPUs has, and cells of seconds.
HERE = (
    "backend.partition=all",
    "backend.account=null",
    "backend.gpus_per_node=null",
    "backend.cpus_per_task=1",
    "backend.mem_gb=2",
    "backend.time=0:05:00",
    "backend.max_pending=2",
    "training.steps=2",
    "training.batch=2",
    "evaluation={samples: 1, reals: 2, metrics: [throughput]}",
    "seeds=[0]",
)


def run(command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    words = shlex.split(command)
    small = [word for each in HERE for word in ("--set", each)]
    return subprocess.run(
        [sys.executable, *words[1:], *small],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_from_the_page_to_a_table(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{root / 'plugins'}")
    (study,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "on_a_cluster.yaml").write_text(study)
    commands = re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    dry, detach, status, collect, cancel = commands

    done = run(dry, tmp_path)
    assert done.returncode == 0 and "2 cells" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "results").exists()
    done = run(detach, tmp_path)
    assert done.returncode == 0 and "submitted: 2 cells" in done.stdout, done.stdout + done.stderr
    done = run(status, tmp_path)
    assert done.returncode == 0 and "2 cells done" in done.stdout, done.stdout + done.stderr
    done = run(cancel, tmp_path)
    assert done.returncode == 0 and "cancelled" in done.stdout, done.stdout + done.stderr
    deadline = time.monotonic() + 60
    while cluster.run("squeue", "--noheader"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    done = run(collect, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no_context" in (tmp_path / "results" / "on_a_cluster" / "report" / "table.md").read_text()
