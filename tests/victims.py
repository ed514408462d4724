"""Processes that do one thing to a cache each, to be killed at it: `python -m tests.victims`.

For each line ``OPERATION DIRECTORY`` a child is forked, so that nothing is imported again. Its number is
printed, it does the operation once it is told to go, and its exit status is printed.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

from cachedb import Cache
from tests import make

KEPT = make.image(1, 2)
"""Saved before, as kept:1, and acknowledged."""
GONE = make.image(2, 3)
"""Saved before, as gone:1; shares a layer with the one that is kept."""
NEW = make.image(2, 4)
LARGE = make.random_bytes(3 * 1024 * 1024 + 1, 5)


def save(cache: Cache, name: str, image: make.Made) -> None:
    for digest, data in image.blobs.items():
        cache.save_blob(digest, data)
    cache.save_manifest(name, image.manifest)


def prepare(directory: Path) -> None:
    """Make what every operation finds: two images that share a layer, a blob that nothing refers to, an archive."""
    with Cache.open(directory / "cache") as cache:
        save(cache, "kept:1", KEPT)
        save(cache, "gone:1", GONE)
        cache.add_blob(b"nothing refers to this")
    make.write(directory / "new.tar", make.oci_files({"new:1": NEW}))


def open_anew(directory: Path) -> None:
    Cache.open(directory / "new-cache").close()


def save_blob(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        cache.save_blob(make.digest_of(LARGE), LARGE)


def save_manifest(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        cache.save_manifest("gone:1", NEW.manifest)


def import_archive(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        cache.cache_from_tar(directory / "new.tar")


def remove(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        if any(image.repository == "gone" for image in cache.list_manifests()):
            cache.remove_manifest("gone:1")


def collect(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        cache.collect_garbage()


OPERATIONS: dict[str, Callable[[Path], None]] = {
    "open_anew": open_anew,
    "save_blob": save_blob,
    "save_manifest": save_manifest,
    "import_archive": import_archive,
    "remove": remove,
    "collect": collect,
}
_SET_PTRACER, _ANY = 0x59616D61, -1


def main() -> None:
    import alembic.command
    import alembic.config  # noqa: F401

    import cachedb.archive  # noqa: F401

    for line in sys.stdin:
        operation, directory = line.split()
        child = os.fork()
        if child == 0:
            # Where the kernel allows tracing only to parents, let strace, a sister, be one.
            ctypes.CDLL(None).prctl(_SET_PTRACER, _ANY, 0, 0, 0)
            print(os.getpid(), flush=True)
            os.read(0, 1)
            OPERATIONS[operation](Path(directory))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
