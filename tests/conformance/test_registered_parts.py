"""Every registered key of every family passes its family's conformance cases; none is listed here."""

import shutil

import pytest

from hpdm_core.plugins import FAMILIES, build_plugins
from hpdm_core.testing import CASES, Case

INSTALLED = build_plugins()
FRAMES = {"i3d": (9, 10), "c3d": (16, 16)}
"""What the detectors take, of two videos each: a clip costs them a second."""
SLOW = {("feature_extractors", "c3d")}

CHECKS = [
    pytest.param(
        family,
        key,
        check,
        id=f"{family}-{key}-{check.removeprefix('test_')}",
        marks=[pytest.mark.slow] if (family, key) in SLOW else [],
    )
    for family, case in CASES.items()
    for key in INSTALLED.keys(family)
    for check in case.checks()
]


@pytest.fixture(scope="module")
def cases() -> dict[tuple[str, str], Case]:
    """One case per part: a dataset is opened once for all its checks."""
    return {}


@pytest.mark.parametrize(("family", "key", "check"), CHECKS)
def test_part(cases, plugins, options_of, family, key, check):
    if (family, key) == ("video_readers", "skvideo") and shutil.which("ffmpeg") is None:
        pytest.skip("the optional reader 'skvideo' needs the program ffmpeg, which is not on PATH")
    if (family, key) not in cases:
        case = CASES[family]()
        case.plugins, case.key, case.options = plugins, key, options_of(family, key)
        if key in FRAMES:
            case.sizes = tuple((frames, 12, 16 + frames) for frames in FRAMES[key])
            case.count = 2
        cases[family, key] = case
    getattr(cases[family, key], check)()


def test_every_family_has_cases_and_parts():
    assert set(CASES) == set(FAMILIES)
    assert all(case.family == family for family, case in CASES.items())
    assert [family for family in FAMILIES if not INSTALLED.keys(family)] == []


def test_no_installed_plugin_is_broken():
    assert [f"{info.name}: {info.skipped}" for info in INSTALLED.infos if info.skipped] == []
