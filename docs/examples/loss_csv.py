"""A CSV file per cell in the folder that the environment variable HPDM_LOSSES names: step, loss of each level."""

import csv
import os
from pathlib import Path

from hpdm_core import hookimpl


@hookimpl
def after_step_finished(cell, step, loss):
    name = f"{cell.study}-{cell.arm}-{cell.seed}.csv".replace("/", "_")
    file = Path(os.environ["HPDM_LOSSES"]) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w" if step == 1 else "a", newline="") as output:
        csv.writer(output).writerow([step, *loss.tolist()])
