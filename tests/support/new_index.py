"""Copy the schema of a new index, which the migrations make only once in each process: ten times as fast.

All other changes of a schema run the migrations. So do attacks, scripts, and the processes that a test starts with a
new interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from sqlalchemy import Connection, StaticPool, create_engine, event

from cachedb.index import schema
from cachedb.index.schema import Progress
from cachedb.index.sqlite.revision import is_empty
from cachedb.index.tables import REVISION

MIGRATE = schema.run_migrations


def install(*, copies: bool = True) -> None:
    """Choose whether this process copies the schema of a new index."""
    schema.run_migrations = run_migrations if copies else MIGRATE


def run_migrations(
    change: Callable[..., None], connection: Connection, target: str, progress: Progress | None = None
) -> None:
    """Copy the newest schema to an empty index; run the migrations on any other."""
    if target != REVISION or progress is not None or not is_empty(connection):
        MIGRATE(change, connection, target, progress)
        return
    for statement in statements_of_schema():
        connection.exec_driver_sql(statement)


@cache
def statements_of_schema() -> list[str]:
    """Return the statements that make the newest schema, and the rows that it begins with."""
    from alembic import command  # slow

    engine = create_engine("sqlite://", poolclass=StaticPool)
    event.listen(engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
    with engine.connect() as connection:
        MIGRATE(command.upgrade, connection, REVISION)
        statements = dump(connection.connection.driver_connection)
    engine.dispose()
    return statements


def dump(connection: Any) -> list[str]:
    """Return the statements that make the schema, the rows and the version of a database."""
    tables = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid")
    rows = [line for line in connection.iterdump() if line.startswith("INSERT")]
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return [*(sql for (sql,) in tables), *rows, f"PRAGMA user_version = {version}"]
