"""A trained cell, in a store or exported as one file.

In a store it is a folder, STORE/train/KEY, with spec.json, model.safetensors and result.json. An exported file
``NAME.safetensors`` holds the averaged weights, and in its header, as JSON under ``hpdm``, their configuration and
provenance. A plugin that is a package may ship such files in a folder ``trained``; they are found by their names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hpdm_core.assembly.compose import load_cell
from hpdm_core.base.errors import InputError, did_you_mean
from hpdm_core.base.files import read_json

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly

__all__ = ["PRECISIONS", "Trained", "export", "load_trained", "shipped"]

SUFFIX = ".safetensors"

PRECISIONS = {"float32": torch.float32, "float16": torch.float16}
"""Precisions of the weights in an exported file."""

PROVENANCE = ("git", "machine", "versions")
"""Entries of a train stage's result that are copied into an exported file."""


@dataclass(frozen=True)
class Trained:
    """A trained cell: its path ``place``, the file of averaged ``weights``; ``spec`` has ``config`` and ``plugins``."""

    place: Path
    weights: Path
    spec: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The train stage, STORE/train/KEY. Raises `InputError` if the cell is an exported file."""
        if self.place.is_dir():
            return self.place
        raise InputError(
            f"{self.place}: is one file of weights; allowed here is a train stage, STORE/train/KEY"
        )

    @cached_property
    def header(self) -> dict[str, Any]:
        """The metadata in the header of the file of weights. Raises `InputError` when it is missing or damaged."""
        from hpdm_core.training.checkpoint import read_header

        return read_header(self.weights)

    @property
    def provenance(self) -> dict[str, Any]:
        """Commit (``git``), ``machine`` and ``versions`` of the training, as far as they are known."""
        if not self.place.is_dir():
            return dict(self.header.get("provenance", {}))
        result = read_json(self.place / "result.json") or {}
        return {name: result[name] for name in PROVENANCE if name in result}

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by label, if an exported file has them; else empty."""
        return [] if self.place.is_dir() else [str(name) for name in self.header.get("classes", ())]

    def assembly(self, sets: Sequence[str] = ()) -> Assembly:
        """Return the cell's `Assembly`; ``sets`` as in `load_cell`. Raises `InputError` with every problem."""
        return load_cell(self.spec["config"], sets=sets, plugins=self.spec.get("plugins", ()))


def shipped() -> dict[str, Path]:
    """Return the trained cells that installed plugins ship: name -> file."""
    from hpdm_core.plugins import build_plugins

    found: dict[str, Path] = {}
    for folder in build_plugins().trained_folders:
        for file in sorted(folder.glob(f"*{SUFFIX}")):
            found.setdefault(file.stem, file)
    return found


def load_trained(given: str | Path) -> Trained:
    """Return the trained cell ``given``.

    ``given`` is a train stage, STORE/train/KEY, an exported file, or the name of a trained cell that a plugin ships.
    Raises `InputError` for anything else.
    """
    place = Path(given).expanduser()
    if not place.exists() and "/" not in str(given):
        known = shipped()
        if str(given) not in known:
            raise InputError(
                f"no trained cell '{given}'{did_you_mean(str(given), known)}; allowed is a train stage, "
                f"STORE/train/KEY, an exported file, or one of: {', '.join(sorted(known)) or 'none'}"
            )
        place = known[str(given)]
    if place.is_file():
        return Trained(place, place, _spec_in(place))
    path = place / "spec.json"
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); allowed is a train stage, STORE/train/KEY, or an exported file"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from error
    return Trained(place, place / "model.safetensors", _checked(spec, path))


