"""How much memory is free: of the machine, and within the limits of a job or container."""

import logging
from pathlib import Path

import pytest
import torch

from hpdm_core.assembly import runtime
from hpdm_core.assembly.runtime import MUCH, _free_in_groups, free_memory
from hpdm_core.model.hpdm import Contexts
from hpdm_core.sampling.cache import CachedContexts

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


def test_what_the_allocator_holds_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "mem_get_info": lambda device: (5 * MIB, 80 * MIB),
        "memory_reserved": lambda device: 70 * MIB,
        "memory_allocated": lambda device: 30 * MIB,
    }
    for name, tell in told.items():
        monkeypatch.setattr(torch.cuda, name, tell)
    assert free_memory(torch.device("cuda")) == 45 * MIB


def test_contexts_that_cannot_be_pinned_go_to_ordinary_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refused)
    runtime._say_not_pinned.cache_clear()
    cache = object.__new__(CachedContexts)  # as it is on CUDA, with no room on the device
    cache._copies, cache._budget, cache.nbytes = object(), 0, {"device": 0, "host": 0}  # type: ignore[assignment]
    contexts = Contexts(pixel=torch.arange(6.0), tokens={1: torch.ones(2, 3), 2: None})
    with caplog.at_level(logging.WARNING):
        kept = cache._place(contexts, 0)
    assert torch.equal(kept.pixel, contexts.pixel) and torch.equal(kept.tokens[1], contexts.tokens[1])
    assert cache.nbytes == {"device": 0, "host": 48}
    assert [record.message for record in caplog.records] == [
        "the system has no more pinned memory: ordinary memory is used, and copies are slower"
    ]
