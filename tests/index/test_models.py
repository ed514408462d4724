"""The ORM models over a cache's index, as other programs use them."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from cachedb import Cache
from cachedb.index.models import Blob, Image
from tests.support import make


def test_images_and_blobs_are_associated_many_to_many(cache: Cache, directory: Path) -> None:
    one, two = make.image(1, 2), make.image(1, 3)
    for name, made in (("one", one), ("two", two)):
        for digest, data in made.blobs.items():
            cache.save_blob(digest, data)
        cache.save_manifest(name, made.manifest)
    engine = create_engine(f"sqlite:///{directory / 'index.db'}")
    with Session(engine) as session:
        image = session.scalars(select(Image).where(Image.repository == "one")).one()
        assert image.manifest.digest == one.digest
        assert [a.blob.digest for a in image.associations] == list(one.blobs)
        assert [a.position for a in image.associations] == [0, 1, 2, 3]
        shared = session.scalars(select(Blob).where(Blob.digest == make.digest_of(one.layers[0]))).one()
        assert {a.image.repository for a in shared.associations} == {"one", "two"}
        assert shared.stored_at is not None
        assert shared.stored_at.utcoffset() is not None
    engine.dispose()
