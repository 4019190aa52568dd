"""Queued jobs run a copy of the code."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hpdm_core.plugins import build_plugins
from hpdm_core.study.plan.freeze import freeze

PLUGIN = "from hpdm_core import hookimpl\n\n\n@hookimpl\ndef before_cell_started(cell):\n    pass\n"


def imported(folder: Path, cwd: Path, *names: str) -> list[str]:
    """Where a worker finds modules: started as submitit starts it, in ``cwd``."""
    code = f"import {', '.join(names)}; print(*[m.__file__ for m in ({', '.join(names)},)], sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, check=True
    ).stdout.split()


def test_the_copy_is_what_a_worker_imports_wherever_it_starts(tmp_path: Path) -> None:
    frozen = freeze(tmp_path / "code", build_plugins())
    tree = Path(__file__).parents[2]
    for where in (tmp_path, tree):
        found = imported(frozen.folder, where, "hpdm_core.cell.cell", "hpdm_plugins.model.fusions")
        assert all(Path(path).is_relative_to(frozen.folder) for path in found), found
    assert (frozen.folder / "hpdm_plugins" / "presets").is_dir()
    assert not list(frozen.folder.rglob("__pycache__/*.py"))


def test_an_unchanged_tree_is_copied_once_and_a_changed_plugin_makes_another(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    first = freeze(tmp_path / "code", build_plugins([str(plugin)]))
    assert freeze(tmp_path / "code", build_plugins([str(plugin)])) == first
    plugin.write_text(PLUGIN + "# edited\n")
    second = freeze(tmp_path / "code", build_plugins([str(plugin)]))
    assert second.folder != first.folder
    assert Path(first.files[str(plugin)]).read_text() == PLUGIN
    folders = [path.name for path in (tmp_path / "code").iterdir()]
    assert sorted(folders) == sorted([first.folder.name, second.folder.name])


def test_a_spec_names_the_copies(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    frozen = freeze(tmp_path / "code", build_plugins([str(plugin)]))
    spec = frozen.spec({"plugins": [str(plugin)], "arm": "a"})
    assert spec == {"plugins": [frozen.files[str(plugin)]], "arm": "a", "code": str(frozen.folder)}
    plugin.unlink()
    assert build_plugins(spec["plugins"]).names == tuple(spec["plugins"])


def test_a_plugin_module_beside_the_study_is_copied_too(tmp_path: Path) -> None:
    package = tmp_path / "beside" / "my_package_of_plugins"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from . import part\n" + PLUGIN)
    (package / "part.py").write_text("X = 1\n")
    sys.path.insert(0, str(package.parent))
    try:
        frozen = freeze(tmp_path / "code", build_plugins(["my_package_of_plugins"]))
    finally:
        sys.path.remove(str(package.parent))
        for name in [name for name in sys.modules if name.startswith("my_package_of_plugins")]:
            del sys.modules[name]
    assert (frozen.folder / "my_package_of_plugins" / "part.py").read_text() == "X = 1\n"


def test_a_copy_keeps_the_commit_of_the_tree(tmp_path: Path) -> None:
    from hpdm_core.store.provenance import git_commit

    frozen = freeze(tmp_path / "code", build_plugins())
    assert json.loads((frozen.folder / "frozen.json").read_text()) == {"git": git_commit()}
    code = "from hpdm_core.store.provenance import git_commit; print(git_commit())"
    environment = {**os.environ, "PYTHONPATH": str(frozen.folder), "PYTHONSAFEPATH": "1"}
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == str(git_commit())
