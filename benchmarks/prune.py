"""Measure the CPU time of plans of a prune on a large index, and compare it with a plain sum over the same index.

The index is that of the reports. Plans free a part of all bytes by last use, or remove all images by a rule.
"""

from __future__ import annotations

import sqlite3
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.measure import print_table, run_in_child
from benchmarks.plan import Plan
from benchmarks.reports import write_index

PARTS = (0.001, 0.1, 0.2, 0.5)
"""Parts of all bytes that plans free."""


def prune(plan: Plan) -> None:
    """Plan prunes that free more and more."""
    directory = plan.folder("prune") / "cache"
    blobs = run_in_child(write_index, directory, plan.images)
    print(f"{plan.images} images, {blobs} blobs.\n")
    columns = ["plan", "images", "CPU s, median", "min to max CPU s", "ratio"]
    print_table(columns, run_in_child(_time_plans, directory, plan.rounds))


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
