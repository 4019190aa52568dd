"""Numbers and warnings from features; results, and what may stand in one column."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from hpdm_core.base.errors import InputError
from hpdm_core.evaluation.extraction import Extracted
from hpdm_core.evaluation.folders.reading import ClipFacts
from hpdm_core.evaluation.scores import measured, warnings_about
from hpdm_core.metrics.__main__ import main as metrics
from hpdm_core.metrics.distances.frechet import frechet_distance
from hpdm_core.metrics.distances.inception_score import inception_score
from hpdm_core.metrics.distances.kernel import kernel_distance
from hpdm_core.metrics.distances.uncertainty import bootstrap
from hpdm_core.metrics.protocols.records import load_record
from hpdm_core.plugins import build_plugins

PLUGINS = build_plugins()
FVD = load_record("stylegan_v/fvd2048_16f", PLUGINS)
RNG = np.random.default_rng(0)
REALS, FAKES = RNG.normal(size=(400, 3)), RNG.normal(0.2, 1.1, size=(300, 3))


def test_a_distance_has_an_interval_and_a_limit():
    found = measured(FVD, REALS, FAKES, replicates=40)
    assert found["value"] == frechet_distance(REALS, FAKES, ddof=0)
    assert found["interval"]["low"] < found["value"] < found["interval"]["high"]
    limit = found["unlimited"]
    assert limit["value"] == pytest.approx(found["value"], rel=0.1) and limit["line_is_straight"]
    assert limit["points"]["300"] == pytest.approx(found["value"])
    few = measured(FVD, REALS, FAKES[:12], replicates=0)
    assert few["unlimited"] is None and few["interval"] is None
    json.dumps(found)


def test_divisor_and_kernel_are_the_records():
    gpt, kvd = load_record("videogpt/fvd256_16f", PLUGINS), load_record("digan/kvd2048_16f", PLUGINS)
    assert measured(gpt, REALS, FAKES, replicates=0)["value"] == frechet_distance(REALS, FAKES, ddof=1)
    found = measured(kvd, REALS, FAKES, replicates=0)
    assert found["value"] == kernel_distance(REALS, FAKES) and found["unlimited"] is None


def test_scores_are_split_shuffled_and_repeated_by_the_record():
    logits = RNG.normal(size=(60, 5)) * 3
    style, tgan = load_record("stylegan_v/isv2048_ucf", PLUGINS), load_record("tgan2_is/is2048_ucf", PLUGINS)
    expected = inception_score(logits, splits=10, shuffle=True)
    found = measured(style, None, logits, replicates=20)
    assert (found["value"], found["spread"]) == (expected.mean, expected.std)
    assert found["interval"]["low"] < found["value"] < found["interval"]["high"]
    parts = [inception_score(part, splits=1, epsilon=1e-20).mean for part in np.array_split(logits, 10)]
    found = measured(tgan, None, logits, replicates=0)
    assert found["value"] == pytest.approx(np.mean(parts)) and found["spread"] == pytest.approx(np.std(parts))
    assert found["spread_over"] == "10 repeats"
    # The interval is that of the mean over the repeats, of all clips.

    def mean(some):
        return np.mean([inception_score(part, epsilon=1e-20).mean for part in np.array_split(some, 10)])

    found = measured(tgan, None, logits, replicates=10)
    assert found["interval"] == pytest.approx(asdict(bootstrap(mean, logits, replicates=10)))


def side(features, **facts):
    usual = {
        "height": 8,
        "width": 8,
        "made_height": 8,
        "made_width": 8,
        "least": 0,
        "most": 255,
        "still": False,
    }
    seen = ClipFacts(**usual | facts)
    return Extracted(features, (), (seen,) * len(features), {})


def warned(reals, fakes, jpeg=()):
    return warnings_about(FVD, {"reals": reals, "fakes": fakes}, jpeg=dict(jpeg))


def test_nothing_is_said_of_sound_sides():
    assert warned(side(REALS), side(FAKES)) == []


@pytest.mark.parametrize(
    ("fakes", "said"),
    [
        (side(FAKES[:3]), "3 fakes for 3 features"),
        (side(FAKES, most=40), "no value is above 40 of 255"),
        (side(FAKES, least=200), "no value is below 200 of 255"),
        (side(FAKES, still=True), "300 of 300 clips do not move"),
        (side(FAKES, made_height=16), "reals come as 8x8, fakes as 16x8"),
        (side(np.repeat(FAKES[:100], 3, axis=0)), "only 100 of 300 clips are different"),
    ],
)
def test_what_may_be_wrong_is_said(fakes, said):
    (warning,) = warned(side(REALS), fakes)
    assert said in warning


def test_zeros_and_ones_are_refused():
    with pytest.raises(InputError, match="fakes: all values of all clips are 0 or 1"):
        warned(side(REALS), side(FAKES, most=1))


def test_a_codec_on_one_side_is_said_unless_both_are_coded():
    plain = load_record("hpdm/fvd10k_16f", PLUGINS)
    sides = {"reals": side(REALS), "fakes": side(FAKES)}
    (warning,) = warnings_about(plain, sides, jpeg={"reals": True, "fakes": False})
    assert "only the reals are JPEG" in warning
    assert warned(side(REALS), side(FAKES), {"reals": True, "fakes": False}) == []


def result(tmp_path, name, record, value, **more):
    data = {"protocol": record["name"], "title": "FVD", "record": record, "value": value}
    data["identity"] = record["identity"]
    file = tmp_path / name
    file.write_text(json.dumps({"format": 1, "results": [data | more]}))
    return str(file)


RECORD = {"name": "hpdm/fvd10k_16f", "identity": "aaa", "fakes": {"count": 10000}, "quirks": ["one"]}


def test_equal_records_share_a_column_and_others_never_do(tmp_path, capsys):
    a, b = (result(tmp_path, name, RECORD, value) for name, value in (("a.json", 1.5), ("b.json", 2.5)))
    other = {**RECORD, "identity": "bbb", "fakes": {"count": 512}, "quirks": []}
    c = result(tmp_path, "c.json", other, 9.5, modified=["fakes.count 10000 -> 512"])
    assert metrics(["compare", a, b]) == 0
    shown = capsys.readouterr().out
    assert "the records are equal" in shown and "do not compare" not in shown
    assert metrics(["compare", a, c]) == 0
    shown = capsys.readouterr().out
    assert "do not compare; their records differ in:\n\n  identity" in shown
    assert "fakes.count: 10000 | 512" in shown and "quirks" not in shown
    lines = {line.split()[0]: line for line in shown.splitlines() if line.startswith(str(tmp_path))}
    assert lines[a].index("1.5") != lines[c].index("9.5")
    assert "(modified)" in shown


@pytest.mark.parametrize("content", ["{", "[]", '{"results": [{}]}', None])
def test_other_files_are_wrong_input(tmp_path, content):
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError):
        metrics(["compare", str(file)])


def test_protocols_are_listed_and_shown_whole(capsys):
    assert metrics(["protocols"]) == 0
    assert "| `stylegan_v/fvd2048_16f`" in capsys.readouterr().out
    assert metrics(["protocols", "stylegan_v/fvd2048_16f"]) == 0
    import yaml

    assert yaml.safe_load(capsys.readouterr().out)["reals"]["prepare"]["jpeg_quality"] == 75
