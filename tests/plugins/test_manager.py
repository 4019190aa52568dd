import pytest

from hpdm_core.base.errors import InputError
from hpdm_core.config.schema import Part
from hpdm_core.plugins import build_plugins

PLUGIN = """
@hookimpl
def register_context_fusions(register):
    def fusion(shape, *, width: int = 3, ends: tuple[float, ...] = (1.0,)):
        return shape, width, ends
    register("wide", fusion, source="me")

@hookimpl
def register_feature_extractors(register):
    def one(*, seed: int = 0): ...
    register("one", one, source="me")

@hookimpl
def register_metrics(register):
    def far(*, extractor: Annotated[Part, "feature_extractors"] = Part(use="one"),
            more: tuple[Annotated[Part, "feature_extractors"], ...] = ()):
        return extractor, more
    register("far", far, source="me")
"""


@pytest.fixture
def plugins(plugin_file):
    return build_plugins([plugin_file(PLUGIN)])


def part(value) -> Part:
    return Part.model_validate(value)


def test_validate_fills_defaults_in_plain_types(plugins) -> None:
    made = plugins.validate("context_fusions", part({"use": "wide", "ends": (1, 2)}))
    assert made.model_dump() == {"use": "wide", "width": 3, "ends": [1.0, 2.0]}
    assert plugins.validate("context_fusions", made) == made
    assert Part.model_validate_json(made.model_dump_json()) == made


def test_make_hands_over_typed_options(plugins) -> None:
    made = plugins.make("context_fusions", part({"use": "wide", "ends": [4]}), "shape")
    assert made == ("shape", 3, (4.0,))


def test_unknown_part_and_family(plugins) -> None:
    with pytest.raises(InputError, match="unknown part 'wid' of context_fusions - did you mean 'wide'"):
        plugins.get("context_fusions", "wid")
    with pytest.raises(InputError, match="unknown family 'metric' - did you mean 'metrics'"):
        plugins.get("metric", "far")


def test_every_wrong_option_is_named(plugins) -> None:
    with pytest.raises(InputError) as caught:
        plugins.validate("context_fusions", part({"use": "wide", "widht": 1, "ends": 2}))
    assert len(caught.value.messages) == 2
    assert "widht: unknown key - did you mean 'width'?" in str(caught.value)


def test_a_part_within_a_part_is_validated_and_handed_on(plugins) -> None:
    made = plugins.validate("metrics", part({"use": "far", "more": ["one", {"use": "one", "seed": 4}]}))
    assert made.options == {
        "extractor": {"use": "one", "seed": 0},
        "more": [{"use": "one", "seed": 0}, {"use": "one", "seed": 4}],
    }
    extractor, more = plugins.make("metrics", made)
    assert extractor == Part(use="one", options={"seed": 0}) and more[1].options == {"seed": 4}
    assert [(family, each.use) for family, each in plugins.nested("metrics", made)] == [
        ("metrics", "far"),
        *[("feature_extractors", "one")] * 3,
    ]


def test_problems_within_a_part_within_a_part(plugins) -> None:
    wrong = part({"use": "far", "extractor": {"use": "one", "sed": 1}})
    _, problems = plugins.check("metrics", wrong, ("m", 0))
    assert [problem.path for problem in problems] == [("m", 0, "extractor", "sed")]
    _, problems = plugins.check("metrics", part({"use": "far", "more": ["on"]}), ("m", 0))
    assert [problem.path for problem in problems] == [("m", 0, "more", 0, "use")]


def test_managers_share_nothing(plugins) -> None:
    assert "wide" not in build_plugins().keys("context_fusions")


def test_observers_are_called_by_the_name_of_their_arguments(plugin_file) -> None:
    body = "seen = []\n@hookimpl\ndef after_step_finished(loss, cell): seen.append((loss, cell))"
    body += "\n@hookimpl\ndef register_objectives(register): register('seen', lambda: seen, source='me')"
    plugins = build_plugins([plugin_file(body)])
    plugins.hook.after_step_finished(cell="cell", step=1, loss="loss")
    assert plugins.make("objectives", Part(use="seen")) == [("loss", "cell")]
