"""Open the database: whose it is, which layout, how SQLite behaves, and who works on a study."""

import functools
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import Engine, create_engine, inspect, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from study.config.formatting import hide_password
from study.record.models import PREFIX, SCHEMA, Base, Run, Schema

Result = TypeVar("Result")

# Longer than any write of ours or Optuna's takes, on a slow disk and with many workers.
_BUSY_TIMEOUT_S = 60
_RETRY_S = 0.05
# Two readings of a process's start differ by rounding only.
_SAME_START_S = 2.0
_FULL = "disk is full", "disk I/O error", "No space left"
_DAMAGED = "malformed", "decode", "not a database", "no such", "does not exist"
_RACE = "already exists", "duplicate key", "locked", "UNIQUE"
_ANOTHER = "Name another with --storage."
_MADE_BY_RUN = "`python -m study run` makes one; --storage names another."
# File systems of other machines, on which the write-ahead log does not work.
# https://www.sqlite.org/wal.html, and the names that /proc/mounts, macOS and Windows give them.
_NETWORK = {
    "nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afpfs", "afs", "9p", "ceph", "lustre",
    "gpfs", "beegfs", "glusterfs", "davfs", "webdav", "virtiofs", "vboxsf", "drvfs",
}  # fmt: skip


class RecordError(ValueError):
    """The database cannot be used, or does not hold what was asked for."""


def open_database(storage: str, *, create: bool) -> tuple[Engine, RDBStorage]:
    """Open a database of ours.

    Args:
        storage: SQLAlchemy URL or path of an SQLite file.
        create: Create it where there is none.

    Returns:
        Our engine, and Optuna's storage in the same database.

    Raises:
        RecordError: Missing, not a database, another program's, or of another layout.
    """
    url = _database_url(storage)
    # A server may have been restarted since a connection was last used.
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.get_backend_name() == "sqlite":
        path = _check_file(url.database, create)
        options = {"creator": functools.partial(_connect, path)}
    storage = hide_password(storage)
    try:
        # Not with our settings: switching to the write-ahead log changes the file.
        if why := _unusable(create_engine(url), create):
            raise RecordError(f"database {storage} {why}")
        engine = create_engine(url, **options)
        _with_patience(lambda: _create_tables(engine))
        text = url.render_as_string(hide_password=False)
        return engine, _with_patience(lambda: RDBStorage(text, options))
    except ModuleNotFoundError as err:
        raise RecordError(
            f"database {storage} needs the package {err.name}, which is not installed. Install it "
            f'(for PostgreSQL: pip install "psycopg[binary]"). {_ANOTHER}'
        ) from err
    except NoSuchModuleError as err:
        raise RecordError(f"database {storage} cannot be opened: {err}. {_ANOTHER}") from err
    except RecordError:
        raise
    except Exception as err:  # a damaged file makes drivers and Optuna raise nearly anything
        why = failure(err) or f"cannot be read: {err} {_ANOTHER}"
        raise RecordError(f"database {storage} {why}") from err


def failure(err: BaseException) -> str | None:
    """Say in words what failed in a database and what to do; None for an error elsewhere."""
    # Optuna's word for an error of the database
    cause = err.__cause__ if isinstance(err, StorageInternalError) else err
    if not isinstance(cause, SQLAlchemyError):
        return None
    text = " ".join(str(getattr(cause, "orig", cause)).split()).rstrip(".?")
    if any(words in text for words in _FULL):
        return f"cannot be written: {text}. Free space on its disk."
    if any(words in text for words in _DAMAGED):
        return f"is damaged: {text}. Restore a copy of it, or name another with --storage."
    return f"cannot be used: {text}. Check that it can be reached, and its permissions."


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """Begin a transaction in which nobody else writes between our reading and our writing.

    Python's SQLite driver begins one only before data is changed, so it is begun here.
    """
    with Session(engine, expire_on_commit=False) as session, session.begin():
        if engine.dialect.name == "sqlite":
            session.connection().exec_driver_sql("BEGIN IMMEDIATE")
        yield session


def is_alive(run: Run) -> bool:
    """Return whether a process still works on its study; one elsewhere does until it signs off."""
    if run.ended_at is not None or run.host != socket.gethostname():
        return run.ended_at is None
    try:
        return bool(abs(psutil.Process(run.pid).create_time() - run.pid_started) < _SAME_START_S)
    except psutil.Error:
        return False


