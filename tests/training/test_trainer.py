"""The training loop: resuming, observers, figures, trouble."""

import errno
import json
import logging
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hpdm_core.assembly.assembly import Assembly
from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.hookspecs import hookimpl
from hpdm_core.training import Trainer, load_ema_model
from hpdm_core.training.checkpoint import checkpoint_folders
from hpdm_core.training.figures import MemoryMeter
from hpdm_core.training.optimizer.schedule import learning_rate
from hpdm_core.training.step import joint_loss

Make = Callable[..., Assembly]


class Killed(BaseException):
    """Stands for a signal: nothing in the project catches it."""


def stop_after(step: int) -> Callable[[dict[str, Any]], None]:
    def progress(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise Killed

    return progress


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    raw = {f"raw.{name}": tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    return raw | {f"ema.{name}": tensor.clone() for name, tensor in trainer.ema_model.state_dict().items()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "videos_per_second"} for row in rows]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting operations takes longer than a tiny run; it has its own tests, and `test_result`."""
    monkeypatch.setattr("hpdm_core.training.cost.training_flops", lambda assembly: 1)


def undisturbed(folder: Path, assembly: Assembly) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    trainer = Trainer(assembly, folder=folder)
    result = trainer.run()
    return folder, weights(trainer), result


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, assemble: Make) -> Any:
    """The folder, weights and result of a run that nothing disturbs."""
    return undisturbed(tmp_path_factory.mktemp("straight"), assemble())


@pytest.fixture(scope="module")
def straight_lamb(tmp_path_factory: pytest.TempPathFactory, assemble: Make) -> Any:
    return undisturbed(tmp_path_factory.mktemp("lamb"), assemble(training={"optimizer": "lamb"}))


@pytest.mark.parametrize(
    ("optimizer", "killed_at"), [("adamw", 1), ("adamw", 2), ("adamw", 5), ("adamw", 9), ("lamb", 6)]
)
def test_killed_and_started_again_ends_with_the_same_bits(
    tmp_path: Path, assemble: Make, straight: Any, straight_lamb: Any, killed_at: int, optimizer: str
) -> None:
    training = {"optimizer": optimizer}
    folder, expected, _ = straight if optimizer == "adamw" else straight_lamb
    first, second = tmp_path / "1", tmp_path / "2"
    with pytest.raises(Killed):
        Trainer(assemble(training=training), folder=first).run(stop_after(killed_at))
    again = Trainer(assemble(training=training), folder=second, previous=[first])
    result = again.run()
    assert_same(weights(again), expected)
    # progress comes before the checkpoint of its step
    last = (killed_at - 1) // 2 * 2
    assert result["resumed_from"] == ([last] if last else [])
    assert without_times(logged(second)) == without_times(logged(folder))


def test_several_kills_in_one_folder_and_a_leftover(tmp_path: Path, assemble: Make, straight: Any) -> None:
    folder, expected, whole = straight
    for step in (3, 5, 6):
        with pytest.raises(Killed):
            Trainer(assemble(), folder=tmp_path).run(stop_after(step))
        leftover = tmp_path / "checkpoints" / "00000008.partial"
        leftover.mkdir(parents=True)
        (leftover / "model.safetensors").write_bytes(b"half a file")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lr"')
    trainer = Trainer(assemble(), folder=tmp_path)
    result = trainer.run()
    assert_same(weights(trainer), expected)
    assert result["resumed_from"] == [2, 4]  # the last kill came before its own first checkpoint
    assert result["loss"] == whole["loss"]
    assert without_times(logged(tmp_path)) == without_times(logged(folder))
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "no state"])
def test_a_damaged_newest_checkpoint_is_passed_over(
    tmp_path: Path, assemble: Make, straight: Any, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    with pytest.raises(Killed):
        Trainer(assemble(), folder=tmp_path).run(stop_after(7))
    newest = checkpoint_folders(tmp_path)[-1]
    assert newest.name == "00000006"
    if damage == "truncated":
        content = (newest / "optimizer.pt").read_bytes()
        (newest / "optimizer.pt").write_bytes(content[:100])
    elif damage == "corrupt":
        content = bytearray((newest / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (newest / "model.safetensors").write_bytes(content)
    else:
        (newest / "state.json").unlink()
    trainer = Trainer(assemble(), folder=tmp_path)
    with caplog.at_level(logging.WARNING):
        result = trainer.run()
    assert "00000006 is skipped" in caplog.text
    assert result["resumed_from"] == [4]
    assert_same(weights(trainer), straight[1])


KILLER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import make_assembly
from hpdm_core.plugins import build_plugins
from hpdm_core.training import Trainer
calls, real = iter(range(1000)), os.fsync
def fsync(descriptor):
    if next(calls) == 14:  # within the third checkpoint
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
Trainer(make_assembly(build_plugins()), folder=Path(sys.argv[2])).run()
"""


def test_kill_nine_while_a_checkpoint_is_written(tmp_path: Path, assemble: Make, straight: Any) -> None:
    command = [sys.executable, "-c", KILLER, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True
    )
    assert done.returncode == -9, done.stderr.decode()
    assert (tmp_path / "checkpoints" / "00000006.partial").is_dir()
    trainer = Trainer(assemble(), folder=tmp_path)
    assert trainer.run()["resumed_from"] == [4]
    assert_same(weights(trainer), straight[1])


def test_prefetch_and_what_is_logged_change_no_bit(assemble: Make, straight: Any) -> None:
    trainer = Trainer(assemble(runtime={"prefetch": 0, "log_every": 1, "checkpoint_every": 100}))
    trainer.run()
    assert_same(weights(trainer), straight[1])


def test_the_final_file_is_the_average_and_loads(assemble: Make, straight: Any, tmp_path: Path) -> None:
    folder, expected, _ = straight
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    assert_same(
        saved, {name.removeprefix("ema."): value for name, value in expected.items() if name[:4] == "ema."}
    )
    loaded = load_ema_model(assemble(), folder / "model.safetensors")
    assert_same(loaded.state_dict(), saved)
    assert not loaded.training
    with pytest.raises(InputError, match="another model"):
        load_ema_model(assemble(model={"token_dim": 16}), folder / "model.safetensors")


def test_the_average_follows_its_recursion_for_every_tensor(assemble: Make) -> None:
    trainer = Trainer(assemble(training={"ema_halflife": 3.0}))
    expected = {name: tensor.double() for name, tensor in trainer.model.state_dict().items()}
    decay = 0.5 ** (1 / 3)

    def progress(row: dict[str, Any]) -> None:
        for name, tensor in trainer.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()

    trainer.run(progress)
    for name, tensor in trainer.ema_model.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
        assert name == "backbone.recall_gain.weight" or tensor.any()


def test_checkpoints_kept_are_the_newest_two_and_those_asked_for(tmp_path: Path, assemble: Make) -> None:
    Trainer(assemble(training={"keep": (3,)}), folder=tmp_path).run()
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["00000003", "00000008", "00000009"]


def test_a_finished_run_started_again_does_nothing_but_write_the_result(
    assemble: Make, straight: Any, tmp_path: Path
) -> None:
    folder, expected, whole = straight
    trainer = Trainer(assemble(), folder=tmp_path, previous=[folder])
    result = trainer.run(stop_after(9))
    assert_same(weights(trainer), expected)
    assert result["videos_per_second"] == whole["videos_per_second"]
    assert result["loss"] == whole["loss"]
    assert result["resumed_from"] == [9]
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_lines_of_figures(straight: Any) -> None:
    rows = logged(straight[0])
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 9]
    for row in rows:
        assert row["lr"] == learning_rate(row["step"] - 1, peak=0.002, warmup=2, steps=9)
        assert len(row["loss"]) == 3
        assert sum(row["loss_share"]) == pytest.approx(1)
        assert row["loss_share"][2] == pytest.approx(row["loss"][2] / sum(row["loss"]))
        assert row["gradient_norm"] > 0
        assert row["videos_per_second"] > 0


