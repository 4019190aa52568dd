"""metrics.jsonl over several attempts."""

import json
from pathlib import Path

from hpdm_core.training.metrics_log import MetricsLog


def read(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_file_is_cut_at_the_checkpoint_and_torn_lines_go(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.start(step=0, source=None)
    for step in (1, 2, 3, 4):
        log.write({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    again = MetricsLog(tmp_path)
    again.start(step=2, source=tmp_path)
    again.write({"step": 3})
    assert read(tmp_path) == [1, 2, 3]


def test_a_new_attempt_begins_with_the_lines_of_the_one_before(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    log = MetricsLog(first)
    log.start(step=0, source=None)
    for step in (1, 2, 3):
        log.write({"step": step})
    log = MetricsLog(second)
    log.start(step=2, source=first)
    log.write({"step": 3})
    assert read(second) == [1, 2, 3]
    assert read(first) == [1, 2, 3]


def test_a_fresh_start_empties_the_file_and_no_folder_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    MetricsLog(tmp_path).start(step=0, source=None)
    assert read(tmp_path) == []
    nothing = MetricsLog(None)
    nothing.start(step=0, source=None)
    nothing.write({"step": 1})
