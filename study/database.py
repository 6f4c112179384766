"""Open the database: whose it is, which version, and how SQLite is told to behave."""

import functools
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from optuna.storages import RDBStorage
from sqlalchemy import Connection, Engine, create_engine, insert, inspect, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
)

from study.tables import PREFIX, SCHEMA_VERSION, Base, InfoTable

Result = TypeVar("Result")

# Longer than any write of ours or Optuna's takes, on a slow disk and with many workers.
BUSY_TIMEOUT_S = 60
_OPTUNA_TABLES = {"studies", "trials", "trial_params", "alembic_version"}
_RETRY_S = 0.05
_VERSION = select(InfoTable.value).where(InfoTable.key == "schema_version")
# File systems of other machines: the write-ahead log needs memory that all processes share.
# https://www.sqlite.org/wal.html, and the names that /proc/mounts, macOS and Windows give them.
_NETWORK = {
    "nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afpfs", "afs", "9p", "ceph", "lustre",
    "gpfs", "beegfs", "glusterfs", "davfs", "webdav", "virtiofs", "vboxsf", "drvfs",
}  # fmt: skip


class StoreError(ValueError):
    """The database cannot be used, or does not hold what was asked for."""


@dataclass(frozen=True, slots=True)
class Database:
    """An open database.

    Attributes:
        engine: For our tables.
        optuna: For Optuna's tables in the same database.
        is_writable: Whether it may be changed.
    """

    engine: Engine
    optuna: RDBStorage
    is_writable: bool


def database_url(storage: str) -> URL:
    """Read a storage setting: an SQLAlchemy URL, or the path of an SQLite file.

    Raises:
        StoreError: Neither.
    """
    try:
        if "://" in storage:
            return make_url(storage)
        return URL.create("sqlite", database=str(Path(storage).expanduser()))
    except ArgumentError as err:
        raise StoreError(
            f"storage must be a file or a database URL such as sqlite:///studies.db, but got "
            f"{storage!r}."
        ) from err


@contextmanager
def sole_writer(engine: Engine) -> Iterator[Connection]:
    """Begin a transaction in which nobody else writes between our reading and our writing.

    Python's SQLite driver begins transactions only before data is changed, and changes tables
    outside of them; so here it is told to begin.
    """
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection


def open_database(storage: str, *, create: bool) -> Database:
    """Open a database of ours; an SQLite file that cannot be written is opened for reading.

    Args:
        storage: SQLAlchemy URL or path of an SQLite file.
        create: Make it where there is none.

    Raises:
        StoreError: Missing, not a database, another program's, or of another version.
    """
    url = database_url(storage)
    options: dict[str, Any] = {}
    is_writable = True
    if url.get_backend_name() == "sqlite":
        path = _check_file(url.database, create)
        is_writable = not path.exists() or (_may_write(path) and _may_write(path.parent))
        options = {"creator": functools.partial(_connect, path, is_writable=is_writable)}
    try:
        # Not with our settings: switching to the write-ahead log changes the file.
        _check_owner(create_engine(url, **({} if is_writable else options)), storage, create)
        engine = create_engine(url, **options)
        if is_writable:
            _with_patience(lambda: _create_tables(engine))
        # Several processes may create Optuna's tables at once; all but one then try again.
        text = url.render_as_string(hide_password=False)
        optuna = _with_patience(
            lambda: RDBStorage(text, options, skip_table_creation=not is_writable)
        )
    except ModuleNotFoundError as err:
        raise StoreError(
            f"database {storage} needs the package {err.name}, which is not installed. Install it "
            '(for PostgreSQL: pip install "psycopg[binary]"), or name another with --storage.'
        ) from err
    except (DatabaseError, NoSuchModuleError) as err:
        why = str(getattr(err, "orig", None) or err).splitlines()[0]
        raise StoreError(
            f"database {storage} cannot be opened: {why}. Check the path and its permissions, or "
            "name another with --storage."
        ) from err
    return Database(engine, optuna, is_writable)