def test_result(straight: Any, assemble: Make) -> None:
    result = straight[2]
    assert set(result) == {
        "steps",
        "loss",
        "seconds",
        "videos_per_second",
        "peak_memory_bytes",
        "device",
        "processes",
        "threads",
        "parameters",
        "flops_per_step",
        "predicted",
        "resumed_from",
        "observer_errors",
    }
    assert result["steps"] == 9
    assert all(math.isfinite(value) and value > 0 for value in result["loss"])
    assert result["parameters"] == sum(p.numel() for p in assemble().build_model().parameters())
    assert result["flops_per_step"] > 1e6
    assert json.loads(json.dumps(result)) == result


def test_peak_memory_is_that_of_this_cell_and_not_of_the_one_before() -> None:
    def peak_of(meter: MemoryMeter) -> int:
        found = meter.peak()
        if found is None:
            pytest.skip("the high-water mark cannot be set back here")
        return found

    first = MemoryMeter(torch.device("cpu"))
    with mmap.mmap(-1, 200_000_000) as ballast:  # past any allocator, which may have kept as much
        for place in range(0, len(ballast), mmap.PAGESIZE):
            ballast[place] = 1
    high = peak_of(first)
    second = MemoryMeter(torch.device("cpu"))
    low = peak_of(second)
    assert high - low > 150_000_000
    with mmap.mmap(-1, 200_000_000) as ballast:  # past any allocator, which may have kept as much
        for place in range(0, len(ballast), mmap.PAGESIZE):
            ballast[place] = 1
    assert peak_of(second) - low > 150_000_000


