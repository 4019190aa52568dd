import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from hpdm_core.base.errors import report_errors
from hpdm_core.report import load_results, write_report
from hpdm_core.report.__main__ import main
from hpdm_core.report.differences import _compare, configuration_differences, parameter_differences
from hpdm_core.report.figures import arms_figure
from hpdm_core.report.tables import blind_spots, headline, metric_tables
from hpdm_core.report.text import HOLE, Table, number, to_latex

Study = Callable[..., Path]


def table(folder: Path, title: str) -> Table:
    (found,) = [made for made in metric_tables(load_results(folder)) if made.title == title]
    return found


def test_the_frame_is_tidy(study: Study) -> None:
    frame = load_results(study()).frame
    assert set(frame["study"]) == {"demo"}
    assert len(frame) == 2 * 3 * (18 + 6 + 6)
    row = frame[(frame["arm"] == "no_context") & (frame["seed"] == 2) & (frame["metric"] == "held_out_loss")]
    (value,) = row[(row["level"] == 2) & row["sigma_eff"].isna() & (row["parents"] == "clean")]["value"]
    assert value == pytest.approx(0.224)
    assert json.loads(row["protocol"].iloc[0])["reals"] == 256


def test_all_files_are_written_and_agree(study: Study) -> None:
    folder = study()
    text = write_report(folder)
    names = {path.name for path in (folder / "report").iterdir()}
    assert names == {"results.parquet", "results.csv", "table.md", "table.tex", "arms.png"}
    parquet = pd.read_parquet(folder / "report" / "results.parquet")
    frame = load_results(folder).frame
    assert parquet["value"].tolist() == frame["value"].tolist()
    assert pd.read_csv(folder / "report" / "results.csv")["value"].tolist() == pytest.approx(
        frame["value"].tolist()
    )
    assert text.splitlines()[0] == "All 6 cells are done: 2 arms, seeds 0, 1, 2."


def test_a_report_is_the_same_when_it_is_made_again(study: Study) -> None:
    folder = study()
    write_report(folder)
    first = {path.name: path.read_bytes() for path in (folder / "report").iterdir()}
    write_report(folder)
    assert {path.name: path.read_bytes() for path in (folder / "report").iterdir()} == first


def test_values_stand_as_mean_and_spread_by_resolution(study: Study) -> None:
    cells = table(study(), "held_out_loss, clean parents").cells
    assert list(cells.columns) == ["2x6x8", "4x12x16", "8x24x32", "videos/s", "parameters"]
    assert cells.loc["default", "8x24x32"] == "0.1210 ± 0.0010"
    assert cells.loc["no_context", "2x6x8"] == "0.2020 ± 0.0020"
    assert cells.loc["no_context", "videos/s"] == "12.00 ± 0.00"
    assert cells.loc["default", "parameters"] == "1,234,567"


def test_differences_are_paired_and_carry_interval_and_n(study: Study) -> None:
    cells = table(study(), "held_out_loss, clean parents: difference to default").cells
    assert list(cells.index) == ["no_context"]
    # .100, .101, .102: spread .001, interval 4.303 * .001 / sqrt(3)
    assert cells.loc["no_context", "8x24x32"] == "+0.1010 ± 0.0010 [0.0985, 0.1035] n=3"


def test_clean_parents_come_first_and_noisy_ones_apart(study: Study) -> None:
    folder = study()
    assert metric_tables(load_results(folder))[0].title == "held_out_loss, clean parents"
    noisy = table(folder, "held_out_loss, noisy parents").cells
    assert noisy.loc["default", "8x24x32"] == "0.6210 ± 0.0010"


def test_losses_stand_per_noise_level(study: Study) -> None:
    cells = table(study(), "held_out_loss at 8x24x32 per noise level, clean parents").cells
    assert list(cells.columns) == ["σ 0.1", "σ 1"]
    assert cells.loc["default", "σ 0.1"].startswith("0.01210")


def test_the_headline_is_the_finest_level_per_seed(study: Study) -> None:
    lines = headline(load_results(study()))
    assert "8x24x32 with clean parents, arm - default" in lines[0]
    assert "+0.1000 (seed 0)  +0.1010 (seed 1)  +0.1020 (seed 2)" in lines[1]
    assert lines[1].endswith("worse in 3 of 3 seeds; mean = 101.0 x spread")


