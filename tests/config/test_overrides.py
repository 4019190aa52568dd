import pytest

from hpdm_core.base.errors import InputError
from hpdm_core.config.overrides import Layers, Override, parse_arm, parse_set, part_paths


def merged(*layers: dict) -> Layers:
    made = Layers()
    for number, layer in enumerate(layers):
        made.merge(layer, lambda path, number=number: f"{number}:{'/'.join(map(str, path))}")
    return made


def test_mappings_merge_and_lists_replace() -> None:
    made = merged({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}, "d": 4})
    assert made.data == {"a": {"b": 1, "c": [3]}, "d": 4}


def test_part_paths() -> None:
    assert ("model", "context_fusion") in part_paths() and ("backend",) in part_paths()
    assert ("model", "video") not in part_paths()


@pytest.mark.parametrize(
    ("over", "result"),
    [
        ("none", {"use": "none"}),
        ({"use": "none", "z": 1}, {"use": "none", "z": 1}),
        ("deep", {"use": "deep", "detach": True, "n": {"x": 1}}),
        ({"use": "deep", "detach": False}, {"use": "deep", "detach": False, "n": {"x": 1}}),
        ({"n": {"y": 2}}, {"use": "deep", "detach": True, "n": {"x": 1, "y": 2}}),
    ],
)
def test_naming_another_part_drops_the_old_ones_options(over: object, result: dict) -> None:
    old = {"model": {"context_fusion": {"use": "deep", "detach": True, "n": {"x": 1}}}}
    assert merged(old, {"model": {"context_fusion": over}}).data["model"]["context_fusion"] == result


def test_options_for_a_part_that_was_a_bare_name() -> None:
    made = merged({"model": {"context_fusion": "deep"}}, {"model": {"context_fusion": {"detach": True}}})
    assert made.data["model"]["context_fusion"] == {"use": "deep", "detach": True}


def test_origins_follow_the_last_layer_that_set_a_key() -> None:
    made = merged({"a": {"b": 1, "c": [{"x": 1}]}, "e": 1}, {"a": {"c": [2]}})
    assert made.where(("a", "b")) == "0:a/b"
    assert made.where(("a", "c", 0)) == "1:a/c/0"
    assert made.where(("a", "c", 0, "x")) == "1:a/c/0"  # what was replaced is forgotten
    assert made.where(("e",)) == "0:e"
    assert made.where(("nope",)) == "configuration"


def test_layers_do_not_share_what_they_were_given() -> None:
    given = {"a": {"b": [1]}}
    made = merged(given, {"a": {"c": 2}})
    copy = made.copy()
    copy.apply(Override(("a", "b"), [5], lambda path: "x"))
    copy.data["a"]["c"] = 9
    assert given == {"a": {"b": [1]}} and made.data == {"a": {"b": [1], "c": 2}}


def test_parse_set() -> None:
    override = parse_set("model.context_fusion={use: deep, detach: true}")
    assert override.path == ("model", "context_fusion") and override.value == {"use": "deep", "detach": True}
    assert override.where(()) == "--set model.context_fusion={use: deep, detach: true}"
    assert parse_set("training.learning_rate=1e-4").value == 1e-4
    assert parse_set("a=b=c").value == "b=c"


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", "a=[1", ".a=1"])
def test_wrong_sets_name_the_flag(text: str) -> None:
    with pytest.raises(InputError, match=r"^--set ") as caught:
        parse_set(text)
    assert len(caught.value.messages) == 1 and text in str(caught.value)


def test_parse_arm_splits_at_outer_commas() -> None:
    name, overrides = parse_arm("mine:a.b={use: x, y: [1, 2]},c='p,q',d=1e-4")
    assert name == "mine"
    assert [(each.path, each.value) for each in overrides] == [
        (("a", "b"), {"use": "x", "y": [1, 2]}),
        (("c",), "p,q"),
        (("d",), 1e-4),
    ]
    assert parse_arm("mine")[1] == []


@pytest.mark.parametrize("text", [":a=1", "mine:a", "mine:a=1,b"])
def test_wrong_arms_name_the_flag(text: str) -> None:
    with pytest.raises(InputError, match=r"^--arm "):
        parse_arm(text)
