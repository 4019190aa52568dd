"""``python -m hpdm_core.sample``: videos to look at, and one line for whatever is wrong."""

import json

import av
import pytest
import torch
from PIL import Image

from hpdm_core.assembly.compose import load_cell
from hpdm_core.base.errors import report_errors
from hpdm_core.sampling import command
from hpdm_core.training.checkpoint import save_weights
from tests.small import rin

CELL = {
    "model": {
        "video": [4, 8, 12],
        "patch": [2, 4, 6],
        "token": [1, 2, 2],
        "levels": 2,
        "classes": 2,
        "token_dim": 8,
        "blocks": 2,
        "backbone": rin(8, latents=2, latent_heads=1, heads=1),
    },
    "data": {"dataset": "gaussian_world"},
    "training": {"steps": 1, "batch": 1, "learning_rate": 1e-3},
    "sampling": {"solver": {"use": "edm", "steps": [3, 2], "churn": [0.0], "sigma_eff_max": [5.0]}},
    "runtime": {"sample_batch": 2},
}


@pytest.fixture
def cell(tmp_path):
    """A trained cell as the store keeps it."""
    assembly = load_cell(CELL)
    folder = tmp_path / "store" / "train" / "key"
    weights = assembly.build_model().state_dict()
    save_weights(folder / "model.safetensors", weights, metadata={"steps": 1})
    spec = {"config": assembly.config.model_dump(mode="json"), "plugins": list(assembly.plugins.names)}
    (folder / "spec.json").write_text(json.dumps(spec))
    (folder / "result.json").write_text(json.dumps({"git": "0123456789abcdef", "machine": {"cores": 2}}))
    return folder


def run(*arguments):
    return report_errors(command.main, [str(argument) for argument in arguments])


def test_writes_videos_and_a_contact_sheet(cell, tmp_path, capsys):
    out = tmp_path / "seen" / "here"
    assert run(cell, "--num", 3, "--out", out, "--fps", 10) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "000000.mp4",
        "000001.mp4",
        "000002.mp4",
        "contact_sheet.png",
        "samples.gif",
    ]
    with av.open(str(out / "000002.mp4")) as container:
        assert len(list(container.decode(video=0))) == 4
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.size[1] > 3 * 64
    with Image.open(out / "samples.gif") as shown:
        assert shown.n_frames == 4 and shown.info["duration"] == 100 and shown.info["loop"] == 0
        assert shown.size == (3 * 192 + 2 * 4, 128)
    printed = capsys.readouterr().out
    assert f"{cell}: seed 0, 1 steps, commit 0123456789ab\n" in printed
    assert f"3 videos, contact_sheet.png and samples.gif in {out}" in printed


def test_a_short_video_lasts_a_second(cell, tmp_path):
    assert run(cell, "--num", 1, "--out", tmp_path / "out") == 0
    with av.open(str(tmp_path / "out" / "000000.mp4")) as container:
        assert container.streams.video[0].average_rate == 4  # four frames


def test_few_videos_are_of_all_classes():
    assert [command._label(index, 8, 36) for index in range(8)] == [0, 4, 9, 13, 18, 22, 27, 31]
    assert [command._label(index, 5, 3) for index in range(5)] == [0, 1, 2, 0, 1]
    assert command._label(1, 3, 0) == -1


def test_seed_and_set_change_the_videos(cell, tmp_path):
    made = {}
    for name, options in {
        "plain": [],
        "again": [],
        "seed": ["--seed", 5],
        "steps": ["--set", "sampling.solver.steps=[6]"],
        "small": ["--set", "runtime.tile_batch=3"],
    }.items():
        out = tmp_path / name
        assert run(cell, "--num", 2, "--out", out, *options) == 0
        with Image.open(out / "contact_sheet.png") as sheet:
            made[name] = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    assert torch.equal(made["plain"], made["again"])
    assert not torch.equal(made["plain"], made["seed"])
    assert not torch.equal(made["plain"], made["steps"])
    assert (made["plain"].int() - made["small"].int()).abs().max() <= 1  # a rounding, at most


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num", "0"], "--num 0: allowed is 1 or more"),
        (["--num", "x"], "argument --num: invalid int value: 'x'"),
        (["--seed", "-1"], "--seed -1: allowed is 0 or more"),
        (["--fps", "0"], "--fps 0: allowed is more than 0"),
        (["--set", "model.levels=1"], "allowed are sampling.* and runtime.*"),
        (["--set", "sampling.overlp=[h]"], "overlap"),
        (["--set", "sampling.solver.steps=[0]"], "steps: [0]; allowed is a positive integer"),
        (["--sett", "a=b"], "unrecognized arguments: --sett"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(arguments, words, cell, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(cell, "--out", out, *arguments) == 2
    printed = capsys.readouterr().err.strip()
    assert words in printed and printed.startswith("error: ") and "\n" not in printed
    assert not out.exists()


def test_a_folder_without_a_cell_is_refused(cell, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(tmp_path, "--out", out) == 2
    assert (
        "spec.json: cannot be read (No such file or directory); allowed is a train stage"
        in capsys.readouterr().err
    )
    (cell / "model.safetensors").unlink()
    assert run(cell, "--out", out) == 2
    assert "model.safetensors" in capsys.readouterr().err
    for text, words in (("{", "is not JSON"), ("[]", "holds no cell")):
        (cell / "spec.json").write_text(text)
        assert run(cell, "--out", out) == 2
        assert words in capsys.readouterr().err
    assert not out.exists()


def test_a_file_in_the_way_of_the_folder_is_named(cell, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert run(cell, "--out", tmp_path / "out") == 2
    assert "--out" in capsys.readouterr().err


def test_progress_tells_the_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    progress = command._Progress(4)
    numbers = {"level": 1, "levels": 3, "call": 2, "calls": 5}
    progress.step(numbers)
    assert capsys.readouterr().err == ""
    now[0] = 3.0
    progress.step(numbers)
    assert capsys.readouterr().err == "0 of 4 videos; level 2 of 3, call 2 of 5\n"
    progress.finished(1)
    now[0] = 6.0
    progress.step(numbers)
    assert capsys.readouterr().err == "1 of 4 videos; level 2 of 3, call 2 of 5, about 18 s left\n"
