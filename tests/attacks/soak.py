"""Run the soak against a cache: `python -m tests.attacks.soak --help`."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection

import cachedb.transports.archive.read
import cachedb.transports.archive.write_layout  # noqa: F401 - imported once, before the workers are forked
from cachedb import Cache, NotInCache
from cachedb.index.sqlite.database import Database
from tests.support import leftovers, promises
from tests.support import soaking as soak

WAITING = {"processes": 64, "seconds": 600.0}


@contextmanager
def translate_errors() -> Iterator[None]:
    """Raise `soak.Absent` instead of `NotInCache` in the block."""
    try:
        yield
    except NotInCache as error:
        raise soak.Absent(str(error)) from error


class OpenCache:
    """An open cache with the interface of `soak.Store`."""

    def __init__(self, directory: Path) -> None:
        self._cache = Cache.open(directory)
        self._formats = itertools.cycle(["docker", "oci-archive"])

    def add(self, name: str, image: soak.Image) -> None:
        for digest, data in image.blobs.items():
            if data is not image.manifest:
                self._cache.save_blob(digest, data)
        self._cache.save_manifest(name, image.manifest)

    def load(self, name: str, archive: Path) -> None:
        self._cache.cache_from_tar(archive, name)

    def has(self, digest: str) -> bool:
        return self._cache.has_blob(digest)

    def read(self, digest: str) -> bytes:
        with translate_errors():
            return self._cache.get_blob(digest)

    def manifest(self, name: str) -> bytes:
        with translate_errors():
            return self._cache.get_manifest(name)

    def blobs(self, name: str) -> list[str]:
        with translate_errors():
            return [blob.digest for blob in self._cache.get_image_blobs(name) if blob.stored]

    def complete(self, name: str) -> bool:
        # `is_image_complete` is also False for an absent image, for which `get_image` raises an error.
        with translate_errors():
            return self._cache.is_image_complete(name) or self._cache.get_image(name).complete

    def tag(self, source: str, target: str) -> None:
        with translate_errors():
            self._cache.tag(source, target)

    def remove(self, name: str) -> None:
        with translate_errors():
            self._cache.remove_manifest(name)

    @contextmanager
    def hold(self, name: str) -> Iterator[dict[str, Path]]:
        with translate_errors():
            # Hold the digests too: a hot name may move to another image before the hold.
            digests = [blob.digest for blob in self._cache.get_image_blobs(name)]
            held = self._cache.hold(name, *digests)
            held.__enter__()
        try:
            yield {digest: self._cache.get_blob_path(digest) for digest in digests}
        finally:
            held.__exit__(None, None, None)

    def export(self, name: str, path: Path) -> None:
        with translate_errors():
            self._cache.export(name, path, format=next(self._formats))  # type: ignore[arg-type]

    def collect(self) -> None:
        self._cache.collect_garbage()

    def verify(self, *, quick: bool) -> list[str]:
        if not hasattr(self._cache, "verify"):
            return []
        return [str(problem) for problem in self._cache.verify(quick=quick, repair=False).problems]

    def close(self) -> None:
        self._cache.close()


class CacheDirectory:
    """A cache in a directory as the target of an attack."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._write = Database.write

    def open(self, waited: Callable[[float], None]) -> OpenCache:
        write = self._write

        @contextmanager
        def timed(self: Database) -> Iterator[Connection]:
            # Everything before the transaction begins counts: waiting for the lock file, and in SQLite.
            began = time.perf_counter()
            with write(self) as connection:
                waited(time.perf_counter() - began)
                yield connection

        Database.write = timed  # type: ignore[method-assign]
        return OpenCache(self._directory)

    def check(self) -> None:
        promises.check(self._directory)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.attacks.soak", description="Load a cache with many processes, and check it."
    )
    parser.add_argument("--processes", type=int, help="processes that use the cache (8; 64 with --waiting)")
    parser.add_argument("--seconds", type=float, help="seconds of work (60 without --operations; 600 with --waiting)")
    parser.add_argument("--operations", type=float, help="operations after which the soak ends")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random choices (1)")
    parser.add_argument("--kills-per-second", type=float, default=2.0, help="kills by SIGKILL (2; 0 with --waiting)")
    parser.add_argument("--pause", type=float, default=0.0, help="average seconds between a process's operations (0)")
    parser.add_argument("--check-every", type=float, default=30.0, help="seconds between checks of all promises (30)")
    parser.add_argument("--directory", type=Path, help="folder for the cache; /dev/shm is faster (a temporary folder)")
    parser.add_argument("--waiting", action="store_true", help="no kills; fail if waits are too long or unfair")
    parser.add_argument("--longest", type=float, default=1.0, help="longest wait with --waiting, in seconds (1)")
    parser.add_argument(
        "--ratio", type=float, default=3.0, help="largest ratio of busiest to slowest process with --waiting (3)"
    )
    return parser.parse_args()


def make_plan(options: argparse.Namespace, scratch: Path) -> soak.Plan:
    seconds = options.seconds
    if seconds is None and options.operations is None:
        seconds = WAITING["seconds"] if options.waiting else 60.0
    return soak.Plan(
        processes=options.processes or (int(WAITING["processes"]) if options.waiting else 8),
        scratch=scratch,
        seconds=float("inf") if seconds is None else seconds,
        operations=float("inf") if options.operations is None else options.operations,
        seed=options.seed,
        pause=options.pause,
        kills_per_second=0.0 if options.waiting else options.kills_per_second,
        # A check ends all workers, but with --waiting they run all the time.
        check_every=float("inf") if options.waiting else options.check_every,
    )


def main() -> int:
    options = parse_arguments()
    interval = 3 if sys.stdout.isatty() else 60
    printed = time.monotonic()

    seen: set[str] = set()

    def progress(result: soak.Result) -> None:
        nonlocal printed
        for text in result.violations.keys() - seen:
            seen.add(text)
            print(f"violation: {text}", flush=True)
        if time.monotonic() - printed >= interval:
            printed = time.monotonic()
            done = sum(result.operations.values())
            print(
                f"{result.seconds:.0f} s: {done} operations, {done / result.seconds:.0f} a second, "
                f"{result.kills} kills, {result.checks} checks, longest wait {max(result.longest_wait):.3f} s, "
                f"{result.violations.total()} violations",
                flush=True,
            )

    if options.directory:
        options.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cachedb-soak-", dir=options.directory) as folder:
        scratch = Path(folder) / "scratch"
        scratch.mkdir()
        result = soak.run(CacheDirectory(Path(folder) / "cache"), make_plan(options, scratch), progress)
    faults = soak.find_unfair_waits(result, longest=options.longest, ratio=options.ratio) if options.waiting else []
    for line in (*soak.format_result(result), *faults):
        print(line)
    return 1 if result.violations or faults else 0


if __name__ == "__main__":
    leftovers.start_watcher()
    sys.exit(main())
