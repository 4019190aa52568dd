"""Read weight files of other projects: safely, in every known naming, and strictly.

Nothing here executes the content of a file: torch files are read with ``weights_only``, numpy files without pickle.
TorchScript, which is code, is only recognised here; `hpdm_core.metrics.networks.weights` decides whether to run it.
"""

import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpdm_core.base.errors import InputError

__all__ = [
    "C3D_NAMINGS",
    "I3D_NAMINGS",
    "Format",
    "Naming",
    "file_format",
    "load_strictly",
    "read_arrays",
    "read_state_dict",
]

Format = Literal["torchscript", "torch", "npz", "npy"]

_TRACKED = "num_batches_tracked"  # counts training steps; some files hold it, and no output depends on it
_WRAPPERS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Naming:
    """Translation between the parameter names of our networks and those of one family of files.

    ``name``: our name -> their name, None where their files have no such array; ``axes``: number of axes -> the
    permutation that brings their axes into our order; ``absent``: the value for arrays that their files lack.
    """

    name: Callable[[str], str | None]
    axes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    absent: float = 1.0
    simplify: Callable[[str], str] = lambda key: key
    """Applied to each of their names first, for example to remove the scope of a graph."""


def _kinetics_i3d_pytorch(own: str) -> str:
    """``mixed_3b.branch_1.0.batch3d.bias``."""
    module, _, rest = own.partition(".")
    if module == "logits":
        return f"conv3d_0c_1x1.{rest}"
    branches = {
        "b0": "branch_0",
        "b1a": "branch_1.0",
        "b1b": "branch_1.1",
        "b2a": "branch_2.0",
        "b2b": "branch_2.1",
        "b3b": "branch_3.1",
    }
    parts = [module.replace("Conv3d", "conv3d").replace("Mixed", "mixed")]
    parts += [branches.get(part, "batch3d" if part == "bn" else part) for part in rest.split(".")]
    return ".".join(parts)


def _tensorflow(own: str) -> str | None:
    """``Mixed_3b/Branch_1/Conv3d_0a_1x1/batch_norm/beta``, under the scope ``RGB/inception_i3d``."""
    *modules, kind, array = own.split(".")
    leaves = {
        ("conv3d", "weight"): "conv_3d/w",
        ("conv3d", "bias"): "conv_3d/b",
        ("bn", "bias"): "batch_norm/beta",
        ("bn", "running_mean"): "batch_norm/moving_mean",
        ("bn", "running_var"): "batch_norm/moving_variance",
    }
    if (kind, array) not in leaves:
        return None  # no learned scale in the graph
    if modules == ["logits"]:
        modules = ["Logits", "Conv3d_0c_1x1"]
    elif len(modules) == 2:
        module, branch = modules
        unit = {
            "b0": "Conv3d_0a_1x1",
            "b1a": "Conv3d_0a_1x1",
            "b2a": "Conv3d_0a_1x1",
            "b1b": "Conv3d_0b_3x3",
            "b2b": "Conv3d_0b_3x3",
            "b3b": "Conv3d_0b_1x1",
        }[branch]
        if (module, branch) == ("Mixed_5b", "b2b"):
            unit = "Conv3d_0a_3x3"  # a naming mistake in the published graph
        modules = [module, f"Branch_{branch[1]}", unit]
    return "/".join((*modules, leaves[kind, array]))


def _without_scope(key: str) -> str:
    return key.rpartition("inception_i3d/")[2].removesuffix(":0")


I3D_NAMINGS: dict[str, Naming] = {
    "pytorch-i3d": Naming(lambda own: own),
    "kinetics_i3d_pytorch": Naming(_kinetics_i3d_pytorch),
    "tensorflow": Naming(_tensorflow, axes={5: (4, 3, 0, 1, 2)}, simplify=_without_scope),
}
"""The naming ``pytorch-i3d`` is also used by VideoGPT, DIGAN, PVDM, TATS and CD-FVD."""

C3D_NAMINGS: dict[str, Naming] = {
    "pytorch": Naming(lambda own: own),
    "chainer": Naming(
        lambda own: own.replace(".weight", "/W").replace(".bias", "/b"),
        simplify=lambda key: key.removeprefix("/"),
    ),
}


def file_format(data: bytes, file: Path) -> Format:
    """Return the format of ``data``, the content of ``file``.

    Raises InputError for a truncated archive, an empty file, and any other format.
    """
    if data.startswith(b"\x93NUMPY"):
        return "npy"
    if not data:
        raise _damaged(file, "it is empty")
    if data.startswith(b"\x80"):
        return "torch"  # the old format, before archives
    if not data.startswith(b"PK"):
        raise InputError(f"{file}: not a weight file; allowed are those of torch (.pt) and numpy (.npz)")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise _damaged(file, "an archive whose end is missing") from error
    if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
        return "torchscript"
    return "npz" if any(name.endswith(".npy") for name in names) else "torch"


