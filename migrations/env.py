"""Run Alembic's migrations on a cache's index, all in one transaction under the write lock."""

import re
from collections.abc import Collection
from contextlib import closing
from typing import Any, Literal

from alembic import context
from alembic.operations.ops import MigrationScript
from sqlalchemy import Connection, Engine

from cachedb.disk.layout import default_directory
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.prepare import prepare
from cachedb.index.tables import METADATA, UtcTime


def render_item(kind: str, item: object, _context: object) -> str | Literal[False]:
    # A migration is frozen, so it must not import our type; SQLite stores the time as text.
    return "sa.Text()" if kind == "type" and isinstance(item, UtcTime) else False


def number_revisions(_context: object, _revision: object, scripts: list[MigrationScript]) -> None:
    """Give a new revision the next number, unless one was chosen; cachedb compares the numbers."""
    for script in scripts:
        if not re.fullmatch(r"[0-9]{4}", script.rev_id or ""):
            newest = max((int(known.revision) for known in context.script.walk_revisions()), default=0)
            script.rev_id = f"{newest + 1:04}"


def record_oldest_revision(ctx: object, step: object, heads: Collection[Any], run_args: object) -> None:
    """Store the oldest revision whose releases can use the schema, and report progress."""
    for head in heads:
        script = context.script.get_revision(head)
        assert script is not None
        context.execute(f"PRAGMA user_version = {int(getattr(script.module, 'oldest', head))}")
    if progress := context.config.attributes.get("progress"):
        number, known = int(max(heads, default="0")), len(list(context.script.walk_revisions()))
        progress("migrating", number, known)


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=METADATA,
        render_as_batch=True,
        render_item=render_item,
        compare_type=True,
        compare_server_default=True,
        process_revision_directives=number_revisions,
        on_version_apply=record_oldest_revision,
    )
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    if context.is_offline_mode():
        context.configure(
            dialect_name="sqlite",
            target_metadata=METADATA,
            literal_binds=True,
            dialect_opts={"paramstyle": "named"},
            on_version_apply=record_oldest_revision,
        )
        with context.begin_transaction():
            context.run_migrations()
        return
    connection = context.config.attributes.get("connection")
    if isinstance(connection, Engine):  # given by other tools for Alembic, such as pytest-alembic
        with connection.begin() as begun:
            run(begun)
        return
    if connection is not None:
        run(connection)
        return
    # The `alembic` command in a checkout: `-x dir=DIR`, else the directory that `cachedb` uses.
    from pathlib import Path

    directory = context.get_x_argument(as_dictionary=True).get("dir")
    with closing(Database(Path(directory) if directory else default_directory())) as database:
        prepare(database)
        with database.write_schema() as connection:
            # A batch drops its table for a moment, but not the views over it.
            connection.exec_driver_sql("PRAGMA legacy_alter_table = ON")
            run(connection)


main()
