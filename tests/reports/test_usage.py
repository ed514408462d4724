"""The disk usage of a cache is exact to the byte."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from cachedb import Cache
from cachedb.reports import usage
from tests.conftest import Run
from tests.support import make
from tests.support.promises import check


def total_size(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure_with_du(directory: Path) -> int:
    """Return the bytes of the files of a cache, as du sums them; du also counts folders, if it may."""
    files = b"\0".join(os.fsencode(path) for path in directory.rglob("*") if path.is_file())
    command = ["du", "--apparent-size", "--block-size=1", "--total", "--files0-from=-"]
    done = subprocess.run(command, input=files, stdout=subprocess.PIPE, check=True)
    return int(done.stdout.splitlines()[-1].split()[0])


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
        assert found.file_sizes["partial downloads"] == len(b"cut off")
        assert found.file_sizes["index"] >= (directory / "index.db").stat().st_size
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
        cache.set_policy("[limits]\n")
        for path in ("quarantine/x", "backups/x", "trash/x", f"trash/sha256-{'0' * 64}", "ingest/partial/x", "x"):
            (directory / path).parent.mkdir(exist_ok=True)
            (directory / path).write_bytes(path.encode())
        found = cache.get_usage()
        assert found.used_size == found.stored.size + sum(found.file_sizes.values()) == measure_with_du(directory)


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


@pytest.mark.slow
def test_df_and_a_plan_have_the_same_lines_for_files(cachedb: Run, directory: Path) -> None:
    with Cache.open(directory) as cache:
        fill(cache)
        for number, path in enumerate(["quarantine/x", "backups/x", "trash/x", "ingest/partial/x"], 1):
            (directory / path).parent.mkdir(exist_ok=True)
            (directory / path).write_bytes(b"x" * 100 * number)
    (directory / "trash" / f"sha256-{'0' * 64}").write_bytes(b"x" * 500)
    with Cache.open(directory):  # the first process that opens the cache empties the trash
        old = directory / "ingest" / "partial" / f"sha256-{'0' * 64}"
        old.write_bytes(b"x" * 600)
        os.utime(old, (0, 0))
        kept = {"partial downloads": 400, "quarantine": 100, "backups": 200, "other files": 300}
        rows = dict(re.findall(r"^(\w[\w ]*?) +(\d+) B$", cachedb("df").stdout, re.MULTILINE))
        assert rows.items() >= {name: str(size) for name, size in kept.items()}.items()
        assert rows["old partial downloads"] == "600"
        document = json.loads(cachedb("df", "--format", "json").stdout)
        assert document["file_sizes"].items() >= {**kept, "old partial downloads": 600}.items()
        assert document["used_size"] == measure_with_du(directory)
        done = cachedb("prune", "--to-free", "1TB", "--dry-run")
        freed, kept_table, summary = done.stdout.split("\n\n")
        assert freed.splitlines() == ["FREED FIRST             SIZE", "old partial downloads  600 B"]
        heading, *lines = kept_table.splitlines()
        assert heading.split() == ["KEPT", "SIZE"]
        assert {" ".join(line.split()) for line in lines} >= {f"{name} {size} B" for name, size in kept.items()}
        assert summary == "would prune 0 images, 600 B\n"
        for name, size in kept.items():
            assert f"{size} B {name}" in done.stderr
        plan = json.loads(cachedb("prune", "--to-free", "1TB", "--dry-run", "--format", "json").stdout)
        assert plan["kept_sizes"].items() >= kept.items()
        assert plan["garbage_sizes"] == {"reclaimable": 0, "old partial downloads": 600, "trash": 0}
        assert plan["garbage_size"] == 600


@pytest.mark.slow
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
