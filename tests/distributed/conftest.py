"""Programs run in several processes that torchrun's variables join."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(arguments: Sequence[str], *, processes: int, timeout: float = 500) -> list[tuple[int, str]]:
    """Run ``python *arguments`` in so many processes; return each one's exit code and output, by rank."""
    port = str(free_port())
    running = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        running.append(
            subprocess.Popen(
                [sys.executable, "-W", "error", *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    ended = []
    try:
        for process in running:
            text, _ = process.communicate(timeout=timeout)
            ended.append((process.returncode, text))
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return ended


def succeed(arguments: Sequence[str], *, processes: int, timeout: float = 500) -> list[str]:
    """Like `start`, where every process must end well; return what each printed."""
    ended = start(arguments, processes=processes, timeout=timeout)
    assert all(code == 0 for code, _ in ended), "\n".join(text for _, text in ended)
    return [text for _, text in ended]


Start = Callable[..., list[tuple[int, str]]]
Succeed = Callable[..., list[str]]


@pytest.fixture(scope="session", name="start")
def start_fixture() -> Start:
    """Return `start`."""
    return start


@pytest.fixture(scope="session", name="succeed")
def succeed_fixture() -> Succeed:
    """Return `succeed`."""
    return succeed