def check_dead(run: Run, take_over: bool) -> None:
    """Refuse a study that another process works on; to take over, not for one elsewhere.

    Raises:
        RecordError: It does; says which process, and what the user can do.
    """
    is_here = run.host == socket.gethostname()
    if is_alive(run) and (is_here or not take_over):
        remedy = "Wait for it, stop it, or use another --name."
        if not is_here:
            remedy += " If that machine is gone, add --take-over."
        raise RecordError(
            f"the study is being run by process {run.pid} on {run.host} since "
            f"{run.started_at:%Y-%m-%d %H:%M} UTC. {remedy}"
        )


def database_folder(url: URL) -> Path | None:
    """Return the folder in which relative paths of a database's studies begin: its own.

    It is empty for the one where one stands; None for a server, which lies in none.
    """
    if url.get_backend_name() != "sqlite":
        return None
    folder = Path(os.path.abspath(url.database or "")).parent
    return Path() if folder == Path.cwd() else folder


def _database_url(storage: str) -> URL:
    try:
        if "://" in storage:
            return make_url(storage)
        return URL.create("sqlite", database=str(Path(storage).expanduser()))
    except ArgumentError as err:
        text = f"storage must be a file or a database URL (sqlite:///studies.db), got {storage!r}."
        raise RecordError(text) from err


def _check_file(database: str | None, create: bool) -> Path:
    """Refuse what can be no database of ours, without opening the file.

    SQLite's locks belong to the process: closing a file that we opened ourselves would drop them
    all, and the next process to leave the database would remove the log that we still write to.
    """
    if not database or database == ":memory:":
        raise RecordError("storage must be a file, but got an SQLite database in memory.")
    path = Path(database)
    if path.is_dir():
        raise RecordError(f"storage must be a file, but {path} is a folder.")
    if not path.parent.is_dir():
        raise RecordError(f"storage must lie in a folder that exists, but got {path}. {_ANOTHER}")
    if not path.exists() and not create:
        raise RecordError(f"there is no database {path}. {_MADE_BY_RUN}")
    return path


def _connect(path: Path) -> sqlite3.Connection:
    """Connect to an SQLite file.

    On a local disk with a write-ahead log, which does not wait for the disk: the last
    transactions may be lost when the power fails, and nothing when a process is killed.
    """
    connection = sqlite3.connect(path, _BUSY_TIMEOUT_S, check_same_thread=False)
    connection.execute("PRAGMA foreign_keys = ON")
    if _is_on_network(path):
        connection.execute("PRAGMA journal_mode = DELETE")
    else:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
    return connection


@functools.cache
def _is_on_network(path: Path) -> bool:
    """Return whether a file lies on another machine, as far as the system tells."""
    where = path.resolve()
    mounts = [
        part for part in psutil.disk_partitions(all=True) if where.is_relative_to(part.mountpoint)
    ]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype.lower() if mounts else ""
    return kind in _NETWORK or kind.startswith("fuse.")


def _with_patience(action: Callable[[], Result]) -> Result:
    """Repeat an action while other processes create the same tables.

    SQLite does not wait by itself for the lock that a change to the write-ahead log takes.
    """
    last = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            return action()
        except DBAPIError as err:
            is_race = any(word in str(err.orig) for word in _RACE)
            if not is_race or time.monotonic() > last:
                raise
            time.sleep(_RETRY_S)


def _unusable(engine: Engine, create: bool) -> str | None:
    """Say why a database is not ours or not of this layout; nothing is written."""
    try:
        tables = set(inspect(engine).get_table_names())
        number = None
        if Schema.__tablename__ in tables:
            with Session(engine) as session:
                number = session.scalar(select(Schema.number))
    finally:
        engine.dispose()
    if not tables:
        return None if create else f"is empty. {_MADE_BY_RUN}"
    if not any(name.startswith(PREFIX) for name in tables):
        shown = ", ".join(sorted(tables)[:3])
        return f"belongs to another program (tables {shown}). {_ANOTHER}"
    if number != SCHEMA:
        age = "a newer" if number is not None and number > SCHEMA else "an older"
        return f"was written by {age} version of Frostline, which this one cannot read. {_ANOTHER}"
    expected = {*Base.metadata.tables, *(() if create else ("studies", "trials"))}
    if missing := expected - tables:
        listed = ", ".join(sorted(missing))
        return f"is damaged: it lacks the tables {listed}. Restore a copy of it. {_ANOTHER}"
    return None


def _create_tables(engine: Engine) -> None:
    """Create our tables where there are none; all or none of them."""
    with writing(engine) as session:
        if not inspect(session.connection()).has_table(Schema.__tablename__):
            Base.metadata.create_all(session.connection())
            session.add(Schema(SCHEMA))
