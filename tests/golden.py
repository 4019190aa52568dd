"""The keys of every study under studies/, as they were: tests/golden_keys.json, of the first seed of every arm.

``python tests/golden.py`` writes them anew. Do so only for keys that a change is meant to change, since whoever has
results under the old ones does that work again; the CHANGELOG names them and says why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpdm_core.study.plan.cells import cells_of
from hpdm_core.study.plan.study_file import load_study

STUDIES = Path(__file__).parents[1] / "studies"
KEYS = Path(__file__).with_name("golden_keys.json")
DIGITS = 16
"""Of a key's 64: enough to tell keys apart, and short enough to read."""


def found() -> dict[str, dict[str, Any]]:
    """Return study -> arm -> its keys as the code is now."""
    return {file.stem: keys_of(file) for file in sorted(STUDIES.glob("*.yaml"))}


def keys_of(file: Path) -> dict[str, Any]:
    """Return arm -> train, sample and evaluation keys of its first seed in the study ``file``."""
    arms: dict[str, Any] = {}
    for cell in cells_of(load_study(file), Path("nowhere") / "store")[0]:
        keys = cell.keys
        arms.setdefault(
            cell.arm,
            {
                "train": keys.train[:DIGITS],
                "samples": keys.samples[:DIGITS],
                "evaluations": [key[:DIGITS] for key in keys.evaluations],
            },
        )
    return arms


if __name__ == "__main__":
    KEYS.write_text(json.dumps(found(), indent=1) + "\n")
