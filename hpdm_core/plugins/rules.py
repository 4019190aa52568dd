"""Rules for a plugin's hook functions that pluggy itself does not check.

pluggy registers a misspelt hook without an error and never calls it. It fails for a class only at the first call.
A parameter with a default is treated differently in different releases, and a keyword-only parameter raises only
when the hook is called. All this is checked here before anything runs.
"""

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from hpdm_core import hookspecs
from hpdm_core.base.errors import did_you_mean

__all__ = ["HOOKS", "RuleError", "hook_functions"]

HOOKS: dict[str, tuple[str, ...]] = {
    name: tuple(inspect.signature(function).parameters)
    for name, function in vars(hookspecs).items()
    if inspect.isfunction(function) and hasattr(function, "hpdm_spec")
}
"""Hook -> names of its parameters."""


class RuleError(Exception):
    """A plugin breaks a rule. The message is appended to "plugin NAME (FILE): "."""


def _marked(plugin: Any) -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    for name in dir(plugin):
        function = inspect.getattr_static(plugin, name)
        if isinstance(function, (staticmethod, classmethod)):
            function = function.__func__
        options = getattr(function, "hpdm_impl", None) if inspect.isroutine(function) else None
        if isinstance(options, dict):
            yield name, getattr(plugin, name), options


def hook_functions(plugin: Any) -> dict[str, Callable[..., Any]]:
    """Return hook name -> function for the plugin's functions marked ``@hookimpl``, after checking them.

    Raises RuleError for a class, an unknown hook, a wrapper of a registration hook, or a parameter that the hook does
    not pass.
    """
    if inspect.isclass(plugin):
        raise RuleError(f"{plugin.__name__} is a class; give an instance of it, or a module")
    found: dict[str, Callable[..., Any]] = {}
    for attribute, function, options in _marked(plugin):
        hook = options.get("specname") or attribute
        if hook not in HOOKS:
            nearest = did_you_mean(hook, HOOKS)
            raise RuleError(
                f"no hook '{hook}'{nearest or '; hooks are: ' + ', '.join(HOOKS)}{_place(function)}"
            )
        if hook.startswith("register_") and (options.get("wrapper") or options.get("hookwrapper")):
            raise RuleError(f"{hook} is marked as a wrapper; it should register{_place(function)}")
        _check_parameters(hook, function)
        found[hook] = function
    if not found:
        raise RuleError(f"has no hooks; mark a function with @hookimpl, for example {_example(plugin)}")
    return found


def _check_parameters(hook: str, function: Callable[..., Any]) -> None:
    given = HOOKS[hook]
    for parameter in inspect.signature(function).parameters.values():
        name = parameter.name
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            problem = "collects arguments, which pluggy never fills"
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            problem = "is keyword-only, and hooks are called with positional arguments"
        elif parameter.default is not inspect.Parameter.empty:
            problem = "has a default, which pluggy may use in place of the real value; remove it"
        elif name not in given:
            problem = f"is not one of ({', '.join(given)}){did_you_mean(name, given)}"
        else:
            continue
        raise RuleError(f"{hook}: argument '{name}' {problem}{_place(function)}")


def _place(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f" (line {code.co_firstlineno})" if code is not None else ""


def _example(plugin: Any) -> str:
    """Return a hint at the likeliest mistake: an undecorated function, or hooks inside a class of the module."""
    for name in dir(plugin):
        if name in HOOKS and inspect.isroutine(getattr(plugin, name)):
            return f"'{name}', which is not marked"
    if isinstance(plugin, ModuleType):
        for name, member in vars(plugin).items():
            if inspect.isclass(member) and member.__module__ == plugin.__name__ and any(_marked(member)):
                return f"in the module itself; class '{name}' has some, but a class is not looked into"
        for name, member in vars(plugin).items():
            if inspect.isfunction(member) and member.__module__ == plugin.__name__:
                nearest = did_you_mean(name, HOOKS)
                if nearest:
                    return f"'{name}'{nearest}"
    return "register_context_fusions(register)"
