"""Filters select images by name, pattern and property, in the transaction that uses them."""

from __future__ import annotations

import json
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Pool, event

from cachedb import Cache, Filters, InvalidDigest, InvalidName, InvalidQuery, Name, NotInCache
from cachedb.index.filters import parse_filters
from tests.conftest import Run
from tests.support import make
from tests.support.ages import age, set_time
from tests.support.make import full_config, image_of

NAMES = ["app:1", "app:2", "localhost:5000/team/app:1", "team/app:1", "team/db:2", "team/sub/x:latest"]


def fill(cache: Cache, names: list[str] = NAMES) -> None:
    for number, name in enumerate(names):
        make.save(cache, name, make.image(1, 10 + number))


def select(cache: Cache, *texts: str, sort: str | None = None, limit: int | None = None) -> list[Name]:
    filters = parse_filters(texts, sort=sort, limit=limit)
    found = cache.list_names(filters=filters)
    assert [image.name for image in cache.list_manifests(filters=filters)] == found
    return found


# Patterns


def test_a_text_without_wildcards_is_one_name_with_the_default_tag(cache: Cache) -> None:
    fill(cache, ["app:latest", "app:1", "apple:latest"])
    assert cache.list_names("app") == ["app:latest"]
    assert cache.list_names("app", "appl*", "app:1") == ["app:1", "app:latest", "apple:latest"]
    with pytest.raises(InvalidName):
        cache.list_names("app:")


@pytest.mark.parametrize("text", ["nope*", "nope", "team/app", "app@sha256:" + "0" * 64])
def test_a_name_or_pattern_that_matches_nothing_is_an_error_unless_it_may_be_missing(cache: Cache, text: str) -> None:
    fill(cache)
    for call in (cache.list_names, cache.list_manifests, cache.remove_manifest, cache.add_hold):
        with pytest.raises(NotInCache) as caught:
            call("app:1", text)
        assert caught.value.name in (text, f"{text}:latest")
    assert cache.list_names("app:1", text, ignore_missing=True) == ["app:1"]
    assert cache.list_names() == NAMES
    assert cache.list_holds() == []


@pytest.mark.slow
def test_too_many_patterns_are_refused_before_sqlite_fails(cache: Cache) -> None:
    fill(cache)
    assert cache.list_names(*["app:*"] * 500) == ["app:1", "app:2"]
    with pytest.raises(InvalidQuery, match="give at most 500"):
        cache.list_names(*["app:*"] * 501)


def test_any_number_of_names_can_be_given_with_filters(directory: Path) -> None:
    def lower_limit(connection: sqlite3.Connection, _record: object) -> None:
        connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 100)  # instead of 32,766

    event.listen(Pool, "connect", lower_limit)
    try:
        with Cache.open(directory) as cache:
            fill(cache)
            names = [*NAMES * 50, *(f"other:{number}" for number in range(300))]
            assert cache.list_names(*names, filters=Filters(incomplete=False), ignore_missing=True) == NAMES
    finally:
        event.remove(Pool, "connect", lower_limit)


# Filters


def test_labels_are_matched_by_key_or_by_value_and_all_of_them_must_match(cache: Cache) -> None:
    for name, labels in {"a:1": {"team": "web", "env": "ci"}, "b:1": {"team": "db"}, "c:1": {}}.items():
        make.save(cache, name, image_of(full_config(1, config={"Labels": labels}), 1))
    assert select(cache, "label=team") == ["a:1", "b:1"]
    assert select(cache, "label=team=web") == ["a:1"]
    assert select(cache, "label=team=web", "label=env=ci") == ["a:1"]
    assert select(cache, "label=team=web", "label=team=db") == []
    assert select(cache, "label=team=") == []


def test_unused_for_and_added_before_compare_ages(cache: Cache) -> None:
    fill(cache, ["a:1", "b:1"])
    age(cache, "last_used_at", "a:1", days=8)
    age(cache, "added_at", "b:1", days=4)
    assert select(cache, "unused-for=7d") == ["a:1"]
    assert select(cache, "unused-for=9d") == []
    assert select(cache, "unused-for=99999999w") == []
    assert select(cache, "added-before=2d") == ["b:1"]
    assert select(cache, "added-before=5d") == []
    day_before = (datetime.now(UTC) - timedelta(days=2)).date()
    assert select(cache, f"added-before={day_before}") == ["b:1"]
    assert select(cache, f"added-before={day_before}T00:00:00+14:00") == ["b:1"]
    assert select(cache, "added-before=2000-01-01") == []
    assert cache.list_names(filters=Filters(added_before=datetime(2100, 1, 1))) == ["a:1", "b:1"]


