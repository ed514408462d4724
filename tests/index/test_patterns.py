"""A pattern matches whole names, and its stars make the names of a rename."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from cachedb import Cache, InvalidName, InvalidQuery, Name, NotInCache
from cachedb.index.patterns import is_pattern, rename_all
from tests.support import make

NAMES = ["app:1", "app:2", "localhost:5000/team/app:1", "team/app:1", "team/db:2", "team/sub/x:latest"]


def fill(cache: Cache) -> None:
    for number, name in enumerate(NAMES):
        make.save(cache, name, make.image(number))


@pytest.mark.parametrize(
    "pattern", ["*", "team/*", "*:1", "app:?", "*/app:1", "[at]*:[12]", "[!a]*", "team/*/x:latest", "localhost:*", "x"]
)
def test_a_pattern_matches_whole_names_and_its_star_also_slashes(cache: Cache, pattern: str) -> None:
    fill(cache)
    found = cache.list_names(pattern, ignore_missing=True)
    assert found == [name for name in NAMES if fnmatchcase(name, pattern)]
    assert [image.name for image in cache.list_manifests(pattern, ignore_missing=True)] == found


def test_a_host_in_brackets_is_no_pattern() -> None:
    assert not is_pattern("[::1]:5000/app:1")
    assert not is_pattern(Name.parse("[2001:db8::1]/app"))
    assert is_pattern("[ab]/app")
    assert is_pattern("team/[ab]:1")


def test_the_stars_of_a_target_are_what_those_of_the_source_matched(cache: Cache) -> None:
    fill(cache)
    tagged = cache.tag_images("team/*:*", "mirror/*/copy:v*")
    assert [image.name for image in tagged] == ["mirror/app/copy:v1", "mirror/db/copy:v2", "mirror/sub/x/copy:vlatest"]
    for source, target in {"team/app:1": "mirror/app/copy:v1", "team/db:2": "mirror/db/copy:v2"}.items():
        assert cache.get_image(source).digest == cache.get_image(target).digest
    assert [image.name for image in cache.tag_images("app:1", "app:stable")] == ["app:stable"]
    assert rename_all([Name.parse("team/db:2")], "t[!x]am/?b:*", "db:*") == ["db:2"]


@pytest.mark.parametrize(
    ("source", "target", "error"),
    [
        ("team/*", "app:1", InvalidQuery), ("app:1", "*", InvalidQuery), ("app:?", "new:1", InvalidQuery),
        ("app:*", "Upper:*", InvalidName), ("*:1", "*:2/", InvalidName), ("*app:1", "team/*app:1", InvalidQuery),
        ("nope*", "new*", NotInCache),
    ],
)  # fmt: skip
def test_tagging_several_images_does_all_or_nothing(
    cache: Cache, source: str, target: str, error: type[Exception]
) -> None:
    fill(cache)
    with pytest.raises(error):
        cache.tag_images(source, target)
    assert cache.list_names() == NAMES
