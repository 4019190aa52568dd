"""Three storages for the same tests: a journal, SQLite, and a real PostgreSQL server, where one is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PASSWORD = "s3cret-w0rd"


def _binaries() -> Path | None:
    """The folder of the newest server on this machine. Debian keeps it off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    there = shutil.which("initdb")
    return found[-1].parent if found else Path(there).parent if there else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a server of this session, without a database's name; it asks for a password.

    It runs as the user postgres when the tests run as root, which a server refuses to be.
    """
    binaries = _binaries()
    if binaries is None or importlib.util.find_spec("psycopg") is None:
        pytest.skip(
            "needs PostgreSQL (Debian: apt-get install postgresql) and psycopg (the extra 'postgres')"
        )
    owner: dict[str, Any] = {"user": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="hpdm-postgres-"))
    if owner:
        shutil.chown(folder, "postgres")
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(*command: str) -> None:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60, **owner)

    data, log = str(folder / "data"), str(folder / "log")
    options = f"-k {folder} -p {port} -c listen_addresses=127.0.0.1 -c fsync=off"
    try:
        run(
            str(binaries / "initdb"),
            f"--pgdata={data}",
            "--username=hpdm",
            f"--pwfile={folder / 'password'}",
            "--auth=scram-sha-256",
            "--no-sync",
            "--locale=C.UTF-8",
            "--encoding=UTF8",
        )
        run(str(binaries / "pg_ctl"), "start", "--wait", f"--pgdata={data}", f"--log={log}", f"-o{options}")
        try:
            yield f"postgresql://hpdm:{PASSWORD}@127.0.0.1:{port}"
        finally:
            run(str(binaries / "pg_ctl"), "stop", "--wait", f"--pgdata={data}", "--mode=immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def database(server: str) -> Iterator[str]:
    """The URL of a new, empty database of ``server``."""
    import psycopg

    name = f"ledger_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    try:
        yield f"{server}/{name}"
    finally:
        with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["journal", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str | None]:
    """What a study file may say under ``storage``; nothing is there yet."""
    if request.param == "journal":
        yield None
    elif request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'ledger.db'}"
    else:
        with database(request.getfixturevalue("postgres")) as url:
            yield url


@pytest.fixture
def empty_database(postgres: str) -> Iterator[str]:
    """The URL of a new database of the server."""
    with database(postgres) as url:
        yield url


@pytest.fixture
def opened(storage: str | None, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that opens the ledger of study ``tiny``, as each command does."""
    from hpdm_core.study.ledger.ledger import Ledger

    made = []

    def open_ledger(study: str = "tiny") -> Any:
        for ledger in made:
            ledger.close()
        made.append(Ledger(tmp_path, study=study, storage=storage))
        return made[-1]

    yield open_ledger
    for ledger in made:
        ledger.close()
