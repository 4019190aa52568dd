"""The tables of docs/study-file.md, made from the models and the registered parts.

``python -m tests.study_reference`` writes them anew. Do so after a change of a key, of a part's options, of the text
below a field, or of a part's docstring.
"""

from __future__ import annotations

from pathlib import Path

from hpdm_core.plugins import build_plugins
from hpdm_core.study.show.explain import reference

PAGE = Path(__file__).parents[1] / "docs" / "study-file.md"
BEGIN = "<!-- The tables from here on are made: python -m tests.study_reference -->"
END = "<!-- The tables end here. -->"


def with_tables(page: str, tables: str) -> str:
    """Return ``page`` with ``tables`` between the two comments."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, "the page has both comments"
    return f"{before}{begin}\n\n{tables}\n{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(), reference(build_plugins())))
