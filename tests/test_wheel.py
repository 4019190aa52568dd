"""The wheel, unpacked outside the clone, has all that the commands need."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as an installer would put it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < 4e6
    site = folder / "site"
    zipfile.ZipFile(wheel).extractall(site)
    return site


def run(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the unpacked wheel, and nothing of the clone, in front of everything."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=site.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_a_user_needs_is_in_it(unpacked: Path) -> None:
    (metadata,) = unpacked.glob("*.dist-info")
    assert {"LICENSE", "NOTICE"} <= {path.name for path in metadata.rglob("*")}
    names = [path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()]
    shipped = {path.name for path in (ROOT / "studies").glob("*.yaml")}
    assert shipped == {Path(name).name for name in names if name.startswith("hpdm_plugins/studies/")}
    for folder, suffix in (("presets", ".yaml"), ("protocols", ".yaml"), ("trained", ".safetensors")):
        assert any(name.startswith(f"hpdm_plugins/{folder}/") and name.endswith(suffix) for name in names), (
            folder
        )
    assert "hpdm_core/report/data/table1.json" in names and "hpdm_core/py.typed" in names
    assert not any(name.startswith(("tests", "docs", "results", "benchmarks")) for name in names)


def test_its_studies_are_found_by_name(unpacked: Path) -> None:
    done = run(unpacked, "hpdm_core.study", "quickstart", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "study 'quickstart': 2 cells" in done.stdout
    wrong = run(unpacked, "hpdm_core.study", "quikstart", "--dry-run")
    assert wrong.returncode == 2 and "did you mean 'quickstart'?" in wrong.stderr


def test_its_code_is_the_wheels(unpacked: Path) -> None:
    code = "import hpdm_core, hpdm_plugins; print(hpdm_core.__file__, hpdm_plugins.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=unpacked.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [
        str(unpacked / name / "__init__.py") for name in ("hpdm_core", "hpdm_plugins")
    ]
