"""docs/your-own-videos.md, from the folder to the evaluated model, with a few steps instead of a thousand."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest

from hpdm_core.__main__ import main as hpdm
from hpdm_core.base.randomness import generator
from hpdm_core.testing.data import write_clip

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your-own-videos.md").read_text()
FEW = [
    "training.steps=2",
    "training.warmup=1",
    "training.batch=2",
    "evaluation.samples=4",
    "evaluation.reals=4",
]
FEW += ["sampling.solver.steps=[2,2,2]", "backend=inline"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number, name in enumerate(("rain", "traffic")):
        (tmp_path / "my_videos" / name).mkdir(parents=True)
        for file in range(3):
            place = tmp_path / "my_videos" / name / f"{file:04d}.mp4"
            write_clip(place, frames=20, height=40 + 8 * number + 4 * file, width=64)
    study, protocol = blocks("yaml")
    (tmp_path / "my_videos.yaml").write_text(study)
    (tmp_path / "my_protocol.yaml").write_text(protocol)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, *more: str) -> None:
    """Run one of the page's commands in this process."""
    python, dash, module, *words = shlex.split(command)
    assert (python, dash) == ("python", "-m")
    assert hpdm([module.removeprefix("hpdm_core."), *words, *more]) == 0


def test_the_page_is_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry, study, sample, export, evaluate = (block.strip() for block in blocks("sh"))
    run(dry)
    assert "study 'my_videos': 2 cells" in capsys.readouterr().out
    run(study, *(word for setting in FEW for word in ("--set", setting)))
    report = folder / "results" / "my_videos" / "report"
    assert (report / "arms.png").is_file()
    table = (report / "table.md").read_text()
    assert "no_context" in table and "level 0 upsampled" in table and "memorisation" in table
    with (folder / "results" / "my_videos" / "index.csv").open(newline="") as file:
        key = next(row["train"] for row in csv.DictReader(file) if row["arm"] == "default")
    run(sample.replace("KEY", key).replace("--num 16", "--num 2"))
    assert len(list((folder / "more").glob("*.mp4"))) == 2
    run(export.replace("KEY", key))
    assert (folder / "my_model.safetensors").stat().st_size > 1e5
    capsys.readouterr()
    run(evaluate, "--bootstrap", "0", "--no-cache")
    assert "frechet[random3d]" in capsys.readouterr().out


def test_what_the_page_says_of_the_folder(folder: Path) -> None:
    """A file that is too short is skipped and named; a class of one file has none to hold out."""
    from hpdm_core.base.errors import InputError
    from hpdm_core.config.schema import Part
    from hpdm_core.data.dataset import ClipShape
    from hpdm_core.plugins import build_plugins

    plugins = build_plugins()
    reader = plugins.make("video_readers", Part(use="pyav"))
    part = Part(use="video_folder", options={"root": str(folder / "my_videos")})
    made = plugins.make("datasets", part, ClipShape(8, 32, 32), reader)
    assert made.classes == ("rain", "traffic")
    assert made.draw("held_out", generator("own videos")).video.shape == (3, 8, 32, 32)
    write_clip(folder / "my_videos" / "rain" / "short.mp4", frames=4, height=40, width=64)
    again = build_plugins().make("datasets", part, ClipShape(8, 32, 32), reader)
    assert "short.mp4" in str(again.describe())
    for name in ("rain", "traffic"):
        for path in sorted((folder / "my_videos" / name).glob("*.mp4"))[1:]:
            path.unlink()
    with pytest.raises(InputError, match="none can be held out"):
        build_plugins().make("datasets", part, ClipShape(8, 32, 32), reader)