def test_holes_are_shown_counted_and_named(study: Study) -> None:
    folder = study(states={("no_context", 2): "failed", ("default", 1): "running"})
    text = write_report(folder)
    assert text.startswith("2 of 6 cells missing: default seed 1 (running), no_context seed 2 (failed).")
    made = table(folder, "held_out_loss, clean parents")
    assert made.first.startswith("6 of 18 values missing (–, or n below 3).")
    assert made.cells.loc["no_context", "2x6x8"] == "0.2010 ± 0.0014 (n=2)"
    paired = table(folder, "held_out_loss, clean parents: difference to default").cells
    assert paired.loc["no_context", "2x6x8"].endswith("n=1")  # seed 0 alone has both
    assert "6 of 18 values missing" in (folder / "report" / "table.tex").read_text()


def test_an_arm_that_never_ran_is_a_hole_in_its_row(study: Study) -> None:
    folder = study(states={("no_context", seed): "waiting" for seed in range(3)})
    cells = table(folder, "held_out_loss, clean parents").cells
    assert cells.loc["no_context"].tolist() == ["–"] * 5
    assert "no_context  – no seed that both have" in write_report(folder)


def test_a_baseline_that_never_ran_leaves_values_without_differences(study: Study) -> None:
    folder = study(states={("default", seed): "failed" for seed in range(3)})
    made = table(folder, "held_out_loss, clean parents: difference to default")
    assert made.cells.loc["no_context"].tolist() == ["–"] * 3
    assert "Fewer than two seeds to compare" in made.first


def test_nothing_at_all_still_makes_a_report(study: Study) -> None:
    folder = study(states={(arm, seed): "waiting" for arm in ("default", "no_context") for seed in range(3)})
    text = write_report(folder)
    assert text.startswith("6 of 6 cells missing")
    assert not (folder / "report" / "arms.png").exists()


def test_a_result_that_cannot_be_read_is_a_hole(study: Study) -> None:
    folder = study()
    key = load_results(folder).cells[0].evaluation_keys[0]
    (folder.parent / "store" / "evaluations" / key / "result.json").write_text('{"rows": [')
    assert "3 of 18 values missing" in table(folder, "held_out_loss, clean parents").first


def test_a_table_without_a_difference_says_so_first(study: Study) -> None:
    made = table(study(), "frechet[random3d]: difference to default")
    assert made.first == "No difference to default exceeds its spread over seeds."


def test_one_seed_says_that_it_has_no_spread(study: Study) -> None:
    made = table(study(seeds=(4,)), "held_out_loss, clean parents")
    assert made.cells.loc["default", "2x6x8"] == "0.1040"
    assert "One seed (4): no spread." in made.caption
    assert "Fewer than two seeds" in made.first


def test_one_arm_has_no_differences(study: Study) -> None:
    folder = study(arms=("default",))
    titles = [made.title for made in metric_tables(load_results(folder))]
    assert not [title for title in titles if "difference" in title]
    assert "What each arm changes" not in write_report(folder)


def test_the_floor_has_a_row_and_marks_what_is_near_it(study: Study) -> None:
    made = table(study(), "frechet[random3d]")
    assert made.cells.loc["floor (real held-out clips)"].tolist() == ["10.00"] * 3 + ["", ""]
    assert made.cells.loc["default"].tolist()[:3] == ["20.00 ± 0.00†", "60.00 ± 0.00", "100.0 ± 0.0"]
    assert "† below 3 times the floor" in made.caption


def test_controls_have_rows_beneath_the_floor_and_are_no_arm(study: Study) -> None:
    folder = study()
    for file in folder.parent.glob("store/evaluations/*/result.json"):
        result = json.loads(file.read_text())
        if result["metric"] == "frechet[random3d]":
            result["rows"] += [
                {
                    "metric": "frechet[random3d].control",
                    "level": level,
                    "value": 33.0 + level,
                    "control": "frozen",
                }
                for level in (0, 2)
            ]
            file.write_text(json.dumps(result))
    made = table(folder, "frechet[random3d]").cells
    assert list(made.index) == [
        "default",
        "no_context",
        "floor (real held-out clips)",
        "control: training clips, frozen",
    ]
    assert made.iloc[-1].tolist() == ["33.00", HOLE, "35.00", "", ""]
    titles = [each.title for each in metric_tables(load_results(folder))]
    assert not [title for title in titles if "control" in title]


