"""Files of weights: what they are, where they are found, and that nothing but the right one is loaded."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hpdm_core.__main__ import main as hpdm
from hpdm_core.base.errors import InputError
from hpdm_core.metrics.__main__ import main as metrics
from hpdm_core.metrics.networks.c3d import C3D
from hpdm_core.metrics.networks.i3d import I3D
from hpdm_core.metrics.networks.state_dicts import C3D_NAMINGS, I3D_NAMINGS
from hpdm_core.metrics.networks.weights import (
    FOLDER_VARIABLE,
    KNOWN_FILES,
    MissingWeights,
    find,
    git_blob_sha1,
    identify,
    load_into,
    load_torchscript,
    locate,
    uninitialised,
)
from hpdm_core.testing.weights import export, randomise, write_state_dict


class Tiny(nn.Module):
    """A unit of I3D, by I3D's names."""

    def __init__(self) -> None:
        super().__init__()
        self.Mixed_5b = nn.Module()
        self.Mixed_5b.b2b = nn.Module()
        self.Mixed_5b.b2b.conv3d = nn.Conv3d(2, 3, (1, 2, 3), bias=False)
        self.Mixed_5b.b2b.bn = nn.BatchNorm3d(3)


class TinyC3D(nn.Module):
    """Two layers of C3D, by its names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3b = nn.Conv3d(2, 3, 3)
        self.fc6 = nn.Linear(4, 5)


class Runs:
    """Executed when unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.fixture(scope="module")
def i3d() -> I3D:
    network = uninitialised(I3D)
    randomise(network, seed=3)
    return network


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch):
    """Make a file one of the known ones."""

    def make(file: Path, name: str) -> None:
        blob = git_blob_sha1(file.read_bytes())
        monkeypatch.setitem(KNOWN_FILES, name, replace(KNOWN_FILES[name], git_sha1=blob))

    return make


# Identity


