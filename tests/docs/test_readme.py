"""What the README shows is run: its library example as it stands, its commands at a size of seconds."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hpdm_core.__main__ import main as hpdm

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

SMALL = (
    "data.dataset={use: synthetic, classes: 3}",
    "training.batch=2",
    "model.backbone={latent_layers: 1, latents: 4}",
    "sampling.solver={steps: [2], order: [1]}",
    "evaluation={samples: 2, reals: 4, metrics: [throughput]}",
    "backend=inline",
)


def run(*arguments: str, folder: Path) -> str:
    """Run ``python ARGUMENTS`` in ``folder`` and return what it prints: a command of ours in this process."""
    if arguments[0] != "-m":
        done = subprocess.run(
            [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        code = hpdm([arguments[1].removeprefix("hpdm_core."), *arguments[2:]])
    assert code == 0, printed.getvalue()
    return printed.getvalue()


def commands(module: str) -> list[list[str]]:
    """The README's lines ``python -m MODULE ...``, split into words."""
    lines = re.findall(rf"^    python (-m {re.escape(module)}\b.*)$", README, re.MULTILINE)
    assert lines, f"the README shows no {module}"
    return [shlex.split(line) for line in lines]


def test_the_library_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 10
    assert "torch.Size([2, 3, 16, 64, 64])" in run("-c", code, folder=tmp_path)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "studies").symlink_to(ROOT / "studies")
    return tmp_path


def test_the_commands_run(clone: Path) -> None:
    for words in commands("hpdm_core.study"):
        if "--dry-run" in words or "slurm" in words:
            # Without a cluster and its data, what the command resolves to is what can be checked.
            words = [word for word in words if word not in ("--backend", "slurm", "--dry-run")]
            before = list(clone.rglob("*"))
            if (
                "extends=ucf101_hpdm_s" in words
            ):  # one arm of that size takes seconds to count, and there are six
                words += ["--only", "default"]
            assert "nothing was run or written" in run(*words, "--dry-run", folder=clone)
            assert list(clone.rglob("*")) == before
        else:
            small = [part for key in (*SMALL, "training.steps=2") for part in ("--set", key)]
            run(*words, *small, folder=clone)
    for words in commands("hpdm_core.report"):
        assert "default" in run(*words, folder=clone)
    (key,) = [path.name for path in (clone / "results" / "store" / "train").iterdir()]
    for words in commands("hpdm_core.sample"):
        words = ["1" if word == "8" else word.replace("KEY", key) for word in words]
        run(*words, folder=clone)
        assert list((clone / "videos").glob("*.mp4"))
        assert (clone / "videos" / "contact_sheet.png").is_file()
    for words in commands("hpdm_core.export"):
        run(*(word.replace("KEY", key) for word in words), folder=clone)
        assert (clone / "mine.safetensors").is_file()
    for words in commands("hpdm_core.plugins"):
        assert "hpdm_plugins" in run(*words, folder=clone)


def test_every_study_is_in_the_table() -> None:
    shown = set(re.findall(r"\]\(studies/(\w+)\.yaml\)", README))
    assert shown == {path.stem for path in (ROOT / "studies").glob("*.yaml")}
