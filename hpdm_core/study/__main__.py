"""``python -m hpdm_core.study FILE``: run a study, or go on with it."""

from __future__ import annotations

import argparse
import errno
import gc
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from hpdm_core.base.errors import InputError, TroubleError, did_you_mean, report_errors
from hpdm_core.base.files import disk_trouble, read_json
from hpdm_core.base.passwords import without_passwords
from hpdm_core.study.backends.registry import BACKENDS, make_backend

if TYPE_CHECKING:
    from hpdm_core.cell import Cell
    from hpdm_core.study.plan.study_file import StudyConfig

__all__ = ["build_parser", "main"]

STARTING_SECONDS = 30.0
"""For how long a command that leaves another behind looks whether that one starts."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser: its flags are a promise."""
    parser = argparse.ArgumentParser(
        prog="python -m hpdm_core.study",
        description="Run every cell (arm x seed) of a study: train, sample, evaluate, report. The same "
        "command again goes on where it was; what is done is not done again.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="the study file (YAML)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="sets",
        help="change a key of the file, such as training.steps=100",
    )
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        dest="arms",
        help="add an arm",
    )
    parser.add_argument("--only", action="append", default=[], metavar="ARM", help="run this arm alone")
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        dest="plugins",
        help="use a plugin: a Python file or a module",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="where results go (default: results)",
    )
    parser.add_argument("--backend", metavar="NAME", help=f"where cells run: {', '.join(BACKENDS)}")
    parser.add_argument(
        "--max-parallel", type=_positive, metavar="N", help="how many cells may be under way at a time"
    )
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        dest="imports",
        help="take what is finished in another results folder, by its keys, before anything runs",
    )
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    parser.add_argument(
        "--evaluate-only", action="store_true", help="measure what is trained and sampled, and nothing else"
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--dry-run", action="store_true", help="print what would be run and what it takes; write nothing"
    )
    way.add_argument(
        "--detach", action="store_true", help="submit and return; the same command later collects and goes on"
    )
    way.add_argument("--status", action="store_true", help="print where every cell stands; write nothing")
    way.add_argument("--cancel", action="store_true", help="end what runs or waits, wherever it does")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 all cells done, 1 trouble, 130 after Ctrl-C."""
    given = build_parser().parse_args(arguments)
    if given.backend is not None and given.backend not in BACKENDS:
        raise InputError(
            f"--backend {given.backend}: unknown '{given.backend}'{did_you_mean(given.backend, BACKENDS)}; "
            f"allowed: {', '.join(BACKENDS)}"
        )
    if given.dry_run:
        with _nothing_collected():
            _say(f"reading {given.file}")  # before torch is loaded, which takes seconds
            study = _study(given)
            from hpdm_core.study.show.dry_run import describe_study

            print(describe_study(study, given.results, say=_say))
        return 0
    study = _study(given)
    words = [each for each in (sys.argv[1:] if arguments is None else arguments) if each != "--detach"]
    if given.status or given.cancel:
        from hpdm_core.study.backends.simulated import results_for

        results = results_for(given.backend or study.backend.use, given.results.resolve())
        return _look_or_cancel(study, results, cancel=given.cancel)
    if given.detach and (given.backend or study.backend.use) != "slurm":
        return _detached(study, given.results.resolve(), given.backend or study.backend.use, words)
    again = shlex.join(["python", "-m", "hpdm_core.study", *words])
    return run_study(
        study,
        given.results,
        backend=given.backend,
        max_parallel=given.max_parallel,
        retry_failed=given.retry_failed,
        evaluate_only=given.evaluate_only,
        imports=given.imports,
        again=again,
        detach=given.detach,
    )


def _study(given: argparse.Namespace) -> StudyConfig:
    from hpdm_core.study.plan.study_file import load_study

    return load_study(
        given.file,
        sets=given.sets,
        arms=given.arms,
        only=given.only,
        plugins=given.plugins,
        backends=BACKENDS,
    )


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Within the block Python does not look for garbage in cycles: what ends in seconds has little of it, and would
    spend a sixth of its time looking.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


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

    ``detach`` (slurm) submits what may be submitted and returns.
    """
    from hpdm_core.evaluation.study_metric import lacking
    from hpdm_core.study.backends.simulated import results_for
    from hpdm_core.study.controller.controller import Controller
    from hpdm_core.study.controller.display import make_display
    from hpdm_core.study.ledger.storage import check_storage
    from hpdm_core.study.plan.cells import cells_of, refuse_absent
    from hpdm_core.study.plan.evaluate_only import only_evaluations
    from hpdm_core.study.plan.import_cells import Importer
    from hpdm_core.study.show.report import report
    from hpdm_core.study.worker.run_cell import run_job

    use, options = study.backend.use, study.backend.options
    if backend is not None and backend != use:
        use, options = backend, {}
    controllers: list[Controller] = []
    chosen = make_backend(use, options, work=run_job, tick=lambda: controllers[0].tick(), slots=max_parallel)
    chosen.check()
    check_writable(results)
    results = results_for(use, results.resolve())
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
            cells,
            others=others,
            folder=results / study.name,
            study=study.name,
            backend=chosen,
            display=make_display(console),
            source=study_text(study, without_passwords(again)),
            storage=study.storage,
            retry_failed=retry_failed,
            report=report,
            planner=search,
            again=without_passwords(again),
            detach=detach,
            prepare=_freezer(results / study.name, study) if use == "slurm" else None,
            budget=study.budget,
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
    """Return what makes a spec run from a copy of the code, made when the first one is submitted."""
    from hpdm_core.study.plan.freeze import Frozen, freeze

    made: list[Frozen] = []

    def prepare(spec: dict[str, Any]) -> dict[str, Any]:
        if not made:
            made.append(freeze(folder / "code", study.plugins))
        return made[0].spec(spec)

    return prepare


