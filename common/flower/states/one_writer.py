"""A SuperLink's database that many nodes write to: writers wait in line instead of trying again and again.

SQLite lets one write at a time. Whoever comes meanwhile tries again, at first after 1 ms, later after 100, and after 5 s it
gives up: the request fails, and the message that it was for is lost. Here a thread that is about to write first waits for the
one that writes, for as long as a request may take.
This is the patch `one-writer` of `common.flower.registry`.
"""

import importlib
import sqlite3
import threading
from collections.abc import Callable
from typing import Any

PATIENCE = 60.0
"""Seconds that a writer waits in line, for a connection, and afterwards for SQLite itself."""
CONNECTIONS = 45
"""Connections beyond SQLAlchemy's first five: a thread that waits in line holds one, and those who only read need some too."""
_HELD = "quickbloom-writes"
_lines: dict[str, threading.Lock] = {}
_making = threading.Lock()


def write_in_line() -> None:
    """Let the threads of this process write one after the other to every database of Flower's."""
    sql: Any = importlib.import_module("flwr.supercore.sql_mixin")
    sql.create_engine = _roomy(sql.create_engine)
    sql.SqlMixin.initialize = _then_in_line(sql.SqlMixin.initialize)


def _roomy(create: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine(url: Any, **options: Any) -> Any:
        """Make the engine as Flower does, with connections for many threads, unless it is of a database in memory."""
        room = {} if "poolclass" in options else {"max_overflow": CONNECTIONS, "pool_timeout": PATIENCE}
        return create(url, **room, **options)

    return create_engine


def _then_in_line(initialize: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_in_line(self: Any, *arguments: Any, **named: Any) -> Any:
        """Open the database as Flower does, and let its writers wait in line."""
        tables = initialize(self, *arguments, **named)
        if self.database_backend == "sqlite" and not self._is_in_memory_sqlite:
            with _making:
                line = _lines.setdefault(str(self.database_url), threading.Lock())
            _listen(self._engine, line)
        return tables

    return initialize_in_line


def _listen(engine: Any, line: threading.Lock) -> None:
    listen = importlib.import_module("sqlalchemy").event.listen

    def before_execute(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        # A search alone needs no turn, and whoever has it keeps it until its connection is given back.
        if connection.info.get(_HELD) or statement.lstrip()[:6].upper().startswith(("SELECT", "PRAGMA")):
            return
        if not line.acquire(timeout=PATIENCE):  # it has written nothing yet, and must not hold up the others
            raise sqlite3.OperationalError(f"database is locked: no turn to write within {PATIENCE:g} s")
        connection.info[_HELD] = True
        cursor.execute(f"PRAGMA busy_timeout = {round(1000 * PATIENCE)}")

    def on_return(connection: Any, record: Any) -> None:
        if record.info.pop(_HELD, False):
            line.release()

    listen(engine, "before_cursor_execute", before_execute)
    listen(engine, "checkin", on_return)
    listen(engine, "invalidate", lambda connection, record, error: on_return(connection, record))
