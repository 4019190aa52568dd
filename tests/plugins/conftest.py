from collections.abc import Callable
from pathlib import Path

import pytest

HEAD = """
from typing import Annotated
from hpdm_core import hookimpl
from hpdm_core.config.schema import Part


class Thing:
    def __init__(self, *positional, **options):
        self.positional, self.options = positional, options

"""


@pytest.fixture
def plugin_file(tmp_path: Path) -> Callable[..., str]:
    """Write a plugin file: the usual imports, then ``body``; return its path."""

    def write(body: str, name: str = "mine", *, head: str = HEAD) -> str:
        file = tmp_path / f"{name}.py"
        file.write_text(head + body)
        return str(file)

    return write


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that a distribution with one entry point is installed."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def pretend(name: str, source: str, *, version: str = "1.2.3", value: str = "") -> None:
        (site / f"{name}.py").write_text(source)
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[hpdm]\n{name} = {value or name}\n")

    return pretend
