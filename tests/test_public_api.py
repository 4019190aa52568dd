import subprocess
import sys

import pytest

import hpdm_core


def test_every_public_name_is_there_and_sorted() -> None:
    assert hpdm_core.__all__ == sorted(hpdm_core.__all__)
    for name in hpdm_core.__all__:
        assert getattr(hpdm_core, name) is not None, name
    assert set(hpdm_core.__all__) <= set(dir(hpdm_core))


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'ContextFusions'"):
        hpdm_core.ContextFusions  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, hpdm_core; print([n for n in ('torch', 'numpy', 'pydantic', 'yaml') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
