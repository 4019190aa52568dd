"""The command line of ``python -m hpdm_core.evaluate``: two folders by a protocol, or one trained cell."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hpdm_core.assembly.runtime import prepare_torch
from hpdm_core.base import distributed
from hpdm_core.base.command_line import CommandParser
from hpdm_core.base.errors import InputError, did_you_mean
from hpdm_core.base.files import trouble_when_unwritable, write_json
from hpdm_core.config.schema import Arithmetic, Part, RuntimeConfig
from hpdm_core.evaluation.extraction import FeatureCache
from hpdm_core.evaluation.folders.manifest import Manifest, read_manifest
from hpdm_core.evaluation.folders.reading import RANGES
from hpdm_core.evaluation.folders.splits import check_split, find_lists
from hpdm_core.evaluation.results import table, text_of, to_json
from hpdm_core.evaluation.run import Changes, Evaluation, FolderEvaluator, changed_record
from hpdm_core.metrics.protocols.records import load_record
from hpdm_core.plugins import build_plugins

__all__ = ["build_parser", "main", "manifest_file"]

CACHE_VARIABLE = "HPDM_CACHE"


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser. Its flags are part of the public interface."""
    parser = CommandParser(
        prog="python -m hpdm_core.evaluate",
        description="Measure a folder of generated videos against a folder of real ones by a named protocol "
        "(--real, --fake, --protocol), or the metrics of a trained cell (CELL_DIR). Under torchrun the clips "
        "are shared among the processes, with the same result.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "cell",
        type=Path,
        nargs="?",
        metavar="CELL_DIR",
        help="a train stage: STORE/train/KEY, with spec.json",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the results with their protocols as JSON"
    )
    folders = parser.add_argument_group(
        "folders of videos, frame folders or .npy files, with or without class folders"
    )
    folders.add_argument("--real", type=Path, metavar="DIR", help="real videos")
    folders.add_argument("--fake", type=Path, metavar="DIR", help="generated videos")
    folders.add_argument(
        "--protocol",
        action="append",
        default=[],
        dest="protocols",
        metavar="NAME",
        help="such as stylegan_v/fvd2048_16f, or a file; may be repeated (python -m hpdm_core.metrics protocols "
        "lists them)",
    )
    folders.add_argument(
        "--split", metavar="NAME", help="split of the real videos by UCF-101's lists: train, test, train+test"
    )
    folders.add_argument(
        "--lists", type=Path, metavar="DIR", help="UCF-101's lists (default: in or beside --real)"
    )
    folders.add_argument(
        "--num-reals", type=int, metavar="N", help="number of real clips; marks the result as modified"
    )
    folders.add_argument(
        "--num-fakes", type=int, metavar="N", help="number of generated clips; marks the result as modified"
    )
    folders.add_argument("--stride-reals", type=int, metavar="N", help="every N-th frame; marks as modified")
    folders.add_argument("--stride-fakes", type=int, metavar="N", help="every N-th frame; marks as modified")
    folders.add_argument("--seed", type=int, metavar="N", help="seed of random choices; marks as modified")
    folders.add_argument("--value-range", metavar="RANGE", help=f"range of float arrays: {', '.join(RANGES)}")
    folders.add_argument(
        "--weights", type=Path, metavar="PATH", help="the detector's weight file, or a folder of weight files"
    )
    folders.add_argument(
        "--trust-weights", action="store_true", help="run a TorchScript file whose hash is not known"
    )
    folders.add_argument(
        "--manifest", type=Path, metavar="FILE", help="use exactly the clips of an earlier run"
    )
    folders.add_argument(
        "--bootstrap", type=int, default=200, metavar="N", help="replicates (default: 200; 0: none)"
    )
    folders.add_argument("--device", default="cpu", metavar="NAME", help="such as cuda (default: cpu)")
    folders.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help=f"folder for features of real clips (default: {CACHE_VARIABLE}, or ~/.cache/hpdm)",
    )
    folders.add_argument("--no-cache", action="store_true", help="do not store features of real clips")
    folders.add_argument("--reader", default="pyav", metavar="NAME", help="video reader (default: pyav)")
    folders.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        dest="plugins",
        help="a Python file or a module",
    )
    cell = parser.add_argument_group("a trained cell")
    cell.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="PART",
        dest="metrics",
        help="NAME or '{use: NAME, option: value}', may be repeated; default: those of the cell",
    )
    cell.add_argument(
        "--samples", type=Path, metavar="DIR", help="generated videos; default: those of the cell"
    )
    return parser


