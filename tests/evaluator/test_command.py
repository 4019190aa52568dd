"""The command, end to end, on a small real data set in UCF-101's layout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hpdm_core.evaluation.extraction import Task, _key
from hpdm_core.metrics.networks.i3d import I3D
from hpdm_core.metrics.protocols.records import Preparation

ROOT = Path(__file__).parents[2]


def measure(run, ucf, fakes, protocol, out, *more):
    assert (
        run("--real", ucf, "--fake", fakes, "--protocol", protocol, "--out", out, "--bootstrap", 0, *more)
        == 0
    )
    return json.loads(out.read_text())["results"][0]


@pytest.fixture
def first(run, ucf, fakes, protocol, tmp_path):
    return measure(run, ucf, fakes, protocol(), tmp_path / "a.json")


def test_it_measures_and_says_how(run, ucf, fakes, protocol, tmp_path, capsys):
    code = run(
        *("--real", ucf, "--fake", fakes, "--protocol", protocol(), "--split", "train"),
        *("--out", tmp_path / "a.json", "--bootstrap", 10),
    )
    assert code == 0
    shown = capsys.readouterr()
    result = json.loads((tmp_path / "a.json").read_text())["results"][0]
    assert result["value"] > 0 and result["modified"] == []
    assert result["interval"]["low"] < result["value"] < result["interval"]["high"]
    assert result["sides"]["reals"]["clips"] == 12 and result["sides"]["reals"]["split"] == "train"
    assert result["sides"]["fakes"] | {"clips": 4, "sizes": ["32x32"]} == result["sides"]["fakes"]
    assert result["record"]["reals"]["prepare"]["size"] == [32, 32]
    assert len(result["record"]["detector"]["weights"]) == 64
    assert f"record {result['identity']}" in shown.out and "reals.count: all" in shown.out
    assert "12 reals for 272 features" in shown.out
    assert "fakes: 4 of 4 clips" in shown.err
    clips = json.loads((tmp_path / "a.manifest.json").read_text())["protocols"][0]["sides"]["reals"]["clips"]
    assert [clip["video"] for clip in clips] == sorted(clip["video"] for clip in clips)
    assert len({clip["first"] for clip in clips}) > 1 and all(len(clip["sha256"]) == 64 for clip in clips)


def test_the_manifest_repeats_the_number_bit_by_bit(run, ucf, fakes, protocol, tmp_path, first):
    manifest = tmp_path / "a.manifest.json"
    # Another folder with more in it: the manifest says what is used.
    more = tmp_path / "more"
    shutil.copytree(fakes, more)
    np.save(more / "00a.npy", np.zeros((16, 32, 32, 3), np.uint8))
    again = measure(run, ucf, more, protocol(), tmp_path / "b.json", "--manifest", manifest, "--no-cache")
    assert again["value"] == first["value"]
    assert (tmp_path / "b.manifest.json").read_text().replace(str(more), str(fakes)) == manifest.read_text()
    other = measure(run, ucf, more, protocol(), tmp_path / "c.json")
    assert other["value"] != first["value"]


def test_a_manifest_of_other_content_is_refused(run, ucf, fakes, protocol, tmp_path, first, capsys):
    manifest = tmp_path / "a.manifest.json"
    changed = tmp_path / "changed"
    shutil.copytree(fakes, changed)
    np.save(changed / "00.npy", np.load(changed / "00.npy") // 2)
    arguments = ("--real", ucf, "--protocol", protocol(), "--manifest", manifest)
    assert run(*arguments, "--fake", changed) == 2
    assert "1 of 4 videos have changed" in capsys.readouterr().err
    (changed / "00.npy").unlink()
    assert run(*arguments, "--fake", changed) == 2
    assert "1 of 4 videos are not in --fake" in capsys.readouterr().err
    assert run("--real", ucf, "--fake", fakes, "--protocol", protocol(seed=1), "--manifest", manifest) == 2
    assert "chosen by record" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_do_not_change_a_bit(processes, ucf, fakes, protocol, tmp_path, first):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HPDM_CACHE": str(tmp_path / f"cache{processes}")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "plugins")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "hpdm_core.evaluate", "--real", ucf, "--fake", fakes, "--protocol", protocol()]
    command += ["--bootstrap", "0", "--out", tmp_path / "n.json"]
    done = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "n.json").read_text())["results"][0]
    assert result["processes"] == processes
    assert result["value"] == first["value"]
    assert (tmp_path / "n.manifest.json").read_text() == (tmp_path / "a.manifest.json").read_text()


def test_features_of_reals_are_kept_by_content(run, ucf, fakes, protocol, tmp_path, own_cache, capsys, first):
    (kept,) = own_cache.iterdir()
    capsys.readouterr()
    measure(run, ucf, fakes, protocol(), tmp_path / "b.json")
    assert "reals:" not in capsys.readouterr().err  # not decoded again
    moved = tmp_path / "moved"
    shutil.copytree(ucf, moved)
    again = measure(run, moved, fakes, protocol(), tmp_path / "c.json")
    assert again["value"] == first["value"] and list(own_cache.iterdir()) == [
        kept
    ]  # the place does not matter
    video = sorted(moved.rglob("*_g01_c01.avi"))[0]
    shutil.copy(sorted(moved.rglob("*_g02_c01.avi"))[-1], video)
    other = measure(run, moved, fakes, protocol(), tmp_path / "d.json")
    assert other["value"] != first["value"] and len(list(own_cache.iterdir())) == 2
    kept.write_bytes(kept.read_bytes()[:100])
    assert measure(run, ucf, fakes, protocol(), tmp_path / "e.json")["value"] == first["value"]


def test_kept_features_are_of_one_reader_one_detector_and_one_preparation():
    task = Task(16, Preparation(), {"extractor": "x"}, lambda clip: clip, None, {})
    others = [
        replace(task, detector={"extractor": "x", "option": 2}),
        replace(task, sources={"feature_extractors/x": "other code"}),
        replace(task, prepare=Preparation(jpeg_quality=75)),
    ]
    reader, other = (SimpleNamespace(describe=lambda name=name: {"name": name}) for name in ("pyav", "other"))
    keys = [_key(each, reader, None, [], []) for each in (task, *others)] + [_key(task, other, None, [], [])]
    assert len(set(keys)) == 5


def test_results_that_cannot_be_written_are_trouble(run, ucf, fakes, protocol, tmp_path, monkeypatch, capsys):
    from hpdm_core.evaluation import command

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_json", full)
    out = tmp_path / "a.json"
    arguments = ("--real", ucf, "--fake", fakes, "--protocol", protocol(), "--bootstrap", 0)
    assert run(*arguments, "--out", out) == 1
    assert "No space left on device" in capsys.readouterr().err and not out.exists()


def test_a_changed_protocol_is_marked(run, ucf, fakes, protocol, tmp_path, capsys, first):
    out = tmp_path / "b.json"
    changed = measure(
        run, ucf, fakes, protocol(), out, "--num-fakes", 3, "--split", "test", "--stride-fakes", 1
    )
    assert changed["modified"] == ["reals.split train -> test", "fakes.count 4 -> 3"]
    assert changed["sides"]["reals"]["clips"] == 3
    assert changed["identity"] != first["identity"]
    assert "(modified)" in capsys.readouterr().out


def test_damaged_files_are_named_and_replaced(run, ucf, fakes, protocol, tmp_path, capsys, first):
    damaged = tmp_path / "damaged"
    shutil.copytree(fakes, damaged)
    whole = (damaged / "01.npy").read_bytes()
    (damaged / "01.npy").write_bytes(whole[: len(whole) // 2])
    (damaged / "02.avi").write_bytes(b"no video at all")
    result = measure(run, ucf, damaged, protocol(), tmp_path / "b.json")
    assert [each["video"] for each in result["sides"]["fakes"]["unreadable"]] == ["01.npy", "02.avi"]
    assert result["sides"]["fakes"]["clips"] == 4
    assert any("2 videos cannot be read" in said and "01.npy" in said for said in result["warnings"])
    assert run("--real", ucf, "--fake", damaged, "--protocol", protocol(fakes__count=6)) == 2
    said = capsys.readouterr().err
    assert "5 clips can be used; protocol 'small/random3d_16f' takes 6 fakes" in said and "01.npy" in said


def test_a_set_with_holes_is_marked_where_all_of_it_is_wanted(
    run, ucf, fakes, protocol, tmp_path, first, capsys
):
    holes = tmp_path / "holes"
    shutil.copytree(ucf, holes)
    videos = sorted(holes.rglob("*_g01_c01.avi"))
    cut = videos[0].read_bytes()
    videos[0].write_bytes(cut[: len(cut) // 2])  # its header promises all frames
    videos[1].write_bytes(b"")
    videos[2].unlink()
    result = measure(run, holes, fakes, protocol(), tmp_path / "b.json")
    assert result["sides"]["reals"]["clips"] == 9
    assert len(result["sides"]["reals"]["unreadable"]) == 2
    assert result["sides"]["reals"]["listed_and_absent"] == ["Carphone/v_Carphone_g01_c01.avi"]
    assert result["modified"] == ["reals: 2 unreadable, 1 listed and absent"]
    assert result["identity"] != first["identity"]
    again = tmp_path / "b.manifest.json"
    repeated = measure(run, holes, fakes, protocol(), tmp_path / "c.json", "--manifest", again, "--no-cache")
    same = ("value", "identity", "modified", "record")
    assert {key: repeated[key] for key in same} == {key: result[key] for key in same}


def test_each_side_has_a_stride_of_its_own(run, ucf, fakes, protocol, tmp_path):
    small = protocol(frames=8)
    arguments = ("--stride-reals", 3, "--stride-fakes", 2)
    result = measure(run, ucf, fakes, small, tmp_path / "a.json", *arguments)
    assert result["modified"] == ["reals.stride 1 -> 3", "fakes.stride 1 -> 2"]
    sides = json.loads((tmp_path / "a.manifest.json").read_text())["protocols"][0]["sides"]
    assert {name: side["clips"][0]["stride"] for name, side in sides.items()} == {"reals": 3, "fakes": 2}
    by_hand = tmp_path / "every_second"
    by_hand.mkdir()
    for path in fakes.iterdir():
        np.save(by_hand / path.name, np.load(path)[:16:2])
    whole = measure(run, ucf, by_hand, small, tmp_path / "b.json", "--stride-reals", 3)
    assert whole["value"] == result["value"]


def test_fewer_reals_than_a_protocol_takes_are_said(run, ucf, fakes, protocol, tmp_path):
    result = measure(run, ucf, fakes, protocol(reals__count=50, reals__fewer="use_all"), tmp_path / "a.json")
    assert "reals: 12 clips, all that there are, where the protocol takes 50" in result["warnings"]


def test_a_clip_that_breaks_while_it_is_decoded_is_replaced(run, ucf, fakes, protocol, tmp_path, monkeypatch):
    from hpdm_core.data.readers import ReadError
    from hpdm_core.evaluation import extraction
    from hpdm_core.evaluation.folders import reading

    def read(choice, prepare, **more):
        if choice.video.name == "02.npy":
            raise ReadError(choice.video.path, "is damaged at 0.3 s")
        return reading.read_clip(choice, prepare, **more)

    monkeypatch.setattr(extraction, "read_clip", read)
    result = measure(run, ucf, fakes, protocol(), tmp_path / "b.json")
    assert result["sides"]["fakes"]["unreadable"] == [{"video": "02.npy", "reason": "is damaged at 0.3 s"}]
    clips = json.loads((tmp_path / "b.manifest.json").read_text())["protocols"][0]["sides"]["fakes"]["clips"]
    assert [clip["video"] for clip in clips] == ["00.npy", "01.npy", "03.npy", "04.npy"]


def test_several_protocols_stand_in_columns_of_their_own(run, ucf, fakes, protocol, tmp_path, capsys):
    kernel = protocol(name="small/kernel", title="kvd[random3d]", measure="kernel")
    out = tmp_path / "a.json"
    arguments = ("--real", ucf, "--fake", fakes, "--bootstrap", 0, "--out", out)
    assert run(*arguments, "--protocol", protocol(), "--protocol", kernel) == 0
    results = json.loads(out.read_text())["results"]
    assert [each["title"] for each in results] == ["frechet[random3d]", "kvd[random3d]"]
    heads = capsys.readouterr().out.splitlines()[:3]
    assert all(each["identity"] in heads[2] for each in results)


def test_i3d_by_a_protocol_file(run, ucf, fakes, protocol, tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "weights" / "mine.pt"
    weights.parent.mkdir()
    torch.save(I3D().state_dict(), weights)
    small = protocol(
        title="FVD",
        detector={"use": "i3d", "weights": "mine.pt", "resize": "squash"},
        frames=9,
        reals__count=2,
        fakes__count=2,
    )
    result = measure(run, ucf, fakes, small, tmp_path / "a.json", "--weights", weights.parent)
    assert result["value"] > 0 and result["modified"] == []
    assert result["title"] == "FVD [unknown weights]"
    assert result["record"]["detector"]["weights"]["known"] == "unknown"
    assert any("unknown origin" in said for said in result["warnings"])
    assert str(tmp_path) not in json.dumps(result["record"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fake", "FAKES", "--protocol", "PROTOCOL"], "give --real DIR"),
        (["--real", "REAL", "--protocol", "PROTOCOL"], "--fake DIR is missing"),
        (["--real", "REAL", "--fake", "FAKES"], "--protocol NAME is missing"),
        (["--real", "REAL", "--fake", "FAKES", "--protocol", "stylegan_v/fvd2048_16"], "did you mean"),
        (["--real", "REAL", "--fake", "FAKES", "--protocol", "fvd2048_16f"], "stylegan_v/{"),
        (
            ["--real", "REAL", "--fake", "FAKES", "--protocol", "hpdm/fvd10k_16f"],
            "'i3d_torchscript.pt' was not found",
        ),
        (
            ["--real", "REAL", "--fake", "FAKES", "--protocol", "PROTOCOL", "--split", "trian"],
            "did you mean 'train'",
        ),
        (["--real", "REAL", "--fake", "nowhere", "--protocol", "PROTOCOL"], "nowhere: does not exist"),
        (["--real", "REAL", "--fake", "EMPTY", "--protocol", "PROTOCOL"], "holds no video"),
        (["--real", "REAL", "--fake", "ONE", "--protocol", "PROTOCOL"], "1 clip can be used"),
        (
            ["--real", "REAL", "--fake", "PICTURES", "--protocol", "PROTOCOL"],
            "holds pictures, so it is one video",
        ),
        (["--real", "REAL", "--fake", "FLOATS", "--protocol", "PROTOCOL"], "give --value-range"),
        (
            ["--real", "REAL", "--fake", "FLOATS", "--protocol", "PROTOCOL", "--value-range", "0..1"],
            "from -1 to 1, outside --value-range 0..1",
        ),
        (
            ["--real", "REAL", "--fake", "ONES", "--protocol", "PROTOCOL"],
            "all values of all clips are 0 or 1",
        ),
        (["--real", "REAL", "--fake", "MIXED", "--protocol", "PROTOCOL"], "mixed sizes: '0.npy' is 32x32"),
        (["--real", "REAL", "--fake", "SHORT", "--protocol", "PROTOCOL"], "'0.npy' has 15 frames"),
        (["--real", "REAL", "--fake", "CUT", "--protocol", "PROTOCOL"], "3 clips can be used"),
        (["--real", "REAL", "--fake", "SHAPE", "--protocol", "PROTOCOL"], "has the shape [4, 16, 3, 32, 32]"),
        (
            ["--real", "REAL", "--fake", "FAKES", "--protocol", "PROTOCOL", "--num-fakes", "9"],
            "6 clips can be used",
        ),
        (
            ["--real", "REAL", "--fake", "FAKES", "--protocol", "PROTOCOL", "--lists", "EMPTY"],
            "holds no train list",
        ),
        (
            ["--real", "REAL", "--fake", "FAKES", "--protocol", "PROTOCOL", "--weights", "no.pt"],
            "does not exist",
        ),
        (
            ["--real", "REAL", "--fake", "FAKES", "--protocol", "PROTOCOL", "--manifest", "no.json"],
            "cannot be read",
        ),
        (
            ["--real", "REAL", "--fake", "FAKES", "--protocol", "PROTOCOL", "--num-fakes", "1"],
            "allowed is 2 or more",
        ),
        (["--real", "REAL", "--fake", "FAKES", "--protocol", "PROTOCOL", "--protocoll", "x"], "unrecognized"),
        (["--metric", "throughput"], "belongs to a trained cell"),
        (
            [
                *("--fake", "FAKES", "--weights", "PROTOCOL"),
                *("--protocol", "hpdm/is10k_ucf", "--protocol", "tgan2_is/is2048_ucf"),
            ],
            "need 2 weight files (c3d_ucf101.pt, conv3d_deepnetA_ucf.npz)",
        ),
        (["SOMEWHERE", "--fake", "FAKES"], "is measured by --metric"),
        (
            ["--real", "FAKES", "--fake", "FAKES", "--protocol", "PROTOCOL", "--split", "train"],
            "no lists in or",
        ),
        (
            ["--real", "REAL", "--fake", "BESIDE", "--protocol", "PROTOCOL"],
            "holds pictures and videos (v.npy)",
        ),
        (["--fake", "FAKES", "--protocol", "SCORE"], "10 splits and 1 repeats need at least 10"),
    ],
)
def test_wrong_input_is_one_sentence(run, ucf, fakes, protocol, tmp_path, capsys, own_cache, arguments, said):
    places = {"REAL": ucf, "FAKES": fakes, "PROTOCOL": protocol(), **wrong_folders(tmp_path, fakes)}
    score = {"title": "IS", "measure": "inception_score", "reals": None, "score": {"splits": 10}}
    places["SCORE"] = protocol(**score)
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out.json"
    assert run(*(places.get(word, word) for word in arguments), "--out", out, "--bootstrap", 0) == 2
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0]
    assert shown.out == ""
    assert [path for path in sorted(tmp_path.rglob("*")) if own_cache not in (path, *path.parents)] == before


def wrong_folders(tmp_path, fakes):
    clip = np.load(fakes / "00.npy")
    floats = np.linspace(-1, 1, clip.size).reshape(clip.shape).astype(np.float32)
    arrays = {
        "EMPTY": [],
        "ONE": [clip],
        "FLOATS": [floats] * 4,
        "ONES": [clip // 255] * 4,
        "MIXED": [clip, clip[:, :, :30], clip, clip],
        "SHORT": [clip[:15], clip, clip, clip],
        "CUT": [clip] * 4,
        "SHAPE": [np.zeros((4, 16, 3, 32, 32), np.uint8)],
    }
    places = {}
    for name, clips in arrays.items():
        places[name] = tmp_path / name.lower()
        places[name].mkdir()
        for index, each in enumerate(clips):
            np.save(places[name] / f"{index}.npy", each)
    cut = places["CUT"] / "2.npy"
    cut.write_bytes(cut.read_bytes()[:1000])
    places["PICTURES"] = tmp_path / "pictures"
    places["PICTURES"].mkdir()
    (places["PICTURES"] / "0.png").write_bytes(b"")
    places["BESIDE"] = tmp_path / "beside"
    (places["BESIDE"] / "class").mkdir(parents=True)
    (places["BESIDE"] / "class" / "thumbnail.png").write_bytes(b"")
    np.save(places["BESIDE"] / "class" / "v.npy", clip)
    return places
