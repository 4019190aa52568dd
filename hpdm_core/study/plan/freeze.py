"""A copy of the code that a study's queued jobs run, made when they are submitted.

A job may wait for days and imports its code only when it starts. It imports the copy: this package, the plugins'
packages and the plugin files, in a folder named by the hash of their content. So you may edit the tree or check out
another branch while jobs wait; a job that a later command submits runs the code of that time.
"""

import hashlib
import importlib.util
import shutil
import sysconfig
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpdm_core.base.files import write_json
from hpdm_core.plugins import Plugins
from hpdm_core.store.provenance import FROZEN, git_commit

__all__ = ["Frozen", "freeze"]

LEFT_OUT = {"__pycache__", ".git", ".venv", "node_modules"}


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A copy in ``folder``. ``files``: plugin file, as the study names it -> its copy."""

    folder: Path
    files: Mapping[str, str]

    def spec(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Return the spec of a cell that runs from the copy."""
        plugins = [self.files.get(name, name) for name in spec.get("plugins", [])]
        return {**spec, "plugins": plugins, "code": str(self.folder)}


def freeze(root: Path, plugins: Plugins) -> Frozen:
    """Copy the code of this package and of ``plugins`` to ``root``/<hash>, unless it is there already.

    Packages installed in the environment (site-packages, standard library) are not copied: editing the tree does not
    change them.
    """
    packages = {"hpdm_core": Path(__file__).resolve().parents[2]}
    files: dict[str, Path] = {}
    for name in plugins.names:
        if name.endswith(".py") or "/" in name or "\\" in name:
            files[name] = Path(name).expanduser().resolve()
        else:
            _add(packages, name.partition(".")[0])
    for info in plugins.infos:
        if info.file is not None and info.file.resolve() not in files.values():
            _add(packages, info.name.partition(".")[0])
    contents = [each for name, top in packages.items() for each in _parts(name, top)]
    placed = {name: f"files/{_short(str(path))}/{path.name}" for name, path in files.items()}
    contents += [(placed[name], path) for name, path in files.items()]
    digest = hashlib.sha256()
    data = {}
    for name, path in sorted(contents):
        data[name] = path.read_bytes()
        digest.update(f"{name}\0{len(data[name])}\0".encode())
        digest.update(data[name])
    folder = root / digest.hexdigest()[:16]
    if not folder.is_dir():
        made = root / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
        for name, content in data.items():
            target = made / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        write_json(made / FROZEN, {"git": git_commit()})
        try:
            made.rename(folder)
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            if not folder.is_dir():
                raise
    return Frozen(folder=folder, files={name: str(folder / place) for name, place in placed.items()})


def _add(packages: dict[str, Path], name: str) -> None:
    """Add the package or module ``name`` unless it is installed in the environment."""
    if name in packages:
        return
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return
    if found is None or found.origin in (None, "built-in", "frozen"):
        return
    path = Path(str(found.origin)).resolve()
    top = path.parent if found.submodule_search_locations else path
    kinds = ("purelib", "platlib", "stdlib")
    installed = any(top.is_relative_to(Path(sysconfig.get_path(kind)).resolve()) for kind in kinds)
    if not installed or name == "hpdm_plugins":
        packages[name] = top


def _parts(name: str, top: Path) -> list[tuple[str, Path]]:
    """Return (path within the copy, file) for each file of a package, or for a single-file module."""
    if top.is_file():
        return [(top.name, top)]
    found = ((path.relative_to(top), path) for path in top.rglob("*") if path.is_file())
    return [(f"{name}/{place.as_posix()}", path) for place, path in found if not LEFT_OUT & set(place.parts)]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
