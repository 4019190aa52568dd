"""The plugins of one run: an object made by `build_plugins`; there is no global registry.

It looks up parts by (family, key), validates their options and builds them; observers are called through ``hook``.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pluggy
from pydantic import BaseModel

from hpdm_core import hookspecs
from hpdm_core.base.errors import InputError, did_you_mean
from hpdm_core.config.problems import KeyPath, Problem, check
from hpdm_core.config.schema import Part
from hpdm_core.plugins import loading
from hpdm_core.plugins.families import FAMILIES, Family
from hpdm_core.plugins.options import FactoryError, handed, options_model, parts_of
from hpdm_core.plugins.rules import RuleError, hook_functions

__all__ = ["PluginInfo", "Plugins", "Registration", "build_plugins"]


@dataclass(frozen=True, kw_only=True)
class Registration:
    """A part registered under its key, and where it comes from."""

    family: str
    name: str
    factory: Callable[..., Any]
    source: str
    """Where the idea comes from, as the plugin's author states it."""
    plugin: str
    file: Path | None
    version: str | None
    """Version of the distribution that the plugin came with."""
    sha256: str | None
    """SHA-256 of a plugin's source that was named as a file or module; None for installed plugins."""
    options: type[BaseModel]


@dataclass(frozen=True, kw_only=True)
class PluginInfo:
    """A plugin that was found; ``skipped`` is the reason if it is not used."""

    name: str
    file: Path | None
    version: str | None
    sha256: str | None
    hooks: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    """What it registers, as FAMILY/KEY."""
    skipped: str | None = None