CELL_OPTIONS = ("metrics", "samples")
BOTH = ("cell", "out", *CELL_OPTIONS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    if given.out is not None:
        check_out(given.out)
    changed = [name for name, value in vars(given).items() if value != parser.get_default(name)]
    if given.cell is not None:
        wrong = [name for name in changed if name not in BOTH]
        if wrong:
            raise InputError(
                f"CELL_DIR {given.cell} and --{_flag(wrong[0])}: a trained cell is measured by --metric; leave out "
                "one of them"
            )
        from hpdm_core.evaluation.trained_cell import evaluate_cell

        return evaluate_cell(given.cell, metrics=given.metrics, samples=given.samples, out=given.out)
    wrong = [name for name in changed if name in CELL_OPTIONS]
    if wrong:
        raise InputError(f"--{_flag(wrong[0])}: belongs to a trained cell; give CELL_DIR")
    with distributed.joined(given.device):
        return _folders(given)


def _folders(given: argparse.Namespace) -> int:
    if given.fake is None or not given.protocols:
        missing = "--fake DIR" if given.fake is None else "--protocol NAME"
        raise InputError(
            f"{missing} is missing; give --real DIR --fake DIR --protocol NAME, or CELL_DIR for a trained cell"
        )
    _check_numbers(given)
    plugins = build_plugins(given.plugins)
    changes = Changes(
        num_reals=given.num_reals,
        num_fakes=given.num_fakes,
        stride_reals=given.stride_reals,
        stride_fakes=given.stride_fakes,
        split=given.split,
        seed=given.seed,
        weights=given.weights,
        trust_weights=given.trust_weights,
    )
    loaded = [load_record(name, plugins) for name in dict.fromkeys(given.protocols)]
    files = {str(each.detector.options["weights"]) for each in loaded if "weights" in each.detector.options}
    if given.weights is not None and given.weights.is_file() and len(files) > 1:
        raise InputError(
            f"--weights {given.weights}: the protocols need {len(files)} weight files "
            f"({', '.join(sorted(files))}); give the folder that holds them"
        )
    records = [changed_record(record, changes) for record in loaded]
    manifest: Manifest | None = None if given.manifest is None else read_manifest(given.manifest)
    device = prepare_torch(RuntimeConfig(device=given.device), Arithmetic())
    judge = FolderEvaluator(
        plugins=plugins,
        reader=plugins.make("video_readers", Part(use=given.reader)),
        real=given.real,
        fake=given.fake,
        cache=FeatureCache(None if given.no_cache else given.cache or cache_folder()),
        lists=given.lists,
        values=given.value_range,
        device=device,
        replicates=given.bootstrap,
        progress=Progress(),
    )
    for record, _ in records:  # before the first clip, so that missing weights of any protocol show early
        judge.check(record)
    evaluations = [judge.evaluate(record, modified, manifest=manifest) for record, modified in records]
    if distributed.is_main():
        _report(evaluations, given.out)
    distributed.barrier()
    return 0


def _report(evaluations: Sequence[Evaluation], out: Path | None) -> None:
    results = [each.result for each in evaluations]
    print("\n\n".join([table(results), *(text_of(result) for result in results)]), flush=True)
    if out is not None:
        clips = Manifest(protocols=tuple(each.clips for each in evaluations))
        with trouble_when_unwritable(out):
            write_json(manifest_file(out), clips.model_dump(mode="json"))
            write_json(out, to_json(evaluations))
        print(f"\nresults: {out}; clips used: {manifest_file(out)}")


def cache_folder() -> Path:
    """Return the folder for features of real clips: ``HPDM_CACHE``, or hpdm in the user's cache folder."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hpdm"


def manifest_file(out: Path) -> Path:
    """Return the path of the manifest of the results ``out``, which is beside them."""
    return out.with_name(f"{out.stem}.manifest.json")


def check_out(file: Path) -> None:
    """Raise InputError if ``file`` cannot be written; called before anything is computed."""
    if file.is_dir():
        raise InputError(f"--out {file}: is a folder; allowed is a file")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise InputError(f"--out {file}: allowed is a file in a folder that exists and may be written to")


def _check_numbers(given: argparse.Namespace) -> None:
    for name, least in (
        ("num_reals", 2),
        ("num_fakes", 2),
        ("stride_reals", 1),
        ("stride_fakes", 1),
        ("seed", 0),
        ("bootstrap", 0),
    ):
        value = getattr(given, name)
        if value is not None and value < least:
            raise InputError(f"--{_flag(name)} {value}: allowed is {least} or more")
    if given.split is not None:
        check_split(given.split)
        if given.real is not None and given.real.is_dir() and find_lists(given.real, given.lists) is None:
            raise InputError(
                f"--split {given.split}: there are no lists in or beside {given.real}; give --lists DIR, or leave "
                "--split out to use all videos in the folder"
            )
    if given.value_range is not None and given.value_range not in RANGES:
        raise InputError(
            f"--value-range {given.value_range}: unknown{did_you_mean(given.value_range, RANGES)}; allowed: "
            f"{', '.join(RANGES)}"
        )
    if given.weights is not None and not given.weights.exists():
        raise InputError(
            f"--weights {given.weights}: does not exist; allowed is a weight file, or a folder of weight files"
        )


def _flag(name: str) -> str:
    return {"protocols": "protocol", "metrics": "metric", "plugins": "plugin"}.get(name, name).replace(
        "_", "-"
    )


class Progress:
    """Prints progress with the time left to standard error, at most every two seconds."""

    def __init__(self) -> None:
        self._side = ""
        self._started = 0.0
        self._shown = 0.0

    def __call__(self, side: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` clips of ``side`` are done."""
        now = time.monotonic()
        if side != self._side:
            self._side, self._started, self._shown = side, now, now
        if now - self._shown < 2 and done < total:
            return
        self._shown = now
        left = (now - self._started) / done * (total - done) if done else 0
        more = f", about {left:.0f} s left" if done and done < total else ""
        print(f"{side}: {done} of {total} clips{more}", file=sys.stderr, flush=True)
