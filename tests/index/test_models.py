"""The ORM models over a cache's index, as other programs use them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Boolean, Double, Integer, String, create_engine, delete, inspect, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.types import NullType

from cachedb import Cache
from cachedb.index import models, views
from cachedb.index.models import Blob, Image
from cachedb.index.tables import UtcTime
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


def test_images_have_names_in_python_and_in_sql(cache: Cache, directory: Path) -> None:
    made = make.image(1)
    make.save(cache, "app:1", made)
    cache.tag("app:1", f"app@{made.digest}")
    with read_only_session(directory) as session:
        names = {"app:1", f"app@{made.digest}"}
        assert (
            {image.name for image in session.scalars(select(Image))}
            == set(session.scalars(select(Image.name)))
            == names
        )
        image = session.scalars(select(Image).where(Image.name == "app:1")).one()
        assert [repr(image), repr(image.manifest)] == ["Image('app:1')", f"Blob('{made.digest}')"]
        assert [repr(platform) for platform in image.platforms] == ["ImagePlatform('linux/amd64')"]
        assert image.created_at == image.added_at


def test_every_view_has_a_class_with_its_columns_and_types(cache: Cache, directory: Path) -> None:
    old = {"image_usage": {"os", "architecture", "variant", "created_at"}}
    described = {view.name: {column.name: column.type for column in view.columns} for view in cache.list_views()}
    del described["image_ages"]  # an old name
    types = {Boolean: "INTEGER", Integer: "INTEGER", Double: "REAL", String: "TEXT", UtcTime: "TEXT"}
    mapped = {
        mapper.class_.__tablename__: {column.name: types[type(column.type)] for column in mapper.columns}
        for mapper in views.View.registry.mappers
    }
    assert mapped == {
        name: {column: kind for column, kind in columns.items() if column not in old.get(name, ())}
        for name, columns in described.items()
    }


def test_a_view_is_read_as_objects(cache: Cache, directory: Path) -> None:
    make.save(cache, "app:1", make.image(1))
    cache.add_hold("app:1")
    with read_only_session(directory) as session:
        for mapper in views.View.registry.mappers:
            session.scalars(select(mapper.class_)).all()
        (usage,) = session.scalars(select(views.ImageUsage).where(views.ImageUsage.unused_days < 1))
        assert (repr(usage), usage.complete, usage.added_at.utcoffset()) == ("ImageUsage('app:1')", True, timedelta())
        (platform,) = session.scalars(select(views.Platform))
        assert (platform.os, platform.architecture, platform.size) == ("linux", "amd64", usage.size)
        (hold,) = session.scalars(select(views.Hold))
        assert (hold.name, hold.size, hold.expires_at) == ("app:1", usage.size, None)


def test_the_url_of_the_documentation_cannot_write(cache: Cache, directory: Path) -> None:
    make.save(cache, "app:1", make.image(1))
    with read_only_session(directory) as session, pytest.raises(OperationalError, match="readonly"):
        session.execute(delete(Image))


@pytest.mark.skipif(
    sqlite3.sqlite_version_info < (3, 41), reason="SQLite before 3.41 reports no type of a CAST: use a newer Python"
)
def test_reflected_views_have_types(cache: Cache, directory: Path) -> None:
    engine = create_engine(URL.format(directory / "index.db"))
    found = {
        view.name: {c["name"]: c["type"] for c in inspect(engine).get_columns(view.name)} for view in cache.list_views()
    }
    engine.dispose()
    assert [
        (view, name) for view, columns in found.items() for name, kind in columns.items() if isinstance(kind, NullType)
    ] == []


@contextmanager
def read_only_session(directory: Path) -> Iterator[Session]:
    """Yield a session with the URL of the documentation."""
    assert URL.format("index.db") in (models.__doc__ or "")
    engine = create_engine(URL.format(directory / "index.db"))
    with Session(engine) as session:
        yield session
    engine.dispose()


URL = "sqlite:///file:{}?mode=ro&uri=true"
