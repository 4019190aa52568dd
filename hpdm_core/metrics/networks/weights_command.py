"""``hpdm weights``: list the known weight files, their purpose, and which are missing.

``python -m hpdm_core.metrics weights`` is the same.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpdm_core.base.command_line import CommandParser
from hpdm_core.base.errors import InputError, report_errors
from hpdm_core.metrics.networks.c3d import load_mean
from hpdm_core.metrics.networks.weights import (
    FOLDER_VARIABLE,
    KNOWN_FILES,
    UNKNOWN,
    WeightIdentity,
    checked,
    find,
    identify,
    search_folders,
)

__all__ = ["listing", "main"]


def listing(paths: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Return one JSON object per known file, and per other file among ``paths``.

    ``state``: "found", "missing", or "other content" for a file of a known name whose hash is not that of the
    original; ``verified``: whether the hash is that of the original. Raises InputError for a path that is not a file.
    """
    given = {path.name: path for path in paths}
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"weights: no file {', '.join(missing)}")
    rows = []
    for known in KNOWN_FILES.values():
        path = given.pop(known.name, None) or find(known.name)
        row: dict[str, Any] = {
            "name": known.name,
            "purpose": known.purpose,
            "source": known.source,
            "format": known.format,
            "original_git_sha1": known.git_sha1,
            "state": "missing",
            "verified": False,
            "path": None,
        }
        if path is not None:
            row |= _found(path, identify(path), original=known.git_sha1)
        rows.append(row)
    for name, path in given.items():
        identity = identify(path)
        known_as = KNOWN_FILES.get(identity.known)
        about = "not a known file" if known_as is None else known_as.purpose
        rows.append({"name": name, "purpose": about, **_found(path, identity, original=None)})
    return rows


def _found(path: Path, identity: WeightIdentity, *, original: str | None) -> dict[str, Any]:
    other = original is not None and identity.git_sha1 != original
    return {
        "state": "other content" if other else "found",
        "verified": identity.known != UNKNOWN,
        "path": str(path),
        **identity.record(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``weights`` and return its exit code: 0 also if files are missing, 2 for wrong input."""
    parser = CommandParser(
        prog="hpdm weights",
        description="List the known weight files: the purpose of each, where it is searched for, and whether it "
        "is missing. Nothing is downloaded.",
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="identify these files too")
    parser.add_argument("--check", action="store_true", help="also read every file that was found completely")
    parser.add_argument(
        "--trust-weights", action="store_true", help="with --check: run TorchScript files of unknown hash"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    given = parser.parse_args(arguments)
    rows = listing(given.files)
    if given.check:
        for row in rows:
            if row["state"] != "missing":
                row["check"] = _checked(Path(row["path"]), trust=given.trust_weights)
    if given.json:
        print(json.dumps({"folders": [str(folder) for folder in search_folders()], "files": rows}))
        return 0
    folders = ", ".join(str(folder) for folder in search_folders())
    print(f"searched folders: {folders or f'none, {FOLDER_VARIABLE} is not set'} ({FOLDER_VARIABLE})")
    print("in a study, give a file's name or path as the option 'weights' of an extractor\n")
    for row in rows:
        _print(row)
    return 0


def _print(row: dict[str, Any]) -> None:
    state = {
        "missing": "missing",
        "found": f"found: {row['path']}",
        "other content": f"CONTENT DIFFERS from the original's: {row['path']}",
    }[row["state"]]
    print(f"{row['name']}  {state}")
    print(f"  for       {row['purpose']}")
    if "source" in row:
        print(f"  from      {row['source']} ({row['format']})")
        print(f"  git hash  {row['original_git_sha1'] or 'none published: the file cannot be verified'}")
    if row["state"] != "missing":
        if row["git_sha1"] != row.get("original_git_sha1"):
            print(f"  this file git {row['git_sha1']}, SHA-256 {row['sha256']}")
        print(f"  known as  {row['known']}{'' if 'warning' not in row else ' - ' + row['warning']}")
    if "check" in row:
        print(f"  check     {row['check']}")


def _checked(path: Path, *, trust: bool) -> str:
    try:
        if path.name == "mean2.npz":
            load_mean(path, "tgan")
            return "reads as a mean clip"
        return checked(path, trust=trust)
    except InputError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(report_errors(main))
