"""Where a number comes from: versions, commit, machine."""

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from hpdm_core.base.files import read_json

__all__ = ["FROZEN", "git_commit", "machine", "versions"]

FROZEN = "frozen.json"
"""File beside a frozen copy of this package, from which jobs run: ``{"git": commit}``."""


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("hpdm", "torch", "numpy", "av"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def git_commit() -> str | None:
    """Return the commit of this package's source, with ``+`` for local changes; None outside a repository."""
    source = Path(__file__).resolve().parents[1]
    frozen = read_json(source.parent / FROZEN)
    if frozen is not None:
        return frozen.get("git")
    try:
        # The package may be installed in an environment inside another repository, whose commit is not meant.
        _git(source, "ls-files", "--error-unmatch", "hookspecs.py")
        changed = _git(source, "status", "--porcelain", "--untracked-files=no")
        return _git(source, "rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def machine() -> dict[str, Any]:
    """Return the kind of machine, without its name: system, processor, cores of this process, threads, GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores,
    }
    import torch

    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _git(folder: Path, *arguments: str) -> str:
    shown = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return shown.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
