"""Put another index in the place of the one that is there, while other processes use the cache."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path

from cachedb.disk.durable import sync_file, sync_folder
from cachedb.disk.locks import Turn
from cachedb.errors import DamagedIndex, NotACache, StorageError
from cachedb.index.sqlite.database import Database

__all__ = ["replace"]

_READING_SECONDS = 10  # that others may go on reading an index that is to be replaced
_POLL_SECONDS = 0.02


def replace(database: Database, turn: Turn, new: Path, old: Path) -> bool:
    """Have another index under the name, which is never without one; under the write lock.

    Args:
        database: whose index it is.
        turn: the write lock, as it is held.
        new: the other, in one file.
        old: where to keep a copy of the one that is there.

    Returns:
        Whether there was one.

    Raises:
        CacheReplaced: if the write lock is lost; nothing is replaced then.
        StorageError: if somebody has been reading for so long that the old WAL cannot be written back.
    """
    found, wal = database.path.exists(), database.path.with_name("index.db-wal")
    if found:
        with suppress(DamagedIndex, NotACache):
            _write_back(database)
    database.close()
    with database.entered(lambda stack: stack.enter_context(database.file.unreplaced(replacing=True))):
        if found:
            shutil.copyfile(database.path, old)
            old.chmod(0o600)
            sync_file(old)
        # Without the lock another process may have written what the new index lacks.
        turn.check("the index was not replaced: try again")
        # SQLite would apply a WAL that it finds to whatever database lies beside it.
        if wal.exists():
            kept = old.with_name(f"{old.name}-wal")
            wal.rename(kept)
            if not kept.stat().st_size:
                kept.unlink()
        database.path.with_name("index.db-shm").unlink(missing_ok=True)
        sync_folder(old.parent)
        sync_folder(database.directory)
        new.rename(database.path)
        sync_folder(database.directory)
    return found


def _write_back(database: Database) -> None:
    """Write the WAL back to the index, which is all there in one file then."""
    end = time.monotonic() + _READING_SECONDS
    while True:
        with database.raw() as connection:
            busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if not busy:
            return
        if time.monotonic() > end:
            raise StorageError(
                "the index cannot be replaced: another program has been reading it for long; end it and try again"
            )
        time.sleep(_POLL_SECONDS)
