"""Time an upgrade of the schema, and the disk it takes, against a copy of the index by VACUUM INTO alone.

python benchmarks/upgrade_schema.py [--images 100000] [--blobs 10] [--directory DIR]

The cache has schema 0002 and that many images, each with a config of its own, and that many blobs an image in all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cachedb import Cache, schema
from cachedb.oci import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST

TIME = "2026-01-31T23:59:59.123456Z"
DIFF_ID = f"sha256:{'ab' * 32}"


def config(number: int, layers: int) -> bytes:
    return json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": "2026-01-31T23:59:59Z",
            "author": f"author {number}",
            "config": {"Labels": {"org.opencontainers.image.version": str(number), "maintainer": "a@example.org"}},
            "rootfs": {"type": "layers", "diff_ids": [DIFF_ID] * layers},
            "history": [{"created_by": f"RUN make layer-{layer}"} for layer in range(layers)],
        }
    ).encode()


def fill(directory: Path, images: int, blobs: int) -> None:
    """Write the rows, and of the files the configs: an upgrade reads no others."""
    with Cache.open(directory):
        pass
    schema.downgrade(directory, "0002")
    layers = blobs - 2
    shell = sqlite3.connect(directory / "index.db")

    def rows() -> Iterator[tuple[int, str, int, str]]:
        for number in range(images):
            data = config(number, layers)
            name = hashlib.sha256(data).hexdigest()
            (directory / "blobs" / "sha256" / name).write_bytes(data)
            first = number * blobs + 1
            yield first, f"sha256:{first:064x}", 500, TIME
            yield first + 1, f"sha256:{name}", len(data), TIME
            for layer in range(layers):
                yield first + 2 + layer, f"sha256:{first + 2 + layer:064x}", 1_000_000, TIME

    with shell:
        shell.executemany("INSERT INTO blobs (id, digest, size, stored_at) VALUES (?, ?, ?, ?)", rows())
        shell.executemany(
            "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (number + 1, f"team/app-{number % 1000}", str(number), number * blobs + 1, OCI_MANIFEST, TIME, TIME)
                for number in range(images)
            ),
        )
        kinds = [("manifest", OCI_MANIFEST), ("config", OCI_CONFIG), *[("layer", OCI_LAYER)] * layers]
        shell.executemany(
            "INSERT INTO image_blobs VALUES (?, ?, ?, ?, ?)",
            (
                (number + 1, position, number * blobs + 1 + position, *kind)
                for number in range(images)
                for position, kind in enumerate(kinds)
            ),
        )
    shell.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shell.close()


def index_bytes(directory: Path) -> int:
    total = 0
    for path in (*directory.glob("index.db*"), *directory.glob("backups/*")):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--blobs", type=int, default=10, help="an image, its manifest and config among them (10)")
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        directory = Path(folder) / "cache"
        fill(directory, options.images, options.blobs)
        for backup in directory.glob("backups/*"):
            backup.unlink()
        size = index_bytes(directory)
        print(f"index of {options.images} images, {options.images * options.blobs} blobs: {size / 1e6:.0f} MB")

        began = time.perf_counter()
        copy = schema.back_up(directory, Path(folder) / "copy.db")
        alone = time.perf_counter() - began
        copy.unlink()

        stages: dict[str, list[float]] = {}
        peak, done = 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02):
                peak = max(peak, index_bytes(directory))

        watcher = threading.Thread(target=watch)
        watcher.start()
        began = time.perf_counter()

        def progress(what: str, _done: int, _total: int) -> None:
            stages.setdefault(what, []).append(time.perf_counter() - began)

        schema.upgrade(directory, progress=progress)
        taken = time.perf_counter() - began
        done.set()
        watcher.join()

        print("| step | seconds | ratio to the copy alone |\n| --- | --- | --- |")
        rows = [("VACUUM INTO and fsync, alone", alone), ("upgrade, all of it", taken)]
        last = 0.0
        for what, times in stages.items():
            rows.append((f"of it: {what}", times[-1] - last))
            last = times[-1]
        for what, seconds in rows:
            print(f"| {what} | {seconds:.2f} | {seconds / alone:.2f} |")
        print(f"disk: {peak / 1e6:.0f} MB at most, {peak / size:.2f} times the index as it was")
        print(f"memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB at most")


if __name__ == "__main__":
    main()
