"""Measure an upgrade of the schema and its disk usage, and compare it with VACUUM INTO."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.many_images import CONFIG, LAYER, MANIFEST, TIME
from benchmarks.measure import measure_cost, print_table, run_in_child
from benchmarks.plan import Plan

BLOBS = 10  # of an image
DIFF_ID = f"sha256:{'ab' * 32}"


def upgrade(plan: Plan) -> None:
    """Upgrade a cache of schema 0002 in which each image has its own config."""
    rows, text = run_in_child(_upgrade, plan.folder("upgrade"), plan.images)
    print(f"{plan.images} images, {plan.images * BLOBS} blobs; {text}\n")
    print_table(["step", "seconds", "ratio to the copy alone"], rows)


def _config(number: int, layers: int) -> bytes:
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


def _write_cache(directory: Path, images: int) -> None:
    """Write the rows and the config files of a cache; an upgrade reads no other files."""
    from cachedb import Cache
    from cachedb.operations.upgrade import downgrade

    with Cache.open(directory):
        pass
    downgrade(directory, "0002")
    layers = BLOBS - 2
    shell = sqlite3.connect(directory / "index.db")

    def rows() -> Iterator[tuple[int, str, int, str]]:
        for number in range(images):
            data = _config(number, layers)
            name = hashlib.sha256(data).hexdigest()
            (directory / "blobs" / "sha256" / name).write_bytes(data)
            first = number * BLOBS + 1
            yield first, f"sha256:{first:064x}", 500, TIME
            yield first + 1, f"sha256:{name}", len(data), TIME
            for layer in range(layers):
                yield first + 2 + layer, f"sha256:{first + 2 + layer:064x}", 1_000_000, TIME

    with shell:
        shell.executemany("INSERT INTO blobs (id, digest, size, stored_at) VALUES (?, ?, ?, ?)", rows())
        shell.executemany(
            "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (number + 1, f"team/app-{number % 1000}", str(number), number * BLOBS + 1, MANIFEST, TIME, TIME)
                for number in range(images)
            ),
        )
        kinds = [("manifest", MANIFEST), ("config", CONFIG), *[("layer", LAYER)] * layers]
        shell.executemany(
            "INSERT INTO image_blobs VALUES (?, ?, ?, ?, ?)",
            (
                (number + 1, position, number * BLOBS + 1 + position, *kind)
                for number in range(images)
                for position, kind in enumerate(kinds)
            ),
        )
    shell.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shell.close()


def _measure_index(directory: Path) -> int:
    """Return the bytes of the index, its WAL, and the backups."""
    total = 0
    for path in (*directory.glob("index.db*"), *directory.glob("backups/*")):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def _upgrade(place: Path, images: int) -> tuple[list[list[str]], str]:
    """Upgrade; return a row for each step, and a text about disk, memory and CPU."""
    from cachedb.operations import upgrade as operation
    from cachedb.operations.upgrade import back_up

    directory = place / "cache"
    run_in_child(_write_cache, directory, images)
    for backup in directory.glob("backups/*"):
        backup.unlink()
    size = _measure_index(directory)
    alone = measure_cost(lambda: back_up(directory, place / "copy.db"))
    (place / "copy.db").unlink()

    last: dict[str, float] = {}
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, _measure_index(directory))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()

    def progress(what: str, _done: int, _total: int) -> None:
        last[what] = time.perf_counter() - began

    whole = measure_cost(lambda: operation.upgrade(directory, progress=progress))
    done.set()
    watcher.join()
    steps = [("VACUUM INTO and fsync, alone", alone.seconds), ("the whole upgrade", whole.seconds)]
    ended = 0.0
    for what, moment in last.items():
        steps.append((f"step: {what}", moment - ended))
        ended = moment
    text = (
        f"the index had {size / 1e6:.0f} MB; the upgrade took at most {peak / 1e6:.0f} MB of disk, "
        f"{peak / size:.2f} times the index, {whole.peak / 2**20:.0f} MiB of memory and {whole.cpu:.1f} CPU seconds."
    )
    return [[what, f"{taken:.2f}", f"{taken / alone.seconds:.2f}"] for what, taken in steps], text
