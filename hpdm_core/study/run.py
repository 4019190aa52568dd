"""Run a validated study: build its cells, backend and controller, and start the controller."""

from __future__ import annotations

import errno
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from hpdm_core.base.errors import InputError, TroubleError, did_you_mean
from hpdm_core.base.files import disk_trouble
from hpdm_core.base.passwords import without_passwords
from hpdm_core.config.schema import Part
from hpdm_core.study.backends.interface import JobRunner
from hpdm_core.study.backends.registry import asking_backends, make_backend, results_of

if TYPE_CHECKING:
    from hpdm_core.cell import Cell
    from hpdm_core.study.plan.study_file import StudyConfig

__all__ = ["backend_part", "check_writable", "run_study", "study_text"]


def backend_part(study: StudyConfig, name: str | None) -> Part:
    """Return the backend that ``--backend NAME`` asks for; without it the study's own. Raises `InputError`."""
    if name is None or name == study.backend.use:
        return study.backend
    known = study.plugins.keys("backends")
    if name not in known:
        raise InputError(
            f"--backend {name}: unknown '{name}'{did_you_mean(name, known)}; allowed: {', '.join(known)}"
        )
    return Part(use=name)


def run_study(
    study: StudyConfig,
    results: Path,
    *,
    backend: str | None = None,
    max_parallel: int | None = None,
    retry_failed: bool = False,
    evaluate_only: bool = False,
    imports: Sequence[Path] = (),
    again: str = "",
    detach: bool = False,
) -> int:
    """Run ``study`` with its results under ``results`` and return the exit code.

    ``imports``: results folders to take finished stages from (``--import``). ``again``: the command line to show to the
    user for going on. ``detach`` (for a backend with its own queue): submit what may be submitted, and return.
    """
    from hpdm_core.evaluation.study_metric import lacking
    from hpdm_core.study.controller.controller import Controller
    from hpdm_core.study.controller.display import make_display
    from hpdm_core.study.controller.study_run import StudyRun
    from hpdm_core.study.ledger.storage import check_storage
    from hpdm_core.study.plan.cells import cells_of, refuse_absent
    from hpdm_core.study.plan.evaluate_only import only_evaluations
    from hpdm_core.study.plan.import_cells import Importer
    from hpdm_core.study.show.report import report
    from hpdm_core.study.worker.run_cell import run_job

    part = backend_part(study, backend)
    controllers: list[Controller] = []
    runner = JobRunner(work=run_job, tick=lambda: controllers[0].tick())
    chosen = make_backend(study.plugins, part, runner, slots=max_parallel)
    chosen.check()
    check_writable(results)
    results = results_of(chosen, results.resolve())
    check_storage(study.storage, results / study.name)
    cells, others = cells_of(study, results / "store")
    refuse_absent(cells)
    importers = [Importer(folder) for folder in imports]

    def take(cell: Cell) -> None:
        for importer in importers:
            importer.take(cell)

    search = None
    if study.search is not None:
        from hpdm_core.study.search.search import Search

        search = Search(study, store=results / "store", folder=results / study.name, seen=take)
        cells, others = [], []
    if evaluate_only:
        cells, rest = only_evaluations(cells)
        others = [*others, *rest]
    console = Console()
    for line in lacking(list(study.configs.values()), study.plugins):
        console.print(line, markup=False, highlight=False)
    controllers.append(
        Controller(
            StudyRun(
                name=study.name,
                folder=results / study.name,
                cells=cells,
                others=others,
                backend=part.use,
                other_backend=asking_backends(study.plugins),
                source=study_text(study, without_passwords(again)),
                storage=study.storage,
                retry_failed=retry_failed,
                report=report,
                planner=search,
                again=without_passwords(again),
                detach=detach,
                prepare=_freezer(results / study.name, study) if chosen.queued else None,
                budget=study.budget,
            ),
            backend=chosen,
            display=make_display(console),
        )
    )
    before = (
        signal.signal(signal.SIGTERM, _terminated),
        signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        with disk_trouble(results):
            for cell in cells if importers else ():
                take(cell)
        code = controllers[0].run()
        for importer in importers:
            for text in importer.lines():
                console.print(text, markup=False, highlight=False, soft_wrap=True)
        return code
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def _freezer(folder: Path, study: StudyConfig) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that makes a spec run from a copy of the code; its first call makes the copy."""
    from hpdm_core.study.plan.freeze import Frozen, freeze

    made: list[Frozen] = []

    def prepare(spec: dict[str, Any]) -> dict[str, Any]:
        if not made:
            made.append(freeze(folder / "code", study.plugins))
        return made[0].spec(spec)

    return prepare


def study_text(study: StudyConfig, command: str) -> str:
    """Return the text of study.yaml in the study's folder: the study file with presets and flags applied."""
    data = {key: value for key, value in study.resolved.items() if key != "factors"}
    data["arms"] = study.arms  # with those of --arm and of factors
    data["baseline"] = study.baseline
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"# {command}\n{text}" if command else text


def check_writable(folder: Path) -> None:
    """Raise `InputError` when ``folder`` is not writable, `TroubleError` when the disk is full; leaves no files."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        # Checking permissions is not enough: a file system may be read-only, and root passes every check.
        Path(tempfile.mkdtemp(prefix=".hpdm-", dir=there)).rmdir()
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TroubleError(
                f"--results {folder}: {reason}; the work done is kept, free some space and give the same "
                "command again"
            ) from error
        raise InputError(
            f"--results {folder}: not writable ({there}: {reason}); allowed: a folder that you may write"
        ) from error


def _terminated(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)
