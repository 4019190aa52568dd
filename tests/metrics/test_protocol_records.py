"""Protocol records: the shipped ones are right and frozen, anybody's own are checked to the last key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from hpdm_core.base.errors import InputError
from hpdm_core.metrics.protocols.records import differences, identity_of, known_protocols, load_record
from hpdm_core.plugins import build_plugins

PLUGINS = build_plugins()
KNOWN = known_protocols(PLUGINS)
IDENTITIES = {name: identity_of(load_record(name, PLUGINS).model_dump(mode="json")) for name in KNOWN}


def test_the_issue_families_are_there():
    assert {
        "stylegan_v/fvd2048_16f",
        "stylegan_v/fvd2048_128f",
        "stylegan_v/fvd2048_128f_subsample8f",
        "stylegan_v/isv2048_ucf",
        "hpdm/fvd10k_16f",
        "hpdm/fvd10k_64f",
        "hpdm/fvd512_16x64x64",
        "hpdm/fvd512_32x128x128",
        "hpdm/fvd512_64x256x256",
        "videogpt/fvd256_16f",
        "cdfvd_i3d/fvd2048_16f",
        "tgan2_is/is2048_ucf",
    } <= set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_each_is_called_as_its_file_and_stands_alone(name):
    record = load_record(name, PLUGINS)
    assert record.name == name
    assert record.quirks and record.source
    assert list(IDENTITIES.values()).count(IDENTITIES[name]) == 1
    with pytest.raises(ValidationError):
        record.ddof = 1


def test_published_quirks_are_in_the_records():
    """StyleGAN-V's code, VideoGPT's and TGAN2's, as their repositories have it."""
    style = load_record("stylegan_v/fvd2048_16f", PLUGINS)
    assert (style.ddof, style.detector.options["epsilon"], style.detector.options["resize"]) == (
        0,
        1e-3,
        "squash",
    )
    assert (style.reals.choose, style.reals.order, style.reals.count, style.reals.fewer) == (
        "first",
        "name",
        2048,
        "use_all",
    )
    assert (style.reals.offset, style.fakes.offset) == ("random", "start")
    assert (style.reals.short, style.fakes.short, style.reals.reach) == (
        "drop",
        "refuse",
        "frames_times_stride",
    )
    assert (style.reals.prepare.jpeg_quality, style.fakes.prepare.jpeg_quality) == (75, 75)
    assert (style.reals.prepare.quantise, style.fakes.prepare.quantise) == ("round", "truncate")
    gpt = load_record("videogpt/fvd256_16f", PLUGINS)
    assert (gpt.ddof, gpt.detector.options["epsilon"], gpt.detector.options["input_range"]) == (
        1,
        1e-5,
        "-1..1",
    )
    tgan = load_record("tgan2_is/is2048_ucf", PLUGINS)
    assert (tgan.fakes.count, tgan.score.repeats, tgan.score.splits, tgan.score.epsilon) == (
        20480,
        10,
        1,
        1e-20,
    )
    score = load_record("stylegan_v/isv2048_ucf", PLUGINS).score
    assert (score.splits, score.shuffle, score.epsilon) == (10, "numpy_42", 0)
    hpdm = load_record("hpdm/fvd10k_16f", PLUGINS)
    assert (hpdm.fakes.count, hpdm.reals.split, hpdm.frames, hpdm.reals.window) == (10000, "train", 16, 64)


def test_numbers_that_do_not_compare_differ_in_named_fields():
    first, second = (
        load_record(name, PLUGINS).model_dump(mode="json") for name in ("hpdm/fvd10k_16f", "hpdm/fvd2048_16f")
    )
    assert differences(first, second) == [
        ("name", "hpdm/fvd10k_16f", "hpdm/fvd2048_16f"),
        ("fakes.count", 10000, 2048),
    ]
    assert differences(first, first) == []
    assert differences({"a": {"b": 1}, "quirks": [1]}, {"a": {}, "c": None, "quirks": []}) == [
        ("a.b", 1, "(absent)"),
        ("a", "(absent)", {}),
        ("c", "(absent)", None),
    ]