def read_state_dict(file: Path, data: bytes | None = None) -> dict[str, Tensor]:
    """Return the named tensors in ``file`` (torch or npz), without executing anything.

    ``data``: its content, if it has been read. A dictionary around the state dict, and the prefix ``module.`` of all
    names, are removed. Raises InputError if the file cannot be read.
    """
    data = _content(file) if data is None else data
    kind = file_format(data, file)
    if kind == "torchscript":
        raise InputError(f"{file}: TorchScript, which is code; a state dict is read from .pt or .npz files")
    if kind in ("npz", "npy"):
        arrays = read_arrays(file, data)
        return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
    try:
        found: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        if re.search(r"[Uu]nsupported (global|class)", str(error)):
            raise InputError(
                f"{file}: refused, because it holds objects other than tensors, which loading would execute; save "
                "its state dict with torch.save(model.state_dict(), FILE)"
            ) from error
        raise _damaged(file, "it cannot be read as weights") from error
    except (TypeError, AttributeError, IndexError, AssertionError, UnicodeDecodeError) as error:
        raise _damaged(file, "it cannot be read as weights") from error
    for wrapper in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{file}: no state dict; allowed is a dictionary of names and tensors")
    if found and all(str(name).startswith("module.") for name in found):
        found = {str(name).removeprefix("module."): value for name, value in found.items()}
    return {str(name): value for name, value in found.items()}


def read_arrays(file: Path, data: bytes | None = None) -> dict[str, NDArray[Any]]:
    """Return the named arrays in an npz file, or ``{"mean": array}`` for an npy file.

    Raises InputError for pickled objects, and if the file cannot be read.
    """
    data = _content(file) if data is None else data
    kind = file_format(data, file)
    if kind not in ("npz", "npy"):
        raise InputError(f"{file}: neither an .npz nor an .npy file of numpy")
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        if kind == "npy":
            return {"mean": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        if "pickle" in str(error).lower():
            raise InputError(f"{file}: it holds pickled objects, which are refused") from error
        raise _damaged(file, "it cannot be read as arrays") from error


def load_strictly(
    network: nn.Module, given: Mapping[str, Tensor], namings: Mapping[str, Naming], *, file: Path
) -> str:
    """Load the weights ``given`` into ``network`` and return the name of their naming.

    Every array must exist, be finite and have the right shape, and no other may be in the file (except counts of
    training steps). Raises InputError with the problems, in the naming that fits best.
    """
    own = {name: value for name, value in network.state_dict().items() if not name.endswith(_TRACKED)}
    best: tuple[int, str, dict[str, str | None], dict[str, str]] | None = None
    for title, naming in namings.items():
        theirs = {naming.simplify(name): name for name in given if not name.endswith(_TRACKED)}
        wanted = {name: naming.name(name) for name in own}
        overlap = len(set(theirs) & set(wanted.values()))
        if best is None or overlap > best[0]:
            best = overlap, title, wanted, theirs
    assert best is not None
    overlap, title, wanted, theirs = best
    missing = sorted(name for name in wanted.values() if name is not None and name not in theirs)
    extra = sorted(set(theirs) - set(wanted.values()))
    if missing or extra:
        raise InputError(
            f"{file}: not the weights of {type(network).__name__}: {len(missing)} of its arrays are missing"
            f"{_some(missing)} and {len(extra)} arrays are not its own{_some(extra)}, in the naming '{title}', which "
            f"fits best; known are {', '.join(namings)}"
        )
    naming = namings[title]
    state: dict[str, Tensor] = {}
    for name, value in own.items():
        key = wanted[name]
        if key is None:
            state[name] = torch.full_like(value, naming.absent)
            continue
        found = given[theirs[key]].to(torch.float32)
        if found.ndim in naming.axes and found.ndim == value.ndim:
            found = found.permute(naming.axes[found.ndim])
        if found.ndim != value.ndim and found.numel() == value.numel() and value.ndim == 1:
            found = found.reshape(value.shape)  # (1, 1, 1, 1, C) in TensorFlow
        if found.shape != value.shape:
            raise InputError(
                f"{file}: {key} has the shape {list(found.shape)}; wanted is {list(value.shape)}"
            )
        if not bool(torch.isfinite(found).all()):
            raise InputError(f"{file}: {key} holds values that are not finite")
        state[name] = found.contiguous()
    kept = {name: torch.zeros_like(value) for name, value in network.state_dict().items() if name not in own}
    network.load_state_dict({**kept, **state}, strict=True)
    return title


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: it cannot be read: {error.strerror or error}") from error


def _damaged(file: Path, reason: str) -> InputError:
    return InputError(f"{file}: damaged or cut off: {reason}; get the file again and compare its hash")


def _some(names: Iterable[str]) -> str:
    shown = list(names)[:3]
    return f" ({', '.join(shown)}{', ...' if len(list(names)) > 3 else ''})" if shown else ""
