"""Check the promises P1, P2, P3, P5 and P6 of the design; many attacks end with this check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cachedb import Cache
from cachedb.disk.layout import lock_kind
from tests.conftest import files_of, snapshot, stored_rows
from tests.support.make import digest_of


def check(directory: Path) -> None:
    """Open the cache, as the next process would, and assert that its promises hold."""
    with Cache.open(directory) as cache:
        check_opened(cache)


def check_opened(cache: Cache) -> None:
    """Assert that the promises of an opened cache hold; no other process may have it open."""
    directory = cache.directory
    files, rows = files_of(directory), stored_rows(directory)
    assert rows.items() <= files.items(), "P1: every stored row has its file, of the right size"
    for digest in files:
        data = (directory / "blobs" / digest.replace(":", "/")).read_bytes()
        assert digest_of(data, digest.partition(":")[0]) == digest, "P2: the content of a file matches its digest"
    for image in cache.list_manifests():
        if image.complete:
            blobs = cache.get_image_blobs(image.name)
            assert all(files.get(blob.digest) == blob.size for blob in blobs), "P3: complete images have all files"
    cache.collect_garbage()
    assert files_of(directory) == stored_rows(directory), "P5: the files are exactly those of the stored rows"
    left: dict[str, Any] = snapshot(directory)
    used, leased = {row[2] for row in left["image_blobs"]}, {row[0] for row in left["leases"]}
    assert all(row[0] in used or row[1] in leased for row in left["blobs"]), "P6: no unreferenced blob is left"
    assert {row[1] for row in left["leases"]} <= {row[0] for row in left["lasting_holds"]}, "only holds have leases"
    assert (left["trash"], set(left["ingest"]) - {"partial"}) == ([], set())
    kept = {name for name in left["locks"] if lock_kind(name) != "failure"}
    assert kept <= {"write.lock", "write.queue"}
    problems = cache.verify().problems
    assert problems == [], "`verify` finds no problem"
