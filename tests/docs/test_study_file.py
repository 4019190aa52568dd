"""docs/study-file.md is true: its tables are those of the code, its examples load; and `--explain` explains."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from pydantic import BaseModel

from hpdm_core.base.errors import InputError, report_errors
from hpdm_core.config.loader import parse_value
from hpdm_core.config.overrides import Layers
from hpdm_core.config.problems import field_of, in_json
from hpdm_core.config.schema import CellConfig, Part
from hpdm_core.config.search import PRUNERS, SAMPLERS
from hpdm_core.config.study_keys import StudyKeys, check_top_level
from hpdm_core.plugins import FAMILIES, Plugins, build_plugins
from hpdm_core.study.__main__ import build_parser, main
from hpdm_core.study.backends.local import LocalOptions
from hpdm_core.study.plan.study_file import load_study
from hpdm_core.study.show.explain import explain, keys, keys_of, meanings, places, reference
from tests.study_reference import PAGE, with_tables

TEXT = PAGE.read_text()
COMMAND = "python -m hpdm_core.study "
MINE = '''
from hpdm_core import ContextFusion, hookimpl

class Mine(ContextFusion):
    """A fusion of one's own.

    Args:
        shape: the model's sizes.
        gain: factor on the context, 0 for none. cut: levels
        that are left out.
    """

    def __init__(self, shape, *, gain: float = 1.0, cut: tuple[int, ...] | None = None):
        super().__init__()

@hookimpl
def register_context_fusions(register):
    register("mine", Mine, source="me")
'''


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


EXAMPLES = {text.splitlines()[0].removeprefix("# "): text for text in blocks("yaml")}
COMMANDS = [line.removeprefix(COMMAND) for text in blocks("sh") for line in text.splitlines()]


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return build_plugins()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the page's study files."""
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def models() -> list[type[BaseModel]]:
    """Every model of a study file."""
    found: list[type[BaseModel]] = [StudyKeys, CellConfig, *SAMPLERS.values(), *PRUNERS.values()]
    for model in found:
        inner = (field_of(model, (name,)) for name in model.model_fields)
        found += [each for each in inner if each is not None and each not in found]
    return found


# The tables


def test_the_tables_are_those_of_the_code(plugins: Plugins) -> None:
    made = with_tables(TEXT, reference(plugins))
    assert TEXT.splitlines() == made.splitlines(), "python -m tests.study_reference writes them anew"


def test_every_field_has_a_line_that_says_what_it_means() -> None:
    assert Part in models() and len(models()) > 20
    silent = [
        f"{model.__name__}.{field}"
        for model in models()
        for field in model.model_fields
        if not meanings(model).get(field)
    ]
    assert silent == [], "write a line of text below these fields"


def test_every_top_level_key_is_there(plugins: Plugins) -> None:
    _, (line,) = check_top_level(Layers({"0": None}), backends=plugins.models("backends"))
    allowed = line.partition("allowed: ")[2].split(", ")
    assert sorted(key.path for key in keys() if "." not in key.path) == allowed


def test_every_family_has_its_place(plugins: Plugins) -> None:
    held = {place.family: place for place in places(plugins)}
    assert held.keys() == FAMILIES.keys() | {"samplers", "pruners"}
    for family in FAMILIES.values():
        assert held[family.name].path == family.path
        assert [part.name for part in held[family.name].parts] == plugins.keys(family.name)
    options = {part.name: [each.name for each in part.options] for part in held["pruners"].parts}
    assert options == {name: list(model.model_fields) for name, model in PRUNERS.items()}


def test_a_default_is_the_yaml_of_its_value(plugins: Plugins) -> None:
    shown = [(model, [key for key in keys_of(model) if "." not in key.path]) for model in models()]
    shown += [
        (plugins.options(place.family, part.name), list(part.options))
        for place in places(plugins)
        if place.family in FAMILIES
        for part in place.parts
    ]
    for model, found in shown:
        for key, (name, field) in zip(found, model.model_fields.items(), strict=True):
            assert key.name == (field.alias or name)
            assert (key.default == "required") == field.is_required()
            if not field.is_required():
                value = _in_a_file(field.get_default(call_default_factory=True))
                assert in_json(parse_value(key.default, name)) == in_json(value), (model, name)


def _in_a_file(value: object) -> object:
    if isinstance(value, Part):
        return value.use
    return value.model_dump(exclude_defaults=True) if isinstance(value, BaseModel) else value


# --explain


