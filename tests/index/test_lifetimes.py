"""Pins belong to names; each save of a name decides anew when it expires."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cachedb import Cache, CacheError, Filters, NotInCache
from cachedb.operations import upgrade
from tests.operations.test_upgrade import unpack_frozen_cache
from tests.support import make
from tests.support.promises import check


def save(cache: Cache, ttl: float | None) -> object:
    made = make.image(1)
    for digest, data in made.blobs.items():
        cache.save_blob(digest, data)
    return cache.save_manifest("app:1", made.manifest, ttl=ttl)


def import_archive(cache: Cache, ttl: float | None) -> object:
    (image,) = cache.cache_from_tar(io.BytesIO(make.tar_of(make.docker_files({"app:1": make.image(1)}))), ttl=ttl)
    return image


def read_expiry(cache: Cache, name: str = "app:1") -> datetime | None:
    return cache.get_image(name).expires_at


# Lifetimes


@pytest.mark.parametrize("store", [save, import_archive])
def test_each_save_of_a_name_decides_anew_when_it_expires(
    cache: Cache, store: Callable[[Cache, float | None], object]
) -> None:
    before = datetime.now(UTC)
    store(cache, 3600)
    first = read_expiry(cache)
    assert first is not None
    assert before + timedelta(hours=1) <= first <= datetime.now(UTC) + timedelta(hours=1)
    store(cache, 60)
    second = read_expiry(cache)
    assert second is not None
    assert second < first
    store(cache, None)
    assert read_expiry(cache) is None
    assert store(cache, 0.5) == cache.get_image("app:1")


def test_a_tag_does_not_copy_the_lifetime_and_ends_that_of_its_target(cache: Cache) -> None:
    save(cache, 3600)
    cache.tag("app:1", "app:2")
    assert read_expiry(cache, "app:2") is None
    assert read_expiry(cache) is not None
    cache.tag("app:2", "app:1")
    assert read_expiry(cache) is None


@pytest.mark.parametrize("ttl", [0, -1, float("inf"), float("nan"), 1e300, 4e9])
def test_a_lifetime_without_a_meaning_is_refused_before_anything_is_saved(cache: Cache, ttl: float) -> None:
    for store in (save, import_archive):
        with pytest.raises(CacheError, match="give seconds"):
            store(cache, ttl)
    with pytest.raises(CacheError, match="give seconds"):
        cache.pull("localhost:1/app:1", ttl=ttl)
    with pytest.raises(CacheError, match="give seconds"):
        cache.adopt("nowhere", ttl=ttl)
    assert cache.list_names() == []


@pytest.mark.parametrize("ttl", ["6h", True, timedelta(1)])
def test_a_lifetime_is_a_number(cache: Cache, ttl: float) -> None:
    with pytest.raises(TypeError, match="ttl is of type"):
        cache.cache_from_tar(io.BytesIO(b""), ttl=ttl)


# Pins


def test_a_pin_belongs_to_the_name_and_stays_when_the_name_moves(cache: Cache) -> None:
    save(cache, None)
    cache.tag("app:1", "app:2")
    assert cache.pin("app:1") == ["app:1"]
    make.save(cache, "app:1", make.image(2))
    import_archive(cache, 3600)
    cache.tag("app:2", "app:1")
    assert {str(image.name): image.pinned for image in cache.list_manifests()} == {"app:1": True, "app:2": False}
    assert cache.get_details("app:1").image.pinned


def test_removing_a_name_removes_its_pin(cache: Cache) -> None:
    save(cache, None)
    cache.pin("app:1")
    cache.remove_manifest("app:1")
    save(cache, None)
    assert not cache.get_image("app:1").pinned


def test_a_name_may_be_pinned_and_unpinned_twice(cache: Cache) -> None:
    save(cache, None)
    cache.pin("app:1")
    with cache.sql("SELECT pinned_at FROM images") as first:
        since = list(first.rows)
    assert cache.pin("app:1") == ["app:1"]
    with cache.sql("SELECT pinned_at FROM images") as second:
        assert list(second.rows) == since
    for _ in range(2):
        assert cache.unpin("app:1") == ["app:1"]
        assert not cache.get_image("app:1").pinned


def test_names_patterns_and_filters_are_pinned_all_or_none(cache: Cache) -> None:
    for name in ("app:1", "app:2", "team/app:1"):
        make.save(cache, name, make.image(1))
    for change in (cache.pin, cache.unpin):
        with pytest.raises(NotInCache):
            change("app:1", "nope:1")
        with pytest.raises(NotInCache):
            change("app:1", "nope*")
        assert change() == []
    assert cache.pin("app:*", "nope:1", ignore_missing=True) == ["app:1", "app:2"]
    assert cache.unpin(filters=Filters(incomplete=False, limit=1)) == ["app:1"]
    assert [str(image.name) for image in cache.list_manifests() if image.pinned] == ["app:2"]


def test_a_pin_of_a_digest_does_not_pin_a_tag(cache: Cache) -> None:
    save(cache, None)
    with pytest.raises(NotInCache):
        cache.pin(f"app@{make.image(1).digest}")


# The schema


@pytest.mark.slow
def test_an_upgrade_adds_pins_and_lifetimes_and_a_downgrade_keeps_the_images(tmp_path: Path) -> None:
    directory = unpack_frozen_cache("0006", tmp_path / "cache")
    upgrade.upgrade(directory)
    with closing(sqlite3.connect(directory / "index.db")) as shell:
        assert shell.execute("PRAGMA user_version").fetchone() == (7,), "an older release would open the cache"
    with Cache.open(directory) as cache:
        before = cache.list_manifests()
        assert {(image.pinned, image.expires_at) for image in before} == {(False, None)}
        cache.pin("hello:1")
        cache.save_manifest("frozen:2", cache.get_manifest("frozen:2"), ttl=3600)
        with cache.sql("SELECT name FROM image_usage WHERE pinned OR expires_at IS NOT NULL") as found:
            assert sorted(found.rows) == [("frozen:2",), ("hello:1",)]
    upgrade.downgrade(directory, "0006")
    upgrade.upgrade(directory)
    with Cache.open(directory) as cache:
        after = cache.list_manifests()
    assert [image._replace(last_used_at=image.added_at) for image in after] == [
        image._replace(last_used_at=image.added_at) for image in before
    ]
    check(directory)


def test_the_cache_of_the_release_that_brought_pins_has_them(tmp_path: Path) -> None:
    with Cache.open(unpack_frozen_cache("0007", tmp_path / "cache"), upgrade=True) as cache:
        assert {str(image.name) for image in cache.list_manifests() if image.pinned} == {
            "hello:1", "team/frozen:stable"
        }  # fmt: skip
        assert [str(image.name) for image in cache.list_manifests() if image.expires_at] == [
            "docker.io/library/docker:2"
        ]  # fmt: skip
