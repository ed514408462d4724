"""The promises of the design, P1 to P6, as one check that every attack ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cachedb import Cache
from tests.conftest import files_of, snapshot, stored_rows
from tests.support.make import digest_of


def check(directory: Path) -> None:
    """Open the cache, as the next process does, and hold it to its promises."""
    with Cache.open(directory) as cache:
        files, rows = files_of(directory), stored_rows(directory)
        assert rows.items() <= files.items(), "P1: a stored row has its file, of the right size"
        for digest in files:
            data = (directory / "blobs" / digest.replace(":", "/")).read_bytes()
            assert digest_of(data, digest.partition(":")[0]) == digest, "P2: a file has the content its name says"
        for image in cache.list_manifests():
            if image.complete:
                blobs = cache.get_image_blobs(image.name)
                assert all(files.get(blob.digest) == blob.size for blob in blobs), "P3: a complete image is whole"
        cache.collect_garbage()
        assert files_of(directory) == stored_rows(directory), "P5: files are stored rows"
        left: dict[str, Any] = snapshot(directory)
        used, held = {row[2] for row in left["image_blobs"]}, {row[0] for row in left["leases"]}
        assert all(row[0] in used or row[1] in held for row in left["blobs"]), "P6: nothing unreferenced is left"
        assert {row[1] for row in left["leases"]} <= {row[0] for row in left["holds"]}, "dead sessions hold nothing"
        assert (left["trash"], set(left["ingest"]) - {"partial"}) == ([], set())
        assert set(left["locks"]) <= {"write.lock", "write.queue"}
        problems = cache.verify().problems
        assert problems == [], "and `verify` says so"