@pytest.mark.parametrize(
    ("key", "lines"),
    [
        (
            "training.learning_rate",
            [
                "training.learning_rate",
                "  Peak learning rate.",
                "  type     float > 0",
                "  default  required",
            ],
        ),
        ("budget", ["  keys", "    budget.max_failures: int > 0 or null, default null"]),
        ("training", ["    training.start_from.path: path or null, default null"]),
        ("data.downsampling", ["  type     area, trilinear or centre_frame", "  default  area"]),
        ("model.token", ["  type     list of 3 int > 0"]),
        ("runtime.compile", ["  type     bool, training or sampling", "  default  false"]),
        ("search.space.*.log", ["search.space.*.log", "  type     bool"]),
        ("search.space.log", ["search.space.*.log", "  type     bool"]),
        ("extends", ["  type     str or null"]),
        ("model.backbone", ["  type     part", "  default  rin", "      latents: int > 0, default 768"]),
        ("model.backbone.use", ["  type     part", "  default  rin"]),
        (
            "model.backbone.heads",
            ["model.backbone.heads, an option of: dit, rin", "  rin: int > 0, default 16"],
        ),
        ("sampling.solver.churn", ["  edm: list of float, default [40.0, 0.0, 0.0]"]),
        ("evaluation.metrics", ["  type     list of part", "      ddof: 0 or 1, default 0"]),
        (
            "evaluation.metrics[0].extractor",
            [
                "evaluation.metrics.*.extractor, an option of: fake_counts, frechet, kvd, sensitivity",
                "  frechet: part of feature_extractors, default random3d",
                "      layer: logits or fc7, default logits",
            ],
        ),
        ("search.pruner.patience", ["  patient: int > 0, default 3"]),
        ("backend.slots", ["  local: int > 0, default 1", f"    {meanings(LocalOptions)['slots']}"]),
        (
            "backbones/rin",
            ["model.backbone, a part of the family backbones", "    latents: int > 0, default 768"],
        ),
        ("model.backbone rin", ["model.backbone, a part of the family backbones"]),
    ],
)
def test_a_key_is_explained(plugins: Plugins, key: str, lines: list[str]) -> None:
    said = explain(plugins, key).splitlines()
    assert [line for line in lines if line not in said] == []
    assert "" not in said and max(map(len, said)) <= 100


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("training.stepz", "training.stepz: no key of a study file - did you mean 'training.steps'?"),
        ("model.backbone.latent_dims", "did you mean 'model.backbone.latent_dim'?"),
        ("learning_rate", "did you mean 'training.learning_rate'?"),
        ("seed", "did you mean 'seeds' or 'search.seed'"),
        ("qqqq", "no key of a study file; keys: extends, plugins, name, arms, "),
        ("backbones/rim", "unknown part 'rim' - did you mean 'rin'?; parts: dit, rin"),
        ("backbone/rin", "unknown family 'backbone' - did you mean 'backbones'?; families: "),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest(
    capsys: pytest.CaptureFixture[str], key: str, line: str
) -> None:
    assert report_errors(main, ["--explain", key]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: --explain {key}: ") and line in said.err


def test_only_explain_works_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([], ["--dry-run"], ["--status"]):
        with pytest.raises(SystemExit) as end:
            main(flags)
        assert end.value.code == 2
        assert capsys.readouterr().err.endswith("error: the following arguments are required: FILE\n")
    assert main(["--explain", "seeds"]) == 0 and capsys.readouterr().out.startswith("seeds\n")


def test_the_parts_of_plugins_are_known(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.py").write_text(MINE)
    # A study with a mistake can still be explained.
    (folder / "study.yaml").write_text("extends: tiny_clips\nplugins: [mine.py]\ntraining: {stepz: 1}\n")
    expected = (
        "model.context_fusion.gain, an option of: mine\n"
        "  mine: float, default 1.0\n"
        "    factor on the context, 0 for none.\n"
    )
    for flags in (["study.yaml"], ["--plugin", "mine.py"], ["layers.yaml", "--plugin", "mine.py"]):
        assert main([*flags, "--explain", "model.context_fusion.gain"]) == 0
        assert capsys.readouterr().out == expected
    assert main(["--explain", "model.context_fusion.cut", "study.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  mine: list of int or null, default null",
        "    levels that are left out.",
    ]
    with pytest.raises(InputError, match="no key of a study file"):
        main(["layers.yaml", "--explain", "model.context_fusion.gain"])


# The examples


def test_each_example_loads(folder: Path) -> None:
    assert len(EXAMPLES) == TEXT.count("```yaml") == 8
    studies = {name: load_study(name) for name in EXAMPLES}
    sizes = {name: (len(each.arms), len(each.arms) * len(each.seeds)) for name, each in studies.items()}
    assert sizes["three_arms.yaml"] == (3, 9) and sizes["grid.yaml"] == (4, 8)
    mine = studies["mine.yaml"].configs["default"]
    assert (mine.training.steps, mine.training.batch) == (500, 4)
    assert [part.use for part in mine.evaluation.metrics] == ["held_out_loss", "throughput"]
    search, budget = studies["tuned.yaml"].search, studies["limited.yaml"].budget
    assert search is not None and search.budget == 20 and budget.max_failures == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_understood(folder: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    given = build_parser().parse_args(shlex.split(command))
    if given.explain is None:
        study = load_study(given.file, sets=given.sets, arms=given.arms, only=given.only)
        assert study.selected == (("default", "wide") if given.only else tuple(study.arms))
    else:
        assert main(shlex.split(command)) == 0
        assert [capsys.readouterr().out] == blocks("text")


def test_the_last_place_counts(folder: Path) -> None:
    rows = re.findall(r"^\| `(layers\.yaml.*?)` \| (\d+) \| (\d+) \|$", TEXT, flags=re.MULTILINE)
    assert len(rows) == 3
    for command, default, long in rows:
        given = build_parser().parse_args(shlex.split(command))
        configs = load_study(given.file, sets=given.sets).configs
        assert (configs["default"].training.steps, configs["long"].training.steps) == (
            int(default),
            int(long),
        )
    text = TEXT.partition("The preset `tiny_clips` says ")[2]
    (folder / "bare.yaml").write_text("extends: tiny_clips\n")
    assert text.startswith(f"{load_study('bare.yaml').configs['default'].training.steps}.")