@pytest.mark.parametrize("floor", [-1.0, 0.0, 1.0])
def test_a_floor_with_a_spread_marks_by_the_spread(study: Study, floor: float) -> None:
    """An unbiased floor may be 0 or negative: multiples of it mean nothing."""
    folder = study()
    for cell in load_results(folder).cells:
        path = folder.parent / "store" / "evaluations" / cell.evaluation_keys[1] / "result.json"
        result = json.loads(path.read_text())
        for row in result["rows"]:
            if row["metric"].endswith(".floor"):
                row |= {"value": floor, "spread": 15.0}
        path.write_text(json.dumps(result))
    made = table(folder, "frechet[random3d]")
    assert made.cells.loc["floor (real held-out clips)"].tolist()[:3] == [f"{floor:.2f} ± 15.00"] * 3
    assert made.cells.loc["default"].tolist()[:3] == ["20.00 ± 0.00†", "60.00 ± 0.00", "100.0 ± 0.0"]
    assert "† below the floor plus 3 times its spread" in made.caption


def test_blind_spots_are_named_with_their_levels(study: Study) -> None:
    folder = study()
    assert blind_spots(load_results(folder)) == ["frechet[random3d] is blind to: shuffle (2x6x8, 4x12x16)."]
    cells = table(folder, "What the distances see").cells
    assert cells.loc["frechet[random3d], shuffle"].tolist() == ["1.0†", "1.0†", "5.0"]


def test_every_table_carries_its_protocol_with_short_hashes(study: Study) -> None:
    for made in metric_tables(load_results(study())):
        if "difference" not in made.title:
            assert "Protocol: extractor (weights abababababab); metric" in made.caption


def test_two_protocols_in_a_table_are_said(study: Study) -> None:
    folder = study()
    key = load_results(folder).cells[0].evaluation_keys[0]
    path = folder.parent / "store" / "evaluations" / key / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"protocol": {"reals": 8}}))
    assert "2 different ones" in table(folder, "held_out_loss, clean parents").caption


def test_one_metric_with_two_protocols_in_a_cell_makes_two_tables(study: Study) -> None:
    folder = study()
    for cell in load_results(folder).cells:
        source = folder.parent / "store" / "evaluations" / cell.evaluation_keys[1] / "result.json"
        target = folder.parent / "store" / "evaluations" / (cell.evaluation_keys[1] + "x")
        target.mkdir()
        result = json.loads(source.read_text())
        rows = [{**row, "value": 2 * row["value"]} for row in result["rows"]]
        (target / "result.json").write_text(
            json.dumps({**result, "rows": rows, "protocol": {"dimensions": 7}})
        )
    index = folder / "index.csv"
    index.write_text(re.sub(r"(e\w+1);", r"\1;\1x;", index.read_text()))
    assert table(folder, "frechet[random3d]").cells.loc["default", "8x24x32"] == "100.0 ± 0.0"
    second = table(folder, "frechet[random3d] (2)").cells
    assert second.loc["default", "8x24x32"] == "200.0 ± 0.0"
    assert second.loc["floor (real held-out clips)", "8x24x32"] == "20.00"


def test_different_versions_are_said(study: Study) -> None:
    folder = study()
    key = load_results(folder).cells[0].evaluation_keys[0]
    path = folder.parent / "store" / "evaluations" / key / "result.json"
    path.write_text(path.read_text().replace('"2.13"', '"2.6"'))
    assert "different versions: torch 2.13, 2.6." in write_report(folder)


def test_cells_of_other_versions_than_planned_are_stale(study: Study) -> None:
    folder = study()
    assert "stale" not in write_report(folder)
    cell = load_results(folder).cells[1]
    path = folder.parent / "store" / "evaluations" / cell.evaluation_keys[0] / "result.json"
    plugins = {"hpdm_plugins.diffusion.noise": "1.0", "theirs": "3", "file": "sha256:ab"}
    result = json.loads(path.read_text()) | {"versions": {"hpdm": "1.0", "torch": "2.13", "plugins": plugins}}
    path.write_text(json.dumps(result))
    plugins = {"hpdm_plugins.diffusion.noise": "1.1", "theirs": "4", "file": "sha256:cd", "new": "1"}
    planned = {"hpdm": "1.1", "torch": "2.14", "plugins": plugins}
    (folder / "versions.json").write_text(json.dumps(planned))
    text = write_report(folder).replace("\n", " ")
    assert (
        "1 of 6 cells are stale, computed with other versions than the study was last planned with "
        "(theirs 3, now 4; hpdm 1.0, now 1.1): default seed 1." in text
    )
    frame = load_results(folder).frame
    assert set(frame[frame["stale"]]["seed"]) == {1} and set(frame[frame["stale"]]["arm"]) == {"default"}


