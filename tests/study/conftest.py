"""Studies for tests: one of fake cells under the real controller, and a real one of the smallest kind."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hpdm_core.hookspecs import hookimpl
from hpdm_core.plugins import build_plugins
from hpdm_core.store.stages import Stage, Store
from hpdm_core.study.backends.inline import Inline
from hpdm_core.study.backends.interface import JobRunner
from hpdm_core.study.backends.registry import asking_backends
from hpdm_core.study.controller.controller import Controller
from hpdm_core.study.controller.display import PlainDisplay
from hpdm_core.study.controller.study_run import StudyRun
from tests.small import MODEL

PLUGINS = build_plugins()


@dataclass
class Listener:
    """Notes the study that has ended."""

    heard: list[Path]

    @hookimpl
    def after_study_finished(self, study: Path) -> None:
        self.heard.append(study)


@dataclass
class FakeCell:
    """Looks like `hpdm_core.cell.cell.Cell` to the controller. ``model``: its train key; ``metrics``: one stage
    each.
    """

    arm: str
    seed: int
    root: Path
    model: str
    metrics: Sequence[str] = ("loss",)
    fails: str = ""
    """The stage that fails."""
    heard: list[Path] = field(default_factory=list)
    observers: Sequence[Any] = ()

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def identity(self) -> str:
        return "-".join([self.arm, str(self.seed), self.model, *self.metrics])

    @property
    def keys(self) -> Any:
        evaluations = tuple(f"{self.model}{self.seed}{metric}" for metric in self.metrics)
        return SimpleNamespace(
            train=f"{self.model}{self.seed}", samples=self.identity, evaluations=evaluations
        )

    @property
    def plugins(self) -> Any:
        return build_plugins(objects=[Listener(self.heard), *self.observers])

    def stages(self) -> list[tuple[str, Stage]]:
        store = Store(self.root)
        found = [("train", store.stage("train", self.keys.train))]
        for metric, key in zip(self.metrics, self.keys.evaluations, strict=True):
            found.append((f"evaluate {metric}", store.stage("evaluations", key)))
        return found

    def missing(self) -> list[Any]:
        return [SimpleNamespace(name=name, stage=stage) for name, stage in self.stages() if not stage.done]

    def finished(self) -> bool:
        return all((stage.folder / "result.json").exists() for _, stage in self.stages())

    def forget(self) -> None: ...

    def results(self) -> dict[str, Any]:
        return {name: result for name, stage in self.stages() if (result := stage.result()) is not None}

    def spec(self) -> dict[str, Any]:
        stages = [[name, stage.kind, stage.key] for name, stage in self.stages()]
        return {"root": str(self.root), "stages": stages, "fails": self.fails, "cell": self.name}


def make_job() -> Callable[..., None]:
    """Return a job that does a fake cell; nested, so that it travels to another process by value."""

    def job(path: str, progress: Any = None) -> None:
        import json
        from pathlib import Path

        from hpdm_core.base.errors import TroubleError
        from hpdm_core.base.files import write_json
        from hpdm_core.store.lease import Process
        from hpdm_core.store.stages import Store

        if progress is None:
            write_json(Path(path).parent / "worker.json", Process.here().to_json())
        spec = json.loads(Path(path).read_text())
        store = Store(Path(spec["root"]))
        for name, kind, key in spec["stages"]:
            stage = store.stage(kind, key)
            if stage.done:
                continue
            with stage.claim() as attempt:
                attempt.log(f"{name} for {spec['cell']}")
                attempt.heartbeat({"stage": name, "step": 1, "steps": 2})
                if progress is not None:
                    progress({})
                if spec["fails"] == "full disk":
                    try:
                        raise OSError(28, "No space left on device")
                    except OSError as error:
                        raise TroubleError("could not be written") from error
                if spec["fails"] == name:
                    raise TroubleError(f"{name} went wrong")
                attempt.finish({"value": 1.0, "wall_seconds": 2.0})

    return job


@dataclass
class Run:
    """What one command did."""

    code: int
    text: str
    made: list[str]
    """The stages that were worked on, in order: ``NAME for CELL``."""


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., Run]:
    """Return a function that runs cells as one command would, inline unless a backend is given."""

    def run(cells: Sequence[FakeCell], *, backend: Any = None, job: Any = None, **options: Any) -> Run:
        seen = _logged(tmp_path)
        text = io.StringIO()
        display = PlainDisplay(Console(file=text, width=200))
        used = backend or Inline(JobRunner(work=job or make_job()))
        asked = StudyRun(
            name="tiny",
            folder=tmp_path / "tiny",
            cells=cells,
            again="again",
            backend="inline",
            other_backend=asking_backends(PLUGINS),
            **options,
        )  # type: ignore[arg-type]
        controller = Controller(asked, backend=used, display=display)
        code = controller.run()
        return Run(code, text.getvalue(), [line for line in _logged(tmp_path) if line not in seen])

    return run


@pytest.fixture
def cell(tmp_path: Path) -> Callable[..., FakeCell]:
    """Return a function that makes a fake cell in this test's store."""

    def make(arm: str, seed: int = 0, **options: Any) -> FakeCell:
        return FakeCell(arm, seed, tmp_path / "store", options.pop("model", arm), **options)

    return make


def _logged(folder: Path) -> list[str]:
    """Every line of work in the store, with its attempt, oldest first."""
    found = []
    for log in (folder / "store").rglob("log.txt"):
        for line in log.read_text().splitlines():
            if " for " in line:
                found.append((log.stat().st_mtime_ns, f"{line[20:]} #{log.parent.name}"))
    return [line for _, line in sorted(found)]


@pytest.fixture
def fake_job() -> Callable[..., None]:
    return make_job()


TINY = (
    "name: tiny"
    + MODEL
    + """data: {dataset: synthetic}
training: {steps: 6, batch: 2, learning_rate: 1e-3}
sampling: {solver: {use: edm, steps: [2]}}
evaluation: {samples: 4, reals: 4, metrics: [held_out_loss, {use: frechet, extractor: statistics}]}
runtime: {threads: 1, sample_batch: 2, checkpoint_every: 2, log_every: 1}
arms:
  default: {}
seeds: [0]
"""
)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A study file of one real cell that takes seconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of the tiny study, run inline, undisturbed. Copy it before changing it."""
    from hpdm_core.study.__main__ import main

    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "tiny.yaml").write_text(TINY)
    results = folder / "results"
    assert main([str(folder / "tiny.yaml"), "--results", str(results), "--backend", "inline"]) == 0
    return results


def numbers(results: Path) -> dict[str, Any]:
    """Return all that a study computed, by path: weights and samples as bytes, the rows of each metric."""
    store = results / "store"
    found: dict[str, Any] = {
        str(path.relative_to(store)): path.read_bytes()
        for path in store.rglob("*.safetensors")
        if "attempts" not in path.parts
    }
    for path in store.glob("evaluations/*/result.json"):
        found[str(path.relative_to(store))] = json.loads(path.read_text())["rows"]
    for path in store.glob("train/*/result.json"):
        found[str(path.relative_to(store))] = json.loads(path.read_text())["loss"]
    return found


@pytest.fixture
def computed() -> Callable[[Path], dict[str, Any]]:
    """Return `numbers`."""
    return numbers
