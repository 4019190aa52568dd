"""Costs in the report: out of memory is written, the paper's numbers stand apart, predictions beside the real."""

import json

import pytest

from hpdm_core.report import load_results, write_report
from hpdm_core.report.efficiency import cost_table, efficiency_tables, paper_table1

FULL, ADAPTIVE, LARGE = "full_64x256", "patch_16x64_at_64x256_adaptive", "full_64x512"
FIGURES = {
    FULL: {"peak_memory_bytes": 400 * 2**20, "batch": 2.0, "videos_per_second": 0.5, "training_flops": 30e9},
    ADAPTIVE: {
        "peak_memory_bytes": 40 * 2**20,
        "batch": 16.0,
        "videos_per_second": 8.0,
        "training_flops": 1.5e9,
    },
    LARGE: {"peak_memory_bytes": None, "batch": None, "videos_per_second": None, "training_flops": 120e9},
}


@pytest.fixture
def measured(tmp_path):
    """A study of three measured arms and one that is still to come."""
    lines = ["arm,seed,train,samples,evaluations,state"]
    for arm, figures in FIGURES.items():
        folder = tmp_path / "store" / "evaluations" / f"e{arm}"
        folder.mkdir(parents=True)
        rows = [
            {"metric": f"efficiency.{name}", "level": None, "value": value}
            | {"outcome": "OOM" if value is None else "ok"}
            for name, value in figures.items()
        ]
        protocol = {"metric": "efficiency", "probes": [{"batch": 1}], "device": "abacus"}
        (folder / "result.json").write_text(json.dumps({"rows": rows, "protocol": protocol}))
        lines.append(f"{arm},0,t{arm},s{arm},e{arm},done")
    lines.append("later,0,tl,sl,el,planned")
    study = tmp_path / "demo"
    study.mkdir()
    (study / "index.csv").write_text("\n".join(lines) + "\n")
    (study / "study.yaml").write_text("name: demo\n")
    return study


def test_out_of_memory_is_a_word_and_a_missing_arm_a_hole(measured):
    table, _ = efficiency_tables(load_results(measured))
    cells = table.cells
    assert cells.loc[FULL, "memory, batch 1 (MiB)"] == "400"
    assert cells.loc[ADAPTIVE, "videos/s"] == "8.000"
    assert cells.loc[LARGE, ["memory, batch 1 (MiB)", "largest batch", "videos/s"]].tolist() == ["OOM"] * 3
    assert cells.loc[LARGE, "training GFLOP/video"] == "120.0"
    assert set(cells.loc["later"]) == {"–"}
    assert "1 of 4 arms missing: later" in table.first
    assert "abacus" in table.caption and "probes" not in table.caption


def test_ratios_stand_beside_the_papers_in_columns_of_their_own(measured):
    _, table = efficiency_tables(load_results(measured))
    ours, theirs = table.cells.loc[ADAPTIVE].iloc[:3], table.cells.loc[ADAPTIVE].iloc[3:]
    assert ours.tolist() == ["0.100", "16.000", "0.050"]
    assert theirs.tolist() == [f"{14.2 / 65.3:.3f}", f"{6.71 / 1.24:.3f}"]
    assert all(name.startswith("ours: ") for name in ours.index)
    assert all(name.startswith("paper: ") for name in theirs.index)
    assert table.cells.loc[LARGE].tolist() == ["OOM", "OOM", "1.000", "OOM", "OOM"]
    assert table.cells.loc["later", "paper: memory / full"] == "–"
    assert "2406.07792" in table.caption


def test_the_report_holds_both_and_no_table_of_the_metrics_own(measured):
    text = write_report(measured)
    assert text.count("| full_64x512") == 2
    assert "efficiency.batch" not in text


def test_every_row_of_the_papers_table_has_its_full_resolution():
    rows = paper_table1()["rows"]
    assert len(rows) == 10
    assert all(row["full"] in rows for row in rows.values())
    assert all((row["memory_gb"] is None) == (row["videos_per_second"] is None) for row in rows.values())


def test_predicted_stands_beside_real(study):
    folder = study(arms=("default", "no_context"), seeds=(0, 1))
    assert cost_table(load_results(folder)) is None
    for seed in (0, 1):
        file = folder.parent / "store" / "train" / f"tdefault{seed}" / "result.json"
        result = json.loads(file.read_text())
        result |= {
            "seconds": 3600.0 * (1 + seed),
            "peak_memory_bytes": 3 * 2**30,
            "device": "cuda",
            "processes": 2,
        }
        result["predicted"] = {"memory_bytes": 2**31, "train_seconds": 1800.0, "flops_per_second": 62.4e12}
        file.write_text(json.dumps(result))
    table = cost_table(load_results(folder))
    assert table.cells.loc["default"].tolist() == ["2", "3", "0.5", "3", "cuda"]
    assert "no_context" not in table.cells.index
    assert "62.4 TFLOP/s" in table.caption
