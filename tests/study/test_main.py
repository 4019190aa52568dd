import errno
import gc
import os
import shutil
import time
from pathlib import Path

import pytest

from hpdm_core.base.errors import InputError, report_errors
from hpdm_core.study.__main__ import build_parser, main
from hpdm_core.study.plan.study_file import load_study
from hpdm_core.study.run import study_text


def test_the_flags_are_a_promise() -> None:
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert flags == {
        "-h",
        "--help",
        "--set",
        "--arm",
        "--only",
        "--plugin",
        "--results",
        "--backend",
        "--max-parallel",
        "--retry-failed",
        "--dry-run",
        "--evaluate-only",
        "--import",
        "--detach",
        "--status",
        "--cancel",
        "--explain",
    }
    assert str(build_parser().get_default("results")) == "results"
    assert [action.dest for action in build_parser()._actions if not action.option_strings] == ["file"]


def test_flags_are_not_guessed(tiny: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(tiny), "--dry"])
    assert end.value.code == 2


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main([str(tiny), "--results", str(tmp_path / "results"), "--dry-run"]) == 0
    assert gc.isenabled()
    shown = capsys.readouterr().out
    for word in (
        "default",
        "parameters",
        "FLOPs/step",
        "disk",
        "train, sample, evaluate (held_out_loss, frechet)",
    ):
        assert word in shown
    assert "1 cells, 1 models to train" in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_shows_what_is_done(
    tiny: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arm = "other:training.steps=7"
    assert main([str(tiny), "--results", str(undisturbed), "--dry-run", "--arm", arm]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert rows["default"].rstrip().endswith("-")
    assert "train, sample" in rows["other"]


def test_a_finished_study_is_shown_at_once(
    tiny: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, tmp_path / "results")
    capsys.readouterr()
    start = time.monotonic()
    assert main([str(tiny), "--results", str(tmp_path / "results")]) == 0
    assert time.monotonic() - start < 15
    shown = capsys.readouterr().out
    assert "1 of 1 cells done" in shown and "report: " in shown
    assert not list((tmp_path / "results" / "store").glob("*/*/attempts/2"))
    assert "default: {}" in (tmp_path / "results" / "tiny" / "study.yaml").read_text()


def test_the_study_that_is_kept_holds_flags_and_grid_and_can_be_run(tiny: Path, tmp_path: Path) -> None:
    text = tiny.read_text().replace("arms:\n  default: {}\n", "factors: {training.steps: [6, 7]}\n")
    (tmp_path / "grid.yaml").write_text(text)
    study = load_study(tmp_path / "grid.yaml", sets=["training.batch=3"])
    (tmp_path / "kept.yaml").write_text(study_text(study, "command"))
    kept = load_study(tmp_path / "kept.yaml")
    assert kept.configs == study.configs and kept.baseline == study.baseline and len(kept.arms) == 2
    assert kept.configs["steps=7"].training.batch == 3


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--backend", "slrum"], "unknown 'slrum' - did you mean 'slurm'"),
        (["--only", "defualt"], "no such arm"),
        (["--set", "training.steps=-1"], "training.steps"),
        (["--set", "model.video=[4, 16, 18]"], "model"),
        (["--set", "backend={use: local, slot: 2}"], "slot"),
    ],
)
def test_wrong_input_is_told_before_anything_is_written(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], line: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    code = report_errors(main, [str(tiny), "--results", str(tmp_path / "results"), *flags])
    complaint = capsys.readouterr().err
    assert code == 2 and line in complaint and "Traceback" not in complaint
    assert sorted(tmp_path.rglob("*")) == before


def test_results_that_are_a_file_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(InputError, match="not writable"):
        main([str(tiny), "--results", str(tmp_path / "results")])


def test_a_read_only_folder_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)  # root may write everywhere else
    with pytest.raises(InputError, match="Read-only file system"):
        main([str(tiny), "--results", str(tmp_path / "results")])
    assert not (tmp_path / "results").exists()