def test_arms_differ_in_configuration_and_parameters(study: Study) -> None:
    results = load_results(study())
    assert configuration_differences(results, "no_context") == [
        "model.context_fusion: deep (detach=False) -> none",
        "sampling.overlap: [] -> [h]",
    ]
    assert (
        parameter_differences(results, "no_context") == "parameters: 26 -> 6; 1 missing here (fusion.weight)"
    )
    assert parameter_differences(results, "default") == "parameters: the same 2 names and shapes"


def test_arms_that_never_ran_differ_by_their_overrides(study: Study) -> None:
    results = load_results(study(states={("no_context", seed): "waiting" for seed in range(3)}))
    assert configuration_differences(results, "no_context") == [
        "model.context_fusion: deep (detach=False) -> none",
        "sampling.overlap: [] -> [h]",
    ]
    assert parameter_differences(results, "no_context") is None


def test_a_field_that_came_later_is_no_difference_while_it_is_neutral() -> None:
    old = {"steps": 1, "part": {"use": "deep"}}
    new = {"steps": 1, "part": {"use": "deep", "detach": False}, "start_from": None, "resize": []}
    assert _compare("training", old, new) == _compare("training", new, old) == []
    new["start_from"] = {"arm": "base", "path": None, "resize": []}
    assert _compare("training", old, new) == ["training.start_from: (absent) -> {arm: base}"]
    assert _compare("training", {}, {"warmup": 0}) == ["training.warmup: (absent) -> 0"]


def test_every_pair_of_arms_is_compared(study: Study) -> None:
    folder = study(arms=("default", "no_context", "third"))
    text = write_report(folder).replace("\n", " ")
    assert "## In what the other pairs of arms differ" in text
    same = "parameters: the same 1 names and shapes"
    assert f"- no_context -> third: sampling.overlap; {same}" in text
    assert "default -> third" not in text  # stands above, in full


def test_a_key_that_only_an_arm_gives_is_compared_with_its_default(study: Study) -> None:
    folder = study()
    plan = yaml.safe_load((folder / "study.yaml").read_text())
    del plan["sampling"]
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    assert "sampling.overlap: [] -> [h]" in configuration_differences(load_results(folder), "no_context")


def test_latex_escapes_what_the_user_wrote(study: Study) -> None:
    text = to_latex(table(study(arms=("default", "50%_of_a&b#")), "held_out_loss, clean parents"))
    assert r"50\%\_of\_a\&b\#" in text
    assert r"50\% of a\_b \& c" in text
    assert r"\toprule" in text
    assert r"0.1210 $\pm$ 0.0010" in text
    assert text.count("{") == text.count("}")
    assert text.isascii()


def test_samples_of_all_arms_stand_side_by_side(study: Study) -> None:
    data = arms_figure(load_results(study()))
    assert data is not None
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    # Sample 0 at the first frame: red in default, black in no_context, at 2 dots per pixel (32 x 24).
    red = (np.abs(pixels - [255, 0, 0]).sum(-1) < 8).sum()
    assert red == pytest.approx(64 * 48, rel=0.1)
    # Sample 3 shows its own green, in both arms; sample 4 is not shown.
    assert (np.abs(pixels - [0, 150, 0]).sum(-1) < 8).sum() == pytest.approx(64 * 48, rel=0.1)
    assert (np.abs(pixels - [0, 200, 0]).sum(-1) < 8).sum() == 0


def test_without_samples_an_old_picture_goes(study: Study) -> None:
    folder = study()
    write_report(folder)
    shutil.rmtree(folder.parent / "store" / "samples")
    write_report(folder)
    assert not (folder / "report" / "arms.png").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.1235"), (12.3456, "12.35"), (12345.6, "12,346"), (0.0, "0.0000"), (-0.05, "-0.05000")],
)
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_the_command_prints_the_report(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(study())]) == 0
    assert "All 6 cells are done" in capsys.readouterr().out


def test_a_folder_that_is_no_study_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_errors(main, [str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert "not a study's results" in error
    assert error.count("\n") == 1


def test_a_report_that_cannot_be_written_is_one_line(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = study()
    (folder / "report").write_text("no folder")
    assert report_errors(main, [str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / 'report'}: the report cannot be written: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["", "arm,seed\na,b\n", "arm,seed,train,samples,evaluations,state\n"])
def test_an_index_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "index.csv").write_text(text)
    assert report_errors(main, [str(tmp_path)]) == 2
    assert "index.csv" in capsys.readouterr().err


def test_the_report_names_machine_versions_and_commit(study: Study) -> None:
    text = write_report(study())
    assert "processor abacus, cores 2" in text
    assert "torch 2.13" in text
    assert "0123456789ab" in text and "0123456789abcdef" not in text