def _spec_in(file: Path) -> dict[str, Any]:
    from hpdm_core.training.checkpoint import read_header

    header = read_header(file)
    if "cell" not in header:
        raise InputError(
            f"{file}: holds weights and no configuration; allowed is a file that python -m hpdm_core.export made, or "
            "a train stage, STORE/train/KEY"
        )
    spec = _checked(header["cell"], file)
    files = _plugin_files(spec)
    if files:  # a file from an unknown source must not choose which local Python file is executed
        raise InputError(
            f"{file}: names plugins that are files ({', '.join(files)}); allowed in an exported file are installed "
            "packages"
        )
    provenance, classes = header.get("provenance", {}), header.get("classes", [])
    if not isinstance(provenance, dict) or not isinstance(classes, list):
        raise InputError(
            f"{file}: in its header 'provenance' should be an object and 'classes' a list, as export writes them"
        )
    shown = [*classes, *(spec[name] for name in ("arm", "study") if spec.get(name) is not None)]
    shown.append(str(header.get("steps", "")))
    shown += [] if provenance.get("git") is None else [provenance["git"]]
    if not all(isinstance(text, str) and text.isprintable() for text in shown):
        raise InputError(
            f"{file}: in its header a class, arm, study, commit or number of steps has characters that cannot be "
            "printed, or is not text; allowed is printable text, as export writes it"
        )
    expected = spec["config"].get("model", {}).get("classes")
    if classes and len(classes) != expected:
        raise InputError(f"{file}: names {len(classes)} classes; its configuration has {expected}")
    return spec


def _plugin_files(spec: Mapping[str, Any]) -> list[str]:
    return [name for name in spec.get("plugins", ()) if "/" in name or name.endswith(".py")]


def _checked(spec: Any, where: Path) -> dict[str, Any]:
    config, plugins = (
        (spec.get("config"), spec.get("plugins", [])) if isinstance(spec, dict) else (None, None)
    )
    whole = isinstance(config, dict) and isinstance(config.get("model", {}), dict)
    if not whole or not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise InputError(
            f"{where}: holds no cell; allowed is an object with 'config', an object, and 'plugins', a list of names"
        )
    return dict(spec)


def export(trained: Trained, file: Path, *, precision: str = "float16", made_by: str | None = None) -> None:
    """Write the train stage ``trained`` to the single file ``file``, atomically.

    If the dataset is available, the header includes the names of the classes. The configuration in the header contains
    the paths that the cell was trained with. ``precision``: of the weights, one of `PRECISIONS`. ``made_by``: the
    command that trains the cell again, stored unchanged. Raises `InputError` for a weight that ``precision`` cannot
    represent, a plugin that is a file, an unknown ``precision``, and damaged weights.
    """
    from hpdm_core.training.checkpoint import read_weights, save_weights

    if precision not in PRECISIONS:
        raise InputError(
            f"precision '{precision}'{did_you_mean(precision, PRECISIONS)}; allowed: {', '.join(PRECISIONS)}"
        )
    folder, files = trained.folder, _plugin_files(trained.spec)
    if files:
        raise InputError(
            f"{folder}: needs {', '.join(files)}, which an exported file does not hold; allowed are cells whose "
            "plugins are installed packages"
        )
    weights = read_weights(trained.weights)
    assembly = trained.assembly()  # raises InputError for a configuration that is not valid in this version
    stored = {
        name: tensor.to(PRECISIONS[precision]) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }
    for name, tensor in stored.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{trained.weights}: the weight '{name}' is not finite in {precision}; its largest magnitude is "
                f"{float(weights[name].abs().max()):g}, allowed is up to {torch.finfo(PRECISIONS[precision]).max:g}, "
                "or another precision"
            )
    names = ("config", "plugins", "arm", "study")
    header = {
        **trained.header,
        **_classes(assembly),
        "cell": {name: trained.spec[name] for name in names if name in trained.spec},
        "key": trained.spec.get("keys", {}).get("train"),
        "made_by": made_by,
        "precision": precision,
        "provenance": trained.provenance,
    }
    save_weights(file, stored, metadata=header)


def _classes(assembly: Assembly) -> dict[str, Any]:
    """Return the header entry with the names of the classes; empty if the dataset is not available."""
    try:
        names = assembly.dataset.classes if assembly.config.model.classes else ()
    except InputError:
        return {}
    return {"classes": list(names)} if names else {}
