import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hpdm_core import hookimpl
from hpdm_core.base.errors import TroubleError
from hpdm_core.cell import Cell
from hpdm_core.plugins import build_plugins
from hpdm_core.study.plan.cells import cells_of
from hpdm_core.study.plan.study_file import load_study
from hpdm_core.study.worker.run_cell import run_job


def cell_of(file: Path, store: Path, *sets: str) -> Cell:
    chosen, _ = cells_of(load_study(file, sets=sets), store)
    return chosen[0]


def todo(cell: Cell) -> list[str]:
    return [step.name for step in cell.missing()]


ALL = ["train", "sample", "evaluate held_out_loss", "evaluate frechet"]


@pytest.fixture
def store(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of the store in which the tiny cell is done."""
    shutil.copytree(undisturbed / "store", tmp_path / "store")
    return tmp_path / "store"


def test_a_new_cell_has_everything_to_do_and_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    assert todo(cell_of(tiny, tmp_path / "store")) == ALL
    assert not (tmp_path / "store").exists()


def test_the_store_is_laid_out_as_promised(tiny: Path, store: Path) -> None:
    cell = cell_of(tiny, store)
    train, samples = store / "train" / cell.keys.train, store / "samples" / cell.keys.samples
    assert {path.name for path in train.iterdir() if not path.name.startswith(".")} == {
        "attempts",
        "model.safetensors",
        "result.json",
        "spec.json",
    }
    names = {path.name for path in samples.iterdir() if not path.name.startswith(".")}
    assert names == {f"00000{index}.safetensors" for index in range(4)} | {
        "attempts",
        "contact_sheet.png",
        "result.json",
    }
    assert {path.name for path in (train / "attempts" / "1").iterdir()} >= {
        "log.txt",
        "heartbeat",
        "metrics.jsonl",
    }
    assert list((train / "attempts" / "1" / "checkpoints").iterdir()) == []  # of use only until it is done


def test_results_say_where_they_come_from(tiny: Path, store: Path) -> None:
    results = cell_of(tiny, store).results()
    assert list(results) == ALL
    for result in results.values():
        assert {"python", "torch", "hpdm", "plugins"} <= set(result["versions"])
        assert result["wall_seconds"] > 0 and result["attempts"] == 1 and result["machine"]["cores"] >= 1
    assert results["evaluate frechet"]["protocol"] and results["evaluate frechet"]["rows"]


def test_a_finished_cell_has_nothing_to_do(tiny: Path, store: Path) -> None:
    assert todo(cell_of(tiny, store)) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("runtime.tile_batch=7", []),
        ("evaluation.metrics=[held_out_loss, throughput]", ["evaluate throughput"]),
        ("sampling.context_sigma_eff=0.1", ["sample", "evaluate frechet"]),
        ("training.steps=7", ALL),
        ("evaluation.samples=6", ["sample", "evaluate frechet"]),
    ],
)
def test_a_change_asks_for_what_depends_on_it(
    tiny: Path, store: Path, change: str, expected: list[str]
) -> None:
    assert todo(cell_of(tiny, store, change)) == expected


def test_more_samples_extend_those_that_are_there(tiny: Path, store: Path) -> None:
    cell = cell_of(tiny, store, "evaluation.samples=6")
    first = cell.sample_stage.folder / "000000.safetensors"
    before = (first.read_bytes(), first.stat().st_mtime_ns)
    cell.run()
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    assert len(list(cell.sample_stage.folder.glob("*.safetensors"))) == 6 and todo(cell) == []
    assert todo(cell_of(tiny, store)) == []  # and fewer are there too


def test_samples_may_be_deleted_once_they_are_measured(tiny: Path, store: Path) -> None:
    shutil.rmtree(store / "samples")
    assert todo(cell_of(tiny, store)) == []
    another = cell_of(tiny, store, "evaluation.metrics=[{use: frechet, extractor: statistics}, kvd]")
    assert todo(another)[0] == "sample"


def test_a_lost_sample_is_made_again_bit_by_bit(tiny: Path, store: Path) -> None:
    cell = cell_of(tiny, store)
    lost = cell.sample_stage.folder / "000003.safetensors"
    before = lost.read_bytes()
    lost.unlink()
    shutil.rmtree(cell.evaluation_stages()[1][1].folder)
    assert todo(cell) == ["sample", "evaluate frechet"]
    cell.run()
    assert lost.read_bytes() == before


def test_a_spec_rebuilds_the_cell(tiny: Path, store: Path) -> None:
    cell = cell_of(tiny, store)
    again = Cell.from_spec(json.loads(json.dumps(cell.spec())))
    assert again.keys == cell.keys and again.identity == cell.identity and again.name == "default, seed 0"


def test_a_spec_whose_keys_have_changed_is_refused(tiny: Path, store: Path) -> None:
    spec = cell_of(tiny, store).spec()
    spec["keys"]["train"] = "0" * 64
    with pytest.raises(TroubleError, match="changed since the cell was planned"):
        Cell.from_spec(spec)


def test_a_job_says_why_it_failed(tmp_path: Path) -> None:
    with pytest.raises(TroubleError):
        run_job(str(tmp_path / "spec.json"))
    assert "no readable spec" in json.loads((tmp_path / "error.json").read_text())["message"]


@pytest.mark.parametrize(
    ("gone", "runs", "stage"),
    [
        (("train", "samples", "evaluations"), "hpdm_core.training.trainer.Trainer.run", "train"),
        (("samples", "evaluations"), "hpdm_core.sampling.stage.sample_missing", "samples"),
        (("evaluations",), "hpdm_core.evaluation.stage.evaluate_metric", "evaluations"),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["main process", "another"])
def test_a_job_says_at_which_stage_it_failed(
    gone: tuple[str, ...],
    runs: str,
    stage: str,
    first: bool,
    tiny: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def short(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    for kind in gone:
        shutil.rmtree(store / kind)
    cell = cell_of(tiny, store)
    (tmp_path / "spec.json").write_text(json.dumps(cell.spec()))
    monkeypatch.setattr(runs, short)
    if not first:  # told by the main one what to follow
        made = {step.stage.kind: step.stage for step in reversed(cell.missing())}[stage]
        monkeypatch.setattr("hpdm_core.base.distributed.is_main", lambda: False)
        monkeypatch.setattr("hpdm_core.base.distributed.broadcast", lambda _: (made.kind, made.key, 1))
        monkeypatch.setattr("hpdm_core.base.distributed.on_main", lambda _: [made.key])
    with pytest.raises(MemoryError):
        run_job(str(tmp_path / "spec.json"), lambda progress: None)
    said = json.loads((tmp_path / "error.json").read_text())
    assert (said["kind"], said["stage"]) == ("out of memory", stage)
    if first:
        failure = cell.missing()[0].stage.failure()
        assert failure is not None and failure["stage"] == stage


def test_a_metric_alone_is_measured_with_the_threads_of_the_cell(
    tiny: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[int | None] = []
    monkeypatch.setattr(
        "hpdm_core.assembly.runtime.prepare_torch", lambda runtime, _: prepared.append(runtime.threads)
    )
    cell_of(tiny, store, "evaluation.metrics=[throughput]").run()
    assert prepared == [1]


class Watcher:
    """Notes what it hears; its last hook raises."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    @hookimpl
    def before_cell_started(self, cell: Cell) -> None:
        self.heard.append("before")

    @hookimpl
    def after_level_sampled(self, cell: Cell, level: int, videos: Any) -> None:
        self.heard.append((level, tuple(videos.shape)))

    @hookimpl
    def after_cell_finished(self, cell: Cell, result: dict[str, Any]) -> None:
        self.heard.append(sorted(result))
        raise RuntimeError("an observer's own mistake")

    @hookimpl
    def on_cell_error(self, cell: Cell, error: BaseException) -> None:
        self.heard.append(str(error))


def watched(cell: Cell) -> tuple[Cell, Watcher]:
    watcher = Watcher()
    plugins = build_plugins(objects=[watcher])
    return Cell(cell.config, plugins, store=cell.store.root, arm=cell.arm), watcher


def test_observers_hear_of_a_cell_and_cannot_fail_it(tiny: Path, store: Path) -> None:
    shutil.rmtree(store / "samples")
    shutil.rmtree(store / "evaluations")
    cell, watcher = watched(cell_of(tiny, store))
    cell.run()
    levels = [(0, (2, 3, 2, 4, 4)), (1, (2, 3, 4, 16, 16))]
    assert watcher.heard == ["before", *levels, *levels, sorted(ALL)]


class Stumbling:
    @hookimpl
    def after_step_finished(self, step: int) -> None:
        raise RuntimeError(f"step {step}")


def test_an_observers_error_stands_once_in_the_result(tiny: Path, tmp_path: Path) -> None:
    planned = cell_of(tiny, tmp_path / "store", "training.steps=2", "evaluation.metrics=[throughput]")
    cell = Cell(planned.config, build_plugins(objects=[Stumbling()]), store=planned.store.root, arm="default")
    (line,) = cell.run()["train"]["observer_errors"]
    assert line.endswith("after_step_finished: RuntimeError: step 1 (2x)")


def test_the_device_is_in_no_key(tiny: Path, tmp_path: Path) -> None:
    plain, other = (
        cell_of(tiny, tmp_path, "evaluation.metrics=[throughput, held_out_loss]", f"runtime.device={device}")
        for device in ("cpu", "cuda")
    )
    assert plain.keys == other.keys


def test_observers_hear_of_an_error(tiny: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanish(*arguments: Any, **options: Any) -> None:
        raise TroubleError("the data folder has vanished")

    monkeypatch.setattr("hpdm_core.training.trainer.Trainer.run", vanish)
    cell, watcher = watched(cell_of(tiny, store / "elsewhere"))
    with pytest.raises(TroubleError):
        cell.run()
    assert watcher.heard == ["before", "the data folder has vanished"]
    failure = cell.train_stage.failure()
    assert failure is not None and failure["message"] == "the data folder has vanished"