def test_peak_memory_is_unknown_where_the_mark_cannot_be_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpdm_core.training.figures._reset_high_water", lambda: False)
    assert MemoryMeter(torch.device("cpu")).peak() is None


def test_training_learns(assemble: Make) -> None:
    rows: list[dict[str, Any]] = []
    assembly = assemble(
        training={"steps": 50, "learning_rate": 0.01, "warmup": 5},
        diffusion={"noise_scaling": {"use": "constant", "value": 1.0}},
    )
    Trainer(assembly).run(rows.append)

    def mean(part: list[dict[str, Any]]) -> float:
        return sum(sum(row["loss"]) for row in part) / len(part)

    assert mean(rows[-15:]) < 0.75 * mean(rows[:10])


class Watcher:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[torch.Tensor] = []
        self.paths: list[Path] = []

    @hookimpl
    def after_step_finished(self, step: int, loss: torch.Tensor) -> None:
        self.steps.append(step)
        self.losses.append(loss)

    @hookimpl
    def after_checkpoint_saved(self, cell: Any, path: Path) -> None:
        assert (path / "state.json").exists()
        self.paths.append(path)


def test_observers_see_each_step_once_and_each_checkpoint(
    tmp_path: Path, assemble: Make, watched: Callable[[Assembly], Any]
) -> None:
    watcher = Watcher()
    assembly = assemble(objects=(watcher,))
    Trainer(assembly, folder=tmp_path, observers=watched(assembly).observers).run()
    assert watcher.steps == list(range(1, 10))
    assert all(loss.shape == (3,) and not loss.requires_grad for loss in watcher.losses)
    assert [path.name for path in watcher.paths] == [f"{step:08d}" for step in (2, 4, 6, 8, 9)]


class Clumsy:
    @hookimpl
    def after_step_finished(self, step: int, loss: torch.Tensor) -> None:
        loss.zero_()
        torch.manual_seed(0)
        raise RuntimeError(f"no step {step}")


