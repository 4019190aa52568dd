import hashlib
import sys
from pathlib import Path

import pytest

from hpdm_core.base.errors import InputError
from hpdm_core.plugins import build_plugins

OBJECTIVE = """
from hpdm_core import hookimpl


@hookimpl
def register_objectives(register):
    register("{key}", lambda: "{value}", source="me")
"""


def line_of(names) -> str:
    with pytest.raises(InputError) as caught:
        build_plugins(names)
    (line,) = caught.value.messages
    assert "\n" not in line
    return line


def test_a_file_is_hashed_and_named(plugin_file) -> None:
    file = plugin_file(OBJECTIVE.format(key="mine", value=1))
    plugins = build_plugins([file])
    made = plugins.get("objectives", "mine")
    assert made.sha256 == hashlib.sha256(Path(file).read_bytes()).hexdigest()
    assert (made.plugin, made.file, made.version) == ("mine", Path(file), None)
    assert plugins.names == (file,)


def test_an_edited_file_is_a_new_module_and_an_unchanged_one_is_not(plugin_file) -> None:
    file = plugin_file(OBJECTIVE.format(key="mine", value=1))
    first, again = (build_plugins([file]).get("objectives", "mine") for _ in range(2))
    assert first.factory.__code__ is again.factory.__code__
    plugin_file(OBJECTIVE.format(key="mine", value=2))
    edited = build_plugins([file]).get("objectives", "mine")
    assert (first.factory(), edited.factory()) == ("1", "2") and first.sha256 != edited.sha256


def test_names_rebuild_the_same_elsewhere(plugin_file, tmp_path, monkeypatch) -> None:
    plugin_file(OBJECTIVE.format(key="mine", value=1))
    monkeypatch.chdir(tmp_path)
    names = build_plugins(["mine.py", "./mine.py"]).names
    monkeypatch.chdir("/")
    assert names == (str(tmp_path / "mine.py"),)
    assert build_plugins(names).get("objectives", "mine")


def test_two_files_of_one_name(plugin_file, tmp_path) -> None:
    one = plugin_file(OBJECTIVE.format(key="one", value=1))
    other = tmp_path / "other" / "mine.py"
    other.parent.mkdir()
    other.write_text(OBJECTIVE.format(key="two", value=2))
    plugins = build_plugins([one, str(other)])
    assert {"one", "two"} <= set(plugins.keys("objectives"))


def test_a_file_that_does_not_import_leaves_nothing_behind(plugin_file) -> None:
    file = plugin_file("import torch\n\n1 / 0", head="")
    reason = f"{file}:3: ZeroDivisionError: division by zero"
    assert line_of([file]) == f"plugin '{file}' does not import: {reason}"
    assert not any(getattr(module, "__file__", None) == file for module in list(sys.modules.values()))


def test_a_file_with_a_syntax_error(plugin_file) -> None:
    file = plugin_file("x = 1\ndef f(:\n", head="")
    assert line_of([file]).startswith(f"plugin '{file}' does not import: {file}:2: SyntaxError: ")


def test_a_missing_file(plugin_file) -> None:
    file = plugin_file("")
    wrong = file.replace("mine.py", "mind.py")
    assert line_of([wrong]) == f"plugin '{wrong}': no such file - did you mean 'mine.py'?"


def test_an_unknown_module() -> None:
    assert "no module of this name" in line_of(["hpdm_plugin_that_is_not"])


def test_a_module_that_misses_another(tmp_path, monkeypatch) -> None:
    (tmp_path / "needs_more.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(str(tmp_path))
    line = line_of(["needs_more"])
    assert "does not import" in line and "needs_more.py:1" in line and "not_there_at_all" in line


def test_a_module_is_hashed(tmp_path, monkeypatch) -> None:
    (tmp_path / "a_module.py").write_text(OBJECTIVE.format(key="mine", value=1))
    monkeypatch.syspath_prepend(str(tmp_path))
    made = build_plugins(["a_module"]).get("objectives", "mine")
    assert made.plugin == "a_module" and len(made.sha256) == 64


def test_an_installed_plugin_has_a_version_and_no_hash(install) -> None:
    install("nice_plugin", OBJECTIVE.format(key="nice", value=1))
    made = build_plugins().get("objectives", "nice")
    assert (made.plugin, made.version, made.sha256) == ("nice_plugin", "1.2.3", None)
    assert build_plugins().versions()["nice_plugin"] == "1.2.3"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import not_there_at_all", "not_there_at_all"),
        ("", "has no hooks"),
        (OBJECTIVE.format(key="snap_v", value=1), "has registered already"),
    ],
)
def test_a_broken_installed_plugin_is_skipped_unless_it_is_named(install, source: str, reason: str) -> None:
    name = f"broken_{abs(hash(reason))}"
    install(name, source)
    (info,) = [info for info in build_plugins().infos if info.name == name]
    assert reason in info.skipped
    assert name in line_of([name])


def test_the_rest_works_beside_a_broken_one(install) -> None:
    install("broken_beside", "1 / 0")
    plugins = build_plugins()
    assert "snap_v" in plugins.keys("objectives")
    with pytest.raises(InputError, match="skipped as broken: broken_beside"):
        plugins.get("objectives", "nope")


def test_an_installed_class_is_refused(install) -> None:
    source = OBJECTIVE.format(key="x", value=1) + "\nclass Mine:\n    pass\n"
    install("with_class", source, value="with_class:Mine")
    (info,) = [info for info in build_plugins().infos if info.name == "with_class"]
    assert "Mine is a class; give an instance" in info.skipped


def test_every_built_in_loads() -> None:
    infos = build_plugins().infos
    assert [info.name for info in infos if info.skipped] == []
    assert len(infos) > 10 and {info.version for info in infos} == {infos[0].version}


def test_a_package_brings_presets(tmp_path, monkeypatch) -> None:
    package = tmp_path / "with_presets"
    (package / "presets").mkdir(parents=True)
    (package / "__init__.py").write_text(OBJECTIVE.format(key="mine", value=1))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package / "presets" in build_plugins(["with_presets"]).preset_folders
    assert package / "presets" not in build_plugins().preset_folders


def test_the_file_beside_a_presets_folder_brings_none(plugin_file, tmp_path) -> None:
    (tmp_path / "presets").mkdir()
    file = plugin_file(OBJECTIVE.format(key="mine", value=1))
    assert tmp_path / "presets" not in build_plugins([file]).preset_folders
