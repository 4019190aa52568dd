import pytest

from hpdm_core.assembly.compose import compose, load_cell, presets
from hpdm_core.base.errors import InputError
from hpdm_core.config.loader import load_yaml
from hpdm_core.plugins import build_plugins

OBJECTIVE = """
from hpdm_core import hookimpl

@hookimpl
def register_objectives(register):
    register("{key}", lambda: None, source="me")
"""


def lines_of(*arguments, **options) -> list[str]:
    with pytest.raises(InputError) as caught:
        compose(*arguments, **options)
    return list(caught.value.messages)


def test_chains_merge_from_the_far_end(folder) -> None:
    (folder / "a.yaml").write_text("extends: sub/b.yml\ntraining: {steps: 1}\n")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.yml").write_text("extends: ../base.yaml\ntraining: {steps: 2, batch: 3}\n")
    training = compose("a.yaml").layers.data["training"]
    assert training == {"steps": 1, "batch": 3, "learning_rate": 1e-3}


def test_sets_beat_the_file_and_replace_its_extends(folder, study) -> None:
    (folder / "other.yaml").write_text("training: {warmup: 4}\n")
    file = study("training: {steps: 7}\n")
    data = compose(file, sets=["extends=other.yaml", "training.steps=8"]).layers.data
    assert data == {"training": {"steps": 8, "warmup": 4}}


def test_scales_hold_for_their_preset_alone_and_lie_between_file_and_sets(folder, study) -> None:
    (folder / "big.yaml").write_text("training: {steps: 100}\n")
    file = study(
        "training: {steps: 7}\nscales:\n  big:\n    training: {steps: 1000, batch: 50}\n    a.b: 1\n"
    )
    assert compose(file).layers.data["training"]["steps"] == 7
    data = compose(file, sets=["extends=big.yaml", "training.batch=3"]).layers.data
    assert data["training"] == {"steps": 1000, "batch": 3} and data["a"] == {"b": 1}
    assert compose(file, sets=["extends=big.yaml"]).layers.where(("a", "b")) == "study.yaml:6"


def test_a_preset_is_found_by_name_in_a_file_a_set_and_alone(study) -> None:
    assert "tiny_clips" in presets(build_plugins())
    for composed in (
        compose(study("", head="extends: tiny_clips\n")),
        compose(study("", head="extends: none.yaml\n"), sets=["extends=tiny_clips"]),
        compose("tiny_clips"),
        compose({"extends": "tiny_clips"}),
    ):
        assert composed.layers.data["model"]["levels"] == 3


def test_errors_of_extends_say_where(folder, study) -> None:
    assert lines_of(study("", head="a: 1\nextends: tiny_clip\n"))[0].startswith(
        "study.yaml:2: unknown preset 'tiny_clip' - did you mean 'tiny_clips'?; presets: "
    )
    assert lines_of(study("", head="extends: nope.yaml\n"))[0].startswith(
        "study.yaml:1: extends: no such file 'nope.yaml'"
    )
    assert "--set extends=tiny_clip: unknown preset" in lines_of("base.yaml", sets=["extends=tiny_clip"])[0]
    assert "should be a preset's name" in lines_of(study("", head="extends: [a]\n"))[0]
    assert "unknown preset 'tiny_clip'" in lines_of("tiny_clip")[0]


def test_an_extends_loop_is_shown(folder) -> None:
    (folder / "a.yaml").write_text("extends: b.yaml\n")
    (folder / "b.yaml").write_text("x: 1\nextends: a.yaml\n")
    assert lines_of("a.yaml") == [f"{folder}/b.yaml:2: extends loop: a.yaml -> b.yaml -> a.yaml"]
    (folder / "c.yaml").write_text("extends: c.yaml\n")
    assert lines_of("c.yaml") == ["c.yaml:1: extends loop: c.yaml -> c.yaml"]


def test_plugins_of_the_chain_and_the_flag_add_up(folder, study) -> None:
    (folder / "sub").mkdir()
    for place in ("one", "sub/two", "three"):
        (folder / f"{place}.py").write_text(OBJECTIVE.format(key=place.rpartition("/")[2]))
    (folder / "sub" / "b.yaml").write_text("plugins: [two.py]\n")
    file = study("", head="extends: sub/b.yaml\nplugins: [./one.py]\n")
    plugins = compose(file, plugins=["three.py"]).plugins
    assert {"one", "two", "three"} <= set(plugins.keys("objectives"))
    assert plugins.names == tuple(str(folder / name) for name in ("three.py", "one.py", "sub/two.py"))


def test_presets_of_a_plugin_that_the_file_names(folder, study, monkeypatch) -> None:
    package = folder / "shipping"
    (package / "presets").mkdir(parents=True)
    (package / "__init__.py").write_text(OBJECTIVE.format(key="shipped"))
    (package / "presets" / "theirs.yaml").write_text("training: {steps: 5}\n")
    monkeypatch.syspath_prepend(str(folder))
    file = study("", head="extends: theirs\nplugins: [shipping]\n")
    assert compose(file).layers.data["training"] == {"steps": 5}


def test_errors_of_plugins_say_where(study) -> None:
    (line,) = lines_of(study("a: 1\nplugins: [nope.py]\n"))
    assert line.startswith("study.yaml:3: plugin '") and "no such file" in line
    assert "should be a list" in lines_of(study("plugins: nope.py\n"))[0]


def test_load_cell_from_a_mapping_a_file_and_a_preset(folder, study) -> None:
    data = load_yaml("base.yaml").data
    cell = load_cell(data, sets=["training.steps=3", "seed=4"])
    assert (cell.config.training.steps, cell.config.seed) == (3, 4)
    assert cell.config.model.context_fusion.options  # defaults are filled in
    assert load_cell("base.yaml").config.seed == 0
    assert load_cell(study("arms: {a: {}}\nseeds: [7, 8]\n")).config.seed == 7
    assert load_cell("tiny_clips").config.model.levels == 3


def test_load_cell_reports_everything(folder) -> None:
    with pytest.raises(InputError) as caught:
        load_cell({"extends": "base.yaml", "trainin": {}, "training": {"step": 1}}, sets=["model.blocks=0"])
    assert list(caught.value.messages) == [
        "configuration: trainin: unknown key - did you mean 'training'?",
        "--set model.blocks=0: model.blocks: should be greater than 0, got 0",
        "configuration: training.step: unknown key - did you mean 'steps'?",
    ]
