"""A search by its command, with the controller killed in its midst: it goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpdm_core.study.__main__ import main

ROOT = Path(__file__).parents[2]
STUDY = {
    "name": "killed",
    "extends": "tiny_clips",
    "evaluation": {"metrics": ["held_out_loss"]},
    "seeds": [0],
    "backend": {
        "use": "simulated",
        "slots": 1,
        "curve": True,
        "toy": {
            "training.learning_rate": {"best": 0.01, "width": 2, "log": True},
            "diffusion.sigma_max": {"best": 60, "width": 40},
        },
    },
    "search": {
        "space": {
            "training.learning_rate": {"float": [1e-4, 1.0], "log": True},
            "diffusion.sigma_max": {"float": [10.0, 90.0]},
        },
        "sampler": {"use": "tpe", "startup": 5},
        "pruner": {"use": "median", "startup": 3},
        "proposals": 16,
        "seeds": [100],
        "objective": {"metric": "held_out_loss"},
    },
}


def start(folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "killed.yaml").write_text(yaml.safe_dump(STUDY))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "plugins")])
    command = [sys.executable, "-m", "hpdm_core.study", "killed.yaml"]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def proposals(folder: Path) -> list[dict[str, Any]]:
    path = folder / "results" / "simulated" / "killed" / "search.json"
    return json.loads(path.read_text())["arms"]["default"] if path.exists() else []


def test_two_kills_change_no_proposal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = start(tmp_path / "whole")
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    for count in (5, 11):
        process = start(tmp_path / "killed")
        while len(proposals(tmp_path / "killed")) < count and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert count <= len(proposals(tmp_path / "killed")) < 16
    last = start(tmp_path / "killed")
    said, _ = last.communicate(timeout=300)
    assert last.returncode == 0, said
    kept = ("number", "values", "state", "objectives", "given_up")
    undisturbed, killed = (
        [{name: each.get(name) for name in kept} for each in proposals(tmp_path / name)]
        for name in ("whole", "killed")
    )
    assert killed == undisturbed and len(killed) == 16
    assert {each["state"] for each in killed} == {"done", "pruned"}
    best = min(each["objectives"][0] for each in killed if each["objectives"])
    assert best < 0.1 + 0.1  # of a bowl whose edges lie at 2.6
    capsys.readouterr()
    given = [
        str(tmp_path / "killed" / "killed.yaml"),
        "--results",
        str(tmp_path / "killed" / "results"),
        "--status",
    ]
    assert main(given) == 0
    shown = capsys.readouterr().out
    rows = [line.split(",")[0] for line in shown.splitlines()[2:]]
    assert (
        rows[:-1] == [*(f"default#{number}" for number in range(16)), "default"]
        and "of 17 cells done" in rows[-1]
    )
