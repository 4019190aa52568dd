"""Samples of a trained cell to look at: ``python -m hpdm_core.sample CELL_DIR --num 8 --out DIR``.

CELL_DIR is a train stage of a store, STORE/train/KEY, with spec.json and model.safetensors. Writes one video
per sample (the finest level) and a contact sheet with all levels. ``--set`` changes how it is sampled and
where it runs, nothing else. Not here: the samples that metrics read (`hpdm_core.cell`), which are lossless.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hpdm_core.errors import InputError, report_errors
from hpdm_core.sampling.cascade import label_of, sample
from hpdm_core.sampling.files import batches_to_sample, contact_sheet, to_uint8, write_mp4

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["main"]

SECTIONS = ("sampling", "runtime")
"""What ``--set`` may change: the weights do not depend on it."""

SHEET_ROWS = 16  # samples on the contact sheet


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as one line, like every other wrong input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(prog="python -m hpdm_core.sample", description="Sample videos from a trained cell.")
    parser.add_argument(
        "cell", type=Path, metavar="CELL_DIR", help="a train stage: STORE/train/KEY, with spec.json"
    )
    parser.add_argument(
        "--num", type=int, default=8, metavar="N", help="number of videos (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for videos and contact sheet"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="sets",
        metavar="KEY=VALUE",
        help="override of sampling.* or runtime.*, such as sampling.overlap=[h,w]; may be repeated",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the noise (default: the cell's own)")
    parser.add_argument(
        "--fps", type=float, default=25.0, metavar="RATE", help="frames per second of the videos"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    from hpdm_core.config.compose import load_trained
    from hpdm_core.training.trainer import load_ema_model

    given = _parser().parse_args(arguments)
    _check(given)
    sets = [*given.sets] if given.seed is None else [*given.sets, f"seed={given.seed}"]
    assembly, _ = load_trained(given.cell, sets=sets)
    config = assembly.config
    denoiser = assembly.denoiser(load_ema_model(assembly, given.cell / "model.safetensors"))
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {given.out}: cannot be made: {error.strerror}") from error

    progress = _Progress(given.num)
    shown: list[list[Tensor]] = []
    for batch in batches_to_sample(range(given.num), given.num, config.runtime.sample_batch):
        labels = [label_of(index, config.model.classes) for index in batch]
        levels = sample(assembly, denoiser, batch, labels, progress=progress.step)
        for row, index in enumerate(batch):
            videos = [to_uint8(videos[row]) for videos in levels]
            write_mp4(given.out / f"{index:06d}.mp4", videos[-1], fps=given.fps)
            if len(shown) < SHEET_ROWS:
                shown.append(videos)
        progress.finished(len(batch))
    contact_sheet(given.out / "contact_sheet.png", shown)
    print(f"{given.num} videos and contact_sheet.png in {given.out}")
    return 0


def _check(given: argparse.Namespace) -> None:
    if given.num < 1:
        raise InputError(f"--num {given.num}: allowed is 1 or more")
    if given.seed is not None and given.seed < 0:
        raise InputError(f"--seed {given.seed}: allowed is 0 or more")
    if not 0 < given.fps <= 1000:
        raise InputError(f"--fps {given.fps:g}: allowed is more than 0, up to 1000")
    for text in given.sets:
        if text.partition("=")[0].partition(".")[0].strip() not in SECTIONS:
            raise InputError(
                f"--set {text}: a trained cell's weights belong to its configuration; allowed are "
                f"{' and '.join(f'{section}.*' for section in SECTIONS)}"
            )


class _Progress:
    """Lines on standard error, at most one every two seconds, with the time left."""

    def __init__(self, videos: int) -> None:
        self.videos = videos
        self.done = 0
        self._started = time.monotonic()
        self._shown = self._started

    def step(self, numbers: dict[str, int]) -> None:
        now = time.monotonic()
        if now - self._shown < 2:
            return
        self._shown = now
        left = f", about {self._left(now):.0f} s left" if self.done else ""
        print(
            f"{self.done} of {self.videos} videos; level {numbers['level'] + 1} of {numbers['levels']}, "
            f"call {numbers['call']} of {numbers['calls']}{left}",
            file=sys.stderr,
            flush=True,
        )

    def finished(self, videos: int) -> None:
        self.done += videos

    def _left(self, now: float) -> float:
        return (now - self._started) / self.done * (self.videos - self.done)


if __name__ == "__main__":
    sys.exit(report_errors(main))