def test_a_clumsy_observer_fails_nothing_and_changes_no_bit(
    assemble: Make,
    watched: Callable[[Assembly], Any],
    straight: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    watcher = Watcher()
    assembly = assemble(objects=(watcher, Clumsy()))
    trainer = Trainer(assembly, folder=tmp_path, observers=watched(assembly).observers)
    with caplog.at_level(logging.WARNING):
        result = trainer.run()
    assert watcher.steps == list(range(1, 10))
    assert_same(weights(trainer), straight[1])
    assert without_times(logged(tmp_path)) == without_times(logged(straight[0]))
    assert len(caplog.messages) == 1
    (message,) = result["observer_errors"]
    assert "after_step_finished: RuntimeError: no step 1 (9x)" in message


def test_an_observer_is_handed_a_loss_of_its_own(
    assemble: Make, watched: Callable[[Assembly], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.Tensor] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        loss = joint_loss(*arguments, **options)
        made.append(loss.levels)
        return loss

    monkeypatch.setattr("hpdm_core.training.trainer.joint_loss", noted)
    assembly = assemble(objects=(Clumsy(),), training={"steps": 1})
    Trainer(assembly, observers=watched(assembly).observers).run()
    assert made[0].abs().sum() > 0  # Clumsy writes zeros


def poison(trainer: Trainer, *, level: int, at: int, value: float) -> None:
    """Make the prediction of ``level`` not finite from step ``at`` on."""
    calls = iter(range(1, 1000))
    forward = trainer.model.forward

    def poisoned(entries: Any, contexts: Any = None) -> Any:
        made = forward(entries, contexts)
        # with self-conditioning every step has two calls
        if torch.is_grad_enabled() and next(calls) >= at:
            prediction, latents = made[level]
            made[level] = (prediction * value, latents)
        return made

    trainer.model.forward = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_level_and_the_last_good_checkpoint(
    tmp_path: Path, assemble: Make, value: float
) -> None:
    trainer = Trainer(assemble(), folder=tmp_path)
    poison(trainer, level=1, at=5, value=value)
    with pytest.raises(TroubleError) as caught:
        trainer.run()
    (message,) = caught.value.messages
    assert "loss of level 1 is not finite at step 5" in message
    assert str(tmp_path / "checkpoints" / "00000004") in message
    assert "\n" not in message
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["00000002", "00000004"]
    assert not (tmp_path / "model.safetensors").exists()


def test_a_gradient_that_is_not_finite_touches_no_weight(tmp_path: Path, assemble: Make) -> None:
    trainer = Trainer(assemble(), folder=tmp_path)
    before = weights(trainer)
    trainer.model.output.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        TroubleError, match=r"the gradient is not finite at step 1 .* no checkpoint was saved"
    ):
        trainer.run()
    assert_same(weights(trainer), before)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, assemble: Make) -> None:
    trainer = Trainer(assemble(), folder=tmp_path)

    def progress(row: dict[str, Any]) -> None:
        if row["step"] == 4:
            trainer.model.output.bias.data[0] = float("nan")

    with pytest.raises(TroubleError, match=r"'output\.bias' is not finite after step 4"):
        trainer.run(progress)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["00000002"]


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    tmp_path: Path, assemble: Make, straight: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = iter(range(1000)), os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) == 14:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(TroubleError, match="00000006: could not be written: No space left on device"):
            Trainer(assemble(), folder=tmp_path).run()
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["00000002", "00000004"]
    assert not list(tmp_path.rglob("*.partial"))
    trainer = Trainer(assemble(), folder=tmp_path)
    assert trainer.run()["resumed_from"] == [4]
    assert_same(weights(trainer), straight[1])


def test_the_gradient_is_clipped_by_its_global_norm(assemble: Make) -> None:
    norms: list[float] = []

    def run(clip: float | None) -> Trainer:
        trainer = Trainer(assemble(training={"clip": clip, "steps": 1, "warmup": 0}))
        norms.append(0.0)
        trainer.run(lambda row: norms.__setitem__(-1, row["gradient_norm"]))
        return trainer

    def norm(trainer: Trainer) -> float:
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        return float(torch.cat(gradients).norm())

    free, clipped = run(None), run(0.01)
    assert norm(free) == pytest.approx(norms[0], rel=1e-5)
    assert norms[1] == norms[0] > 0.01
    assert norm(clipped) == pytest.approx(0.01, rel=1e-3)


def test_lamb_refuses_a_zero_matrix_by_name(assemble: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Assembly.build_model

    def with_zeros(self: Assembly, **arguments: Any) -> Any:
        model = build(self, **arguments)
        torch.nn.init.zeros_(model.output.weight)
        return model

    monkeypatch.setattr(Assembly, "build_model", with_zeros)
    Trainer(assemble())
    with pytest.raises(InputError, match=r"'output\.weight'"):
        Trainer(assemble(training={"optimizer": "lamb"}))
