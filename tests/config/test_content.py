"""Options that say where something lies: keys take what lies there, never where."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hpdm_core.assembly.compose import load_cell
from hpdm_core.assembly.keys import data_key, places_in, sample_key, train_key
from hpdm_core.config import content
from hpdm_core.config.content import fingerprint_files, fingerprint_tree
from hpdm_core.metrics.interface import data_facts

PLUGIN = """
from pathlib import Path
from typing import Annotated

from hpdm_core import Content, Part, hookimpl


@hookimpl
def register_datasets(register):
    register("mine", mine, source="me")
    register("wrapped", wrapped, source="me")


def mine(clip, reader, *, root: Annotated[Path, Content()], extra: tuple[Annotated[Path, Content()], ...] = ()):
    return None


def wrapped(clip, reader, *, inner: Annotated[Part, "datasets"], cache: Annotated[Path, Content()] | None = None):
    return None
"""

Keys = Callable[..., tuple[str, str, str]]


@pytest.fixture
def keys(folder: Path) -> Keys:
    """``keys(dataset, known)``: train, sample and data key of a cell with that dataset."""
    (folder / "mine.py").write_text(PLUGIN)

    def made(dataset: str, known: Callable[[str], str | None] | None = None) -> tuple[str, str, str]:
        cell = load_cell("base.yaml", sets=[f"data.dataset={dataset}"], plugins=["mine.py"])
        train = train_key(cell.config, cell.plugins, known)
        facts = data_facts(cell.config, cell.plugins, known)
        sample = sample_key(train, cell.config, cell.plugins, known)
        return train, sample, data_key(facts, cell.config, cell.plugins)

    return made


@pytest.fixture
def data(folder: Path) -> Path:
    made = folder / "data"
    (made / "a").mkdir(parents=True)
    (made / "a" / "one.bin").write_bytes(b"one" * 100)
    (made / "two.bin").write_bytes(b"two")
    return made


def test_where_it_lies_is_no_part_of_any_key(keys: Keys, data: Path, folder: Path) -> None:
    before = keys("{use: mine, root: data}")
    assert keys(f"{{use: mine, root: {data}}}") == keys("{use: mine, root: data/../data}") == before
    shutil.copytree(data, folder / "copy")
    assert keys("{use: mine, root: copy}") == before
    shutil.move(data, folder / "elsewhere")
    assert keys("{use: mine, root: elsewhere}") == before
    (folder / "link").symlink_to(folder / "elsewhere")
    assert keys("{use: mine, root: link}") == before


def rewrite(data: Path) -> None:
    (data / "two.bin").write_bytes(b"owt")  # of the same size


@pytest.mark.parametrize(
    "change",
    [
        rewrite,
        lambda data: (data / "two.bin").write_bytes(b"two and more"),
        lambda data: (data / "two.bin").unlink(),
        lambda data: (data / "three.bin").write_bytes(b""),
        lambda data: (data / "two.bin").rename(data / "a" / "two.bin"),
        lambda data: (data / "two.bin").rename(data / "2.bin"),
    ],
    ids=["rewritten", "longer", "removed", "added", "moved within", "renamed"],
)
def test_what_lies_there_is_part_of_every_key(
    keys: Keys, data: Path, change: Callable[[Path], object]
) -> None:
    before = keys("{use: mine, root: data}")
    change(data)
    after = keys("{use: mine, root: data}")
    assert not set(before) & set(after)


def test_exchanged_contents_are_another_content(data: Path) -> None:
    before = fingerprint_tree(data)
    one, two = data / "a" / "one.bin", data / "two.bin"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert fingerprint_tree(data) != before


def test_hidden_files_and_times_do_not_count(data: Path) -> None:
    before = fingerprint_tree(data)
    (data / ".DS_Store").write_text("x")
    (data / ".cache").mkdir()
    (data / ".cache" / "x").write_text("x")
    (data / "two.bin").touch()
    assert fingerprint_tree(data) == before


def test_a_single_file(data: Path) -> None:
    one = data / "two.bin"
    before = fingerprint_tree(one)
    assert fingerprint_tree(shutil.copy(one, data / "other name")) == before
    one.write_bytes(b"TWO")
    assert fingerprint_tree(one) != before


def test_many_bytes_are_known_by_sizes_and_ends(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = data / "long.bin"
    monkeypatch.setattr(content, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(content, "END_BYTES", 10)

    def made(payload: bytes) -> str:
        file.write_bytes(payload)
        return fingerprint_files([("long", file)])

    plain = bytes(2000)
    assert made(plain) == made(plain[:1000] + b"x" + plain[1001:])  # the price
    assert len({made(plain), made(b"x" + plain[1:]), made(plain[:-1] + b"x"), made(plain + b"\0")}) == 4
    short = bytes(12)  # the ends overlap: both are read
    assert (
        len(
            {made(short), made(short[:11] + b"x"), made(b"x" + short[1:]), made(short[:6] + b"x" + short[7:])}
        )
        == 4
    )


def test_paths_in_lists_in_parts_and_none_at_all(keys: Keys, data: Path, folder: Path) -> None:
    shutil.copytree(data, folder / "copy")
    (folder / "copy" / "more").write_text("more")
    plain = keys("{use: mine, root: data}")
    assert keys("{use: mine, root: data, extra: [copy]}") != plain
    wrapped = keys("{use: wrapped, inner: {use: mine, root: data}}")
    assert keys(f"{{use: wrapped, inner: {{use: mine, root: {data}}}}}") == wrapped
    assert keys("{use: wrapped, inner: {use: mine, root: copy}}") != wrapped
    assert keys("{use: wrapped, inner: {use: mine, root: data}, cache: copy}") != wrapped


def test_what_is_gone_is_what_was_known_of_it(keys: Keys, data: Path, folder: Path) -> None:
    before = keys("{use: mine, root: data}")
    fingerprint = fingerprint_tree(data)
    shutil.rmtree(data)
    assert keys("{use: mine, root: data}", {str(data): fingerprint}.get) == before
    nothing = keys("{use: mine, root: data}")
    assert nothing != before and nothing == keys("{use: mine, root: data}", lambda place: None)
    assert nothing != keys("{use: mine, root: other}")
    cell = load_cell("base.yaml", sets=["data.dataset={use: mine, root: data}"], plugins=["mine.py"])
    assert places_in(cell.config, cell.plugins) == {}
    data.mkdir()  # an empty folder is no missing one
    assert keys("{use: mine, root: data}") not in (before, nothing)


def test_a_run_reads_the_data_once(folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "mine.py").write_text(PLUGIN)
    cell = load_cell("base.yaml", sets=["data.dataset={use: mine, root: data}"], plugins=["mine.py"])
    read = []
    digest = content._digest
    monkeypatch.setattr(
        content, "_digest", lambda path, whole: read.append(path) or digest(path, whole=whole)
    )
    first = train_key(cell.config, cell.plugins)
    assert len(read) == 2 and train_key(cell.config, cell.plugins) == first
    assert places_in(cell.config, cell.plugins) == {str(data): fingerprint_tree(data)}
    assert len(read) == 4  # two more for the line above
