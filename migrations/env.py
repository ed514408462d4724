"""How Alembic reaches a cache's index: under the cache's own write lock, in its one transaction for all of it."""

from typing import Literal

from alembic import context
from sqlalchemy import Connection

from cachedb.database import Database, default_directory
from cachedb.models import Base, UtcTime


def render_item(kind: str, item: object, _context: object) -> str | Literal[False]:
    # A migration is frozen, so it names no type of ours: what is stored is text.
    return "sa.Text()" if kind == "type" and isinstance(item, UtcTime) else False


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
        render_item=render_item,
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    if context.is_offline_mode():
        context.configure(
            dialect_name="sqlite",
            target_metadata=Base.metadata,
            literal_binds=True,
            dialect_opts={"paramstyle": "named"},
        )
        with context.begin_transaction():
            context.run_migrations()
        return
    connection = context.config.attributes.get("connection")
    if connection is not None:
        run(connection)
        return
    # The `alembic` command in a checkout: `-x dir=DIR`, else the directory that `cachedb` uses.
    from pathlib import Path

    directory = context.get_x_argument(as_dictionary=True).get("dir")
    database = Database(Path(directory) if directory else default_directory())
    database.prepare()
    with database.write_schema() as connection:
        run(connection)
    database.close()


main()
