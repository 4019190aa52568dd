"""The keys of the studies that ship stay: who has results under them keeps those (docs/glossary.md, key)."""

import importlib.util
import json
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_no_key_of_a_shipped_study_has_changed() -> None:
    spec = importlib.util.spec_from_file_location("golden", TESTS / "golden.py")
    assert spec is not None and spec.loader is not None
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    kept, found = json.loads(golden.KEYS.read_text()), golden.found()
    assert set(kept) == set(found) == {file.stem for file in golden.STUDIES.glob("*.yaml")}
    changed = [
        f"{study}, arm {arm}: {kind}"
        for study, arms in found.items()
        for arm, keys in arms.items()
        for kind, key in keys.items()
        if kept[study].get(arm, {}).get(kind) != key
    ]
    assert changed == [], "changed keys; a change that means to runs python tests/golden.py and says why"
