"""Where a study's records are kept: a journal file beside the study (the default), SQLite, or a database server.

`check_storage` tests whether a storage can be opened, before a study writes anything. An open `Storage` wraps an
Optuna storage and adds `Storage.batch`, within which thousands of changes reach the disk or the server in one write.

`hpdm_core.config.study_keys` checks the URL; `hpdm_core.study.ledger.ledger` decides what is recorded.
"""

from __future__ import annotations

import contextlib
import importlib
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.base.files import disk_trouble
from hpdm_core.base.passwords import without_password, without_passwords

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from sqlalchemy.engine import URL

__all__ = [
    "Database",
    "Journal",
    "Storage",
    "check_storage",
    "open_storage",
    "storage_trouble",
]

SECONDS = 5.0
"""How long to wait for an SQLite file that another process has locked, before a study begins."""
BUSY_SECONDS = 60.0
"""The same once the study runs."""
JOURNAL = "journal.log"


class Storage(Protocol):
    """An open storage. ``optuna``: the storage for Optuna's studies; ``journal``: its file, None for a database."""

    optuna: BaseStorage
    journal: Path | None

    def batch(self) -> contextlib.AbstractContextManager[None]:
        """Write the changes made in the block to the disk or the server together, at its end."""
        ...

    def close(self) -> None:
        """Close files and connections."""
        ...


class Journal:
    """A journal file in the existing ``folder``; only the controller, under its lock, opens it."""

    def __init__(self, folder: Path) -> None:
        from optuna.storages import JournalStorage

        from hpdm_core.study.ledger.journal import JournalFile

        self.journal: Path | None = folder / JOURNAL
        # Waiting for the lock of a killed controller would cost 30 s.
        self.journal.with_name(self.journal.name + ".lock").unlink(missing_ok=True)
        self._file = JournalFile(self.journal)
        self.optuna: BaseStorage = JournalStorage(self._file)

    def batch(self) -> contextlib.AbstractContextManager[None]:
        """Write the records made in the block in one write, at its end."""
        return self._file.batch()

    def close(self) -> None:
        """Nothing stays open."""


class Database:
    """A database accessed through SQLAlchemy, with one connection: the controller is the only writer."""

    journal: Path | None = None

    def __init__(self, url: str) -> None:
        from optuna.storages import RDBStorage, get_storage

        parsed = _driver(url)
        self._rdb = RDBStorage(
            parsed.render_as_string(hide_password=False), engine_kwargs=dict(_engine_options(parsed))
        )
        self.optuna: BaseStorage = get_storage(self._rdb)
        self._depth = 0

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Make one transaction of all that is done in the block; an exception undoes it."""
        if self._depth:
            yield
            return
        from sqlalchemy import orm

        self._depth += 1
        own = self._rdb.scoped_session
        try:
            with self._rdb.engine.begin() as connection:
                # Sessions join this transaction: their commits take effect at its end, a rollback undoes all of it.
                joined = orm.sessionmaker(bind=connection, join_transaction_mode="rollback_only")
                self._rdb.scoped_session = orm.scoped_session(joined)
                try:
                    yield
                finally:
                    self._rdb.scoped_session.remove()
        finally:
            self._rdb.scoped_session = own
            self._depth -= 1

    def close(self) -> None:
        """Close the connection."""
        self._rdb.remove_session()
        self._rdb.engine.dispose()


def open_storage(url: str | None, folder: Path) -> Storage:
    """Open the storage at ``url``, or the journal in ``folder`` for None; missing tables are created.

    Raises InputError when it cannot be opened.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url is None:
        return Journal(folder)
    try:
        return _Redis(url) if url.startswith("redis") else Database(url)
    except Exception as error:  # a driver's own, unknown here
        raise _unopened(url, error) from error


class _Redis:
    journal: Path | None = None

    def __init__(self, url: str) -> None:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalRedisBackend

        self.optuna: BaseStorage = JournalStorage(JournalRedisBackend(url))

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        """Nothing stays open."""


@contextlib.contextmanager
def storage_trouble(storage: Path | str | None) -> Iterator[None]:
    """Turn the errors of a failing disk or database into a one-line `TroubleError`."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with disk_trouble(storage or "storage"):
            yield
    except (StorageInternalError, SQLAlchemyError) as error:
        raise TroubleError(
            f"storage: {_first_line(error)}; the work done is kept, give the same command again"
        ) from error


def _driver(url: str) -> URL:
    """Return the URL; if it is PostgreSQL's and names no driver, add the one that the extra ``postgres`` installs."""
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    return parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed


def _engine_options(url: URL) -> Mapping[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    # A server may close a connection that is idle for the hours between two results: ping before each use.
    return {"pool_size": 1, "max_overflow": 1, "pool_pre_ping": True}  # opening it takes a second connection


def _unopened(url: str, error: BaseException) -> InputError:
    hint = ""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("psycopg"):
        hint = " (pip install 'hpdm[postgres]')"
    return InputError(
        f"storage: '{without_password(url)}' cannot be opened: {_first_line(error)}{hint}; allowed is "
        "null for a journal beside the results, or the URL of a database that you may write"
    )


def _first_line(error: BaseException) -> str:
    cause = getattr(error.__cause__, "orig", None) or getattr(error, "orig", None) or error.__cause__ or error
    return without_passwords(str(cause).strip().partition("\n")[0]) or type(error).__name__


def check_storage(url: str | None, folder: Path) -> None:
    """Raise InputError when the storage at ``url`` cannot be opened; None (a journal in ``folder``) always can.

    ``folder``: the study's folder, which need not exist yet; an SQLite file may be going to lie in it. The check
    neither creates nor changes an SQLite file; it connects to a server.
    """
    if url is None:
        return
    try:
        if url.startswith("redis"):
            importlib.import_module("redis").Redis.from_url(url).ping()
            return
        from sqlalchemy import create_engine

        parsed = _driver(url)
        if parsed.get_backend_name() != "sqlite":
            engine = create_engine(parsed)
            engine.connect().close()
            engine.dispose()
        elif parsed.database not in (None, "", ":memory:") and "uri" not in parsed.query:
            _check_file(Path(parsed.database), folder.absolute())
    except Exception as error:  # a driver's own, unknown here
        raise _unopened(url, error) from error


def _check_file(file: Path, folder: Path) -> None:
    """Raise OSError or sqlite3.Error when SQLite cannot write or create ``file``."""
    if file.exists():
        address = f"{file.absolute().as_uri()}?mode=rw"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=SECONDS)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master")  # reads the header: is it a database?
            connection.execute("BEGIN IMMEDIATE")  # takes the write lock, and writes nothing
            connection.execute("ROLLBACK")
    elif not folder.is_relative_to(file.absolute().parent):  # those folders are created with the study's own
        try:
            tempfile.TemporaryDirectory(prefix=".hpdm-", dir=file.parent).cleanup()
        except OSError as error:  # the error names the temporary folder, which means nothing to the user
            raise OSError(f"{file.parent}: {error.strerror}") from error
