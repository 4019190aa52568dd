"""Precision: part of the keys of what it changes, absent from them at its default; its older name."""

import pytest

from hpdm_core.assembly.compose import load_cell
from hpdm_core.assembly.keys import keyed_section, sample_key, train_key
from hpdm_core.base.errors import InputError
from hpdm_core.config.schema import CellConfig


def keys(*sets: str) -> tuple[str, str]:
    assembly = load_cell("base.yaml", sets=sets)
    train = train_key(assembly.config, assembly.plugins)
    return train, sample_key(train, assembly.config, assembly.plugins)


def test_the_default_is_in_no_key(folder) -> None:
    assembly = load_cell("base.yaml")
    for section in ("training", "sampling"):
        assert not {"precision", "attention"} & set(keyed_section(assembly.config, section, assembly.plugins))
    assert keys() == keys("training.precision=tf32", "sampling.attention=null", "training.attention=fp32")


@pytest.mark.parametrize("value", ["precision=fp32", "precision=bf16", "precision=fp64", "attention=bf16"])
def test_what_is_asked_for_is_in_the_key_of_its_stage(folder, value: str) -> None:
    train, sample = keys()
    other, another = keys(f"training.{value}")
    assert other != train and another != sample
    same, third = keys(f"sampling.{value}")
    assert same == train and third not in (sample, another)


def test_the_device_is_not(folder) -> None:
    assert keys("training.precision=bf16") == keys("training.precision=bf16", "runtime.device=cuda")


def test_one_arithmetic_has_one_key(folder) -> None:
    assert keys("training.precision=bf16", "training.attention=bf16") == keys("training.precision=bf16")
    assert keys("training.precision=bf16", "training.attention=fp32") != keys("training.precision=bf16")
    assert keys("training.precision=fp32", "training.attention=fp32") == keys("training.precision=fp32")


def test_the_older_name_is_read_as_both(folder) -> None:
    assert keys("runtime.precision=tf32") == keys()
    assert keys("runtime.precision=bf16") == keys("training.precision=bf16", "sampling.precision=bf16")
    config = load_cell("base.yaml", sets=["runtime.precision=fp64"]).config
    assert (config.training.precision, config.sampling.precision) == ("fp64", "fp64")
    told = config.model_dump(mode="json")
    assert "precision" not in told["runtime"]
    assert CellConfig.model_validate(told) == config
    # As it stands in a store that an older version filled.
    del told["training"]["precision"], told["sampling"]["precision"]
    told["runtime"]["precision"] = "fp64"
    assert CellConfig.model_validate(told) == config


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (
            ["runtime.precision=bf16", "training.precision=fp32"],
            "--set runtime.precision=bf16: runtime.precision: is the older name of training.precision and "
            "sampling.precision, got 'bf16' beside training.precision 'fp32'; allowed is one of them",
        ),
        (
            ["runtime.precision=bf61"],
            "--set runtime.precision=bf61: runtime.precision: should be 'fp32', 'tf32', 'bf16' or 'fp64', got "
            "'bf61' - did you mean 'bf16'?",
        ),
        (
            ["sampling.precision=fp64", "sampling.attention=bf16"],
            "--set sampling.attention=bf16: sampling.attention: should be null with precision fp64, got 'bf16'",
        ),
        (
            ["training.attention=fp64"],
            "--set training.attention=fp64: training.attention: should be 'fp32' or 'bf16', got 'fp64' - did you "
            "mean 'fp32'?",
        ),
    ],
)
def test_what_is_wrong_is_said_where_it_was_given(folder, sets: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_cell("base.yaml", sets=sets)
    assert caught.value.messages == (said,)
