"""Reports that sum bytes agree with a sum by brute force after any sequence of steps."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from cachedb import Cache
from tests.conftest import files_of
from tests.reports.test_named import run_report
from tests.reports.test_views import STEPS, Builder, Row, World, place, query_rows, spread_over_days

__all__ = ["place"]  # a fixture

EXAMPLES = int(os.environ.get("CACHEDB_FUZZ", "40"))


class Sums:
    """The sums of a cache, computed from its model."""

    def __init__(self, world: World) -> None:
        self.sets = {name: {part.digest for part in world.contents(name)} for name in world.entries}
        declared = {part.digest: part.size for name in world.entries for part in world.contents(name)}
        self.files, self.held = files_of(world.directory), world.held
        self.sizes = {**declared, **self.files}

    def union(self, names: set[str]) -> set[str]:
        return set().union(*(self.sets[name] for name in names))

    def size(self, digests: set[str]) -> int:
        return sum(self.sizes[digest] for digest in digests)

    def freed(self, names: set[str]) -> int:
        """Return the bytes that the removal of some images frees."""
        kept = self.union(self.sets.keys() - names) | self.held
        return self.size((self.union(names) & self.files.keys()) - kept)

    def to_free(self, order: list[str], size: int) -> list[tuple[str, int, int]]:
        """Return the shortest prefix of some images whose removal frees a size, with the sums of the report."""
        found: list[tuple[str, int, int]] = []
        total = 0
        for count, name in enumerate(order, 1):
            if total >= size:
                break
            before, total = total, self.freed(set(order[:count]))
            found.append((name, total - before, total))
        return found

    def usage_by(self, values: dict[str, str]) -> list[Row]:
        """Return the usage by the value of a label; values by name."""
        groups: dict[str | None, set[str]] = defaultdict(set)
        for name in self.sets:
            groups[values.get(name)].add(name)
        rows: list[Row] = []
        for value, names in groups.items():
            own, others = self.union(names), self.union(self.sets.keys() - names)
            stored = own & self.files.keys()
            rows.append(
                {
                    "value": value,
                    "images": len(names),
                    "blobs": len(own),
                    "size": self.size(own),
                    "missing_size": self.size(own - stored),
                    "unique_size": self.size(stored - others),
                    "shared_size": self.size(stored & others),
                    "freed_size": self.freed(names),
                }
            )
        return sorted(rows, key=lambda row: (row["value"] is None, -row["size"], row["value"] or ""))


def compare(world: World, cache: Cache) -> None:
    """Compare the reports with sums by brute force, and with dry runs of the cache."""
    sums = Sums(world)
    by_last_use = (
        "SELECT u.name, u.digest FROM images AS i JOIN image_usage AS u USING (repository, reference) "
        "ORDER BY i.last_used_at, i.id"
    )
    order = [row["name"] for row in query_rows(world.directory, by_last_use)]
    removable = [row["name"] for row in query_rows(world.directory, by_last_use) if row["digest"] not in sums.held]
    totals = [total for _, _, total in sums.to_free(removable, 1 << 60)]
    for size in {0, 1, *totals, *(total + 1 for total in totals)}:
        found = run_report(cache, "to-free", size=str(size))
        assert [(row["name"], row["freed_size"], row["total_freed_size"]) for row in found] == sums.to_free(
            removable, size
        )
    for chosen in (set(order), set(order[::2]), set(order[1:3])):
        (row,) = run_report(cache, "freed-by", names=" ".join(chosen))
        dry = cache.remove_manifest(*chosen, dry_run=True)
        assert row == {"blobs": dry.blobs, "size": sums.freed(chosen), "images": len(chosen)}
        assert dry.bytes == row["size"]
    labels = query_rows(world.directory, "SELECT * FROM labels")
    for key in ("version", "empty", "absent"):
        values = {row["name"]: row["value"] for row in labels if row["key"] == key}
        assert run_report(cache, "usage-by", key=key) == sums.usage_by(values)


@pytest.mark.slow
def test_sums_agree_with_brute_force(place: Path) -> None:
    @settings(max_examples=EXAMPLES, deadline=None)
    @given(STEPS)
    def compare_after_steps(steps: list[tuple[Any, ...]]) -> None:
        directory = Path(tempfile.mkdtemp(dir=place)) / "cache"
        shutil.copytree(place / "empty", directory)
        world = World(directory)
        with Cache.open(directory) as holder, ExitStack() as holds:
            with Cache.open(directory) as cache:
                builder = Builder(world, cache, holder, holds)
                for action, *arguments in steps:
                    getattr(builder, action)(*arguments)
            spread_over_days(directory)
            compare(world, holder)
        shutil.rmtree(directory.parent)

    compare_after_steps()
