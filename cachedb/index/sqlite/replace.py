"""Replace the index while other processes use the cache."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from cachedb.disk.durable import copy_to_new
from cachedb.disk.existence import exists
from cachedb.disk.turns import Turn
from cachedb.errors import DamagedIndex, NotACache, StorageError
from cachedb.index.sqlite.database import Database

__all__ = ["replace"]

_READING_SECONDS = 10  # how long to wait for readers of the old index
_POLL_SECONDS = 0.02


def replace(database: Database, turn: Turn, new: Path, old: Path) -> bool:
    """Replace the index; ``index.db`` exists at every moment. The caller holds the write lock.

    Args:
        database: the index to replace.
        turn: the write lock that the caller holds.
        new: the new index, a single file in ``backups/``.
        old: path in ``quarantine/`` for a copy of the replaced index.

    Returns:
        Whether there was an index.

    Raises:
        CacheReplaced: if the write lock is lost; the index is not replaced.
        StorageError: if another program reads for so long that the old WAL cannot be written back.
    """
    found, wal = exists(database.path), database.path.with_name("index.db-wal")
    if found:
        with suppress(DamagedIndex, NotACache):
            _write_back(database)
    database.close()
    folders = database.folders
    with (
        database.entered(lambda stack: stack.enter_context(database.file.no_replacement(replacing=True))),
        folders.open("quarantine") as quarantine,
        folders.open("backups") as backups,
    ):
        if found:
            with database.path.open("rb") as index:
                copy_to_new(index, old.name, quarantine)
        # Without the lock, another process may have written rows that the new index lacks.
        turn.check("the index was not replaced: try again")
        # SQLite would apply the old WAL to the new index.
        if exists(wal):
            kept = f"{old.name}-wal"
            os.rename(wal.name, kept, src_dir_fd=folders.root, dst_dir_fd=quarantine)
            if not os.stat(kept, dir_fd=quarantine, follow_symlinks=False).st_size:
                os.unlink(kept, dir_fd=quarantine)
        folders.remove("index.db-shm")
        os.fsync(quarantine)
        os.fsync(folders.root)
        os.rename(new.name, database.path.name, src_dir_fd=backups, dst_dir_fd=folders.root)
        os.fsync(folders.root)
    return found


def _write_back(database: Database) -> None:
    """Write the WAL back, so that the index is a single file."""
    end = time.monotonic() + _READING_SECONDS
    while True:
        with database.raw() as connection:
            busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if not busy:
            return
        if time.monotonic() > end:
            raise StorageError(
                "the index cannot be replaced, because another program has been reading it: end it and try again"
            )
        time.sleep(_POLL_SECONDS)
