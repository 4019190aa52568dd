import json

import pytest

from hpdm_core.assembly.compose import load_cell
from hpdm_core.assembly.keys import data_key, evaluation_key, parts_in, sample_key, train_key
from hpdm_core.base.canonical import canonical_json
from hpdm_core.config.schema import CellConfig, Part
from hpdm_core.metrics.interface import data_facts
from hpdm_core.plugins import FAMILIES

PLUGIN = """
from hpdm_core import hookimpl

@hookimpl
def register_{family}(register):
    def made({positional}*, a: int = {value}): return None
    register("mine", made, source="me")
"""


def keys(*sets: str, plugins=()) -> tuple[str, str]:
    assembly = load_cell("base.yaml", sets=sets, plugins=plugins)
    train = train_key(assembly.config, assembly.plugins)
    return train, sample_key(train, assembly.config, assembly.plugins)


def test_canonical_json() -> None:
    assert (
        canonical_json({"b": (1, 2.0), "a": {"d": None, "c": True}})
        == '{"a":{"c":true,"d":null},"b":[1,2.0]}'
    )
    assert canonical_json({"x": [1, 2]}) == canonical_json({"x": (1, 2)})
    assert canonical_json({"é": 1e-4}) == '{"\\u00e9":0.0001}'
    assert canonical_json({"p": Part(use="deep", options={"a": 1})}) == '{"p":{"a":1,"use":"deep"}}'
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical_json([value])
    with pytest.raises(TypeError, match="a set has no canonical JSON"):
        canonical_json({"a": {1}})


def test_keys_are_stable_over_sessions(folder) -> None:
    # A change here makes every stored result unreachable: raise SCHEMA_VERSION and say so in the changelog.
    assert evaluation_key("b", {"metric": "x", "n": 4}) == (
        "fad897cefc9bb40ad2b16b686128b591688b6f4851d19974c233bcae4b784aab"
    )


@pytest.mark.parametrize(
    "change",
    [
        "model.token_dim=32",
        "model.context_fusion=none",
        "model.context_fusion={detach: true}",
        "diffusion.sigma_max=81.0",
        "data.downsampling=trilinear",
        "training.steps=11",
        "training.optimizer=lamb",
        "seed=1",
    ],
)
def test_what_the_weights_depend_on_changes_both_keys(folder, change: str) -> None:
    assert not set(keys()) & set(keys(change))


@pytest.mark.parametrize("change", ["sampling.overlap=[h]", "sampling.solver={rho: 6.0}"])
def test_sampling_settings_never_retrain(folder, change: str) -> None:
    (train, sample), (train_too, sample_too) = keys(), keys(change)
    assert train == train_too and sample != sample_too


@pytest.mark.parametrize(
    "change",
    ["runtime.threads=1", "evaluation.samples=3", "evaluation.metrics=[throughput]", "training.steps=10"],
)
def test_what_neither_depends_on_changes_neither(folder, change: str) -> None:
    assert keys() == keys(change)


def test_spelling_does_not_matter(folder) -> None:
    assert keys("training.learning_rate=1") == keys("training.learning_rate=1.0")
    assert keys("sampling.overlap=[h, w]") == keys("sampling.overlap=[w, h]")
    assert (
        keys("model.context_fusion=deep") == keys("model.context_fusion={use: deep, detach: false}") == keys()
    )


def test_editing_a_plugin_file_changes_the_keys_of_those_who_use_it(folder) -> None:
    file = folder / "mine.py"

    def both(*sets: str) -> tuple[str, str]:
        return keys(*sets, plugins=["mine.py"])

    def write(value: int, comment: str = "") -> None:
        text = PLUGIN.format(family="objectives", positional="", value=value)
        file.write_text(text + comment)

    write(1)
    used, unused = both("diffusion.objective=mine"), both()
    assert unused == keys()
    write(1, "# a comment")
    assert both() == unused and not set(both("diffusion.objective=mine")) & set(used)


