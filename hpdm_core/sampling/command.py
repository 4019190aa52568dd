"""Samples of a trained cell to look at: ``python -m hpdm_core.sample demo --num 8 --out DIR``.

The cell is one that a plugin ships (``demo``), a file that `hpdm_core.export` made, or a train stage of a store,
STORE/train/KEY. Writes one video per sample (the finest level), a contact sheet with all levels, and a GIF of the
finest level. ``--set`` can change only the sections ``sampling`` and ``runtime``. Not here: the lossless samples that
metrics read (`hpdm_core.cell.cell`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpdm_core.base.command_line import CommandParser
from hpdm_core.base.errors import InputError
from hpdm_core.sampling.cascade import label_of, sample
from hpdm_core.sampling.files import (
    CONTACT_SHEET,
    batches_to_sample,
    contact_sheet,
    to_uint8,
    write_gif,
    write_mp4,
)

if TYPE_CHECKING:
    from torch import Tensor

    from hpdm_core.training.trained import Trained

__all__ = ["main"]

SECTIONS = ("sampling", "runtime")
"""Sections that ``--set`` may change, because the weights do not depend on them."""

SHEET_ROWS = 16  # samples on the contact sheet and in the GIF

FPS = 25.0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m hpdm_core.sample", description="Sample videos from a trained cell."
    )
    parser.add_argument(
        "cell",
        metavar="CELL",
        help="'demo' or another that a plugin brings, an exported file, or a train stage: STORE/train/KEY",
    )
    parser.add_argument(
        "--num", type=int, default=8, metavar="N", help="number of videos (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the videos and pictures"
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
        "--fps",
        type=float,
        metavar="RATE",
        help=f"frames per second (default: {FPS:g}, or fewer, so that a short video lasts a second)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    from hpdm_core.training.trained import load_trained
    from hpdm_core.training.trainer import load_ema_model

    given = _parser().parse_args(arguments)
    _check(given)
    sets = [*given.sets] if given.seed is None else [*given.sets, f"seed={given.seed}"]
    trained = load_trained(given.cell)
    assembly = trained.assembly(sets)
    config = assembly.config
    denoiser = assembly.denoiser(load_ema_model(assembly, trained.weights))
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {given.out}: cannot be made: {error.strerror}") from error
    print(_origin(given.cell, trained))

    fps = given.fps or min(FPS, config.model.video[0])
    names = trained.classes
    progress = _Progress(given.num)
    shown: list[list[Tensor]] = []
    for batch in batches_to_sample(range(given.num), given.num, config.runtime.sample_batch):
        labels = [_label(index, given.num, config.model.classes) for index in batch]
        levels = sample(assembly, denoiser, batch, labels, progress=progress.step)
        for row, (index, label) in enumerate(zip(batch, labels, strict=True)):
            videos = [to_uint8(videos[row]) for videos in levels]
            path = write_mp4(given.out / f"{index:06d}.mp4", videos[-1], fps=fps)
            if names:
                print(f"{path.name}  {names[label]}", flush=True)
            if len(shown) < SHEET_ROWS:
                shown.append(videos)
        progress.finished(len(batch))
    contact_sheet(given.out / CONTACT_SHEET, shown)
    write_gif(given.out / "samples.gif", [videos[-1] for videos in shown], fps=fps)
    print(f"{given.num} videos, {CONTACT_SHEET} and samples.gif in {given.out}")
    return 0


def _label(index: int, count: int, classes: int) -> int:
    """Return the label of video ``index`` of ``count``: the classes in turn, or evenly spaced if there are more classes
    than videos.
    """
    return index * classes // count if count < classes else label_of(index, classes)


def _origin(given: str, trained: Trained) -> str:
    """Return one line on where the weights come from."""
    spec, steps, commit = trained.spec, trained.header.get("steps"), trained.provenance.get("git")
    words = [
        *(f"{name} {spec[name]}" for name in ("study", "arm") if spec.get(name)),
        f"seed {spec['config'].get('seed', 0)}",
        *([f"{steps} steps"] if steps is not None else []),
        *([f"commit {commit[:12]}"] if commit else []),
    ]
    return f"{given}: {', '.join(words)}"


def _check(given: argparse.Namespace) -> None:
    if given.num < 1:
        raise InputError(f"--num {given.num}: allowed is 1 or more")
    if given.seed is not None and given.seed < 0:
        raise InputError(f"--seed {given.seed}: allowed is 0 or more")
    if given.fps is not None and not 0 < given.fps <= 1000:
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
