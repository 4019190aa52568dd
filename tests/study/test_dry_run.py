"""What a dry run predicts, and cells that are measured without being trained."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpdm_core.assembly.compose import load_cell
from hpdm_core.study.plan.cells import cells_of
from hpdm_core.study.plan.study_file import load_study
from hpdm_core.study.show.dry_run import describe_study
from hpdm_core.training import cost

SMALL = """
extends: tiny_clips
model: {video: [4, 8, 8], patch: [1, 2, 2], token: [1, 1, 1], blocks: 3, classes: 0}
data: {dataset: synthetic}
training: {steps: 1000, batch: 2}
evaluation: {samples: 10, metrics: [METRICS]}
runtime: {utilisation: 0.5, peak_tflops: 1.0e-6}
arms:
  default: {}
  full: {model.computation_allocation: full}
seeds: [0, 1]
"""


@pytest.fixture
def study(tmp_path):
    def make(metrics):
        file = tmp_path / "small.yaml"
        file.write_text(SMALL.replace("METRICS", metrics))
        return load_study(file)

    return make


def test_hours_and_memory_of_each_cell_and_the_total(study, tmp_path):
    made = study("throughput")
    text = describe_study(made, tmp_path / "results")
    cells, _ = cells_of(made, tmp_path / "store")
    rate = 0.5e6  # half of a millionth of a TFLOP/s: hours that can be read
    hours = {}
    for cell in cells[:2]:
        assembly = cell.assembly
        work = 1000 * cost.training_flops(assembly) + 10 * cost.sampling_flops(assembly)
        hours[cell.arm] = work / rate / 3600
        (row,) = re.findall(rf"^{cell.arm} +0 .*$", text, flags=re.MULTILINE)
        assert f" {hours[cell.arm]:.3g} " in row
        assert f" {cost.training_memory(assembly) / 1e6:.3g} MB " in row
    assert hours["full"] > hours["default"]
    assert f"{2 * sum(hours.values()):.3g} GPU-hours" in text  # two seeds
    assert "at 0.5 of 1e-06 TFLOP/s (runtime.utilisation, runtime.peak_tflops)" in text


def test_a_cell_that_is_only_measured_trains_nothing(study, tmp_path):
    made = study("efficiency")
    cells, _ = cells_of(made, tmp_path / "store")
    assert [[step.name for step in cell.missing()] for cell in cells] == [["evaluate efficiency"]] * 4
    text = describe_study(made, tmp_path / "results")
    assert "0 models to train" in text and "0 GPU-hours" in text
    both, _ = cells_of(study("efficiency, throughput"), tmp_path / "store")
    names = [step.name for step in both[0].missing()]
    assert names[0] == "train" and "evaluate efficiency" in names
    assert not both[0].only_measured


def test_what_is_measured_is_known_by_the_configuration(study, tmp_path):
    """Another network is measured anew; where the results lie, and what runs them, change nothing."""
    keys = {cell.keys.evaluations for cell in cells_of(study("efficiency"), tmp_path / "store")[0]}
    assert len(keys) == 4
    elsewhere = {cell.keys.evaluations for cell in cells_of(study("efficiency"), tmp_path / "other")[0]}
    assert elsewhere == keys


def test_an_arm_that_no_card_could_hold_is_named(study, tmp_path, monkeypatch):
    made = study("throughput")
    sizes = {"linear": 90 * 2**30, "full": 100 * 2**30}

    def memory(assembly, flops):
        use = assembly.config.model.computation_allocation.use
        return {"memory_bytes": sizes[use], "train_seconds": 1.0, "flops_per_second": 1.0}

    monkeypatch.setattr("hpdm_core.training.cost.predicted_training", memory)
    text = describe_study(made, tmp_path / "results")
    warnings = [line for line in text.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2  # an arm once, whatever its seeds
    assert warnings[1] == (
        "warning: arm 'full' is predicted to take 100.0 GiB for a training step of 2 videos at a time, more than "
        "runtime.gpu_memory 80; a smaller runtime.micro_batch, or runtime.activation_checkpointing, takes less"
    )
    sizes["linear"] = 80 * 2**30
    assert "arm 'default'" not in describe_study(made, tmp_path / "results")
    assert "of 2 videos at a time (runtime.micro_batch); evaluation is not counted" in text


@pytest.mark.parametrize("size", ["s", "m", "l"])
def test_the_papers_models_fit_one_card_of_80_gb_as_shipped(size, tmp_path):
    assembly = load_cell(f"ucf101_hpdm_{size}", sets=["data.dataset=synthetic", "model.classes=0"])
    runtime = assembly.config.runtime
    assert 40e9 < cost.training_memory(assembly) <= 72e9
    assert runtime.gpu_memory == 80 and runtime.workers and runtime.micro_batch
    assert assembly.config.training.batch % runtime.micro_batch == 0


def test_a_dry_run_says_what_it_does_before_torch_is_loaded_and_never_loads_the_compiler(tmp_path):
    file = Path(__file__).parents[2] / "studies" / "dcf_ablation.yaml"
    watched = """
import sys
from hpdm_core.study.__main__ import main

class Noted:
    def write(self, text):
        if text.strip():
            print(int("torch" in sys.modules), text)

    def flush(self): pass

sys.stderr = Noted()
main([sys.argv[1], "--dry-run", "--only", "default", "--only", "no_adaptive_computation"])
print(int("torch._dynamo" in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", watched, str(file)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    said = done.stdout.splitlines()
    assert said[:3] == [
        f"0 reading {file}",
        "1 counting the cost of arm 'default' (1 of 2)",
        "1 counting the cost of arm 'no_adaptive_computation' (2 of 2)",
    ]
    assert (
        said[-1] == "0"
    )  # the compiler takes as long to load as all else, and some kernels of meta tensors load it
    assert done.stderr == ""
