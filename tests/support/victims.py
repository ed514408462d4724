"""Victims: processes that do one operation each, while a test kills them or lets a system call fail.

Run as `python -m tests.support.victims FOLDER`; it makes a cache in the folder to import everything, and removes it.
For each line of stdin, ``OPERATION<tab>DIRECTORY``, it forks a child, which imports nothing again. It prints the
child's process ID. The child does the operation after the next line of stdin. Then its exit status is printed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sqlite3
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cachedb import Cache, CacheError, Keep, Policy, Remove
from cachedb.operations.restore import restore as restore_backup
from cachedb.operations.upgrade import back_up
from cachedb.operations.upgrade import downgrade as downgrade_schema
from tests.support import make
from tests.support.make import save

KEPT = make.image(1, 2)
"""The image that is saved as kept:1 before the operation."""
GONE = make.image(2, 3)
"""The image that is saved as gone:1 before the operation; it shares a layer with `KEPT`."""
NEW = make.image(2, 4)
LARGE = make.random_bytes(3 * 1024 * 1024 + 1, 5)
LOOSE = b"nothing refers to this"

DONE, FAILED, GAVE_UP, RECOVERED = 0, 1, 3, 4
"""Exit codes of a victim.

DONE: the operation succeeded. FAILED: it raised something other than a `CacheError`. GAVE_UP: it raised a `CacheError`
twice. RECOVERED: it raised a `CacheError`, and succeeded when the same process tried again.
"""


def file_of(directory: Path, data: bytes) -> Path:
    return directory / "cache" / "blobs" / "sha256" / make.hex_of(data)


# Preparations: what an operation finds in its directory


def nothing(_directory: Path) -> None:
    pass


def cache(directory: Path) -> None:
    """Make a cache with two images that share a layer and an unreferenced blob; write an archive."""
    with Cache.open(directory / "cache") as cache:
        save(cache, "kept:1", KEPT)
        save(cache, "gone:1", GONE)
        cache.add_blob(LOOSE)
    make.write(directory / "new.tar", make.oci_files({"new:1": NEW}))


def used_long_ago(directory: Path) -> None:
    """Make a cache whose images were last used long ago; `KEPT` is held."""
    cache(directory)
    with Cache.open(directory / "cache") as opened:
        opened.add_hold("kept:1")
        opened.tag("gone:1", "gone:2")
        save(opened, "gone:3", NEW)
    shell = sqlite3.connect(directory / "cache" / "index.db")
    shell.execute("UPDATE images SET last_used_at = '2026-01-01T00:00:00.000000Z'")
    shell.commit()
    shell.close()


def old_cache(directory: Path) -> None:
    """Make a cache with the schema of the first release."""
    cache(directory)
    downgrade_schema(directory / "cache", "0001")
    for backup in (directory / "cache" / "backups").glob("*.db"):
        backup.unlink()


def damaged_cache(directory: Path) -> None:
    """Make a cache with altered, truncated, missing and unknown blobs, and a stray file."""
    cache(directory)
    for layer, change in zip((GONE.layers[1], GONE.config), (b"x" * len(GONE.layers[1]), b"x"), strict=True):
        path = file_of(directory, layer)
        path.chmod(0o600)
        path.write_bytes(change)
    file_of(directory, LOOSE).unlink()
    file_of(directory, b"orphan").write_bytes(b"orphan")
    (directory / "cache" / "blobs" / "notes.txt").write_text("not a blob")


def lost_index(directory: Path) -> None:
    """Make a cache whose index is lost, but has a backup."""
    cache(directory)
    index = directory / "cache" / "index.db"
    index.rename(directory / "cache" / "backups" / "000001-0002.db")


def damaged_index(directory: Path) -> None:
    """Make a cache whose index has a row with a dangling foreign key."""
    cache(directory)
    shell = sqlite3.connect(directory / "cache" / "index.db")
    shell.execute("INSERT INTO image_blobs VALUES (1, 99, 99, 'layer', 'text/plain', NULL, NULL)")
    shell.commit()
    shell.close()


def dead_sessions(directory: Path) -> None:
    """Make a cache with leftovers of two killed processes: one published, one collected."""
    cache(directory)
    folder = directory / "cache" / "ingest" / "1-abcdefabcdef"
    folder.mkdir()
    published = folder / f"2.{make.digest_of(b'orphan').replace(':', '-')}"
    published.write_bytes(b"orphan")
    os.link(published, file_of(directory, b"orphan"))
    (folder / "3").write_bytes(b"half of someth")
    for name in ("1-abcdefabcdef.session", f"{'ab' * 32}.producing"):
        (directory / "cache" / "locks" / name).touch()
    shell = sqlite3.connect(directory / "cache" / "index.db")
    shell.execute("INSERT INTO leases VALUES (?, '1-abcdefabcdef', 1)", (make.digest_of(LOOSE),))
    shell.execute("INSERT INTO trash VALUES (?, 6)", (make.digest_of(b"trashed"),))
    shell.commit()
    shell.close()
    file_of(directory, b"trashed").write_bytes(b"trashed")
    (directory / "cache" / "trash" / f"sha256-{make.hex_of(b'renamed')}").write_bytes(b"renamed")


# Operations


def open_cache(directory: Path) -> None:
    Cache.open(directory / "cache").close()


def save_blob(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        cache.save_blob(make.digest_of(LARGE), LARGE)


def save_manifest(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        cache.save_manifest("gone:1", NEW.manifest)


def import_archive(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        cache.cache_from_tar(directory / "new.tar")


def tag(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        cache.tag("kept:1", "gone:1")


def remove(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        if any(image.repository == "gone" for image in cache.list_manifests()):
            cache.remove_manifest("gone:1")


def collect(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        cache.collect_garbage()


def pin(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        cache.pin("kept:1", "gone:*", ignore_missing=True)
        assert cache.get_image("kept:1").pinned
        cache.unpin("gone:*", ignore_missing=True)


def prune(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        # The check of a cache uses its images, which must not keep them.
        policy = Policy(keep=(Keep(used_within=0.001),), remove=(Remove(names=("gone:2",)),))
        cache.prune(policy, to_free=1 << 40)
        assert cache.list_names() == ["kept:1"]


def hold(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        for found in cache.list_holds():
            cache.release_hold(found.id)
        cache.add_hold("kept:1", seconds=3600)


def export(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        cache.export("kept:1", directory / "kept.tar")


def export_folder(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        cache.export("kept:1", directory / "layout", format="oci-dir", link=True)


def upgrade(directory: Path) -> None:
    Cache.open(directory / "cache", upgrade=True).close()


def repair(directory: Path) -> None:
    with Cache.open(directory / "cache", damaged=True) as cache:
        cache.verify(repair=True)


def json_cache(directory: Path) -> None:
    """Make a cache, and a cache with an `index.json`, in which one image lacks a blob."""
    cache(directory)
    make.json_cache(directory / "old", {"team/new/1": NEW, "app/2": make.image(1, 6), "app/3": make.image(7)})
    (directory / "old" / "blobs" / "sha256" / make.hex_of(make.image(7).layers[0])).unlink()


def adopt(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        cache.adopt(directory / "old")


def adopt_by_moving(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        cache.adopt(directory / "old", how="move")


def layout(directory: Path) -> None:
    """Make a cache, and an image layout folder; the cache has one of its layers."""
    cache(directory)
    make.write(directory / "layout", make.oci_files({"new:1": NEW}))


def import_by_linking(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        cache.cache_from_tar(directory / "layout", link=True)


def backed_up(directory: Path) -> None:
    """Make a cache that has changed since its backup."""
    with Cache.open(directory / "cache") as opened:
        save(opened, "kept:1", KEPT)
        back_up(directory / "cache", directory / "backup.db")
        save(opened, "gone:1", GONE)


def restore(directory: Path) -> None:
    restore_backup(directory / "cache", directory / "backup.db")


def copy(directory: Path) -> None:
    with Cache.open(directory / "cache") as opened:
        if not (directory / "copy" / "index.db").exists():
            opened.copy(directory / "copy")


class Operation(NamedTuple):
    """An operation to interrupt."""

    prepare: Callable[[Path], None]
    do: Callable[[Path], None]  # can be repeated, even after it was interrupted


OPERATIONS = {
    "open anew": Operation(nothing, open_cache),
    "open after a crash": Operation(dead_sessions, open_cache),
    "save a blob": Operation(cache, save_blob),
    "save a manifest": Operation(cache, save_manifest),
    "import": Operation(cache, import_archive),
    "tag": Operation(cache, tag),
    "remove": Operation(cache, remove),
    "collect": Operation(cache, collect),
    "prune": Operation(used_long_ago, prune),
    "hold": Operation(cache, hold),
    "export": Operation(cache, export),
    "export a folder": Operation(cache, export_folder),
    "adopt": Operation(json_cache, adopt),
    "adopt by moving": Operation(json_cache, adopt_by_moving),
    "upgrade": Operation(old_cache, upgrade),
    "restore a backup": Operation(backed_up, restore),
    "copy": Operation(cache, copy),
    "repair": Operation(damaged_cache, repair),
    "rebuild from a backup": Operation(lost_index, repair),
    "rebuild": Operation(damaged_index, repair),
    "import by linking": Operation(layout, import_by_linking),
    "pin": Operation(cache, pin),
}
_SET_PTRACER, _ANY = 0x59616D61, -1


def attempt(operation: str, directory: Path) -> int:
    """Do an operation, and repeat it once if it raises a `CacheError`; return an exit code."""
    for code in (DONE, RECOVERED):
        try:
            OPERATIONS[operation].do(directory)
        except CacheError:
            continue
        except Exception:
            (directory / "traceback").write_text(traceback.format_exc())
            return FAILED
        return code
    return GAVE_UP


def main() -> None:
    # Import the lazy modules before the first fork, and compile Alembic's migrations.
    warm = Path(sys.argv[1]) / "warm"
    with Cache.open(warm):
        pass
    shutil.rmtree(warm)
    for line in sys.stdin:
        operation, directory = line.rstrip("\n").split("\t")
        child = os.fork()
        if child == 0:
            # strace is no parent of this process, so allow any process to trace it where Yama restricts tracing.
            ctypes.CDLL(None).prctl(_SET_PTRACER, _ANY, 0, 0, 0)
            print(os.getpid(), flush=True)
            os.read(0, 1)
            os._exit(attempt(operation, Path(directory)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
