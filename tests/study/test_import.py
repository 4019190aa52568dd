"""Finished work of another results folder is taken by its keys, whole, and only when it is what they say."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.study.__main__ import main
from hpdm_core.study.plan.import_cells import Importer


@pytest.fixture
def other(undisturbed: Path, tmp_path: Path) -> Path:
    """A results folder with a finished study, free to be changed."""
    copied = tmp_path / "other"
    shutil.copytree(undisturbed, copied)
    return copied


def run(tiny: Path, results: Path, *more: str) -> int:
    return main([str(tiny), "--results", str(results), "--backend", "inline", *more])


def attempts(results: Path, kind: str) -> list[str]:
    logs = (results / "store" / kind).glob("*/attempts/*/log.txt")
    return [log.read_text() for log in logs]


def test_finished_stages_are_taken_and_nothing_is_run(
    tiny: Path, other: Path, tmp_path: Path, computed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    assert run(tiny, here, "--import", str(other)) == 0
    said = capsys.readouterr().out
    assert f"imported from {other / 'store'}: 1 train, 1 samples, 2 evaluations" in said
    assert computed(here) == computed(other)
    assert all("imported from" in log for log in attempts(here, "train"))
    (result,) = ((path / "result.json") for path in (here / "store" / "train").iterdir())
    assert json.loads(result.read_text())["imported"].startswith(str(other))
    # Finished files never change, so one copy on the disk is enough.
    weights = [next((folder / "store").glob("train/*/model.safetensors")) for folder in (here, other)]
    assert weights[0].stat().st_ino == weights[1].stat().st_ino


def test_the_folder_of_a_study_says_where_its_results_are(tiny: Path, other: Path, tmp_path: Path) -> None:
    assert Importer(other / "tiny")._store == Importer(other)._store
    with pytest.raises(InputError, match=r"--import .*nowhere: no results there; allowed is a RESULTS_DIR"):
        Importer(tmp_path / "nowhere")


def test_nothing_is_written_when_there_is_nothing_to_import_from(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run(tiny, tmp_path / "here", "--import", str(tmp_path / "nowhere"))
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("weights", "model.safetensors is not the file whose hash was recorded"),
        ("spec", "its spec.json has another key"),
        ("hashes", "no hashes were recorded"),
    ],
)
def test_what_is_not_what_its_key_says_is_made_here(
    tiny: Path,
    other: Path,
    tmp_path: Path,
    computed: Any,
    capsys: pytest.CaptureFixture[str],
    harm: str,
    said: str,
) -> None:
    whole = computed(other)
    (stage,) = (other / "store" / "train").iterdir()
    if harm == "weights":
        data = bytearray((stage / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (stage / "model.safetensors").write_bytes(data)
    elif harm == "spec":
        spec = json.loads((stage / "spec.json").read_text())
        (stage / "spec.json").write_text(json.dumps({**spec, "keys": {**spec["keys"], "train": "0" * 64}}))
    else:
        result = json.loads((stage / "result.json").read_text())
        del result["sha256"]
        (stage / "result.json").write_text(json.dumps(result))
    here = tmp_path / "here"
    assert run(tiny, here, "--import", str(other)) == 0
    printed = capsys.readouterr().out
    assert f"not imported: {stage}: {said}; it is made here instead" in printed
    assert "1 samples, 2 evaluations" in printed and "train," not in printed.partition("imported from")[2]
    assert computed(here) == whole


def test_a_disk_that_fills_up_meanwhile_is_one_line(
    tiny: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Importer, cell: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Importer, "take", full)
    with pytest.raises(TroubleError, match="No space left"):
        run(tiny, tmp_path / "here", "--import", str(other))


def test_what_is_here_is_left_alone(tiny: Path, other: Path, undisturbed: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(undisturbed, here)
    (stage,) = (here / "store" / "train").iterdir()
    before = (stage / "result.json").read_bytes()
    assert run(tiny, here, "--import", str(other)) == 0
    assert (stage / "result.json").read_bytes() == before
