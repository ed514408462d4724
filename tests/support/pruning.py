"""Caches to prune: images that were used long ago, images that share layers, rows without files."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from hypothesis import strategies as st

from cachedb import Cache, Plan, Policy, Remove
from cachedb.oci.manifests import OCI_LAYER, OCI_MANIFEST
from tests.conftest import files_of, stored_rows
from tests.support import make
from tests.support.ages import age

ALL = Policy(remove=(Remove(names=("*",)),))
"""A policy that removes all images that nothing keeps."""

Image = tuple[list[int], str]
"""The seeds of an image's layers, and its kind: `fill` says what the kinds are."""

IMAGES = st.lists(
    st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(["plain", "plain", "alias", "half", "index"])),
    max_size=6,
)


def save_old(cache: Cache, *names: str) -> None:
    """Save images that share no layer; the first was used last, all of them days ago."""
    for number, name in enumerate(names):
        make.save(cache, name, make.image(100 + number))
        age(cache, "last_used_at", name, days=2 + number)


def fill(cache: Cache, images: list[Image]) -> list[str]:
    """Save images that share layers, and return their names.

    An "alias" is a second name of the first image, a "half" has no layers, an "index" has two platforms.
    """
    names = []
    for number, (seeds, kind) in enumerate(images):
        names.append(name := f"app-{number % 2}:{number}")
        if kind == "alias" and len(names) > 1:
            cache.tag(names[0], name)
        elif kind == "half":
            cache.save_manifest(name, make.image(*seeds).manifest)
        elif kind == "index":
            make.save_index(cache, name, make.image(*seeds), make.image(*seeds[:1], 9, architecture="arm64"))
        else:
            make.save(cache, name, make.image(*seeds))
        age(cache, "last_used_at", name, days=1, seconds=number * 7 % 5)
    return names


def write_rows(directory: Path, images: list[list[int]], sizes: list[int], leased: set[int]) -> None:
    """Replace the rows of an index: images with some blobs, the least recently used first."""
    stored_at = "2026-01-01T00:00:00.000000Z"
    times = [f"2026-01-01T00:00:{number:02}.000000Z" for number in range(len(images))]
    with closing(sqlite3.connect(directory / "index.db")) as shell, shell:
        for table in ("leases", "lasting_holds", "image_blobs", "images", "blobs"):
            shell.execute(f"DELETE FROM {table}")
        shell.executemany(
            "INSERT INTO blobs (id, digest, size, stored_at) VALUES (?, ?, ?, ?)",
            # A blob of size 3 is not stored.
            [(row, f"sha256:{row:064x}", size, None if size == 3 else stored_at) for row, size in enumerate(sizes, 1)],
        )
        for number, blobs in enumerate(images):
            manifest = 1000 + number
            shell.execute("INSERT INTO blobs VALUES (?, ?, 1, ?)", (manifest, f"sha256:{manifest:064x}", stored_at))
            shell.execute(
                "INSERT INTO images (id, repository, reference, manifest_id, media_type, added_at, last_used_at) "
                "VALUES (?, 'app', ?, ?, ?, ?, ?)",
                (number, str(number), manifest, OCI_MANIFEST, times[number], times[number]),
            )
            rows = [(manifest, "manifest"), *((blob + 1, "layer") for blob in blobs)]
            shell.executemany(
                "INSERT INTO image_blobs (image_id, position, blob_id, role, media_type) VALUES (?, ?, ?, ?, ?)",
                [(number, place, blob, role, OCI_LAYER) for place, (blob, role) in enumerate(rows)],
            )
        shell.execute("INSERT INTO lasting_holds VALUES ('hold-000000000000', 'x', ?, NULL)", (stored_at,))
        shell.executemany(
            "INSERT INTO leases VALUES (?, 'hold-000000000000', 0)", [(f"sha256:{blob + 1:064x}",) for blob in leased]
        )


def names_of(plan: Plan) -> list[str]:
    """Return the names of the images of a plan, in the order of removal."""
    return [str(image.name) for image in plan.images]


def check_whole(cache: Cache) -> None:
    """Assert that all images are complete, and that files and rows agree."""
    files = files_of(cache.directory)
    assert files == stored_rows(cache.directory)
    for image in cache.list_manifests():
        assert image.complete
        assert {blob.digest for blob in cache.get_image_blobs(image.name)} <= files.keys()
