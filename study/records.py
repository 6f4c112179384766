"""The record's database as its parts use it: one engine, transactions, rows in and out."""

import dataclasses
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import Connection, Engine, insert, update

from study.database import Database, StoreError, open_database
from study.rows import Json
from study.tables import Base

Row = TypeVar("Row")


def now() -> datetime:
    """Return the time in UTC; SQLite keeps no zone, so neither do the rows."""
    return datetime.now(UTC).replace(tzinfo=None)


def columns_of(table: type[Base], row: type[Any]) -> list[Any]:
    """List a table's columns in the order of a row's fields."""
    return [getattr(table, field.name) for field in dataclasses.fields(row)]


class Records:
    """One database, open for reading and writing.

    Args:
        database: From `open_database`.
        storage: What the user called it.
    """

    def __init__(self, database: Database, storage: str) -> None:
        self._engine = database.engine
        self._optuna = database.optuna
        self._is_writable = database.is_writable
        self.storage = storage

    @classmethod
    def open(cls, storage: str, *, create: bool = False) -> Self:
        """Open the record.

        Args:
            storage: SQLAlchemy URL, or path of an SQLite file.
            create: Make it where there is none.

        Raises:
            StoreError: Missing, not a database, another program's, or of another version.
        """
        return cls(open_database(storage, create=create), storage)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()
        self._optuna.remove_session()
        self._optuna.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """Return the database's engine, for readers."""
        return self._engine

    def _require_writable(self) -> None:
        if not self._is_writable:
            raise StoreError(
                f"database {self.storage} cannot be written. Change its permissions, or name "
                "another with --storage."
            )

    def _writing(self) -> AbstractContextManager[Connection]:
        self._require_writable()
        return self._engine.begin()

    def _insert(self, table: type[Base], values: Json) -> int:
        with self._writing() as connection:
            key = connection.execute(insert(table), values).inserted_primary_key
        assert key is not None
        return int(key[0])

    def _update(self, table: type[Any], key: int, values: Json) -> None:
        with self._writing() as connection:
            connection.execute(update(table).where(table.id == key), values)

    def _rows(self, kind: type[Row], query: Any) -> list[Row]:
        with self._engine.connect() as connection:
            return [kind(*values) for values in connection.execute(query).all()]
