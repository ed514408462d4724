"""Time each report on a large index, and measure how much reports slow writers down.

Each image has its own manifest, config and eight layers, and the four layers of one of 200 bases. The bases are images
too. The benchmark writes only rows, because reports read no files. Each report runs twice, and the faster run counts.
"""

from __future__ import annotations

import hashlib
import random
import sqlite3
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.many_images import CONFIG, LAYER, MANIFEST
from benchmarks.measure import measure_seconds, print_table, run_in_child
from benchmarks.plan import Plan

BASES = 200
WRITERS = 16
GIVEN = {  # parameters of reports
    "freed-by": {"names": "team/app-1:0 team/app-2:0"},
    "added-by": {"name": "team/app-1:0", "over": "base/1:1"},
    "by-label": {"key": "version"},
    "differences": {"name": "team/app-1:0", "other": "team/app-2:0"},
    "for-platform": {"platform": "linux/arm64"},
    "to-free": {"size": "500GB"},
    "usage-by": {"key": "version"},
}
WRITER = """
import sys, time
from cachedb import Cache
with Cache.open(sys.argv[1]) as cache:
    begin, count = float(sys.argv[3]), 0
    time.sleep(max(0, begin - time.monotonic()))  # until all writers are ready
    end = begin + float(sys.argv[4])
    while time.monotonic() < end:
        cache.tag("team/app-1:0", f"mine-{sys.argv[2]}:{count % 10}")
        count += 1
print(count)
"""
BUSY_LOOP = """
import os
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while True:
    pass
"""
READER = """
import os, sys
from cachedb import Cache
from cachedb.reports import named
from benchmarks.reports import GIVEN
with Cache.open(sys.argv[1]) as cache:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # as the command line does
    while True:
        for one in named.list_reports():
            with cache.run_report(one.name, GIVEN.get(one.name)) as answer:
                for _ in answer.rows:
                    pass
"""


def write_index(directory: Path, count: int) -> int:
    """Write the rows of ``count`` images; return the number of blobs."""
    from cachedb import Cache

    with Cache.open(directory):
        pass
    chosen = random.Random(1)
    blobs: list[tuple[int, str, int, str]] = []
    images: list[tuple[object, ...]] = []
    contents: list[tuple[object, ...]] = []
    platforms: list[tuple[object, ...]] = []
    labels: list[tuple[int, str, str]] = []

    def moment() -> str:
        return f"2026-{chosen.randrange(1, 12):02}-{chosen.randrange(1, 28):02}T23:59:59.123456Z"

    def blob(size: int) -> int:
        number = len(blobs) + 1
        blobs.append((number, f"sha256:{hashlib.sha256(b'%d' % number).hexdigest()}", size, moment()))
        return number

    def image(repository: str, tag: int, layers: list[int]) -> None:
        number, manifest, config = len(images) + 1, blob(1500), blob(3000)
        images.append((number, repository, str(tag), manifest, MANIFEST, moment(), moment(), "amd64", moment()))
        contents.append((number, 0, manifest, "manifest", MANIFEST, None))
        contents.append((number, 1, config, "config", CONFIG, None))
        for position, layer in enumerate(layers, 2):
            contents.append((number, position, layer, "layer", LAYER, f"RUN make layer-{layer}"))
        platforms.append((number, 0, len(layers) + 1, "linux", "amd64" if tag % 4 else "arm64"))
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
            "INSERT INTO images (id, repository, reference, manifest_id, media_type, added_at, last_used_at, "
            "architecture, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            images,
        )
        shell.executemany(
            "INSERT INTO image_blobs (image_id, position, blob_id, role, media_type, created_by) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            contents,
        )
        shell.executemany("INSERT INTO image_labels VALUES (?, ?, ?)", labels)
        shell.executemany(
            "INSERT INTO image_platforms (image_id, position, last_position, os, architecture) VALUES (?, ?, ?, ?, ?)",
            platforms,
        )
    shell.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shell.close()
    return len(blobs)


def _measure_rate(directory: Path, writers: int, length: float) -> float:
    """Return how many tags per second the writers write in ``length`` seconds."""
    command, begin = [sys.executable, "-c", WRITER, str(directory)], time.monotonic() + 1 + writers / 2
    running = [
        subprocess.Popen([*command, str(number), str(begin), str(length)], stdout=subprocess.PIPE, text=True)
        for number in range(writers)
    ]
    return sum(int(process.communicate()[0]) for process in running) / length


def reports(plan: Plan) -> None:
    """Time every report, `df` and the HTML page, and compare writers alone, beside reports and a busy loop."""
    directory = plan.folder("reports") / "cache"
    blobs = run_in_child(write_index, directory, plan.images)
    print(f"{plan.images} images, {blobs} blobs.\n")
    print_table(["report", "rows", "seconds"], run_in_child(_time_reports, directory))
    length = 2 if plan.quick else 10
    beside = {"alone": "", "beside reports": READER, "beside a busy loop of the same priority": BUSY_LOOP}
    rates: dict[str, list[float]] = {what: [] for what in beside}
    for _ in range(min(3, plan.rounds)):
        for what, code in beside.items():
            with subprocess.Popen([sys.executable, "-c", code, str(directory)]) as other:
                rates[what].append(_measure_rate(directory, WRITERS, length))
                other.kill()
    alone = statistics.median(rates["alone"])
    rows = [
        [what, f"{statistics.median(each):.0f}", f"{min(each):.0f} to {max(each):.0f}", ratio]
        for what, each in rates.items()
        for ratio in [f"{statistics.median(each) / alone:.2f} of the rate alone" if beside[what] else ""]
    ]
    print_table([f"{WRITERS} writers", "tags per second, median", "min to max", "ratio"], rows)


def _time_reports(directory: Path) -> list[list[str]]:
    """Return a row for each report: its name, its number of rows, and the seconds of its faster run."""
    from cachedb import Cache
    from cachedb.reports import named

    rows = []
    with Cache.open(directory) as cache:

        def ask(one: named.Report) -> int:
            with cache.run_report(one.name, GIVEN.get(one.name)) as answer:
                return sum(1 for _ in answer.rows)

        for one in named.list_reports():
            taken = [measure_seconds(partial(ask, one)) for _ in range(2)]
            rows.append([one.name, str(ask(one)), f"{min(taken):.2f}"])
        rows.append(["`cachedb df`", "", f"{measure_seconds(cache.get_usage):.2f}"])
        rows.append(["`report --html`", "", f"{measure_seconds(cache.get_html_report):.2f}"])
    return rows