class Plugins:
    """The plugins in use. Make one with `build_plugins`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names: tuple[str, ...] = tuple(names)
        """The plugins that were named as a file or module; ``build_plugins(names)`` builds an equal object."""
        self.infos: list[PluginInfo] = []
        """Every plugin found, in order of registration, including skipped ones."""
        self.preset_folders: tuple[Path, ...] = ()
        """The ``presets`` folders of plugins that are packages."""
        self.study_folders: tuple[Path, ...] = ()
        """Their ``studies`` folders."""
        self.protocol_folders: tuple[Path, ...] = ()
        """Their ``protocols`` folders (`hpdm_core.metrics.protocols.records`)."""
        self.trained_folders: tuple[Path, ...] = ()
        """Their ``trained`` folders (`hpdm_core.training.trained`)."""
        self._registrations: dict[str, dict[str, Registration]] = {family: {} for family in FAMILIES}
        self._manager = pluggy.PluginManager("hpdm")
        self._manager.add_hookspecs(hookspecs)

    @property
    def hook(self) -> pluggy.HookRelay:
        """The lifecycle hooks; `hpdm_core.plugins.observers` calls them safely."""
        return self._manager.hook

    # Parts

    def keys(self, family: str) -> list[str]:
        """Return the keys of a family, sorted."""
        return sorted(self._registrations[self._family(family).name])

    def get(self, family: str, key: str) -> Registration:
        """Return the part ``key`` of ``family``. Raises InputError with the nearest key if there is none."""
        registered = self._registrations[self._family(family).name]
        if key not in registered:
            raise InputError(self.unknown(family, key))
        return registered[key]

    def unknown(self, family: str, key: str) -> str:
        """Return the error message for a ``key`` that ``family`` does not have."""
        skipped = [info.name for info in self.infos if info.skipped]
        return (
            f"unknown part '{key}' of {family}{did_you_mean(key, self.keys(family))}; "
            f"registered: {', '.join(self.keys(family)) or 'none'}"
            + (f" (plugins skipped as broken: {', '.join(skipped)})" if skipped else "")
        )

    def options(self, family: str, key: str) -> type[BaseModel]:
        """Return the pydantic model of the options of a part."""
        return self.get(family, key).options

    def models(self, family: str) -> dict[str, type[BaseModel]]:
        """Return key -> the pydantic model of the options, for every part of ``family``."""
        return {key: self.options(family, key) for key in self.keys(family)}

    def check(self, family: str, part: Part, path: KeyPath = ()) -> tuple[Part, list[Problem]]:
        """Return ``part`` with its options validated and every default filled in, and the list of its problems.

        ``path``: the path of the part within its document, which problems include. Returned options are JSON types.
        """
        if part.use not in self._registrations[self._family(family).name]:
            return part, [Problem((*path, "use"), self.unknown(family, part.use))]
        model = self.options(family, part.use)
        made, problems = check(model, part.options)
        if made is None:
            return part, [
                Problem((*path, *problem.path), f"{problem.message} (option of '{part.use}')")
                for problem in problems
            ]
        options = made.model_dump(mode="json")
        for option, (inner, value) in parts_of(model, made).items():
            options[option] = self._check_inside(inner, value, (*path, option), problems)
        return Part(use=part.use, options=options), problems

    def _check_inside(self, family: str, value: Any, path: KeyPath, problems: list[Problem]) -> Any:
        if isinstance(value, Part):
            checked, found = self.check(family, value, path)
            problems.extend(found)
            return checked.model_dump(mode="json")
        if isinstance(value, (list, tuple)):
            return [
                self._check_inside(family, item, (*path, index), problems) for index, item in enumerate(value)
            ]
        return value

    def validate(self, family: str, part: Part) -> Part:
        """Return ``part`` with its options validated and defaults filled in. Raises InputError with all problems."""
        checked, problems = self.check(family, part)
        if problems:
            raise InputError(*(f"{family}/{part.use}: {problem}" for problem in problems))
        return checked

    def make(self, family: str, part: Part, *positional: Any) -> Any:
        """Build a part: call its factory with the ``positional`` values that it takes, and with its validated options.

        ``positional``: the values of the family's positional parameters, optional ones at the end.
        """
        checked = self.validate(family, part)
        registration = self.get(family, part.use)
        made, problems = check(registration.options, checked.options)
        assert made is not None, f"validated options were refused: {problems}"
        values = {name: getattr(made, name) for name in registration.options.model_fields}
        return registration.factory(*handed(registration.factory, positional), **values)

    def nested(self, family: str, part: Part) -> Iterator[tuple[str, Part]]:
        """Yield (family, part) for a valid part and for every part in its options, recursively."""
        yield family, part
        model = self.options(family, part.use)
        made, _ = check(model, part.options)
        if made is not None:
            for inner, value in parts_of(model, made).values():
                for item in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(item, Part):
                        yield from self.nested(inner, item)

    def versions(self) -> dict[str, str]:
        """Return plugin -> version for the plugins in use; ``sha256:...`` for those named as a file or module."""
        return {
            info.name: f"sha256:{info.sha256}" if info.sha256 else str(info.version)
            for info in self.infos
            if info.skipped is None
        }

    def _family(self, family: str) -> Family:
        if family not in FAMILIES:
            raise InputError(
                f"unknown family '{family}'{did_you_mean(family, FAMILIES)}; families: {', '.join(FAMILIES)}"
            )
        return FAMILIES[family]

    # Loading

    def _add(self, candidate: loading.Candidate) -> None:
        """Register one plugin completely, or raise RuleError and register nothing."""
        functions = hook_functions(candidate.plugin)
        registrations: list[Registration] = []
        for hook, function in functions.items():
            if hook.startswith("register_"):
                family = FAMILIES[hook.removeprefix("register_")]
                self._collect(candidate, family, function, registrations)
        self._manager.register(candidate.plugin, name=candidate.name)
        self._manager.check_pending()
        for registration in registrations:
            self._registrations[registration.family][registration.name] = registration
        self.infos.append(
            PluginInfo(
                name=candidate.name,
                file=candidate.file,
                version=candidate.version,
                sha256=candidate.sha256,
                hooks=tuple(functions),
                keys=tuple(f"{made.family}/{made.name}" for made in registrations),
            )
        )

    def _collect(
        self,
        candidate: loading.Candidate,
        family: Family,
        function: Callable[..., Any],
        registrations: list[Registration],
    ) -> None:
        def register(name: str, factory: Callable[..., Any], *, source: str) -> None:
            if not isinstance(name, str) or not name.replace("_", "").isalnum() or not name.isascii():
                raise RuleError(
                    f"{family.hook}: the key {name!r} should be letters, digits and underscores only"
                )
            if not isinstance(source, str) or not source.strip():
                raise RuleError(
                    f"registers {family.name}/{name}: 'source' should say where the idea comes from"
                )
            taken = self._registrations[family.name].get(name) or next(
                (made for made in registrations if (made.family, made.name) == (family.name, name)), None
            )
            if taken is not None:
                raise RuleError(
                    f"registers {family.name}/{name}, which plugin '{taken.plugin}' "
                    f"({taken.file or 'no file'}) has registered already; choose another key"
                )
            try:
                options = options_model(family, name, factory)
            except FactoryError as error:
                raise RuleError(f"registers {family.name}/{name}: {error}") from error
            registrations.append(
                Registration(
                    family=family.name,
                    name=name,
                    factory=factory,
                    source=source,
                    plugin=candidate.name,
                    file=candidate.file,
                    version=candidate.version,
                    sha256=candidate.sha256,
                    options=options,
                )
            )

        arguments = (register,) if inspect.signature(function).parameters else ()
        try:
            function(*arguments)
        except RuleError:
            raise
        except Exception as error:
            raise RuleError(f"{family.hook} raised {type(error).__name__}: {error}") from error


def _folders(candidates: Iterable[loading.Candidate], name: str) -> tuple[Path, ...]:
    """Return the folders called ``name`` in the packages of plugins, each once."""
    folders: dict[Path, None] = {}
    for candidate in candidates:
        if getattr(candidate.plugin, "__package__", "") and candidate.file is not None:
            folder = (candidate.package or candidate.file.parent) / name
            if folder.is_dir():
                folders[folder] = None
    return tuple(folders)


def build_plugins(names: Sequence[str] = (), *, objects: Sequence[Any] = ()) -> Plugins:
    """Return the installed plugins and those called ``names``: paths to Python files, or modules.

    ``objects`` are instances with ``@hookimpl`` methods, for use as a library; worker processes cannot rebuild
    them. Raises InputError if a plugin in ``names`` or ``objects`` breaks a rule. An installed plugin that breaks
    one is skipped, with the reason in ``infos``.
    """
    resolved = dict.fromkeys(_resolved(name) for name in names)
    asked = [candidate for name in resolved for candidate in loading.named(name)]
    asked += [
        loading.Candidate(name=f"{type(item).__name__} {index}", plugin=item, file=None)
        for index, item in enumerate(objects)
    ]
    named_modules = {id(candidate.plugin) for candidate in asked}
    plugins = Plugins(tuple(resolved))
    found = [item for item in loading.installed() if item.reason or id(item.plugin) not in named_modules]
    taken: set[str] = set()
    for candidate in found:
        taken.add(candidate.name)
        reason = candidate.reason
        if reason is None:
            try:
                plugins._add(candidate)
                continue
            except RuleError as error:
                reason = str(error)
        plugins.infos.append(
            PluginInfo(
                name=candidate.name,
                file=candidate.file,
                version=candidate.version,
                sha256=None,
                skipped=reason,
            )
        )
    problems = []
    for candidate in asked:
        if candidate.name in taken:
            candidate = loading.Candidate(
                **{**vars(candidate), "name": f"{candidate.name} ({candidate.file})"}
            )
        taken.add(candidate.name)
        try:
            plugins._add(candidate)
        except RuleError as error:
            place = f" ({candidate.file})" if candidate.file is not None else ""
            problems.append(f"plugin '{candidate.name}'{place}: {error}")
    if problems:
        raise InputError(*problems)
    plugins.preset_folders = _folders([*found, *asked], "presets")
    plugins.study_folders = _folders([*found, *asked], "studies")
    plugins.protocol_folders = _folders([*found, *asked], "protocols")
    plugins.trained_folders = _folders([*found, *asked], "trained")
    return plugins


def _resolved(name: str) -> str:
    """Make paths absolute, so that a worker in another working directory finds them."""
    if name.endswith(".py") or "/" in name:
        return str(Path(name).expanduser().resolve())
    return name