def own(tmp_path: Path, **changes: object) -> str:
    data = yaml.safe_load(KNOWN["stylegan_v/fvd2048_16f"].read_text()) | {"name": "mine/one"}
    for key, value in changes.items():
        inside = data
        *steps, last = key.split("__")
        for step in steps:
            inside = inside[step]
        inside[last] = value
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(data))
    return str(file)


def test_notes_do_not_change_what_a_record_is(tmp_path):
    a = load_record(own(tmp_path), PLUGINS).model_dump(mode="json")
    b = load_record(own(tmp_path, quirks=["another"], choices=[], source="me"), PLUGINS).model_dump(
        mode="json"
    )
    c = load_record(own(tmp_path, reals__stride=2), PLUGINS).model_dump(mode="json")
    assert identity_of(a) == identity_of(b) != identity_of(c)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reals__strid": 2}, "reals.strid: unknown key - did you mean 'stride'?"),
        ({"frame": 2}, "frame: unknown key - did you mean 'frames'?"),
        ({"frames": 1}, "frames: should be greater than or equal to 2"),
        ({"detector": {"use": "i3d", "epsilom": 1}}, "did you mean 'epsilon'?"),
        ({"detector": "i3f"}, "did you mean 'i3d'?"),
        ({"reals__choose": "some"}, "reals.choose"),
        ({"reals__prepare__jpeg_quality": 0}, "reals.prepare.jpeg_quality"),
        ({"reals": None}, "reals: missing; a frechet distance compares with reals"),
        ({"score": {"splits": 2}}, "score: belongs to an inception_score, not to a frechet distance"),
        ({"measure": "inception_score"}, "reals: an inception_score compares with no reals"),
        ({"measure": "inception_score"}, "score: missing; an inception_score says its splits"),
        ({"detector": "random3d"}, "title: 'FVD' is a distance on i3d; on random3d it has another name"),
        ({"measure": "kernel"}, "title: 'FVD' is a frechet, not a kernel"),
        ({"name": "stylegan_v/fvd2048_16f", "ddof": 1}, "is a known protocol, and this file differs from it"),
        ({"name": "a b"}, "name"),
        ({"format": 2}, "format"),
    ],
)
def test_wrong_records_are_told_by_file_line_and_key(tmp_path, changes, said):
    file = own(tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        load_record(file, PLUGINS)
    assert any(said in message and message.startswith(file) for message in caught.value.messages)


def test_a_copy_of_a_known_protocol_is_that_protocol(tmp_path):
    file = own(tmp_path, name="stylegan_v/fvd2048_16f")
    assert load_record(file, PLUGINS) == load_record("stylegan_v/fvd2048_16f", PLUGINS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("hpdm/fvd10k_16", "did you mean 'hpdm/fvd10k_16f'?"),
        ("fvd10k_64f", "did you mean 'hpdm/fvd10k_64f'?"),
        ("nothing", "hpdm/{fvd10k_16f"),
        ("nowhere.yaml", "no such file"),
    ],
)
def test_unknown_names_are_one_line(given, said):
    with pytest.raises(InputError) as caught:
        load_record(given, PLUGINS)
    (message,) = caught.value.messages
    assert said in message


def test_a_plugin_package_brings_protocols(tmp_path, monkeypatch):
    package = tmp_path / "with_protocols"
    (package / "protocols" / "mine").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from hpdm_core import hookimpl\n\n\n@hookimpl\ndef register_objectives(register):\n    pass\n"
    )
    text = Path(own(tmp_path)).read_text()
    (package / "protocols" / "mine" / "one.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = build_plugins(["with_protocols"])
    assert load_record("mine/one", plugins).name == "mine/one"
