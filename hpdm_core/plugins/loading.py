"""Finds plugins: installed ones by the entry-point group ``hpdm``, and those named as a file or a module.

No folder is scanned. A package may contain several plugins: it lists its submodules in ``PLUGIN_MODULES``.
"""

import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import Any

from hpdm_core.base.errors import InputError, did_you_mean

__all__ = ["GROUP", "Candidate", "installed", "named"]

GROUP = "hpdm"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plugin that was looked for: either loaded as ``plugin``, or not loaded, with the ``reason``.

    ``name``: unique among plugins; ``file``: where it was loaded from; ``version``: of its distribution; ``sha256``: of
    its source, for a plugin named as a file or module, which may change without a new version; ``package``: the folder
    of the package that lists it in PLUGIN_MODULES.
    """

    name: str
    plugin: Any = None
    file: Path | None = None
    version: str | None = None
    sha256: str | None = None
    reason: str | None = None
    package: Path | None = None


def installed() -> Iterator[Candidate]:
    """Yield the plugins of the entry-point group, built-in ones first, then by name; broken ones with the reason."""
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.name != "hpdm_plugins", point.name))
    seen = set()
    for point in points:
        if (point.name, point.value) not in seen:
            seen.add((point.name, point.value))
            yield from _from_entry_point(point)


def _from_entry_point(point: EntryPoint) -> Iterator[Candidate]:
    number = point.dist.version if point.dist is not None else None
    try:
        plugin = point.load()
    except Exception as error:
        yield Candidate(name=point.name, version=number, reason=_import_reason(error))
        return
    yield from _expanded(Candidate(name=point.name, plugin=plugin, file=_file(plugin), version=number))


def _expanded(candidate: Candidate) -> Iterator[Candidate]:
    """Yield the plugins that a package lists in PLUGIN_MODULES, or the plugin itself."""
    plugin = candidate.plugin
    modules = getattr(plugin, "PLUGIN_MODULES", None) if isinstance(plugin, ModuleType) else None
    if modules is None:
        yield candidate
        return
    for module in modules:
        name = f"{plugin.__name__}.{module}"
        try:
            loaded = importlib.import_module(name)
        except Exception as error:
            yield Candidate(name=name, version=candidate.version, reason=_import_reason(error))
        else:
            yield Candidate(
                name=name,
                plugin=loaded,
                file=_file(loaded),
                version=candidate.version,
                sha256=candidate.sha256,
                package=None if candidate.file is None else candidate.file.parent,
            )


def named(name: str) -> list[Candidate]:
    """Return the plugins called ``name``: a path to a Python file, or a module that can be imported.

    Raises InputError with one line when there is no such file or module or when it cannot be imported.
    """
    if name.endswith(".py") or "/" in name or "\\" in name:
        return [_from_file(Path(name))]
    try:
        plugin = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise InputError(f"plugin '{name}' does not import: {_import_reason(error)}") from None
        known = [point.name for point in entry_points(group=GROUP)]
        raise InputError(
            f"plugin '{name}': no module of this name can be imported, and it is not a path to a .py file"
            f"{did_you_mean(name, known)}"
        ) from None
    except Exception as error:
        raise InputError(f"plugin '{name}' does not import: {_import_reason(error)}") from None
    candidate = Candidate(
        name=name,
        plugin=plugin,
        file=_file(plugin),
        version=_version(name),
        sha256=_source_hash(plugin),
    )
    return list(_expanded(candidate))


def _from_file(path: Path) -> Candidate:
    path = path.expanduser().resolve()
    if not path.is_file():
        siblings = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise InputError(f"plugin '{path}': no such file{did_you_mean(path.name, siblings)}")
    source = path.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    stem = re.sub(r"\W", "_", path.stem)
    # The module name depends on path and content: an edited file is a new module, an unchanged one is loaded once.
    place = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"hpdm_plugin_{stem}_{place}_{digest[:16]}"
    module = sys.modules.get(name)
    if module is None:
        specification = importlib.util.spec_from_file_location(name, path)
        if specification is None or specification.loader is None:
            raise InputError(f"plugin '{path}': not a Python file; its name should end in .py")
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module
        try:
            # Compiled from the bytes that were hashed, never from a bytecode cache, which may be out of date.
            exec(compile(source, str(path), "exec"), module.__dict__)
        except BaseException as error:
            del sys.modules[name]
            if not isinstance(error, Exception | SystemExit):
                raise
            raise InputError(f"plugin '{path}' does not import: {_import_reason(error, path)}") from None
    return Candidate(name=path.stem, plugin=module, file=path, sha256=digest)


def _import_reason(error: BaseException, path: Path | None = None) -> str:
    """Return ``file:line: Type: message`` as one line, for the innermost frame, in ``path`` if it is given."""
    where = ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}: "
        message = error.msg
    else:
        frames = [
            frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename
        ]
        if path is not None:
            frames = [frame for frame in frames if frame.filename == str(path)]
        else:
            frames = [frame for frame in frames if frame.filename != __file__]
        if frames:
            where = f"{frames[-1].filename}:{frames[-1].lineno}: "
        message = str(error)
    return " ".join(f"{where}{type(error).__name__}: {message}".split())


def _file(plugin: Any) -> Path | None:
    module = plugin if isinstance(plugin, ModuleType) else sys.modules.get(type(plugin).__module__)
    file = getattr(module, "__file__", None)
    return Path(file) if file else None


def _version(module: str) -> str | None:
    distributions = packages_distributions().get(module.partition(".")[0])
    return version(distributions[0]) if distributions else None


def _source_hash(plugin: ModuleType) -> str | None:
    """Return the SHA-256 of the module's source, or of all modules of the package."""
    file = _file(plugin)
    if file is None:
        return None
    files = sorted(file.parent.rglob("*.py")) if hasattr(plugin, "__path__") else [file]
    digest = hashlib.sha256()
    for each in files:
        content = each.read_bytes()
        digest.update(f"{each.relative_to(file.parent).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
