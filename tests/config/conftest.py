from collections.abc import Callable
from pathlib import Path

import pytest

BASE = """
model:
  video: [4, 8, 16]
  patch: [2, 4, 8]
  token: [1, 2, 2]
  levels: 2
  token_dim: 16
  blocks: 2
data:
  dataset: synthetic
training:
  steps: 10
  batch: 2
  learning_rate: 1e-3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``base.yaml``, a small cell."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


@pytest.fixture
def study(folder: Path) -> Callable[..., str]:
    """Write ``study.yaml``, which extends ``base.yaml``; return its name."""

    def write(text: str, *, head: str = "extends: base.yaml\n") -> str:
        (folder / "study.yaml").write_text(head + text)
        return "study.yaml"

    return write
