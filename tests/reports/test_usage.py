"""The disk usage of a cache is exact to the byte."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from cachedb import Cache
from cachedb.reports import usage
from tests.conftest import Run
from tests.support import make
from tests.support.promises import check


def total_size(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fill(cache: Cache) -> None:
    """Save three images, of which half:1 is incomplete."""
    for name, image in (("app:1", make.image(1, 2)), ("app:2", make.image(1, 3)), ("half:1", make.image(4, 5))):
        for data in (image.config, *image.layers[: 1 if name == "half:1" else None]):
            cache.add_blob(data)
        cache.save_manifest(name, image.manifest)


def test_every_stored_byte_is_in_exactly_one_share(directory: Path) -> None:
    with Cache.open(directory) as cache:
        fill(cache)
        held = cache.add_blob(b"held by this process")
        (directory / "ingest" / "partial").mkdir()
        (directory / "ingest" / "partial" / held.replace(":", "-")).write_bytes(b"cut off")
        found = cache.get_usage()
        assert found.stored.size == total_size(directory / "blobs")
        assert found.stored.blobs == len(list((directory / "blobs").rglob("sha256/*")))
        shares = (found.unique, found.shared, found.held, found.reclaimable)
        assert sum(share.size for share in shares) == found.stored.size
        assert sum(share.blobs for share in shares) == found.stored.blobs
        assert (found.images, found.incomplete) == (3, 1)
        assert found.shared == (1, len(make.image(1).layers[0]))
        assert found.saved_size == found.shared.size
        assert found.held == (1, cache.get_blob_size(held))
        assert found.folder_sizes["ingest"] == total_size(directory / "ingest")
        assert found.index_size >= (directory / "index.db").stat().st_size
    with Cache.open(directory) as cache:
        found = cache.get_usage()
        assert (found.held.blobs, found.reclaimable.blobs) == (0, 1)
        assert found.reclaimable == tuple(cache.collect_garbage())
        assert cache.get_usage().reclaimable.blobs == 0
    check(directory)


def test_every_file_of_a_cache_is_counted(directory: Path) -> None:
    with Cache.open(directory) as cache:
        fill(cache)
        cache.add_blob(b"unreferenced")
        (directory / "quarantine").mkdir()
        (directory / "quarantine" / "x").write_bytes(b"damaged")
        found = cache.get_usage()
        others = found.index_size + sum(found.folder_sizes.values()) + found.reserve_size
        assert found.stored.size + others == total_size(directory)


def test_an_empty_cache_uses_no_space(directory: Path) -> None:
    with Cache.open(directory) as cache:
        assert cache.get_usage()[:8] == (0, 0, (0, 0), (0, 0), (0, 0), (0, 0), (0, 0), 0)


def test_used_blobs_are_counted_without_sorting(directory: Path) -> None:
    with Cache.open(directory) as cache:
        fill(cache)
    with closing(sqlite3.connect(directory / "index.db")) as shell:
        plan = [row[3] for row in shell.execute(f"EXPLAIN QUERY PLAN {usage._USED_QUERY}")]
    assert "SCAN image_blobs USING COVERING INDEX ix_image_blobs_blob_id" in plan
    assert "USE TEMP B-TREE FOR GROUP BY" not in plan


def test_df_prints_the_totals_and_with_v_the_images(cachedb: Run, directory: Path) -> None:
    with Cache.open(directory) as cache:
        fill(cache)
        usage_of_cache = cache.get_usage()
    printed = cachedb("df").stdout
    assert "images                3\n  incomplete          1\n" in printed
    assert "app:2" not in printed
    heading, *images = cachedb("df", "-v").stdout.splitlines()[-4:]
    assert heading.split() == ["NAME", "SIZE", "UNIQUE", "SHARED", "FREED", "STATE", "LAST", "USED"]
    assert {line.split()[0] for line in images} == {"app:1", "app:2", "half:1"}
    assert {" ".join(line.split()[-3:]) for line in images} == {"complete just now", "incomplete just now"}
    found = json.loads(cachedb("df", "-v", "--format", "json").stdout)
    assert (found["stored"], found["shared"]) == (usage_of_cache.stored._asdict(), usage_of_cache.shared._asdict())
    assert {row["name"] for row in found["image_usage"]} == {"app:1", "app:2", "half:1"}
    assert "image_usage" not in json.loads(cachedb("df", "--format", "json").stdout)
