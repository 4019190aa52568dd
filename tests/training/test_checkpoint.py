"""Checkpoints: whole or absent, verified, pruned."""

import errno
import logging
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.training import checkpoint as checkpoints
from hpdm_core.training.checkpoint import Checkpoint


def make(step: int) -> Checkpoint:
    tensor = torch.full((2, 3), float(step))
    optimizer = {"state": {0: {"step": step, "m": tensor}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return Checkpoint(
        step=step,
        model={"w": tensor},
        ema={"w": tensor + 0.5},
        optimizer=optimizer,
        running={"x": [0.1, None]},
    )


def steps(folder: Path) -> list[int]:
    return [int(path.name) for path in checkpoints.checkpoint_folders(folder)]


def test_round_trip(tmp_path: Path) -> None:
    path = checkpoints.save_checkpoint(tmp_path, make(12))
    assert path == tmp_path / "checkpoints" / "00000012"
    assert {file.name for file in path.iterdir()} == {
        "model.safetensors",
        "ema.safetensors",
        "optimizer.pt",
        "state.json",
    }
    found = checkpoints.read_checkpoint(path)
    assert (found.step, found.running, found.path) == (12, {"x": [0.1, None]}, path)
    assert torch.equal(found.model["w"], torch.full((2, 3), 12.0))
    assert torch.equal(found.ema["w"], torch.full((2, 3), 12.5))
    assert torch.equal(found.optimizer["state"][0]["m"], torch.full((2, 3), 12.0))


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_newest_one_is_skipped_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    checkpoints.save_checkpoint(tmp_path, make(4))
    newest = checkpoints.save_checkpoint(tmp_path, make(8)) / name
    content = newest.read_bytes()
    if damage == "truncated":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        newest.write_bytes(content[:-9] + bytes([content[-9] ^ 255]) + content[-8:])
    else:
        newest.unlink()
    with caplog.at_level(logging.WARNING):
        found = checkpoints.newest_intact([tmp_path])
    assert found is not None
    assert found.step == 4
    assert len(caplog.messages) == 1
    assert "00000008 is skipped" in caplog.messages[0]


def test_newest_over_several_attempts_and_none_without_any(tmp_path: Path) -> None:
    own, older, empty = tmp_path / "own", tmp_path / "older", tmp_path / "empty"
    assert checkpoints.newest_intact([own, older]) is None
    checkpoints.save_checkpoint(own, make(4))
    checkpoints.save_checkpoint(older, make(8))
    found = checkpoints.newest_intact([empty, own, older])
    assert found is not None
    assert found.path == older / "checkpoints" / "00000008"
    checkpoints.save_checkpoint(own, make(8))
    again = checkpoints.newest_intact([empty, own, older])
    assert again is not None
    assert again.path == own / "checkpoints" / "00000008"


def test_prune_keeps_the_newest_two_and_what_is_asked(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        checkpoints.save_checkpoint(tmp_path, make(step))
    checkpoints.prune(tmp_path, keep=(4,))
    assert steps(tmp_path) == [4, 8, 10]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    path = checkpoints.save_checkpoint(tmp_path, make(4))
    (path / "optimizer.pt").write_bytes(b"")
    checkpoints.save_checkpoint(tmp_path, make(4))
    assert checkpoints.read_checkpoint(path).step == 4


def test_leftovers_are_no_checkpoints_and_are_cleared(tmp_path: Path) -> None:
    path = checkpoints.save_checkpoint(tmp_path, make(4))
    path.rename(path.with_name("00000004.partial"))
    (tmp_path / ".model.safetensors.deadbeef.tmp").write_bytes(b"half")
    assert checkpoints.newest_intact([tmp_path]) is None
    checkpoints.clear_partial(tmp_path)
    assert [item.name for item in tmp_path.rglob("*")] == ["checkpoints"]


@pytest.mark.parametrize("fails_at", range(6))
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    checkpoints.save_checkpoint(tmp_path, make(4))
    calls = iter(range(100))
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        TroubleError, match="00000008: could not be written: No space left on device"
    ) as caught:
        checkpoints.save_checkpoint(tmp_path, make(8))
    assert len(caught.value.messages) == 1
    assert "\n" not in caught.value.messages[0]
    names = {item.name for item in (tmp_path / "checkpoints").iterdir()}
    assert names == {"00000004"} if fails_at < 5 else {"00000004", "00000008"}
    found = checkpoints.newest_intact([tmp_path])
    assert found is not None
    assert found.step == (4 if fails_at < 5 else 8)


def test_weights_are_written_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    checkpoints.save_weights(path, {"w": torch.ones(3)}, metadata={"steps": 4, "seed": 0})
    before = path.read_bytes()
    checkpoints.save_weights(path, {"w": torch.ones(3)}, metadata={"seed": 0, "steps": 4})
    assert path.read_bytes() == before

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TroubleError, match="No space left"):
        checkpoints.save_weights(path, {"w": torch.zeros(3)}, metadata={})
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["model.safetensors"]


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(InputError, match=r"'weight' is \[4, 4\] in the file and \[2, 3\]"):
        checkpoints.load_weights(model, {"weight": torch.ones(4, 4), "bias": torch.ones(2)}, origin="file")
    with pytest.raises(InputError, match="'bias' is nothing in the file"):
        checkpoints.load_weights(model, {"weight": torch.ones(2, 3)}, origin="file")
    with pytest.raises(InputError, match=r"'extra' is \[1\] in the file and nothing"):
        extra = {"weight": torch.ones(2, 3), "bias": torch.ones(2), "extra": torch.ones(1)}
        checkpoints.load_weights(model, extra, origin="file")


def test_a_missing_or_damaged_weights_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        checkpoints.read_weights(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        checkpoints.read_weights(tmp_path / "model.safetensors")
