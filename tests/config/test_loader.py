import pytest

from hpdm_core.base.errors import InputError
from hpdm_core.config.loader import load_yaml, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        (".inf", float("inf")),
        ("12", 12),
        ("-3", -3),
        ("0x1f", 31),
        ("0o17", 15),
        ("017", 17),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("n", "n"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2020-01-01", "2020-01-01"),
        ("<<", "<<"),
        ("'1'", "1"),
        ("!!str 5", "5"),
        ("[1, a, {b: 2.0}]", [1, "a", {"b": 2.0}]),
    ],
)
def test_values_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = parse_value(text, "test")
    assert read == value and type(read) is type(value)


def lines_of(folder, text: str | bytes, name: str = "x.yaml") -> list[str]:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        load_yaml(name)
    return list(caught.value.messages)


def test_every_duplicate_key_is_named_with_both_lines(folder) -> None:
    assert lines_of(folder, "a: 1\nb:\n  c: 1\n  c: 2\na: 2\n") == [
        "x.yaml:4: duplicate key 'b.c', first given in line 3",
        "x.yaml:5: duplicate key 'a', first given in line 1",
    ]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("", "x.yaml: empty"),
        ("# nothing\n", "x.yaml: empty"),
        ("- 1\n", "x.yaml: should be a mapping of keys to values, got a list"),
        ("a: [1\nb: 2\n", "x.yaml:2: not valid YAML: "),
        ("a: 1\n b: 2\n", "x.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 1\n", "x.yaml:2: not valid YAML: "),
        ("a: *x\n", "x.yaml:1: not valid YAML: found undefined alias"),
        ("a: &x [*x]\n", "x.yaml:1: an alias that contains itself"),
        ("a: !!python/name:os.system x\n", "x.yaml:1: the tag "),
        ("a: !!int x\n", "x.yaml:1: 'x' is not a int"),
        ("1: x\n", "x.yaml:1: the key '1' should be text; quote it"),
        ("[1, 2]: x\n", "x.yaml:1: the key"),
        ("a: \x07\n", "x.yaml: not valid YAML: "),
        (b"a: \xff\n", "x.yaml: not a text file in UTF-8"),
    ],
)
def test_what_is_no_configuration_is_one_line(folder, text, start: str) -> None:
    (line,) = lines_of(folder, text)
    assert line.startswith(start) and "\n" not in line


def test_deep_nesting_is_an_error_of_the_file(folder) -> None:
    assert "nested too deeply" in lines_of(folder, "a: " + "[" * 1500 + "]" * 1500)[0]


def test_a_missing_file_and_a_folder(folder) -> None:
    with pytest.raises(InputError, match=r"^bas\.yaml: no such file - did you mean 'base\.yaml'"):
        load_yaml("bas.yaml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_yaml(folder)


def test_where(folder) -> None:
    (folder / "x.yaml").write_text("a:\n  b: 1\n  c:\n    - 1\n    - {d: 2}\n")
    document = load_yaml("x.yaml")
    places = [(), ("a",), ("a", "b"), ("a", "nope"), ("a", "c", 1), ("a", "c", 1, "d"), ("z",)]
    assert [document.where(path) for path in places] == [
        "x.yaml",
        "x.yaml:1",
        "x.yaml:2",
        "x.yaml:1",
        "x.yaml:5",
        "x.yaml:5",
        "x.yaml",
    ]


def test_an_alias_is_read_twice(folder) -> None:
    (folder / "x.yaml").write_text("a: &x {b: 1}\nc: *x\n")
    data = load_yaml("x.yaml").data
    assert data == {"a": {"b": 1}, "c": {"b": 1}} and data["a"] is not data["c"]