def test_incomplete_selects_images_that_lack_a_blob(cache: Cache) -> None:
    fill(cache, ["a:1"])
    cache.save_manifest("b:1", make.image(7).manifest)
    assert select(cache, "incomplete") == select(cache, "incomplete=true") == ["b:1"]
    assert select(cache, "incomplete=false") == ["a:1"]


def test_pinned_and_expired_select_by_pin_and_by_lifetime(cache: Cache) -> None:
    fill(cache, ["ended:1", "lasting:1", "pinned:1"])
    cache.pin("pinned:1")
    age(cache, "expires_at", "ended:1", seconds=1)
    age(cache, "expires_at", "lasting:1", hours=-1)
    assert select(cache, "pinned") == ["pinned:1"]
    assert select(cache, "pinned=false") == ["ended:1", "lasting:1"]
    assert select(cache, "expired") == select(cache, "expired=true", "pinned=false") == ["ended:1"]
    assert select(cache, "expired=false") == ["lasting:1", "pinned:1"]


def test_a_digest_or_its_first_digits_select_the_images_with_this_manifest(cache: Cache) -> None:
    fill(cache, ["a:1", "b:1"])
    cache.tag("a:1", "c:1")
    digest = cache.get_image("a:1").digest
    for text in (digest, digest[:19], digest[7:19], digest[7:]):
        assert select(cache, f"digest={text}") == ["a:1", "c:1"]
    assert select(cache, "digest=" + "0" * 12) == []
    with pytest.raises(InvalidDigest):
        select(cache, f"digest={digest[:18]}")


def test_a_base_selects_all_images_whose_first_layers_are_all_of_its_layers(cache: Cache) -> None:
    contents = {
        "base:1": (1, 2), "middle:1": (1, 2, 3), "top:1": (1, 2, 3, 4), "twice:1": (1, 2, 2), "swapped:1": (2, 1, 3),
        "part:1": (1, 3, 2), "inner:1": (9, 1, 2), "empty:1": (),
    }  # fmt: skip
    for name, seeds in contents.items():
        make.save(cache, name, make.image(*seeds))
    make.save_index(cache, "multi:1", make.image(1, 2), make.image(1, 2, 3, architecture="arm64"))
    cache.tag("base:1", "same:1")
    assert select(cache, "base=base:1") == select(cache, "base=same:1") == ["middle:1", "top:1", "twice:1"]
    assert select(cache, "base=middle:1") == ["top:1"]
    assert select(cache, "base=empty:1") == select(cache, "base=multi:1") == []
    with pytest.raises(NotInCache):
        select(cache, "base=nope:1")


def test_the_bases_agree_with_the_view_of_nearest_bases(cache: Cache) -> None:
    for number, seeds in enumerate([(1,), (1, 2), (1, 2, 3), (2,), (2, 1), (4, 4), (4, 4, 4), (4, 5, 4), (1, 2, 5)]):
        make.save(cache, f"x:{number}", make.image(*seeds))
    with cache.sql("SELECT name, base FROM image_bases") as answer:
        nearest = dict(answer.rows)
    assert nearest
    for name, base in nearest.items():
        assert name in select(cache, f"base={base}")
    found = {name for base in cache.list_names() for name in select(cache, f"base={base}")}
    assert found == set(nearest)


def test_a_platform_is_matched_as_everywhere_and_all_of_them_must_be_there(cache: Cache) -> None:
    make.save(cache, "intel:1", make.image(1))
    make.save(cache, "arm:1", make.image(1, architecture="arm64"))
    make.save_index(cache, "both:1", make.image(2), make.image(2, architecture="arm64"))
    for text in ("amd64", "linux/amd64", "x86_64", "linux/amd64/v2"):
        assert select(cache, f"platform={text}") == ["both:1", "intel:1"]
    assert select(cache, "platform=linux/arm64/v8") == ["arm:1", "both:1"]
    assert select(cache, "platform=amd64", "platform=arm64") == ["both:1"]
    assert select(cache, "platform=windows/amd64") == select(cache, "platform=s390x") == []