def _may_write(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _connect(path: Path, *, is_writable: bool) -> sqlite3.Connection:
    """Connect to an SQLite file.

    On a local disk with a write-ahead log, which does not wait for the disk: the last
    transactions may be lost when the power fails, and nothing when a process is killed.
    """
    if not is_writable:
        # Without a log beside it the file is all there is; SQLite then needs no lock, which it
        # could not write.
        is_whole = not path.with_name(path.name + "-wal").exists()
        uri = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if is_whole else ''}"
        return sqlite3.connect(uri, BUSY_TIMEOUT_S, uri=True, check_same_thread=False)
    connection = sqlite3.connect(path, BUSY_TIMEOUT_S, check_same_thread=False)
    connection.execute("PRAGMA foreign_keys = ON")
    if is_on_network(path):
        connection.execute("PRAGMA journal_mode = DELETE")
    else:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
    return connection


@functools.cache
def is_on_network(path: Path) -> bool:
    """Say whether a file lies on another machine, as far as the system tells."""
    where = path.resolve()
    mounts = [
        part for part in psutil.disk_partitions(all=True) if where.is_relative_to(part.mountpoint)
    ]
    if not mounts:
        return False
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype.lower()
    return kind in _NETWORK or kind.startswith("fuse.")


def _check_file(database: str | None, create: bool) -> Path:
    """Refuse what can be no database of ours, without opening the file.

    SQLite's locks are this process's: closing a file that we opened ourselves drops them all, and
    the next process to leave the database then removes the log that we go on writing to.
    """
    if not database or database == ":memory:":
        raise StoreError("storage must be a file, but got an SQLite database in memory.")
    path = Path(database)
    if path.is_dir():
        raise StoreError(f"storage must be a file, but {path} is a folder.")
    if not path.parent.is_dir():
        raise StoreError(
            f"storage {path} must lie in a folder that exists, but {path.parent} "
            "does not. Make it, or name another with --storage."
        )
    if not path.exists() and not create:
        raise StoreError(
            f"there is no database {path}. `python -m study run` makes one; --storage names "
            "another."
        )
    return path


def _with_patience(action: Callable[[], Result]) -> Result:
    """Try again while another process creates the same tables.

    SQLite does not wait by itself for the lock that a change to the write-ahead log takes.
    """
    last = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            return action()
        except (OperationalError, IntegrityError) as err:
            said = str(err.orig)
            is_race = "already exists" in said or "locked" in said or "UNIQUE" in said
            if not is_race or time.monotonic() > last:
                raise
            time.sleep(_RETRY_S)


def _check_owner(engine: Engine, storage: str, create: bool) -> None:
    """Refuse another program's database and another version of ours; nothing is written."""
    try:
        tables = set(inspect(engine).get_table_names())
        if not any(name.startswith(PREFIX) for name in tables):
            _refuse_foreign(tables, storage)
            if not create:
                raise StoreError(
                    f"database {storage} is empty. `python -m study run` fills it; --storage "
                    "names another."
                )
            return
        with engine.connect() as connection:
            found = connection.execute(_VERSION).scalar()
    finally:
        engine.dispose()
    if found != str(SCHEMA_VERSION):
        raise StoreError(
            f"database {storage} was written by another version of Frostline (schema {found}; "
            f"this one knows {SCHEMA_VERSION}). Use that version, or name another file with "
            "--storage."
        )


def _create_tables(engine: Engine) -> None:
    """Create our tables where there are none; wholly or not at all."""
    with sole_writer(engine) as connection:
        if not inspect(connection).has_table(InfoTable.__tablename__):
            Base.metadata.create_all(connection)
            version = {"key": "schema_version", "value": str(SCHEMA_VERSION)}
            connection.execute(insert(InfoTable), version)


def _refuse_foreign(tables: set[str], storage: str) -> None:
    if not tables:
        return
    remedy = "Name another file with --storage."
    if tables >= _OPTUNA_TABLES:
        raise StoreError(
            f"database {storage} holds plain Optuna studies, not Frostline's, and is left as it "
            f"is. {remedy}"
        )
    shown = ", ".join(sorted(tables)[:3])
    raise StoreError(f"database {storage} belongs to another program (tables {shown}). {remedy}")
