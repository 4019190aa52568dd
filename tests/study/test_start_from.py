"""Models that start from another one: what they take, what comes first, what their keys and reports say."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpdm_core.assembly.compose import load_cell
from hpdm_core.base.errors import InputError
from hpdm_core.cell import Cell
from hpdm_core.report.efficiency import cost_table
from hpdm_core.report.frame import load_results
from hpdm_core.study.__main__ import main
from hpdm_core.study.plan.cells import cells_of, refuse_absent
from hpdm_core.study.plan.import_cells import Importer
from hpdm_core.study.plan.study_file import load_study
from hpdm_core.study.show.dry_run import describe_study
from hpdm_core.training.trainer import Trainer

START = "training.start_from"
STUDY = """name: small
extends: tiny_clips
model: {video: [4, 8, 8], patch: [1, 2, 2], token: [1, 1, 1], blocks: 3, token_dim: 8, classes: 0}
data: {dataset: synthetic}
training: {steps: 4, batch: 2, warmup: 0}
evaluation: {samples: 1, reals: 1, metrics: [throughput]}
runtime: {threads: 1, checkpoint_every: 1, log_every: 1, prefetch: 0}
backend: inline
arms:
  scratch: {}
  base: {model.context_fusion: none, training.steps: 3}
  started: {training.start_from: {arm: base}}
  detached: {model.context_fusion: {use: deep, detach: true}, training.start_from: {arm: base}}
