"""Merges a file, a preset or a mapping with all that it extends into one configuration.

In this order, later values win: presets (``extends``, possibly in chains), the file, its ``scales`` entry for the
preset in use, ``--set``, an arm's own overrides. Plugins are loaded meanwhile, because they may ship presets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpdm_core.base.errors import InputError, did_you_mean
from hpdm_core.config.loader import Document, load_yaml
from hpdm_core.config.overrides import Layers, Override, parse_set, split_dotted
from hpdm_core.config.problems import KeyPath
from hpdm_core.config.study_keys import check_top_level
from hpdm_core.plugins import Plugins, build_plugins

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly

__all__ = ["Composed", "compose", "dotted_overrides", "load_cell", "presets", "studies"]

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Composed:
    """A merged configuration that is not yet validated, the plugins that it names, and the file it came from."""

    layers: Layers
    plugins: Plugins
    file: Path | None


def presets(plugins: Plugins) -> dict[str, Path]:
    """Return the presets that plugins ship: name -> file."""
    return _shipped(plugins.preset_folders)


def studies(plugins: Plugins) -> dict[str, Path]:
    """Return the studies that plugins ship: name -> file. Ours are in the wheel; in a clone they lie in studies/."""
    return _shipped(plugins.study_folders)


def _shipped(folders: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        for file in sorted(folder.iterdir()):
            if file.suffix in SUFFIXES:
                found.setdefault(file.stem, file)
    return found


def dotted_overrides(
    overrides: Mapping[str, Any], prefix: KeyPath, where: Callable[[KeyPath], str]
) -> list[Override]:
    """Return an arm's overrides, dotted or nested keys, which stand at ``prefix`` in a document."""

    def located(key: str, steps: KeyPath) -> Callable[[KeyPath], str]:
        return lambda path: where((*prefix, key, *path[len(steps) :]))

    made = []
    for key, value in overrides.items():
        steps = split_dotted(key, where((*prefix, key)))
        made.append(Override(steps, value, located(key, steps)))
    return made


