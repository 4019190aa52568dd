"""Whether a ledger's storage can be opened, found out before a study writes anything.

Not here: what a URL may look like (`hpdm_core.config.study_file`), and the ledger itself.
"""

from __future__ import annotations

import contextlib
import importlib
import sqlite3
import tempfile
from pathlib import Path

from hpdm_core.errors import InputError

__all__ = ["check_storage", "without_password"]

SECONDS = 5.0
"""How long a database that another process holds is waited for."""


def check_storage(url: str | None, folder: Path) -> None:
    """Raise InputError when the storage at ``url`` cannot be opened; None, a journal in ``folder``, always
    can.

    ``folder``: the study's, which need not exist yet, and may hold an SQLite file once it does. An SQLite file
    is neither made nor changed; a server is asked for a connection.
    """
    if url is None:
        return
    try:
        if url.startswith("redis"):
            importlib.import_module("redis").Redis.from_url(url).ping()
            return
        from sqlalchemy import create_engine
        from sqlalchemy.engine import make_url

        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite":
            create_engine(parsed).connect().close()
        elif parsed.database not in (None, "", ":memory:") and "uri" not in parsed.query:
            _check_file(Path(parsed.database), folder.absolute())
    except Exception as error:  # a driver's own, unknown here
        first = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        raise InputError(
            f"storage: '{without_password(url)}' cannot be opened: {first or type(error).__name__}; allowed is "
            "null for a journal beside the results, or the URL of a database that you may write"
        ) from error


def _check_file(file: Path, folder: Path) -> None:
    """Raise OSError or sqlite3.Error when SQLite cannot write ``file``, or make it."""
    if file.exists():
        address = f"{file.absolute().as_uri()}?mode=rw"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=SECONDS)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master")  # reads the header: is it a database?
            connection.execute("BEGIN IMMEDIATE")  # asks for the right to write, and writes nothing
            connection.execute("ROLLBACK")
    elif not folder.is_relative_to(file.absolute().parent):  # those are made with the study's folder
        with tempfile.TemporaryDirectory(prefix=".hpdm-", dir=file.parent):
            pass


def without_password(url: str) -> str:
    """Return ``url`` with stars for user and password."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}://***@{rest.rpartition('@')[2]}" if separator and "@" in rest else url
