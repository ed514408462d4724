"""Blobs are found by the first digits of their digests."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing

import pytest

from cachedb import BlobUse, Cache, InvalidDigest, InvalidName, Name, NotInCache
from cachedb.oci.digests import digest_of
from cachedb.oci.manifests import OCI_LAYER
from tests.conftest import Run
from tests.support import make

MADE = make.image(1, 2)
LAYER = digest_of(MADE.layers[0])


@pytest.fixture
def filled(cache: Cache) -> Cache:
    make.save(cache, "app:1", MADE)
    return cache


def add_missing_blob(cache: Cache, digest: str) -> None:
    with closing(sqlite3.connect(cache.directory / "index.db")) as index, index:
        index.execute("INSERT INTO blobs (digest, size) VALUES (?, 1)", (digest,))


@pytest.mark.parametrize("cut", [lambda digest: digest[:19], lambda digest: digest[7:19], lambda digest: digest[:70]])
def test_the_first_digits_of_a_digest_find_its_blob(filled: Cache, cut: Callable[[str], str]) -> None:
    text = cut(LAYER)
    assert filled.has_blob(text)
    assert filled.get_blob(text) == MADE.layers[0]
    assert filled.get_blob_size(text) == len(MADE.layers[0])
    assert filled.get_blob_path(text) == filled.get_blob_path(LAYER)
    assert filled.get_blob_details(text).digest == LAYER
    (hold,) = filled.add_hold(text)
    assert hold.name == LAYER
    assert filled.release_hold(text) == 1
    with filled.hold(text):
        filled.remove_manifest("app:1")
        assert filled.has_blob(text)


def test_a_digest_of_fewer_digits_is_invalid_and_an_unknown_one_is_not_in_the_cache(filled: Cache) -> None:
    with pytest.raises(InvalidDigest):
        filled.get_blob(LAYER[7:18])
    with pytest.raises(NotInCache, match="no digest in the cache starts with sha256:000000000000"):
        filled.get_blob("0" * 12)
    assert not filled.has_blob("0" * 12)
    with pytest.raises(NotInCache):
        filled.add_hold("0" * 12)


@pytest.mark.slow
def test_an_ambiguous_digest_is_refused_with_some_candidates(cachedb: Run, filled: Cache) -> None:
    others = [LAYER[:30] + digit * (len(LAYER) - 30) for digit in "0123456789" if digit != LAYER[30]]
    for other in others:
        add_missing_blob(filled, other)
    for call in (filled.get_blob, filled.has_blob, filled.add_hold, filled.release_hold, filled.get_blob_details):
        with pytest.raises(InvalidDigest, match=f"is ambiguous: give more digits of {others[0]}, {others[1]}, .*, ..."):
            call(LAYER[:30])
    for command in (["show"], ["exists"], ["blob", "path"], ["hold"]):
        assert cachedb(*command, LAYER[7:19]).returncode == 2
    assert filled.get_blob(LAYER[:31]) == MADE.layers[0]


@pytest.mark.parametrize(("count", "listed", "ends"), [(3, 3, ""), (4, 3, ", ...")])
def test_the_error_of_an_ambiguous_digest_lists_three_candidates(
    cache: Cache, count: int, listed: int, ends: str
) -> None:
    others = [LAYER[:30] + str(digit) * (len(LAYER) - 30) for digit in range(count)]
    for other in others:
        add_missing_blob(cache, other)
    with pytest.raises(InvalidDigest, match=f"give more digits of {', '.join(others[:listed])}{ends}$"):
        cache.has_blob(LAYER[:30])


def test_sha512_digests_have_their_algorithm_in_front(cache: Cache) -> None:
    digest = cache.add_blob(b"data", algorithm="sha512")
    assert cache.get_blob(digest[:20]) == b"data"
    assert not cache.has_blob(digest[7:19])


def test_an_image_whose_name_looks_like_a_digest_goes_before_a_short_digest(filled: Cache) -> None:
    name = LAYER[7:19]
    filled.tag("app:1", name)
    (hold,) = filled.add_hold(name)
    assert hold.name == f"{name}:latest"


def test_a_name_may_have_the_first_digits_of_a_digest(filled: Cache) -> None:
    make.save(filled, "other:1", make.image(5))
    filled.tag("app:1", f"app@{MADE.digest}")
    for text in (f"app@{MADE.digest[:19]}", f"app@{MADE.digest[7:19]}"):
        assert filled.get_image(text).name == f"app@{MADE.digest}"
        assert filled.get_details(text).image.digest == MADE.digest
        assert filled.get_manifest(text) == MADE.manifest
        assert [blob.digest for blob in filled.get_image_blobs(text)] == list(MADE.blobs)
        assert filled.is_image_complete(text)
        assert filled.list_names(text) == [f"app@{MADE.digest}"]
        assert filled.tag(text, "copy:1").digest == MADE.digest
        assert [hold.name for hold in filled.add_hold(text)] == [f"app@{MADE.digest}"]
        assert filled.release_hold(text) == 1
    assert filled.remove_manifest(f"app@{MADE.digest[:19]}").images == [f"app@{MADE.digest}"]
    assert filled.list_names() == ["app:1", "copy:1", "other:1"]
    with pytest.raises(NotInCache):
        filled.get_image(f"other@{MADE.digest[:19]}")
    with pytest.raises(InvalidName):
        filled.get_image(f"app@{MADE.digest[:18]}")


def test_a_short_digest_in_a_name_must_be_unique_in_its_repository(filled: Cache) -> None:
    make.save(filled, "app:2", make.image(3))
    other = MADE.digest[:30] + "0" * (len(MADE.digest) - 30)
    with closing(sqlite3.connect(filled.directory / "index.db")) as index, index:
        index.execute("UPDATE blobs SET digest = ? WHERE digest = ?", (other, filled.get_image("app:2").digest))
    with pytest.raises(InvalidDigest, match="is ambiguous"):
        filled.get_image(f"app@{MADE.digest[:19]}")


@pytest.mark.slow
def test_show_prints_any_blob_and_the_images_that_have_it(cachedb: Run, filled: Cache) -> None:
    filled.tag("app:1", "copy:1")
    uses = [BlobUse(Name.parse(name), "layer", OCI_LAYER, 2) for name in ("app:1", "copy:1")]
    found = filled.get_blob_details(LAYER)
    assert (found.uses, found.held, found.path) == (uses, False, filled.get_blob_path(LAYER))
    shown = json.loads(cachedb("show", LAYER[7:19], "--format", "json").stdout)
    assert list(shown) == ["digest", "size", "stored_at", "path", "held", "stored", "images"]
    assert [use["name"] for use in shown["images"]] == ["app:1", "copy:1"]
    assert (shown["digest"], shown["size"], shown["stored"]) == (LAYER, len(MADE.layers[0]), True)
    table = cachedb("show", LAYER).stdout
    assert table.splitlines()[1].startswith(LAYER)
    assert table.splitlines()[-1].split() == ["copy:1", "2", "layer", OCI_LAYER]
    assert cachedb("show", "-q", LAYER[:19]).stdout == f"{LAYER}\n"
    filled.add_hold(LAYER)
    assert filled.get_blob_details(LAYER).held


@pytest.mark.slow
def test_show_prints_a_blob_that_an_image_lacks_and_one_without_images(cachedb: Run, cache: Cache) -> None:
    cache.save_manifest("lacking:1", MADE.manifest)
    alone = cache.add_blob(b"alone")
    lacking = json.loads(cachedb("show", LAYER, "--format", "json").stdout)
    assert (lacking["stored"], lacking["stored_at"], lacking["path"]) == (False, None, None)
    assert "missing" in cachedb("show", LAYER).stdout
    assert json.loads(cachedb("show", alone, "--format", "json").stdout)["images"] == []
    assert cachedb("show", "0" * 64).returncode == 3
