"""The schema: bringing a cache's index to the newest revision with the Alembic migrations.

Alembic is imported only when there is something to migrate.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cachedb.database import Database, has_blobs, is_empty, lost, mismatch, read_revision
from cachedb.models import REVISION

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = ["alembic_config", "migrations_directory", "prepare"]


def migrations_directory() -> Path:
    """Return where the migrations lie: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def alembic_config() -> Config:
    """Return an Alembic configuration that needs no ``alembic.ini``."""
    from alembic.config import Config

    config = Config()
    # A % is an interpolation to the ini parser behind it.
    config.set_main_option("script_location", str(migrations_directory()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def prepare(database: Database, *, upgrade: bool = False) -> None:
    """Make the cache directory ready for work: create what is not there, at the newest schema.

    Args:
        database: of the directory.
        upgrade: bring an older schema to the newest.

    Raises:
        NotACache: if the directory is something else.
        DamagedIndex: if it has blobs, and no index or a damaged one.
        SchemaMismatch: if the schema is newer than this release, or older and ``upgrade`` is false.
    """
    database.prepare()
    revision = database.revision()
    if revision == REVISION:
        return
    if revision is not None and (not upgrade or revision > REVISION):
        raise mismatch(database.directory, revision)
    with database.write_schema() as connection:
        # Of many processes that come to a new directory at once, the first has done it for the others.
        revision = read_revision(connection)
        if revision == REVISION:
            return
        if is_empty(connection):
            # A new index would make orphans of what is there, and the next collection would delete it.
            if has_blobs(database.directory):
                raise lost(database.directory)
        elif revision is None or revision > REVISION:
            raise mismatch(database.directory, revision)
        from alembic import command

        config = alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