seeds: [0, 1]
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder of the study in which two arms that start from a third were run, and it was not."""
    folder = tmp_path_factory.mktemp("started")
    (folder / "small.yaml").write_text(STUDY)
    assert (
        main([str(folder / "small.yaml"), "--results", str(folder / "results"), "--only", "started,detached"])
        == 0
    )
    return folder


def cells(
    folder: Path, text: str = STUDY, *sets: str, store: Path | None = None
) -> dict[tuple[str, int], Cell]:
    (folder / "small.yaml").write_text(text)
    found, _ = cells_of(load_study(folder / "small.yaml", sets=sets), store or folder / "results" / "store")
    return {(cell.arm, cell.seed): cell for cell in found}


def todo(cell: Cell) -> list[str]:
    return [step.name for step in cell.missing()]


def test_the_model_of_the_named_arm_is_trained_first_once_per_seed_and_shared(done: Path) -> None:
    found = cells(done)
    trained = {path.parent.name for path in (done / "results" / "store" / "train").glob("*/result.json")}
    assert trained == {
        found[arm, seed].keys.train for arm in ("base", "started", "detached") for seed in (0, 1)
    }
    assert len(trained) == 6
    for seed in (0, 1):
        base = found["base", seed]
        assert base.train_stage.result()["attempts"] == 1  # type: ignore[index]
        assert todo(base) == ["sample", "evaluate throughput"]  # nobody has asked for its samples
        assert found["started", seed].results()["train"]["started_from"]["train"] == base.keys.train


def test_weights_of_equal_name_and_shape_start_from_the_average_and_the_rest_as_it_would(done: Path) -> None:
    found = cells(done)
    cell, scratch = found["started", 0], found["scratch", 0]
    base = load_file(cell.base.weights)  # type: ignore[union-attr]
    started = Trainer(cell.assembly, start=cell.base.weights)  # type: ignore[union-attr]
    drawn = dict(Trainer(scratch.assembly).model.named_parameters())
    told = cell.results()["train"]["started_from"]
    assert told["new"] and set(told["taken"]) | set(told["new"]) == set(drawn)
    assert set(told["unused"]) == set(base) - set(told["taken"])
    average = dict(started.ema_model.named_parameters())
    for name, parameter in started.model.named_parameters():
        expected = base[name] if name in told["taken"] else drawn[name]
        assert torch.equal(parameter, expected) and torch.equal(average[name], expected), name
    assert any(not torch.equal(base[name], drawn[name]) for name in told["taken"])
    assert all("fusion" in name for name in told["new"])


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(done: Path, tmp_path: Path) -> None:
    cell = cells(done)["started", 1]
    start = cell.base.weights  # type: ignore[union-attr]
    stopped = Trainer(cell.assembly, folder=tmp_path / "1", start=start)

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop)
    result = Trainer(cell.assembly, folder=tmp_path / "2", previous=[tmp_path / "1"], start=start).run()
    assert result["resumed_from"] == [2]
    assert result["started_from"]["taken"] == cell.results()["train"]["started_from"]["taken"]
    again, whole = load_file(tmp_path / "2" / "model.safetensors"), load_file(cell.weights)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_keys_hold_the_key_of_the_model_and_no_names(tmp_path: Path) -> None:
    found = cells(tmp_path)
    renamed = cells(tmp_path, STUDY.replace("base:", "other:").replace("arm: base", "arm: other"))
    other = cells(tmp_path, STUDY.replace("training.steps: 3", "training.steps: 2"))
    for seed in (0, 1):
        key = found["started", seed].keys.train
        assert renamed["started", seed].keys.train == key
        assert other["started", seed].keys.train != key != found["scratch", seed].keys.train
        assert other["scratch", seed].keys == found["scratch", seed].keys
    assert found["started", 0].keys.train != found["started", 1].keys.train
    plain = cells(tmp_path, STUDY, "training.start_from=null")
    assert plain["scratch", 0].keys == found["scratch", 0].keys  # the neutral value is in no key


def test_a_worker_rebuilds_the_cell_with_its_base_and_runs_both_alike(done: Path) -> None:
    cell = cells(done)["started", 1]
    spec = json.loads(json.dumps(cell.spec()))
    spec["config"]["runtime"]["micro_batch"] = 1  # as a retry after memory ran out does
    rebuilt = Cell.from_spec(spec)
    assert rebuilt.keys == cell.keys and rebuilt.base is not None
    assert rebuilt.base.keys == cell.base.keys  # type: ignore[union-attr]
    assert rebuilt.base.config.runtime.micro_batch == 1


def test_a_base_whose_weights_are_gone_is_trained_again_only_for_who_needs_it(
    done: Path, tmp_path: Path
) -> None:
    shutil.copytree(done / "results" / "store", tmp_path / "store")
    cell = cells(tmp_path, store=tmp_path / "store")["started", 0]
    assert cell.base is not None
    cell.base.weights.unlink()
    assert todo(cell) == []
    cell.weights.unlink()
    shutil.rmtree(cell.sample_stage.folder)
    shutil.rmtree(cell.evaluation_stages()[0][1].folder)
    assert todo(cell) == ["train base", "train", "sample", "evaluate throughput"]
    old = cell.train_stage.result()
    cell.run()
    assert todo(cell) == [] and cell.base.weights.exists()
    assert cell.train_stage.result()["sha256"] == old["sha256"]  # type: ignore[index]


def test_who_comes_second_waits_for_the_base_and_does_not_train_it(tmp_path: Path) -> None:
    found = cells(tmp_path)
    first, second = found["started", 0], found["detached", 0]
    assert first.base is not None
    waits: list[dict[str, Any]] = []

    def progress(row: dict[str, Any]) -> None:
        if "waiting" in row and not waits:
            waits.append(row)
            claim.close()  # the other lets go, having done it

    claim = ExitStack()
    attempt = claim.enter_context(first.base.train_stage.claim())
    attempt.finish(
        dict(first.base._train(attempt, lambda row: None)), files={"model.safetensors": "model.safetensors"}
    )
    first.base.train_stage.folder.joinpath("result.json").rename(tmp_path / "result.json")

    def finish(row: dict[str, Any]) -> None:
        if "waiting" in row:
            (tmp_path / "result.json").rename(second.base.train_stage.folder / "result.json")  # type: ignore[union-attr]
        progress(row)

    second.run(finish)
    assert waits and waits[0]["stage"] == "train base"
    assert second.base.train_stage.result()["sha256"]  # type: ignore[union-attr, index]


def test_a_dry_run_counts_a_base_once(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(STUDY)
    study = load_study(tmp_path / "small.yaml", only=["started,detached"])
    text = describe_study(study, tmp_path / "none")
    assert "train base, train, sample" in text
    assert re.search(r"to do: 4 cells, 6 models to train", text), text
    whole = describe_study(load_study(tmp_path / "small.yaml"), tmp_path / "none")
    assert re.search(r"to do: 8 cells, 8 models to train", whole), whole
    assert "including the models that arms start from" in whole


def test_the_report_adds_what_the_base_took(done: Path) -> None:
    results = load_results(done / "results" / "small")
    table = cost_table(results)
    assert table is not None
    for arm in ("started", "detached"):
        trained = [cell.train for cell in results.of_arm(arm)]
        seconds = [each["seconds"] + each["started_from"]["seconds"] for each in trained]  # type: ignore[index]
        assert table.cells.loc[arm, "real device-hours"] == f"{sum(seconds) / len(seconds) / 3600:.3g}"
        assert all(each["started_from"]["flops"] > 0 for each in trained)  # type: ignore[index]
    rows = cells(done)["started", 0].results()["evaluate throughput"]["rows"]
    assert {"throughput.base_seconds", "throughput.base_flops"} <= {row["metric"] for row in rows}


def test_what_was_trained_elsewhere_is_imported_with_its_base(done: Path, tmp_path: Path) -> None:
    found = cells(tmp_path, store=tmp_path / "store")
    importer = Importer(done / "results")
    importer.take(found["started", 0])
    assert todo(found["started", 0]) == [] and "2 train" in importer.lines()[0]
    assert "train base" not in todo(found["detached", 0])


def test_a_file_of_weights_is_taken_by_its_content(done: Path, tmp_path: Path) -> None:
    weights = cells(done)["base", 0].weights
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    shutil.copy(weights, first)
    shutil.copy(weights, second)
    text = STUDY.replace("{arm: base}", f"{{path: {first}}}", 1)
    cell = cells(tmp_path, text)["started", 0]
    moved = cells(tmp_path, text.replace(str(first), str(second)))["started", 0]
    assert cell.keys == moved.keys and cell.base is None
    cell.run()
    told = cell.results()["train"]["started_from"]
    assert told["file"] == str(first) and "seconds" not in told
    by_arm = load_file(cells(done)["started", 0].weights)
    assert all(torch.equal(each, by_arm[name]) for name, each in load_file(cell.weights).items())
    save_file({name: each + 1 for name, each in load_file(first).items()}, first)
    assert cells(tmp_path, text)["started", 0].keys.train != cell.keys.train


def test_level_tables_of_a_model_of_fewer_levels_become_the_first_rows_where_asked(tmp_path: Path) -> None:
    one = {"levels": 1, "video": [1, 2, 2], "computation_allocation": "linear"}
    study = STUDY.replace(
        "{model.context_fusion: none, training.steps: 3}",
        f"{{model: {json.dumps(one)}, training.steps: 1, training.learning_rate: 0.5, "
        "sampling.solver.steps: [4], sampling.solver.order: [1], sampling.solver.churn: [0], "
        "sampling.solver.sigma_eff_max: [80], sampling.solver.sigma_eff_min: [0.1]}",
    )
    found = cells(tmp_path, study)
    resized = cells(tmp_path, study.replace("{arm: base}", "{arm: base, resize: [levels]}"))
    plain = cells(tmp_path, study.replace("{arm: base}", "{arm: base, resize: []}"))
    assert plain["started", 0].keys == found["started", 0].keys != resized["started", 0].keys
    table = "sigma_embedding.levels.rows"
    base = found["base", 0]
    Trainer(base.assembly, folder=tmp_path / "base").run()
    start = tmp_path / "base" / "model.safetensors"
    drawn = Trainer(found["scratch", 0].assembly).model.state_dict()[table]
    without = Trainer(found["started", 0].assembly, start=start)
    assert table in without.started_from["new"] and "first_rows" not in without.started_from
    assert torch.equal(without.model.state_dict()[table], drawn)
    trainer = Trainer(resized["started", 0].assembly, start=start)
    assert trainer.started_from["first_rows"] == {table: 1}
    assert table in trainer.started_from["taken"] and table not in trainer.started_from["unused"]
    for model in (trainer.model, trainer.ema_model):
        rows = model.state_dict()[table]
        assert torch.equal(rows[:1], load_file(start)[table]) and torch.equal(rows[1:], drawn[1:])
    assert not torch.equal(load_file(start)[table], drawn[:1])
    equal = Trainer(resized["started", 0].assembly, start=_saved(tmp_path, found["scratch", 0]))
    assert equal.started_from["first_rows"] == {} and table in equal.started_from["taken"]


def _saved(folder: Path, cell: Cell) -> Path:
    save_file(Trainer(cell.assembly).model.state_dict(), folder / "equal.safetensors")
    return folder / "equal.safetensors"


def test_a_chain_of_models_is_trained_in_its_order(tmp_path: Path) -> None:
    text = STUDY.replace(
        "scratch: {}", "scratch: {}\n  last: {training.steps: 2, training.start_from: {arm: started}}"
    )
    cell = cells(tmp_path, text)["last", 0]
    assert todo(cell) == ["train base", "train started", "train", "sample", "evaluate throughput"]
    cell.run()
    told, before = cell.results()["train"]["started_from"], cell.base.train_stage.result()  # type: ignore[union-attr]
    assert before is not None
    assert told["flops"] == 4 * before["flops_per_step"] + before["started_from"]["flops"]


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("{arm: bas}", r"small.yaml:\d+: training.start_from.arm: no arm 'bas' - did you mean 'base'\?"),
        ("{arm: started}", r"small.yaml:\d+: .*arm 'started' would have to be trained before itself"),
        ("{arm: base, path: x}", r"small.yaml:\d+: training.start_from: .*one of them"),
        ("{}", r"small.yaml:\d+: training.start_from: .*one of them"),
        ("{amr: base}", r"small.yaml:\d+: training.start_from.amr: .*did you mean 'arm'\?"),
    ],
)
def test_a_start_that_cannot_be_is_refused_with_its_place(start: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        cells(
            tmp_path,
            STUDY.replace(
                "started: {training.start_from: {arm: base}}", f"started: {{training.start_from: {start}}}"
            ),
        )
    assert any(re.search(said, line) for line in refused.value.messages), refused.value.messages


def test_a_ring_of_models_is_refused(tmp_path: Path) -> None:
    text = STUDY.replace("training.steps: 3", "training.start_from: {arm: detached}")
    with pytest.raises(InputError, match=r"base -> detached -> base"):
        cells(tmp_path, text)


def test_files_that_are_no_start_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training.start_from.path: '.*none.safetensors' does not exist"):
        refuse_absent([started_from(tmp_path, tmp_path / "none.safetensors")])
    save_file({"other": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"no weight with the name and shape"):
        Trainer(started_from(tmp_path, tmp_path / "other.safetensors").assembly)
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(InputError, match=r"not a whole safetensors file"):
        Trainer(started_from(tmp_path, tmp_path / "text.safetensors").assembly)
    save_file({"tokenizer.bias": torch.full((8,), float("nan"))}, tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match=r"'tokenizer.bias' is not finite"):
        Trainer(started_from(tmp_path, tmp_path / "nan.safetensors").assembly)


def started_from(folder: Path, path: Path) -> Cell:
    return cells(folder, STUDY.split("arms:")[0], f"training.start_from.path={path}")["default", 0]


def test_outside_a_study_only_a_file_can_be_started_from(tmp_path: Path) -> None:
    sets = ["training.start_from.arm=base", "data.dataset=synthetic", "model.classes=0"]
    assembly = load_cell("tiny_clips", sets=sets)
    with pytest.raises(InputError, match=r"outside a study allowed is training.start_from.path"):
        Trainer(assembly)
