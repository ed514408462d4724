"""Measure plans of a prune on a large index, and how long a writer waits beside a prune.

The index of the plans is that of the reports. They free a part of all bytes by last use, or remove all images
by a rule. They are compared with a plain sum over the same index.
"""

from __future__ import annotations

import sqlite3
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.many_images import BLOBS, TAGGED, format_waits, run_writer, write_cache
from benchmarks.measure import cachedb, print_table, run, run_in_child
from benchmarks.plan import Plan
from benchmarks.reports import write_index

PARTS = (0.001, 0.1, 0.2, 0.5)
"""Parts of all bytes that plans free."""


def prune(plan: Plan) -> None:
    """Plan prunes that free more and more, then remove a tenth of the images beside a writer."""
    _measure_plans(plan)
    _measure_removal(plan)


def _measure_plans(plan: Plan) -> None:
    directory = plan.folder("prune") / "cache"
    blobs = run_in_child(write_index, directory, plan.images)
    print(f"{plan.images} images, {blobs} blobs.\n")
    columns = ["plan", "images", "CPU s, median", "min to max CPU s", "ratio"]
    print_table(columns, run_in_child(_time_plans, directory, plan.rounds))


def _measure_removal(plan: Plan) -> None:
    count = plan.images // 10
    directory = plan.folder("prune-beside") / "cache"
    run_in_child(write_cache, directory, count)
    with run_writer(directory) as waits:
        time.sleep(2)
        began = time.monotonic()
        cost = run(*cachedb("--dir", directory, "prune", "--unused-for", "1h", "--keep", TAGGED))
        ended = time.monotonic()
    before = [wait for moment, wait in waits if moment + wait < began]
    during = [wait for moment, wait in waits if began <= moment + wait and moment <= ended]
    columns = ["remove", "s", "CPU s", "a writer's wait before: median, longest ms", "and during: median, longest ms"]
    what = f"{count - 1} images, {(count - 1) * BLOBS} blobs"
    times = f"{cost.seconds:.1f}", f"{cost.cpu:.1f}"
    print_table(columns, [[what, *times, format_waits(before), f"{format_waits(during)} (want ≤ 200)"]])


def _time_plans(directory: Path, rounds: int) -> list[list[str]]:
    from cachedb import Cache, Policy, Remove

    with Cache.open(directory) as cache:
        stored_size = cache.get_usage().stored.size

        def count_images(policy: Policy, to_free: int | None) -> int:
            return len(cache.plan_prune(policy, to_free=to_free).images)

        plans: dict[str, Callable[[], int]] = {
            f"free {part:.1%}": partial(count_images, Policy(), int(part * stored_size)) for part in PARTS
        }
        plans["remove all by a rule"] = partial(count_images, Policy(remove=(Remove(names=("*",)),)), None)
        shell = sqlite3.connect(directory / "index.db")

        def add_up() -> int:
            shell.execute("SELECT sum(image_id) FROM image_blobs").fetchone()
            shell.execute("SELECT sum(size) FROM blobs").fetchone()
            return 0

        what = "sum of all associations and sizes"
        taken: dict[str, list[float]] = {name: [] for name in (what, *plans)}
        counts = dict.fromkeys(taken, 0)
        for _ in range(rounds):
            for name, action in ((what, add_up), *plans.items()):
                began = time.process_time()
                counts[name] = action()
                taken[name].append(time.process_time() - began)
        shell.close()
    alone = statistics.median(taken[what])
    rows = [[what, "", *_format_times(taken.pop(what)), ""]]
    for name, times in taken.items():
        want = " (want ≤ 1.5 s)" if counts[name] <= 25_000 else ""
        median, spread = _format_times(times)
        rows.append(
            [name, str(counts[name]), median + want, spread, f"{statistics.median(times) / alone:.1f} times the sum"]
        )
    return rows


def _format_times(times: list[float]) -> tuple[str, str]:
    return f"{statistics.median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}"