def test_editing_a_solver_leaves_the_weights_alone(folder) -> None:
    file = folder / "mine.py"
    text = PLUGIN.format(family="solvers", positional="sigma_in, ", value=1)
    file.write_text(text)
    before = keys("sampling.solver=mine", plugins=["mine.py"])
    file.write_text(text + "\n# edited\n")
    after = keys("sampling.solver=mine", plugins=["mine.py"])
    assert before[0] == after[0] and before[1] != after[1]


def test_evaluation_key_follows_protocol_base_and_the_plugins_of_metric_and_extractor(folder) -> None:
    file = folder / "mine.py"

    def key(comment: str, *, base: str = "b", protocol=None) -> str:
        file.write_text(PLUGIN.format(family="feature_extractors", positional="", value=1) + comment)
        metrics = "evaluation.metrics=[{use: frechet, extractor: mine}]"
        assembly = load_cell("base.yaml", sets=[metrics], plugins=["mine.py"])
        (part,) = assembly.config.evaluation.metrics
        return evaluation_key(base, protocol or {"n": 1}, part=part, plugins=assembly.plugins)

    first = key("")
    assert key("") == first
    assert len({first, key("# edited"), key("", base="c"), key("", protocol={"n": 2})}) == 4
    assert evaluation_key("b", {"n": (1,)}) == evaluation_key("b", {"n": [1]})


def test_a_cell_survives_its_trip_through_json(folder) -> None:
    sets = [
        "evaluation.metrics=[held_out_loss, {use: frechet, extractor: statistics}]",
        "sampling.overlap=[h, w]",
        "training.keep=[5]",
        "training.clip=null",
        "seed=3",
    ]
    config = load_cell("base.yaml", sets=sets).config
    assert CellConfig.model_validate_json(config.model_dump_json()) == config
    assert CellConfig.model_validate(json.loads(canonical_json(config))) == config


def test_every_family_with_a_place_is_among_the_parts(folder) -> None:
    config = load_cell("base.yaml", sets=["evaluation.metrics=[throughput]"]).config
    families = [family for family, _ in parts_in(config, *CellConfig.model_fields)]
    of_cells = {family.name for family in FAMILIES.values() if family.of_cell}
    assert sorted(families) == sorted(of_cells - {"feature_extractors"})
    assert set(FAMILIES) - of_cells == {"backends"}


def test_the_data_key_follows_the_dataset_and_its_plugin_file_alone(folder) -> None:
    file = folder / "mine.py"
    text = PLUGIN.format(family="datasets", positional="clip, reader, ", value=1)
    file.write_text(text)

    def key(*sets: str) -> str:
        cell = load_cell("base.yaml", sets=("data.dataset=mine", *sets), plugins=["mine.py"])
        return data_key(data_facts(cell.config, cell.plugins), cell.config, cell.plugins)

    before = key()
    assert key("training.steps=9") == before
    file.write_text(text + "\n# edited\n")
    assert key() != before


LATER = """
from typing import Annotated
from hpdm_core import hookimpl
from hpdm_core.config.schema import Later

@hookimpl
def register_optimizers(register):
    def made(named_parameters, lr, *, a: int = 1{later}): return None
    register("mine", made, source="me")
"""


def test_an_option_that_is_added_later_changes_no_key_at_its_default(folder, monkeypatch) -> None:
    file = folder / "mine.py"
    monkeypatch.setattr("hpdm_core.assembly.keys.plugin_hashes", lambda plugins, parts: {})  # of the source
    use = "training.optimizer={use: mine, a: 2}"
    file.write_text(LATER.format(later=""))
    before = keys(use, plugins=[str(file)])
    file.write_text(LATER.format(later=", b: Annotated[float, Later()] = 0.5"))
    assert keys(use, plugins=[str(file)]) == before
    assert keys("training.optimizer={use: mine, a: 2, b: 0.5}", plugins=[str(file)]) == before
    assert keys("training.optimizer={use: mine, a: 2, b: 0.6}", plugins=[str(file)]) != before
    file.write_text(LATER.format(later=", b: float = 0.5"))  # without the mark
    assert keys(use, plugins=[str(file)]) != before