def test_filters_and_names_must_all_match(cache: Cache) -> None:
    fill(cache)
    age(cache, "last_used_at", "app:1", days=8)
    age(cache, "last_used_at", "team/app:1", days=8)
    unused = Filters(unused_for=7 * 86_400)
    assert cache.list_names("team/*", "app:2", filters=unused) == ["team/app:1"]
    assert cache.list_names("app:2", filters=unused) == []


@pytest.mark.parametrize(
    ("sort", "names"),
    [
        (None, ["a:1", "b:1", "c:1"]), ("name", ["a:1", "b:1", "c:1"]), ("-name", ["c:1", "b:1", "a:1"]),
        ("size", ["b:1", "c:1", "a:1"]), ("-size", ["a:1", "c:1", "b:1"]), ("added", ["c:1", "a:1", "b:1"]),
        ("-used", ["c:1", "a:1", "b:1"]), ("created", ["b:1", "a:1", "c:1"]), ("-created", ["a:1", "b:1", "c:1"]),
    ],
)  # fmt: skip
def test_images_are_sorted_and_limited(cache: Cache, sort: str | None, names: list[str]) -> None:
    for name, seeds in {"a:1": (1, 2, 3), "b:1": (1,), "c:1": (1, 2)}.items():
        make.save(cache, name, make.image(*seeds))
    age(cache, "added_at", "c:1", days=1)
    age(cache, "last_used_at", "b:1", days=2)
    age(cache, "last_used_at", "a:1", days=1)
    age(cache, "created", "b:1", days=9)
    age(cache, "created", "a:1", days=8)
    set_time(cache, "created", "c:1", None)
    for limit in (None, 0, 1, 2):
        assert select(cache, sort=sort, limit=limit) == names[:limit]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["size=1"], "is not a filter: use one of label, platform, unused-for"), (["label="], "label has no value"),
        (["label==web"], "'=web' has no key: write it as in team=web"),
        (["unused-for=7"], "is not a duration"), (["added-before=yesterday"], "is not a time"),
        (["incomplete=maybe"], "incomplete=false"), (["digest=" + "0" * 12] * 2, "digest is given twice"),
    ],
)  # fmt: skip
def test_an_invalid_filter_is_refused_with_a_hint(texts: list[str], message: str) -> None:
    with pytest.raises(InvalidQuery, match=message):
        parse_filters(texts)


def test_an_unknown_order_is_refused(cache: Cache) -> None:
    with pytest.raises(InvalidQuery, match="use one of name, size, created, added, used"):
        select(cache, sort="weight")


# Removing


def test_an_empty_selection_removes_nothing(cache: Cache) -> None:
    fill(cache)
    assert cache.remove_manifest().images == []
    assert cache.remove_manifest(filters=Filters(limit=3, sort="used")).images == []
    assert cache.remove_manifest(filters=Filters(unused_for=86_400)).images == []
    assert cache.remove_manifest("nope", ignore_missing=True).images == []
    assert cache.add_hold(filters=Filters()) == []
    assert cache.list_names() == NAMES


def test_what_is_removed_is_what_matched(cache: Cache) -> None:
    fill(cache)
    would = cache.remove_manifest("team/*", dry_run=True)
    assert cache.list_names() == NAMES
    freed = cache.remove_manifest("team/*")
    assert (freed, freed.images) == (would, would.images)
    assert freed.images == ["team/app:1", "team/db:2", "team/sub/x:latest"]
    assert cache.list_names() == ["app:1", "app:2", "localhost:5000/team/app:1"]
    assert cache.remove_manifest("*").images == ["app:1", "app:2", "localhost:5000/team/app:1"]


def test_an_image_that_is_used_before_the_lock_is_held_is_not_removed(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cache, ["a:1", "b:1"])
    for name in ("a:1", "b:1"):
        age(cache, "last_used_at", name, days=8)
    write = cache._database.write

    def use_then_write() -> Any:
        monkeypatch.undo()
        with Cache.open(cache.directory) as other, other.hold("a:1"):
            pass
        return write()

    monkeypatch.setattr(cache._database, "write", use_then_write)
    assert cache.remove_manifest(filters=Filters(unused_for=7 * 86_400)).images == ["b:1"]
    assert cache.list_names() == ["a:1"]


