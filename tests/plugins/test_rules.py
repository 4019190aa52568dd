"""pluggy's traps, each made an error that names the plugin, the file and what to write instead."""

import re

import pluggy
import pytest

from hpdm_core.base.errors import InputError
from hpdm_core.hookspecs import hookimpl
from hpdm_core.plugins import build_plugins
from hpdm_core.plugins.families import FAMILIES
from hpdm_core.plugins.rules import HOOKS


def refused(plugin_file, body: str, *wanted: str) -> None:
    file = plugin_file(body)
    with pytest.raises(InputError) as caught:
        build_plugins([file])
    (line,) = caught.value.messages
    assert line.startswith(f"plugin 'mine' ({file}): "), line
    for words in wanted:
        assert words in line, line


def test_every_family_has_its_hook() -> None:
    registering = {name for name in HOOKS if name.startswith("register_")}
    assert {family.hook for family in FAMILIES.values()} == registering


def test_misspelt_hook(plugin_file) -> None:
    body = "@hookimpl\ndef register_solver(register): ..."
    refused(plugin_file, body, "no hook 'register_solver'", "did you mean 'register_solvers'?", "(line 11)")


def test_misspelt_hook_by_specname(plugin_file) -> None:
    refused(plugin_file, "@hookimpl(specname='register_solver')\ndef f(register): ...", "'register_solver'")


def test_misspelt_hook_marked_optional_is_misspelt_all_the_same(plugin_file) -> None:
    refused(plugin_file, "@hookimpl(optionalhook=True)\ndef register_solver(register): ...", "no hook")


def test_pluggy_is_asked_for_hooks_that_nothing_calls(plugin_file, monkeypatch) -> None:
    monkeypatch.setitem(HOOKS, "after_nothing", ())  # our own rule is made blind
    with pytest.raises(pluggy.PluginValidationError, match="unknown hook 'after_nothing'"):
        build_plugins([plugin_file("@hookimpl\ndef after_nothing(): ...")])


def test_argument_with_a_default(plugin_file) -> None:
    body = "@hookimpl\ndef after_step_finished(cell, step=0): ..."
    refused(plugin_file, body, "after_step_finished: argument 'step' has a default", "remove it")


def test_keyword_only_argument(plugin_file) -> None:
    refused(plugin_file, "@hookimpl\ndef after_step_finished(*, step): ...", "'step' is keyword-only")


@pytest.mark.parametrize("argument", ["*things", "**things"])
def test_collecting_argument(plugin_file, argument: str) -> None:
    body = f"@hookimpl\ndef after_step_finished({argument}): ..."
    refused(plugin_file, body, "argument 'things' collects arguments")


def test_unknown_argument(plugin_file) -> None:
    body = "@hookimpl\ndef after_step_finished(cell, steps): ..."
    refused(plugin_file, body, "'steps' is not one of (cell, step, loss)", "did you mean 'step'?")


@pytest.mark.parametrize("mark", ["wrapper=True", "hookwrapper=True"])
def test_wrapper(plugin_file, mark: str) -> None:
    refused(plugin_file, f"@hookimpl({mark})\ndef register_solvers(register): yield", "wrapper")


def test_no_hooks(plugin_file) -> None:
    refused(plugin_file, "x = 1", "has no hooks", "@hookimpl")


def test_forgotten_decorator_is_pointed_at(plugin_file) -> None:
    refused(plugin_file, "def register_solvers(register): ...", "'register_solvers', which is not marked")


def test_undecorated_and_misspelt_is_pointed_at(plugin_file) -> None:
    refused(plugin_file, "def register_solverss(register): ...", "did you mean 'register_solvers'?")


def test_hooks_in_a_class_of_the_module_are_pointed_at(plugin_file) -> None:
    body = "class Mine:\n    @hookimpl\n    def register_solvers(self, register): ..."
    refused(plugin_file, body, "class 'Mine'", "not looked into")


class Observer:
    def __init__(self) -> None:
        self.steps: list[int] = []

    @hookimpl
    def after_step_finished(self, step: int) -> None:
        self.steps.append(step)


def test_a_class_instead_of_an_instance() -> None:
    with pytest.raises(InputError, match="Observer is a class; give an instance"):
        build_plugins(objects=[Observer])


def test_an_instance_observes() -> None:
    observer = Observer()
    plugins = build_plugins(objects=[observer])
    plugins.hook.after_step_finished(cell=None, step=3, loss=None)
    assert observer.steps == [3]


def test_two_plugins_with_one_key(plugin_file) -> None:
    body = """
@hookimpl
def register_objectives(register):
    register("snap_v", lambda: None, source="me")
"""
    file = plugin_file(body)
    words = re.escape(f"plugin 'mine' ({file}): registers objectives/snap_v")
    with pytest.raises(InputError, match=words) as caught:
        build_plugins([file])
    assert "'hpdm_plugins.diffusion.objectives'" in str(caught.value) and "objectives.py" in str(caught.value)


def test_one_plugin_with_a_key_twice(plugin_file) -> None:
    body = """
@hookimpl
def register_objectives(register):
    register("mine", lambda: None, source="me")
    register("mine", lambda: None, source="me")
"""
    refused(plugin_file, body, "registers objectives/mine, which plugin 'mine'")


def test_one_key_in_two_families_is_fine(plugin_file) -> None:
    body = """
@hookimpl
def register_objectives(register):
    register("mine", lambda: None, source="me")
@hookimpl
def register_solvers(register):
    register("mine", lambda sigma_in: None, source="me")
"""
    plugins = build_plugins([plugin_file(body)])
    assert "mine" in plugins.keys("objectives") and "mine" in plugins.keys("solvers")


@pytest.mark.parametrize("key", ["a/b", "", "a b", "ä"])
def test_a_key_that_no_file_can_name(plugin_file, key: str) -> None:
    body = f"@hookimpl\ndef register_objectives(register): register({key!r}, lambda: None, source='me')"
    refused(plugin_file, body, "should be letters, digits and underscores")


def test_a_part_without_a_source(plugin_file) -> None:
    body = "@hookimpl\ndef register_objectives(register): register('mine', lambda: None, source=' ')"
    refused(plugin_file, body, "objectives/mine", "'source'")


def test_a_hook_that_raises(plugin_file) -> None:
    body = "@hookimpl\ndef register_objectives(register): raise KeyError('x')"
    refused(plugin_file, body, "register_objectives raised KeyError: 'x'")


def test_all_broken_plugins_are_named_at_once(plugin_file) -> None:
    files = [plugin_file("", "one"), plugin_file("", "two")]
    with pytest.raises(InputError) as caught:
        build_plugins(files)
    assert len(caught.value.messages) == 2
