"""Every benchmark runs, at a tiny size, and prints one JSON line with what its README promises."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
IMPORTED = {"machine", "sections", "gpu_parts"}
"""Modules that benchmarks share."""
TINY = [
    "model.video=[4,8,8]",
    "model.patch=[1,2,2]",
    "model.token=[1,1,1]",
    "model.token_dim=8",
    "model.backbone.latent_dim=8",
    "model.backbone.latent_head_dim=4",
    "model.backbone.latents=2",
    "model.blocks=3",
]
DATA = ["data.dataset=synthetic", "training.batch=2", "model.classes=0"]


def sets(values):
    return [word for value in values for word in ("--set", value)]


ARGUMENTS = {
    "train_step": ["--steps", "1", *sets([*TINY, *DATA])],
    "sampling": ["--repeats", "1", *sets([*TINY, "sampling.solver.steps=[1,1,2]"])],
    "efficiency": [
        "--rounds=1",
        "--steps=1",
        "--batch=1",
        "--video=4,8,8",
        "--patch=1,2,2",
        *sets(["model.token=[1,1,1]", "model.blocks=3"]),
    ],
    "loader": [
        "--size=8x60x80",
        "--seconds=0.01",
        "--files=2",
        "--workers=1",
        "--batch=1",
        "--steps=1",
        "--step-ms=1",
    ],
    "parallel": ["--steps=1", "--rounds=1", "--strategy", "ddp", *sets([*TINY, *DATA])],
    "dry_run": ["--rounds=1", "--file=studies/quickstart.yaml"],
    "context_sampling": ["--repeats=1", "--threads=1"],
    "peers": [
        "--rounds=1",
        "--tokens=16",
        "--width=8",
        "--latents=3",
        "--latent-width=6",
        "--heads=2",
        "--layers=1",
    ],
}
OTHERS = {"controller", "evaluate", "gpu"}
"""Benchmarks with tests of their own."""
NEEDS = {"peers": "rin_pytorch"}
"""Packages that a benchmark needs and the project does not."""


@pytest.fixture(scope="module")
def run():
    def made(name):
        path = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), *sys.path])
        done = subprocess.run(
            [sys.executable, str(BENCHMARKS / f"{name}.py"), "--json", *ARGUMENTS[name]],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        return json.loads(line)

    return made


LONG = ("efficiency", "loader", "parallel")
"""Benchmarks whose smallest run takes half a minute."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in ARGUMENTS]
)
def test_a_benchmark_prints_one_json_line(name, run):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    result = run(name)
    assert result["benchmark"] == name
    assert "torch" in result or "torch" in result["versions"]
    if name == "sampling":
        assert result["largest_difference"] <= 1e-4
        assert result["rows"][-1]["level"] == "all" and result["rows"][-1]["ideal"] > 1
    if name == "efficiency":
        full, _, adaptive = result["rows"]
        assert full["tokens"] > adaptive["tokens"] and full["flops_per_video"] > adaptive["flops_per_video"]
        assert result["speedup"] > 0 and full["oom"] == 0
    if name == "loader":
        assert set(result["folders"]) == {"h264", "mpeg4"}
        assert set(result["patches_ms"]) == {"whole first", "as cut"}
        assert set(result["wait_ms"]) == {"here", "thread", "workers", "workers, cached"}
    if name == "peers":
        bare, conditioned = result["rows"]["bare"], result["rows"]["conditioned"]
        convolution = 3 * 2 * 16 * 8 * 9  # what only the peer has; forward, and backward to both sides
        # Per token the peer has nothing else besides.
        assert bare["peer_flops"] - bare["ours_flops"] == convolution
        assert bare["ratio"] > 0 and conditioned["ours_flops"] > bare["ours_flops"]


def test_without_the_peer_its_benchmark_says_how_to_get_it():
    script = (
        f"import sys, runpy; sys.modules['rin_pytorch'] = None; sys.argv = ['peers.py']; "
        f"sys.path.insert(0, {str(BENCHMARKS)!r}); "
        f"runpy.run_path({str(BENCHMARKS / 'peers.py')!r}, run_name='__main__')"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "plugins")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "pip install --no-deps rin-pytorch==0.8.0" in line


def test_every_benchmark_is_tried_and_described():
    names = {path.stem for path in BENCHMARKS.glob("*.py")} - IMPORTED
    assert names <= set(ARGUMENTS) | OTHERS
    text = (BENCHMARKS / "README.md").read_text()
    assert all(f"benchmarks/{name}.py" in text for name in names)
