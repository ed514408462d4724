"""How long each report takes on a large index, and what writers lose while reports run without a pause.

python benchmarks/reports.py [--images 100000] [--writers 16] [--seconds 10] [--directory DIR]

Each image has a manifest, a config and eight layers of its own, and four of one of 200 bases, which are images too.
Rows are written and no files: reports read none. Each report is run twice, and the quicker run counts.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cachedb import Cache
from cachedb.oci import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST
from cachedb.report import reports

BASES = 200
GIVEN = {
    "freed-by": {"names": "team/app-1:0 team/app-2:0"},
    "added-by": {"name": "team/app-1:0", "over": "base/1:1"},
    "by-label": {"key": "version"},
}
WRITER = """
import sys, time
from cachedb import Cache
with Cache.open(sys.argv[1]) as cache:
    begin, count = float(sys.argv[3]), 0
    time.sleep(max(0, begin - time.monotonic()))  # until all of them are there
    end = begin + float(sys.argv[4])
    while time.monotonic() < end:
        cache.tag("team/app-1:0", f"mine-{sys.argv[2]}:{count % 10}")
        count += 1
print(count)
"""
READER = """
import os, sys
from cachedb import Cache, report
given = {"freed-by": {"names": "team/app-1:0"}, "added-by": {"name": "team/app-1:0", "over": "base/1:1"}}
with Cache.open(sys.argv[1]) as cache:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # as the command line does
    while True:
        for one in report.reports():
            with cache.sql(one.query, one.values(given.get(one.name, {}))) as answer:
                for _ in answer.rows:
                    pass
"""


def fill(directory: Path, count: int) -> int:
    """Write the rows of so many images; return how many blobs there are."""
    with Cache.open(directory):
        pass
    chosen = random.Random(1)
    blobs: list[tuple[int, str, int, str]] = []
    images: list[tuple[object, ...]] = []
    contents: list[tuple[object, ...]] = []
    labels: list[tuple[int, str, str]] = []

    def moment() -> str:
        return f"2026-{chosen.randrange(1, 12):02}-{chosen.randrange(1, 28):02}T23:59:59.123456Z"

    def blob(size: int) -> int:
        number = len(blobs) + 1
        blobs.append((number, f"sha256:{hashlib.sha256(b'%d' % number).hexdigest()}", size, moment()))
        return number

    def image(repository: str, tag: int, layers: list[int]) -> None:
        number, manifest, config = len(images) + 1, blob(1500), blob(3000)
        images.append((number, repository, str(tag), manifest, OCI_MANIFEST, moment(), moment(), "amd64", moment()))
        contents.append((number, 0, manifest, "manifest", OCI_MANIFEST, None))
        contents.append((number, 1, config, "config", OCI_CONFIG, None))
        for position, layer in enumerate(layers, 2):
            contents.append((number, position, layer, "layer", OCI_LAYER, f"RUN make layer-{layer}"))
        labels.extend([(number, "maintainer", "a@example.org"), (number, "version", str(tag))])

    bases = [[blob(chosen.randrange(10**6, 10**8)) for _ in range(4)] for _ in range(BASES)]
    for number, layers in enumerate(bases):
        image(f"base/{number % 20}", number, layers)
    for number in range(count - BASES):
        base = bases[min(int(chosen.expovariate(1 / 30)), BASES - 1)]
        image(f"team/app-{number % 1000}", number // 1000, [*base, *(blob(chosen.randrange(10**7)) for _ in range(8))])
    for _ in range(1000):
        blob(5000)  # garbage
    shell = sqlite3.connect(directory / "index.db")
    with shell:
        shell.executemany("INSERT INTO blobs (id, digest, size, stored_at) VALUES (?, ?, ?, ?)", blobs)
        shell.executemany(
            "INSERT INTO images (id, repository, reference, manifest_id, media_type, created_at, last_used_at, "
            "architecture, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            images,
        )
        shell.executemany(
            "INSERT INTO image_blobs (image_id, position, blob_id, role, media_type, created_by) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            contents,
        )
        shell.executemany("INSERT INTO image_labels VALUES (?, ?, ?)", labels)
    shell.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shell.close()
    return len(blobs)


def rate(directory: Path, writers: int, seconds: float) -> float:
    """Return how many times a second an image gets a second name."""
    command, begin = [sys.executable, "-c", WRITER, str(directory)], time.monotonic() + 1 + writers / 2
    running = [
        subprocess.Popen([*command, str(number), str(begin), str(seconds)], stdout=subprocess.PIPE, text=True)
        for number in range(writers)
    ]
    return sum(int(process.communicate()[0]) for process in running) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--writers", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        directory = Path(folder) / "cache"
        blobs = fill(directory, options.images)
        print(f"{options.images} images, {blobs} blobs, {os.cpu_count()} cores, SQLite {sqlite3.sqlite_version}\n")
        print("| report | rows | seconds |\n| --- | --- | --- |")
        with Cache.open(directory) as cache:
            for one in reports():
                times, rows = [], 0
                for _ in range(2):
                    began = time.perf_counter()
                    with cache.sql(one.query, one.values(GIVEN.get(one.name, {}))) as answer:
                        rows = sum(1 for _ in answer.rows)
                    times.append(time.perf_counter() - began)
                print(f"| {one.name} | {rows} | {min(times):.2f} |", flush=True)
            began = time.perf_counter()
            cache.get_usage()
            print(f"| `cachedb df` | | {time.perf_counter() - began:.2f} |")
        alone, beside = [], []
        for _ in range(3):
            alone.append(rate(directory, options.writers, options.seconds))
            with subprocess.Popen([sys.executable, "-c", READER, str(directory)]) as reader:
                beside.append(rate(directory, options.writers, options.seconds))
                reader.kill()
        print(f"\n{options.writers} writers, names given a second, in turns:\n")
        print("| | median | each time |\n| --- | --- | --- |")
        for what, rates in (("alone", alone), ("beside reports", beside)):
            print(f"| {what} | {statistics.median(rates):.0f} | {', '.join(f'{one:.0f}' for one in rates)} |")
        print(f"\nBeside reports they have {statistics.median(beside) / statistics.median(alone):.1%} of their rate.")


if __name__ == "__main__":
    main()