def _look_or_cancel(study: StudyConfig, results: Path, *, cancel: bool) -> int:
    from hpdm_core.study.plan.cells import cells_of
    from hpdm_core.study.show.status import begun_cells, cancel_study, status_of

    folder = results / study.name
    if cancel:
        return cancel_study(study.name, folder, say=print)
    cells = cells_of(study, results / "store")[0] if study.search is None else begun_cells(folder)
    print(status_of(cells, folder))
    return 0


def _detached(study: StudyConfig, results: Path, use: str, words: Sequence[str]) -> int:
    """Start the command again without a terminal, since on this machine somebody must hand out the slots."""
    if use == "inline":
        raise InputError("--detach: the backend 'inline' runs in this very process; allowed: local, slurm")
    check_writable(results)
    from hpdm_core.study.ledger.lock import LOCK

    folder = results / study.name
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "controller.log"
    command = [sys.executable, "-m", "hpdm_core.study", *words]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    deadline = time.monotonic() + STARTING_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if (read_json(folder / LOCK) or {}).get("pid") == process.pid:
            break
        time.sleep(0.1)
    if process.poll() not in (None, 0):
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise TroubleError(f"--detach: {''.join(last).removeprefix('error: ')} ({log})")
    process.returncode = 0  # it is left alone on purpose: nobody is to wait for it
    print(f"study '{study.name}' is run by process {process.pid} on this machine; what it says: {log}")
    look = shlex.join(["python", "-m", "hpdm_core.study", *words, "--status"])
    print(f"To look: {without_passwords(look)}")
    return 0


def study_text(study: StudyConfig, command: str) -> str:
    """Return what the study's folder keeps as study.yaml: the file with presets and flags worked in."""
    data = {key: value for key, value in study.resolved.items() if key != "factors"}
    data["arms"] = study.arms  # those of --arm and of factors too
    data["baseline"] = study.baseline
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"# {command}\n{text}" if command else text


def check_writable(folder: Path) -> None:
    """Raise `InputError` when nothing can be written under ``folder``, `TroubleError` when there is no space
    left; leaves nothing behind.
    """
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        # Asking for permissions is not enough: a file system may be read-only, and root is told yes.
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


def _say(text: str) -> None:
    """Say on standard error what goes on."""
    print(text, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of 1 or more")
    return number


def _terminated(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(report_errors(main))
