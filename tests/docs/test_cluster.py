"""What docs/cluster.md says of options, states and classes is what the code has."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from hpdm_core.study.backends.local import LocalOptions
from hpdm_core.study.backends.slurm import SlurmOptions
from hpdm_core.study.controller.states import State
from hpdm_core.study.plan.study_file import load_study

PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
COMMAND = "python -m hpdm_core.study on_a_cluster.yaml"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def first_column(heading):
    table = PAGE.partition(f"| {heading} |")[2].partition("\n\n")[0]
    return [line.split("|")[1].strip() for line in table.splitlines()[2:]]


@pytest.mark.parametrize(
    ("heading", "options"),
    [("key of `backend`", SlurmOptions), ("key of a local `backend`", LocalOptions)],
)
def test_every_option_of_a_backend_is_explained(heading, options):
    named = [name for cell in first_column(heading) for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(options.model_fields)


def test_every_state_is_explained():
    assert first_column("state") == list(get_args(State))


def test_the_study_file_is_one(tmp_path):
    (text,) = blocks("yaml")
    (tmp_path / "on_a_cluster.yaml").write_text(text)
    study = load_study(tmp_path / "on_a_cluster.yaml")
    options = SlurmOptions.model_validate(study.backend.options)
    assert options.time == 12 * 60 and options.gpus == 1 and study.budget.max_gpu_hours == 500
    assert study.name == yaml.safe_load(text)["name"]


def test_the_commands_are_those_that_the_cluster_tests_run():
    commands = [text.strip() for text in blocks("sh")]
    assert commands == [COMMAND + flag for flag in (" --dry-run", " --detach", " --status", "", " --cancel")]
