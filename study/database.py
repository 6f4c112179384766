"""Open the database: whose it is, which version, and how SQLite is told to behave."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Connection,
    Engine,
    create_engine,
    event,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
)

from study.tables import (
    PREFIX,
    SCHEMA_VERSION,
    Base,
    DesignTable,
    InfoTable,
    PredictionTable,
    StudyTable,
    TestTable,
    TrialTable,
)

# Longer than any write of ours or Optuna's takes, on a slow disk and with many workers.
BUSY_TIMEOUT_S = 60
_OPTUNA_TABLES = {"studies", "trials", "trial_params", "alembic_version"}
_RETRY_S = 0.05
_VERSION = select(InfoTable.value).where(InfoTable.key == "schema_version")


class StoreError(ValueError):
    """The database cannot be used, or does not hold what was asked for."""


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


def sqlite_pragmas(engine: Engine) -> None:
    """Make SQLite fast and patient: write-ahead log, no wait for the disk, wait for locks.

    With WAL, `synchronous = NORMAL` loses at most the last transactions when the power fails, and
    nothing when a process is killed.
    """
    if engine.dialect.name != "sqlite":
        return

    @event.listens_for(engine, "connect")
    def _set(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()


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


def open_database(storage: str, *, create: bool) -> Engine:
    """Open a database of ours, bringing an older one up to date.

    Args:
        storage: SQLAlchemy URL or path of an SQLite file.
        create: Make it where there is none.

    Raises:
        StoreError: Missing, not a database, another program's, or of a newer Frostline.
    """
    url = database_url(storage)
    if url.get_backend_name() == "sqlite":
        _check_file(url.database, create)
    try:
        engine = create_engine(url)
        _check_owner(engine, str(storage), create)
        # Only now, since switching to the write-ahead log changes the file.
        engine.dispose()
        sqlite_pragmas(engine)
        _with_patience(lambda: _prepare(engine))
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
    return engine


def _check_file(database: str | None, create: bool) -> None:
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
    if not path.exists():
        if create:
            return
        raise StoreError(
            f"there is no database {path}. `python -m study run` makes one; --storage names "
            "another."
        )


def _with_patience(action: Callable[[], None]) -> None:
    """Try again while another process creates the same tables.

    SQLite does not wait by itself for the lock that a change to the write-ahead log takes.
    """
    last = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            action()
            return
        except (OperationalError, IntegrityError) as err:
            told = str(err.orig)
            is_race = "already exists" in told or "locked" in told or "UNIQUE" in told
            if not is_race or time.monotonic() > last:
                raise
            time.sleep(_RETRY_S)


def _check_owner(engine: Engine, storage: str, create: bool) -> None:
    """Refuse another program's database and a newer one of ours; nothing is written."""
    tables = set(inspect(engine).get_table_names())
    if not any(name.startswith(PREFIX) for name in tables):
        _refuse_foreign(tables, storage)
        if not create:
            raise StoreError(
                f"database {storage} is empty. `python -m study run` fills it; --storage names "
                "another."
            )
        return
    with engine.connect() as connection:
        found = connection.execute(_VERSION).scalar()
    version = int(found) if found and found.isdigit() else 0
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"database {storage} was written by a newer Frostline (schema {version}; this one "
            f"knows {SCHEMA_VERSION}). Update with pip install --upgrade frostline."
        )
    if version not in (SCHEMA_VERSION, *MIGRATIONS):
        raise StoreError(
            f"database {storage} has schema version {found!r}, which no Frostline wrote."
        )


def _prepare(engine: Engine) -> None:
    """Create our tables where there are none, or bring them up to date; wholly or not at all."""
    with sole_writer(engine) as connection:
        if not inspect(connection).has_table(InfoTable.__tablename__):
            Base.metadata.create_all(connection)
            version = {"key": "schema_version", "value": str(SCHEMA_VERSION)}
            connection.execute(insert(InfoTable), version)
            return
        found = int(connection.execute(_VERSION).scalar_one())
        for step in range(found, SCHEMA_VERSION):
            MIGRATIONS[step](connection)
        if found < SCHEMA_VERSION:
            key = InfoTable.key == "schema_version"
            connection.execute(update(InfoTable).where(key).values(value=str(SCHEMA_VERSION)))


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


def _add_tests_and_ablation(connection: Connection) -> None:
    """Version 1 had no looks at the test split and no columns for ablation runs."""
    for column in ("factor VARCHAR", "level VARCHAR", "replicate INTEGER"):
        connection.execute(text(f"ALTER TABLE {PREFIX}trials ADD COLUMN {column}"))
    TestTable.__table__.create(connection)  # type: ignore[attr-defined]  # typed as FromClause


def _add_designs(connection: Connection) -> None:
    """Version 2 had no designs and no predictions of single pictures."""
    for table in (DesignTable, PredictionTable):
        table.__table__.create(connection)  # type: ignore[attr-defined]  # typed as FromClause


def _add_saved_seconds(connection: Connection) -> None:
    """Version 3 did not share work between trials."""
    column = "saved_s FLOAT NOT NULL DEFAULT 0"
    connection.execute(text(f"ALTER TABLE {PREFIX}epochs ADD COLUMN {column}"))


def _add_cache_counts(connection: Connection) -> None:
    """Version 4 did not count what was read of shared work and left there."""
    counts = [f"cache_{name} INTEGER" for name in ("hits", "misses")]
    counts += [f"cache_{name}_bytes BIGINT" for name in ("read", "disk", "kept")]
    for count in counts:
        column = f"{count} NOT NULL DEFAULT 0"
        connection.execute(text(f"ALTER TABLE {PREFIX}epochs ADD COLUMN {column}"))


def _add_scores(connection: Connection) -> None:
    """Version 5 ranked epochs and trials by validation accuracy, and knew nothing else."""
    for table, accuracy in (("epochs", "val_acc"), ("trials", "value")):
        connection.execute(text(f"ALTER TABLE {PREFIX}{table} ADD COLUMN score FLOAT"))
        connection.execute(text(f"UPDATE {PREFIX}{table} SET score = {accuracy}"))
    for study_id, config in connection.execute(select(StudyTable.id, StudyTable.config)).all():
        found = {**config, "train": {**config.get("train", {}), "monitor": "val_acc"}}
        key = StudyTable.id == study_id
        connection.execute(update(StudyTable).where(key).values(config=found))
    for trial_id, config in connection.execute(select(TrialTable.id, TrialTable.config)).all():
        key = TrialTable.id == trial_id
        found = {**config, "monitor": "val_acc"}
        connection.execute(update(TrialTable).where(key).values(config=found))


MIGRATIONS: dict[int, Callable[[Connection], None]] = {
    1: _add_tests_and_ablation,
    2: _add_designs,
    3: _add_saved_seconds,
    4: _add_cache_counts,
    5: _add_scores,
}
"""Steps from a schema version to the next."""