class _Chain:
    """Follows ``extends`` and collects plugins and documents, the given document first."""

    def __init__(self, plugins: Sequence[str]) -> None:
        self.plugins = build_plugins(plugins)
        self.documents: list[Document] = []
        self.visited: list[Path] = []

    def add_plugins(self, document: Document, folder: Path) -> None:
        names = document.data.get("plugins")
        if names is None:
            return
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{document.where(('plugins',))}: plugins: should be a list of files or modules")
        paths = [
            str(folder / Path(name).expanduser()) if name.endswith(".py") or "/" in name else name
            for name in names
        ]
        try:
            self.plugins = build_plugins([*self.plugins.names, *paths])
        except InputError as error:
            where = document.where(("plugins",))
            raise InputError(*(f"{where}: {message}" for message in error.messages)) from None

    def find(self, name: str, folder: Path, where: str) -> Path:
        """Return the file that ``extends: name`` means."""
        if name.endswith(SUFFIXES) or "/" in name:
            file = folder / Path(name).expanduser()
            if not file.is_file():
                siblings = [each.name for each in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
                nearest = did_you_mean(file.name, siblings)
                raise InputError(f"{where}: extends: no such file '{name}' (looked for {file}){nearest}")
            return file
        known = presets(self.plugins)
        if name not in known:
            raise InputError(
                f"{where}: unknown preset '{name}'{did_you_mean(name, known)}; "
                f"presets: {', '.join(sorted(known)) or 'none'}"
            )
        return known[name]

    def add_file(self, file: Path, shown: str) -> Document:
        self.visited.append(file.resolve())
        document = load_yaml(shown)
        self.documents.append(document)
        self.add_plugins(document, file.resolve().parent)
        return document

    def follow(self, extends: Any, folder: Path, where: str) -> None:
        while extends is not None:
            if not isinstance(extends, str):
                raise InputError(f"{where}: extends: should be a preset's name or a path, got {extends!r}")
            file = self.find(extends, folder, where)
            if file.resolve() in self.visited:
                loop = " -> ".join(each.name for each in (*self.visited, file))
                raise InputError(f"{where}: extends loop: {loop}")
            document = self.add_file(file, str(file))
            extends = document.data.get("extends")
            folder, where = file.resolve().parent, document.where(("extends",))


def compose(
    source: str | Path | Mapping[str, Any],
    *,
    sets: Sequence[str | Override] = (),
    plugins: Sequence[str] = (),
    allow_preset: bool = True,
) -> Composed:
    """Merge ``source`` (a file, a preset's name, or a mapping) with what it extends and with ``sets``.

    With ``allow_preset=False`` a name is that of a study that a plugin ships. Each of ``sets`` is ``a.b.c=value`` or an
    Override. Paths in ``plugins`` and in ``sets`` are relative to the working directory, those in a file to the file's
    folder. Raises InputError.
    """
    overrides = [parse_set(each) if isinstance(each, str) else each for each in sets]
    chain = _Chain(plugins)
    document: Document
    if isinstance(source, Mapping):
        file, folder = None, Path.cwd()
        document = Document(dict(source), "configuration")
        chain.documents.append(document)
        chain.add_plugins(document, folder)
    else:
        word = isinstance(source, str) and not source.endswith(SUFFIXES) and "/" not in source
        if allow_preset and word and not Path(source).is_file():
            file, shown = chain.find(str(source), Path.cwd(), str(source)), ""
        elif word and not Path(source).is_file() and (shipped := studies(chain.plugins)):
            if source not in shipped:
                raise InputError(
                    f"{source}: no such file, and no study of this name{did_you_mean(str(source), shipped)}; "
                    f"studies: {', '.join(sorted(shipped))}"
                )
            file, shown = shipped[str(source)], ""
        else:
            file, shown = Path(source).expanduser(), str(source)
        document = chain.add_file(file, shown or str(file))
        folder = file.resolve().parent
    extends, where = document.data.get("extends"), document.where(("extends",))
    for override in overrides:
        if override.path == ("extends",):
            extends, folder, where = override.value, Path.cwd(), override.where(override.path)
        elif override.path == ("plugins",):
            raise InputError(f"{override.where(override.path)}: give plugins by --plugin or in the file")
    chain.follow(extends, folder, where)

    layers = Layers(name=document.file)
    for each in reversed(chain.documents):
        own = {key: value for key, value in each.data.items() if key not in ("extends", "plugins")}
        if each is not document:
            own.pop("name", None)
        layers.merge(own, each.where)
    _apply_scale(layers, extends)
    for override in overrides:
        if override.path != ("extends",):
            layers.apply(override)
    return Composed(layers, chain.plugins, file)


def _apply_scale(layers: Layers, extends: Any) -> None:
    """Apply the ``scales`` entry with the name of the preset in use."""
    scales = layers.data.get("scales")
    if not isinstance(extends, str) or not isinstance(scales, dict):
        return
    name = extends if extends in scales else Path(extends).stem
    if isinstance(scales.get(name), dict):
        for override in dotted_overrides(scales[name], ("scales", name), layers.copy().where):
            layers.apply(override)


def load_cell(
    source: str | Path | Mapping[str, Any],
    *,
    sets: Sequence[str] = (),
    plugins: Sequence[str] = (),
) -> Assembly:
    """Return the parts of the one cell that ``source`` describes: a preset's name, a path, or a mapping.

    ``sets`` are overrides such as ``"training.steps=10"``; ``"seed=1"`` sets the seed. For a study file, the
    result is the configuration without the overrides of any arm, with the first seed. Raises InputError with
    every problem.
    """
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.assembly.validate import validate_cell

    composed = compose(source, sets=sets, plugins=plugins)
    layers = composed.layers
    keys, problems = check_top_level(layers, backends=composed.plugins.models("backends"), extra=("seed",))
    if "seed" not in layers.data and keys is not None:
        layers.data["seed"] = keys.seeds[0]
    config, more = validate_cell(layers, composed.plugins)
    if config is None or problems or more:
        raise InputError(*problems, *more)
    return Assembly(config, composed.plugins)
