"""The record's database as its parts use it: one engine, transactions, rows in and out."""

import contextlib
import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import Connection, Engine, insert, update

from study.database import open_database
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
        engine: From `open_database`.
        storage: What the user called it.
    """

    def __init__(self, engine: Engine, storage: str) -> None:
        self._engine = engine
        self._held: Connection | None = None
        self.storage = storage

    @classmethod
    def open(cls, storage: str, *, create: bool = False) -> Self:
        """Open the record.

        Args:
            storage: SQLAlchemy URL, or path of an SQLite file.
            create: Make it where there is none.

        Raises:
            StoreError: Missing, not a database, another program's, or of a newer Frostline.
        """
        return cls(open_database(storage, create=create), storage)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

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

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Write all that is written inside the block in one transaction, or nothing of it."""
        with self._engine.begin() as connection:
            self._held = connection
            try:
                yield
            finally:
                self._held = None

    def _writing(self) -> contextlib.AbstractContextManager[Connection]:
        """Begin a transaction, or take part in the one that is open."""
        held = self._held
        return self._engine.begin() if held is None else contextlib.nullcontext(held)

    def _reading(self) -> contextlib.AbstractContextManager[Connection]:
        """Connect, or read what the open transaction sees."""
        held = self._held
        return self._engine.connect() if held is None else contextlib.nullcontext(held)

    def _insert(self, table: type[Base], values: Json) -> int:
        with self._writing() as connection:
            key = connection.execute(insert(table), values).inserted_primary_key
        assert key is not None
        return int(key[0])

    def _update(self, table: type[Any], key: int, values: Json) -> None:
        with self._writing() as connection:
            connection.execute(update(table).where(table.id == key), values)

    def _rows(self, kind: type[Row], query: Any) -> list[Row]:
        with self._reading() as connection:
            return [kind(*values) for values in connection.execute(query).all()]
