"""The controller killed at random moments: no ledger unreadable, no cell lost, none run twice to completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def killed(folder: Path, storage: str | None, *, kills: int) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "plugins")])
    script = str(Path(__file__).with_name("kills.py"))
    done = subprocess.run(
        [sys.executable, script, str(folder), storage or "journal", str(kills), "0"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1750,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(found: dict[str, Any], *, kills: int) -> None:
    assert found["kills"] == kills
    assert found["unreadable"] == [] and found["ahead"] == [] and found["twice"] == []
    states = found["states"]
    # Code errors and memory that does not suffice twice are failures by right; everything else is done.
    assert set(states) <= {"done", "failed"} and sum(states.values()) == found["cells"]
    assert states["done"] == found["trained"] and 0 < states.get("failed", 0) < 0.25 * found["cells"]
    assert len(found["causes"]) == states["failed"] and set(found["causes"]) <= {
        "code error",
        "out of memory",
    }
    assert found["code"] == 1
    assert sorted(found["done"]) == found["done"]  # nothing is lost
    assert kills < 20 or found["done"][-1] > 0


def test_a_few_kills(tmp_path: Path, storage: str | None) -> None:
    check(killed(tmp_path, storage, kills=4), kills=4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_seventy_kills(tmp_path: Path, storage: str | None) -> None:
    check(killed(tmp_path, storage, kills=70), kills=70)