def test_the_hash_is_gits(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"hello\n")
    assert git_blob_sha1(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    if shutil.which("git"):
        done = subprocess.run(["git", "hash-object", file], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == git_blob_sha1(file.read_bytes())


def test_the_known_hashes_are_the_published_ones() -> None:
    hashes = {name: known.git_sha1 for name, known in KNOWN_FILES.items()}
    assert hashes == {
        "i3d_torchscript.pt": "93daef59c7ae0e9e8f76225521407e60cbafa6aa",
        "i3d_pretrained_400.pt": "a867b87ac3a9097d200598b1d48a1b890d8ec744",
        "rgb_imagenet.pt": "73a4fd1d87eb3dbd97f33a9779fa1caa3d28111a",
        "model_rgb.pth": "2a7c22e23e6c74f50a0166ce61110bccd2ab48bb",
        "c3d_ucf101.pt": None,
        "conv3d_deepnetA_ucf.npz": None,
        "mean2.npz": None,
    }
    assert [name for name, known in KNOWN_FILES.items() if known.fvd] == [
        "i3d_torchscript.pt",
        "i3d_pretrained_400.pt",
    ]


def test_a_file_is_what_its_hash_says_not_what_it_is_called(tmp_path: Path, known) -> None:
    right, wrong = tmp_path / "renamed.pt", tmp_path / "i3d_pretrained_400.pt"
    torch.save({"a": torch.zeros(3)}, right)
    torch.save({"a": torch.ones(3)}, wrong)
    known(right, "i3d_pretrained_400.pt")
    assert (identify(right).known, identify(right).fvd, identify(right).warning) == (
        "i3d_pretrained_400.pt",
        True,
        None,
    )
    assert (identify(wrong).known, identify(wrong).fvd) == ("unknown", False)
    assert "unknown origin" in identify(wrong).record()["warning"]


def test_the_key_does_not_know_where_the_file_lies_or_what_it_is_called(tmp_path: Path) -> None:
    first = write_state_dict({"a": torch.zeros(3)}, tmp_path / "mean2.npz")
    (tmp_path / "elsewhere").mkdir()
    second = Path(shutil.copy(first, tmp_path / "elsewhere" / "renamed.npz"))
    assert identify(first).key() == identify(second).key()
    assert identify(first).record() != identify(second).record()
    write_state_dict({"a": torch.ones(4)}, second)
    assert identify(first).key() != identify(second).key()  # and a changed file is seen at once


# Where files are


def test_a_name_is_looked_for_in_the_folders_in_order(tmp_path: Path, monkeypatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "two" / "mean2.npz").write_bytes(b"2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(FOLDER_VARIABLE, f"{tmp_path / 'one'}:{tmp_path / 'two'}")
    assert find("mean2.npz") == tmp_path / "two" / "mean2.npz"
    (tmp_path / "one" / "mean2.npz").write_bytes(b"1")
    assert locate("mean2.npz", of="c3d") == tmp_path / "one" / "mean2.npz"
    assert find("two/mean2.npz") == Path("two/mean2.npz")
    assert find(tmp_path / "three" / "mean2.npz") is None


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    with pytest.raises(MissingWeights, match="set HPDM_WEIGHTS to the folder") as caught:
        locate("i3d_torchscript.pt", of="i3d")
    assert caught.value.exit_code == 2
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(MissingWeights, match=f"not in {tmp_path}.*did you mean 'i3d_torchscript.pt'"):
        locate("i3d_torchscrip.pt", of="i3d")
    with pytest.raises(MissingWeights, match=r"there is no file 'here/mine\.pt'"):
        locate("here/mine.pt", of="i3d")


# State dicts


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
@pytest.mark.parametrize("naming", I3D_NAMINGS)
def test_weights_of_i3d_make_the_round_trip_in_every_naming(
    naming: str, suffix: str, i3d: I3D, tmp_path: Path
) -> None:
    file = write_state_dict(export(i3d, I3D_NAMINGS[naming]), tmp_path / f"weights{suffix}")
    made = uninitialised(I3D)
    identity = load_into(made, file, kind="i3d")
    assert identity.naming == naming
    state = made.state_dict()
    for name, value in i3d.state_dict().items():
        assert name.endswith("tracked") or torch.equal(state[name], value), name
    videos = torch.rand(1, 3, 9, 33, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(made.endpoints(videos)["Mixed_5c"], i3d.endpoints(videos)["Mixed_5c"])


def test_the_namings_are_those_of_the_files() -> None:
    """A few names as they stand in the files, and the slip in the graph."""
    with torch.device("meta"):
        network = I3D()
    torch_names = export(network, I3D_NAMINGS["pytorch-i3d"])
    assert len(torch_names) == 287
    assert {"Conv3d_1a_7x7.conv3d.weight", "Mixed_4f.b2b.bn.running_var", "logits.conv3d.bias"} <= set(
        torch_names
    )
    ported = export(network, I3D_NAMINGS["kinetics_i3d_pytorch"])
    assert len(ported) == 287
    assert {
        "conv3d_1a_7x7.conv3d.weight",
        "conv3d_2c_3x3.batch3d.weight",
        "mixed_3b.branch_0.conv3d.weight",
        "mixed_4f.branch_2.1.batch3d.running_var",
        "mixed_5c.branch_3.1.conv3d.weight",
        "conv3d_0c_1x1.conv3d.bias",
    } <= set(ported)
    graph = export(network, I3D_NAMINGS["tensorflow"])
    assert len(graph) == 230
    assert sum(value.numel() for value in graph.values()) == 12_704_544
    assert {
        "Conv3d_1a_7x7/conv_3d/w",
        "Mixed_3b/Branch_0/Conv3d_0a_1x1/batch_norm/beta",
        "Mixed_4f/Branch_2/Conv3d_0b_3x3/batch_norm/moving_variance",
        "Mixed_5b/Branch_2/Conv3d_0a_3x3/conv_3d/w",
        "Mixed_5c/Branch_3/Conv3d_0b_1x1/batch_norm/moving_mean",
        "Logits/Conv3d_0c_1x1/conv_3d/b",
    } <= set(graph)
    assert "Mixed_5b/Branch_2/Conv3d_0b_3x3/conv_3d/w" not in graph
    assert tuple(graph["Conv3d_1a_7x7/conv_3d/w"].shape) == (7, 7, 7, 3, 64)


def test_scopes_numbers_of_batches_and_wrappers_are_taken_off(tmp_path: Path) -> None:
    source = Tiny()
    randomise(source, seed=5)
    wanted = source.state_dict()
    graph = {
        f"RGB/inception_i3d/{name}:0": value.reshape((1,) * 4 + (3,)) if value.ndim == 1 else value
        for name, value in export(source, I3D_NAMINGS["tensorflow"]).items()
    }
    assert "RGB/inception_i3d/Mixed_5b/Branch_2/Conv3d_0a_3x3/conv_3d/w:0" in graph
    kernel = graph[
        "RGB/inception_i3d/Mixed_5b/Branch_2/Conv3d_0a_3x3/conv_3d/w:0"
    ]  # time, height, width, in, out
    assert torch.equal(kernel, wanted["Mixed_5b.b2b.conv3d.weight"].permute(2, 3, 4, 1, 0))
    videogpt = source.state_dict()  # with its num_batches_tracked
    forms = {
        "tensorflow": graph,
        "pytorch-i3d": {f"module.{name}": value for name, value in videogpt.items()},
    }
    for naming, state in forms.items():
        for content in (state, {"state_dict": state, "epoch": 3}):
            torch.save(content, tmp_path / "weights.pt")
            made = Tiny()
            assert load_into(made, tmp_path / "weights.pt", kind="i3d").naming == naming
            assert torch.equal(made.Mixed_5b.b2b.conv3d.weight, wanted["Mixed_5b.b2b.conv3d.weight"])
            assert torch.equal(made.Mixed_5b.b2b.bn.running_var, wanted["Mixed_5b.b2b.bn.running_var"])
            assert torch.equal(made.Mixed_5b.b2b.bn.weight, torch.ones(3))


def test_weights_of_c3d_make_the_round_trip_in_every_naming(tmp_path: Path) -> None:
    with torch.device("meta"):
        names = export(C3D(), C3D_NAMINGS["chainer"])
    assert len(names) == 22
    assert {"conv1a/W", "conv3b/b", "fc8/W"} <= set(names)
    source, made = TinyC3D(), TinyC3D()
    randomise(source)
    for naming, theirs in C3D_NAMINGS.items():
        randomise(made, seed=1)
        file = write_state_dict(export(source, theirs), tmp_path / "weights.npz")
        assert load_into(made, file, kind="c3d").naming == naming
        assert all(torch.equal(value, source.state_dict()[name]) for name, value in made.state_dict().items())


def damaged(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    name = "Mixed_5b.b2b.conv3d.weight"
    if how == "missing":
        return {key: value for key, value in state.items() if key != name}
    if how == "extra":
        return {**state, "head.weight": torch.zeros(1)}
    if how == "shape":
        return {**state, name: state[name].transpose(3, 4)}
    return {**state, name: state[name] * float("nan")}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "missing",
            r"1 of its arrays are missing \(Mixed_5b.b2b.conv3d.weight\) and 0 arrays are not its own",
        ),
        ("extra", r"0 of its arrays are missing and 1 arrays are not its own \(head.weight\)"),
        ("shape", r"has the shape \[3, 2, 1, 3, 2\]; wanted is \[3, 2, 1, 2, 3\]"),
        ("nan", "holds values that are not finite"),
    ],
)
def test_loading_is_strict(how: str, message: str, tmp_path: Path) -> None:
    torch.save(damaged(Tiny().state_dict(), how), tmp_path / "weights.pt")
    with pytest.raises(InputError, match=message):
        load_into(Tiny(), tmp_path / "weights.pt", kind="i3d")


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.save(Tiny().state_dict(), whole)
    data = whole.read_bytes()
    contents = {
        "cut.pt": (data[: len(data) // 2], "damaged or cut off"),
        "empty.pt": (b"", "it is empty"),
        "page.pt": (b"<html>not found</html>", "not a weight file"),
        "old.pt": (b"\x80\x02garbage", "damaged or cut off"),
        "changed.pt": (data[:300] + bytes(200) + data[500:], "damaged or cut off"),
        "cut.npz": (b"PK\x03\x04", "damaged or cut off"),
    }
    for name, (content, message) in contents.items():
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            load_into(Tiny(), file, kind="i3d")
        assert len(caught.value.messages) == 1
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_into(Tiny(), tmp_path / "nowhere.pt", kind="i3d")


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Runs()}, "evil.pt")
    np.savez("evil.npz", a=np.array([Runs()], dtype=object))
    with pytest.raises(InputError, match=r"refused.*other than tensors"):
        load_into(Tiny(), Path("evil.pt"), kind="i3d")
    with pytest.raises(InputError, match="pickled objects, which are refused"):
        load_into(Tiny(), Path("evil.npz"), kind="i3d")
    torch.save([1, 2], "list.pt")
    with pytest.raises(InputError, match="no state dict"):
        load_into(Tiny(), Path("list.pt"), kind="i3d")
    assert not Path("executed").exists()


# TorchScript


@pytest.fixture
def scripted(tmp_path: Path) -> Path:
    file = tmp_path / "i3d_torchscript.pt"
    with pytest.warns(DeprecationWarning):
        torch.jit.trace(nn.ReLU(), torch.zeros(1)).save(str(file))
    return file


def test_code_runs_only_for_a_known_hash_or_when_trusted(scripted: Path, known) -> None:
    with pytest.raises(
        InputError, match=r"a program, and the hash of this one is not known.*--trust-weights"
    ):
        load_torchscript(scripted)
    module, identity = load_torchscript(scripted, trust=True)
    assert module(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
    assert (identity.known, identity.format) == ("unknown", "torchscript")
    known(scripted, "i3d_torchscript.pt")
    assert load_torchscript(scripted)[1].known == "i3d_torchscript.pt"


def test_code_is_never_read_as_a_state_dict(scripted: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="TorchScript, which is code"):
        load_into(Tiny(), scripted, kind="i3d")
    torch.save({"a": torch.zeros(1)}, tmp_path / "state.pt")
    with pytest.raises(InputError, match="not a TorchScript file"):
        load_torchscript(tmp_path / "state.pt", trust=True)


def test_a_cut_off_program_is_one_sentence(scripted: Path) -> None:
    scripted.write_bytes(scripted.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged or cut off"):
        load_torchscript(scripted, trust=True)


# The command


def test_the_command_lists_every_known_file(monkeypatch, capsys) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    assert hpdm(["weights"]) == 0
    said = capsys.readouterr().out
    assert "HPDM_WEIGHTS is not set" in said
    for known in KNOWN_FILES.values():
        assert f"{known.name}  missing" in said
        assert known.purpose in said
        assert known.git_sha1 is None or known.git_sha1 in said
    assert metrics(["weights"]) == 0
    assert capsys.readouterr().out == said


def test_the_command_tells_originals_from_others(tmp_path: Path, monkeypatch, capsys, known) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    torch.save({"a": torch.zeros(1)}, tmp_path / "rgb_imagenet.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "model_rgb.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "mine.pt")
    known(tmp_path / "rgb_imagenet.pt", "rgb_imagenet.pt")
    assert hpdm(["weights", "--json", str(tmp_path / "mine.pt")]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["files"]}
    assert {
        name: (row["state"], row["verified"]) for name, row in rows.items() if row["state"] != "missing"
    } == {
        "rgb_imagenet.pt": ("found", True),
        "model_rgb.pth": ("other content", False),
        "mine.pt": ("found", False),
    }
    assert rows["model_rgb.pth"]["warning"]
    assert rows["i3d_torchscript.pt"]["path"] is None
    assert hpdm(["weights", str(tmp_path / "mine.pt")]) == 0
    assert "CONTENT DIFFERS from the original's" in capsys.readouterr().out


def test_the_command_checks_files_to_their_end(tmp_path: Path, monkeypatch, capsys, i3d: I3D) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    write_state_dict(export(i3d, I3D_NAMINGS["tensorflow"]), tmp_path / "mine.npz")
    np.savez(tmp_path / "mean2.npz", mean=np.zeros((3, 16, 128, 171)))
    torch.save({"a": torch.ones(2)}, tmp_path / "rgb_imagenet.pt")
    assert hpdm(["weights", "--check", str(tmp_path / "mine.npz"), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["files"]}
    assert rows["mine.npz"]["check"] == "weights of I3D, named as in tensorflow"
    assert rows["mean2.npz"]["check"] == "reads as a mean clip"
    assert "not the weights of I3D" in rows["rgb_imagenet.pt"]["check"]
    assert "check" not in rows["c3d_ucf101.pt"]


def test_wrong_input_of_the_command_ends_with_two(tmp_path: Path, capsys) -> None:
    assert hpdm(["weights", str(tmp_path / "no.pt")]) == 2
    assert "no file" in capsys.readouterr().err
    with pytest.raises(InputError, match="did you mean 'weights'"):
        metrics(["weight"])
