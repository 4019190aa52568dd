"""``python -m hpdm_core.study FILE``: run a study, or go on with it."""

from __future__ import annotations

import argparse
import gc
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hpdm_core.base.errors import InputError, TroubleError, report_errors
from hpdm_core.base.files import read_json
from hpdm_core.base.passwords import without_passwords
from hpdm_core.study.run import backend_part, check_writable, run_study

if TYPE_CHECKING:
    from hpdm_core.study.backends.interface import Backend
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
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="the study file (YAML); only --explain works without"
    )
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
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="where cells run: inline, local, slurm, simulated, or another that a plugin brings",
    )
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
    way.add_argument(
        "--explain",
        metavar="KEY",
        help="say what a key of a study file means, such as training.steps, model or model.backbone.heads",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 all cells done, 1 trouble, 130 after Ctrl-C."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    if given.explain is not None:
        print(_explained(given))
        return 0
    if given.file is None:
        parser.error("the following arguments are required: FILE")
    if given.dry_run:
        with _nothing_collected():
            _say(f"reading {given.file}")  # before torch is loaded, which takes seconds
            study = _study(given)
            backend_part(study, given.backend)
            from hpdm_core.study.show.dry_run import describe_study

            print(describe_study(study, given.results, say=_say))
        return 0
    study = _study(given)
    words = [each for each in (sys.argv[1:] if arguments is None else arguments) if each != "--detach"]
    if given.status or given.cancel or given.detach:
        from hpdm_core.study.backends.registry import asking_backends, results_of

        part, other = backend_part(study, given.backend), asking_backends(study.plugins)
        backend = other(part.use)
        results = results_of(backend, given.results.resolve())
        if given.status or given.cancel:
            return _look_or_cancel(study, results, other, cancel=given.cancel)
        if not backend.queued:
            return _detached(study, results, part.use, words, attached=backend.attached)
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
    )


def _explained(given: argparse.Namespace) -> str:
    """Return what the key of ``--explain`` means, parts of the study's and the flags' plugins included."""
    from hpdm_core.assembly.compose import compose
    from hpdm_core.plugins import build_plugins
    from hpdm_core.study.show.explain import explain

    if given.file is None:
        return explain(build_plugins(given.plugins), given.explain)
    composed = compose(given.file, sets=given.sets, plugins=given.plugins, allow_preset=False)
    return explain(composed.plugins, given.explain)


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


def _look_or_cancel(
    study: StudyConfig, results: Path, other: Callable[[str], Backend], *, cancel: bool
) -> int:
    from hpdm_core.study.plan.cells import cells_of
    from hpdm_core.study.show.status import begun_cells, cancel_study, status_of

    folder = results / study.name
    if cancel:
        return cancel_study(study.name, folder, other=other, say=print)
    cells = cells_of(study, results / "store")[0] if study.search is None else begun_cells(folder)
    print(status_of(cells, folder, other))
    return 0


def _detached(study: StudyConfig, results: Path, use: str, words: Sequence[str], *, attached: bool) -> int:
    """Start the command again without a terminal, since on this machine somebody must hand out the slots."""
    if attached:
        raise InputError(f"--detach: the backend '{use}' runs in this very process; allowed: local, slurm")
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


if __name__ == "__main__":
    sys.exit(report_errors(main))
