"""How much memory is free: of the machine, and within the limits of a job or container."""

from pathlib import Path

import pytest
import torch

from hpdm_core.runtime import MUCH, _free_in_groups, free_memory

MIB = 2**20


@pytest.mark.parametrize(
    ("listed", "folder", "most", "used", "cache"),
    [
        ("0::/slurm/job\n", "", "memory.max", "memory.current", "inactive_file"),
        (
            "4:memory:/slurm/job\n1:cpu:/\n0::/\n",
            "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_a_jobs_limit_counts_and_so_do_those_around_it(
    listed: str, folder: str, most: str, used: str, cache: str, tmp_path: Path
) -> None:
    groups, top = tmp_path / "cgroup", tmp_path / "mounted" / folder
    groups.write_text(listed)
    job = top / "slurm" / "job"
    job.mkdir(parents=True)
    for place, limit in ((job, 100 * MIB), (top / "slurm", 80 * MIB)):
        (place / most).write_text(f"{limit}\n")
        (place / used).write_text(f"{50 * MIB}\n")
        (place / "memory.stat").write_text(f"anon 1\n{cache} {10 * MIB}\n")
    assert _free_in_groups(groups, tmp_path / "mounted") == [60 * MIB, 40 * MIB]
    (job / most).write_text("max\n")
    assert _free_in_groups(groups, tmp_path / "mounted") == [40 * MIB]


def test_where_there_are_no_groups_nothing_is_said(tmp_path: Path) -> None:
    assert _free_in_groups(tmp_path / "none", tmp_path) == []
    assert 0 <= free_memory(torch.device("cpu")) <= MUCH