def test_an_image_that_this_process_has_just_read_counts_as_used(cache: Cache) -> None:
    fill(cache, ["a:1", "b:1"])
    for name in ("a:1", "b:1"):
        age(cache, "last_used_at", name, days=8)
    cache.get_manifest("a:1")
    assert cache.remove_manifest(filters=Filters(unused_for=7 * 86_400)).images == ["b:1"]


def test_removing_by_digest_never_removes_a_tag(cache: Cache) -> None:
    fill(cache, ["app:1"])
    digest = cache.get_image("app:1").digest
    with pytest.raises(NotInCache):
        cache.remove_manifest(f"app@{digest}")
    assert cache.list_names("app@" + digest) == ["app@" + digest]


# Other operations


def test_images_that_match_are_held_together(cache: Cache) -> None:
    fill(cache)
    assert sorted(hold.name for hold in cache.add_hold("team/*", "app:1")) == [
        "app:1", "team/app:1", "team/db:2", "team/sub/x:latest",
    ]  # fmt: skip
    held = cache.add_hold(filters=Filters(incomplete=False, sort="-name", limit=1))
    assert [hold.name for hold in held] == ["team/sub/x:latest"]
    with cache.hold("team/*"):
        cache.remove_manifest("team/*")
        assert cache.collect_garbage().blobs == 0


def test_the_usage_of_some_images_counts_each_blob_once(cache: Cache) -> None:
    fill(cache)
    found = cache.get_selected_usage("team/*")
    assert found.images == len(found.image_usage) == 3
    assert found.freed.size == cache.remove_manifest("team/*", dry_run=True).bytes
    assert found.stored.size == found.unique.size + found.shared.size
    assert (found.stored.blobs, found.shared.blobs) == (3 * 3 + 1, 1)
    everything = cache.get_selected_usage()
    assert everything.stored == everything.unique == cache.get_usage().stored
    with cache.hold("team/app:1"):
        assert cache.get_selected_usage("team/*").freed.blobs == 2 * 3
    assert cache.get_selected_usage("nope", ignore_missing=True).stored == (0, 0)
    by_name = cache.get_selected_usage(filters=Filters(sort="-name")).image_usage
    assert [image.name for image in by_name] == NAMES[::-1]


# Commands


@pytest.mark.slow
def test_commands_with_patterns_exit_as_documented(cachedb: Run, cache: Cache) -> None:
    fill(cache)
    assert cachedb("ls", "-q", "team/*", "app:2").stdout.split() == ["app:2", *NAMES[3:]]
    assert (cachedb("ls", "-q", "nope").returncode, cachedb("ls", "-q", "nope*").stdout) == (0, "")
    assert cachedb("rm").returncode == 2
    assert cachedb("rm", "--limit", "3").returncode == 2
    assert cachedb("ls", "--filter", "foo=1").returncode == 2
    assert "use one of label, platform" in cachedb("ls", "--filter", "foo=1").stderr
    for command in (["rm", "nope*"], ["hold", "nope*"], ["tag", "nope*", "x*"], ["df", "nope*"]):
        assert cachedb(*command).returncode == 3, command
    for command in (["rm", "nope*"], ["rm"], ["hold", "nope*"], ["tag", "nope*", "x*"]):
        assert cachedb(*command, "--ignore-missing").returncode == 0, command
    done = cachedb("rm", "--filter", "unused-for=1d")
    assert (done.returncode, done.stdout) == (0, "freed 0 blobs, 0 B\n")
    assert done.stderr == "no image matches: nothing is removed\n"
    assert cache.list_names() == NAMES
    assert cachedb("rm", "--dry-run", "team/*").stdout.splitlines()[:1] == ["would remove team/app:1"]
    removed = json.loads(cachedb("rm", "team/*", "nope", "--ignore-missing", "--format", "json").stdout)
    assert [image["name"] for image in removed["images"]] == NAMES[3:]
    assert removed["size"] == removed["bytes"] > 0
    assert cachedb("rm", "-q", "app:*").stdout.split() == ["app:1", "app:2"]


def test_df_of_some_images_prints_what_they_take_together(cachedb: Run, cache: Cache) -> None:
    fill(cache)
    found = json.loads(cachedb("df", "team/*", "--format", "json").stdout)
    assert found["freed"]["size"] == cache.get_selected_usage("team/*").freed.size
    assert [row["complete"] for row in found["image_usage"]] == [True] * 3
    names = cachedb("df", "team/*", "--sort", "-name", "--columns", "name", "--no-header").stdout.split()
    assert names == NAMES[:2:-1]
