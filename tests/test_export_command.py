"""``python -m hpdm_core.export``: a trained cell as one file, and what is drawn from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hpdm_core import export as command
from hpdm_core.assembly.compose import load_cell
from hpdm_core.base.errors import InputError, report_errors
from hpdm_core.evaluate import main as evaluate
from hpdm_core.sampling import command as sample_command
from hpdm_core.training.checkpoint import save_weights
from hpdm_core.training.trained import load_trained

CONFIG = {
    "model": {
        "video": [4, 8, 8],
        "patch": [2, 4, 4],
        "token": [1, 2, 2],
        "levels": 2,
        "classes": 0,
        "token_dim": 16,
        "blocks": 2,
        "backbone": {"use": "dit", "heads": 1},
    },
    "data": {"dataset": "gaussian_world"},
    "training": {"steps": 7, "batch": 1, "learning_rate": 1e-3, "self_conditioning": 0.0},
    "sampling": {"solver": {"use": "edm", "steps": [2], "churn": [0.0]}},
    "seed": 5,
}


@pytest.fixture
def cell(tmp_path: Path) -> Path:
    """A train stage as the store keeps it."""
    assembly = load_cell(CONFIG)
    folder = tmp_path / "store" / "train" / "key"
    save_weights(folder / "model.safetensors", assembly.build_model().state_dict(), metadata={"steps": 7})
    spec = {
        "config": assembly.config.model_dump(mode="json"),
        "plugins": list(assembly.plugins.names),
        "keys": {"train": "abc"},
        "arm": "deep",
        "study": "mine",
        "store": "/secret/place",
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    result = {"git": "0123456789abcdef", "machine": {"cores": 2}, "versions": {"torch": "2"}, "seconds": 1}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def run(*arguments: object) -> int:
    return report_errors(command.main, [str(argument) for argument in arguments])


def test_one_file_holds_weights_configuration_and_provenance(cell: Path, tmp_path: Path) -> None:
    file = tmp_path / "there" / "mine.safetensors"
    assert run(cell, "--out", file, "--made-by", "python -m hpdm_core.study mine.yaml") == 0
    given, stored = load_file(cell / "model.safetensors"), load_file(file)
    assert given.keys() == stored.keys()
    assert all(torch.equal(stored[name], given[name].half()) for name in given)
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["hpdm"])
    assert header.pop("cell")["config"] == json.loads((cell / "spec.json").read_text())["config"]
    assert header == {
        "steps": 7,
        "key": "abc",
        "made_by": "python -m hpdm_core.study mine.yaml",
        "precision": "float16",
        "provenance": {
            "git": "0123456789abcdef",
            "machine": {"cores": 2},
            "versions": {"torch": "2"},
        },
    }
    assert b"/secret/place" not in file.read_bytes()
    trained = load_trained(file)
    assert trained.assembly().config.seed == 5 and trained.provenance["machine"] == {"cores": 2}


def test_videos_of_the_file_are_those_of_the_cell(
    cell: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for precision, close in (("float32", 0), ("float16", 3)):
        file = tmp_path / f"{precision}.safetensors"
        assert run(cell, "--out", file, "--precision", precision) == 0
        sheets = []
        for source in (cell, file):
            out = tmp_path / f"{precision} {source.name}"
            assert report_errors(sample_command.main, [str(source), "--num", "2", "--out", str(out)]) == 0
            with Image.open(out / "contact_sheet.png") as sheet:
                sheets.append(torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).int())
        assert (sheets[0] - sheets[1]).abs().max() <= close, precision
    said = capsys.readouterr().out
    assert said.count("study mine, arm deep, seed 5, 7 steps, commit 0123456789ab\n") == 4


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    cell: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out" / "mine.safetensors"

    def refused(said: str, *arguments: object, source: Path = cell) -> None:
        assert run(source, *(arguments or ("--out", file))) == 2
        printed = capsys.readouterr().err
        assert said in printed and printed.startswith("error: ") and printed.count("\n") == 1, printed
        assert not file.parent.exists()

    refused("allowed is a name that ends in .safetensors", "--out", tmp_path / "mine.pt")
    refused("precision 'float61' - did you mean 'float16'?", "--out", file, "--precision", "float61")
    refused("no trained cell 'dem'", source=Path("dem"))
    weights = load_file(cell / "model.safetensors")
    large = {**weights, "output.bias": weights["output.bias"] + 1e5}
    save_file(large, cell / "model.safetensors")
    refused("'output.bias' is not finite in float16; its largest magnitude is 100000, allowed is up to 65504")
    spec = json.loads((cell / "spec.json").read_text())
    (cell / "spec.json").write_text(json.dumps({**spec, "plugins": ["/home/me/fusion.py"]}))
    refused("needs /home/me/fusion.py, which an exported file does not hold")
    (cell / "spec.json").write_text(json.dumps(spec))
    (cell / "model.safetensors").write_bytes(b"torn")
    refused("not a whole safetensors file")


def test_a_file_is_refused_where_it_is_no_exported_cell(cell: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds weights and no configuration"):
        load_trained(cell / "model.safetensors")
    file = tmp_path / "strange.safetensors"
    spec = json.loads((cell / "spec.json").read_text())
    for made, said in (
        ({"cell": {**spec, "plugins": ["/tmp/evil.py"]}}, r"names plugins that are files \(/tmp/evil.py\)"),
        ({"cell": [1]}, "holds no cell"),
        ({"cell": {**spec, "plugins": 7}}, "holds no cell"),
        ({"cell": {"config": {"model": [1]}}}, "holds no cell"),
        ({"cell": {**spec, "arm": "\x1b[2J"}}, "cannot be printed"),
        ({"cell": spec, "provenance": {"git": 7}}, "cannot be printed, or is not text"),
        ({"cell": spec, "classes": ["a"]}, "names 1 classes; its configuration has 0"),
        ({"cell": spec, "classes": "abc"}, "'classes' a list"),
    ):
        save_weights(file, load_file(cell / "model.safetensors"), metadata=made)
        with pytest.raises(InputError, match=said):
            load_trained(file)
    save_file({"x": torch.zeros(1)}, file, metadata={"hpdm": "[]"})
    with pytest.raises(InputError, match="holds list under 'hpdm'"):
        load_trained(file)
    file.write_bytes(b"torn")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_trained(file)


def test_a_file_has_no_samples_to_measure(
    cell: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.safetensors"
    assert run(cell, "--out", file) == 0
    assert report_errors(evaluate, [str(file)]) == 2
    assert "is one file of weights; allowed here is a train stage" in capsys.readouterr().err
