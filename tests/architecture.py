"""The shape of the packages: ``python -m tests.architecture`` prints it and what breaks the rules, exit code 1 if any.

Rules: no circle of imports, those for typing and within functions counted; at most `MODULES` modules in a folder beside
its sub-packages; at most `ARGUMENTS` arguments of a constructor, dataclasses of options aside. The direction of
imports between packages is the layers contract of import-linter (pyproject.toml), which ``nox -s lint`` checks.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "hpdm_core", ROOT / "plugins" / "hpdm_plugins")
MODULES = 14
ARGUMENTS = 8
PARTS = ("FileClips", "RIN", "EDM")
"""Classes whose keyword-only arguments are the options of a part, as they stand in a study file."""


class Source:
    """The modules below a package's folder, read and never imported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {self._name(path): path for path in sorted(folder.rglob("*.py"))}

    def _name(self, path: Path) -> str:
        parts = path.relative_to(self.folder.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.files.items()}

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """Module -> the modules that it imports, anywhere in its text."""
        return {name: set(self._imported(tree)) - {name} for name, tree in self.trees.items()}

    def _imported(self, tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in self.files else str(node.module) for name in whole]
            yield from (name for name in names if name in self.files)

    def circle(self) -> list[str]:
        """Return modules that import one another in a circle, the first one again at the end; none: empty."""
        try:
            graphlib.TopologicalSorter(self.imports).prepare()
        except graphlib.CycleError as error:
            return list(reversed(error.args[1]))
        return []

    def crowded(self) -> list[str]:
        """Return a line per folder that holds too many modules."""
        counted = Counter(path.parent for path in self.files.values() if path.name != "__init__.py")
        return [
            f"{folder.relative_to(ROOT)}: {count} modules; at most {MODULES}"
            for folder, count in sorted(counted.items())
            if count > MODULES
        ]

    def constructors(self) -> list[str]:
        """Return a line per class whose constructor takes too many arguments."""
        return [
            f"{name}.{node.name}: {count} constructor arguments; at most {ARGUMENTS}"
            for name, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            for count in [_arguments(node)]
            if count > ARGUMENTS
        ]

    def faults(self) -> list[str]:
        circle = self.circle()
        return [
            *(["circle of imports: " + " -> ".join(circle)] if circle else []),
            *self.crowded(),
            *self.constructors(),
        ]


def _arguments(node: ast.ClassDef) -> int:
    for each in () if node.name in PARTS else node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            given = each.args
            return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) - 1
    return 0


def main() -> int:
    faults = []
    for folder in PACKAGES:
        source = Source(folder)
        faults += source.faults()
        packages = sum(path.name == "__init__.py" for path in source.files.values())
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in source.files.values())
        arrows = sum(map(len, source.imports.values()))
        modules = len(source.files) - packages
        print(f"{folder.name}: {packages} packages, {modules} modules, {arrows} imports, {lines} lines")
    print("\n".join(faults) or "no circle of imports, no crowded folder, no crowded constructor")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
