"""Kill the controller of a simulated study again and again, with SIGKILL, at random moments; then let it finish.

    python kills.py FOLDER STORAGE KILLS SEED        STORAGE: a URL, or "journal"

Run as a program: it forks a controller per kill, which takes a process without threads. Prints JSON: what was found.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from hpdm_core.study.backends.simulated import FINISHED
from hpdm_core.study.ledger.ledger import Ledger
from hpdm_core.study.plan.study_file import StudyConfig, load_study
from hpdm_core.study.run import run_study
from hpdm_core.study.show import report as reporting

STUDY = {
    "name": "killed",
    "extends": "tiny_clips",
    "evaluation": {"metrics": ["held_out_loss"]},
    "backend": {
        "use": "simulated",
        "slots": 8,
        "failures": {"lost node": 0.03, "code error": 0.02, "preempted": 0.02, "out of memory": 0.02},
    },
}


def controller(study: StudyConfig, results: Path, log: Path) -> int:
    """Start a controller in a process of its own and return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        reporting.report = lambda folder: ""
        code = run_study(study, results)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def main() -> None:
    folder, url, kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    storage = None if url == "journal" else url
    chance = random.Random(seed)
    file, results, log = folder / "killed.yaml", folder / "results", folder / "log"
    cells = 10 * kills + 40
    file.write_text(yaml.safe_dump({**STUDY, "storage": storage, "seeds": list(range(cells))}))
    study = load_study(file)
    home = results / "simulated" / "killed"
    found: dict[str, Any] = {"kills": 0, "unreadable": [], "ahead": [], "done": [], "cells": cells}

    def look() -> Counter[str]:
        ledger = Ledger(home, study="killed", storage=storage)
        found["unreadable"] += ledger.notices
        states = ledger.states()
        ledger.close()
        finished = {
            path.parent.name for path in (home.parent / "store" / "evaluations").glob("*/result.json")
        }
        count = Counter(states.values())
        if count["done"] > len(finished):  # the ledger never says more than the results
            found["ahead"].append(count["done"] - len(finished))
        return count

    begin = time.monotonic()
    usual = 3.0
    while found["kills"] < kills:
        started = time.monotonic()
        pid = controller(study, results, log)
        time.sleep(chance.uniform(0, usual))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            found["kills"] += 1
        else:
            usual = max(0.2, usual / 1.5)  # it had ended by itself
        if home.is_dir():
            count = look()
            found["done"].append(count["done"])
            # Late enough that each goes a little further than the last, early enough that all of it is hit; what is
            # finished is killed while it is looked through.
            step = found["done"][-1] - (found["done"][-2] if len(found["done"]) > 1 else 0)
            over = count["done"] + count["failed"] == cells
            usual = (
                1.0 if over else min(30.0, usual * 1.5) if step < 2 else usual / 1.5 if step > 10 else usual
            )
        if time.monotonic() - started > 60 or time.monotonic() - begin > 1500:
            break
    before = sum(look().values())
    _, status = os.waitpid(controller(study, results, log), 0)
    found["code"] = os.waitstatus_to_exitcode(status)
    found["states"] = look()
    last: dict[Path, dict[str, Any]] = {}
    for path in sorted((home / "jobs").glob("*/*/outcome.json"), key=lambda each: int(each.parent.name)):
        last[path.parent.parent] = json.loads(path.read_text())
    found["causes"] = [each["cause"] for each in last.values() if each["state"] == "failed"]
    found["before"] = before
    logs = list((home.parent / "store" / "train").glob(f"*/{FINISHED}"))
    found["twice"] = [path.parent.name for path in logs if len(path.read_text().split()) > 1]
    found["trained"] = len(list((home.parent / "store" / "train").glob("*/result.json")))
    found["seconds"] = time.monotonic() - begin
    print(json.dumps(found))


if __name__ == "__main__":
    main()
