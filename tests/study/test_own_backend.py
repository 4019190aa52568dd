"""A scheduler that this project does not know is one file: a backend as a plugin (docs/examples/plain_processes.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpdm_core.base.files import read_json
from hpdm_core.study.__main__ import main

FILE = Path(__file__).parents[2] / "docs" / "examples" / "plain_processes.py"


def test_a_study_runs_through_it_and_status_finds_its_jobs(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    arguments = [str(tiny), "--results", str(results), "--plugin", str(FILE), "--backend", "plain_processes"]
    arguments += ["--set", "seeds=[0]"]
    assert main(arguments) == 0
    specs: list[Any] = [read_json(path) for path in results.glob("tiny/jobs/*/*/spec.json")]
    assert specs and {spec["backend"] for spec in specs} == {"plain_processes"}
    capsys.readouterr()
    assert main([*arguments, "--status"]) == 0
    assert "done" in capsys.readouterr().out


def test_an_unknown_backend_is_named_with_the_nearest(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hpdm_core.base.errors import InputError

    with pytest.raises(
        InputError, match=r"--backend lokal: unknown 'lokal' - did you mean 'local'\?; allowed: inline"
    ):
        main([str(tiny), "--backend", "lokal"])
