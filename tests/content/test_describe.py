"""Image descriptions: the index copies them from configs, also when a config is stored after its image."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachedb import Cache, CacheError, StorageError
from cachedb.content import describe
from cachedb.disk import reader
from cachedb.index.descriptions import BACKFILL
from cachedb.index.tables import TEXT_LIMIT
from cachedb.oci.configs import CONFIG_LIMIT, parse_config
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import DOCKER_CONFIG, OCI_CONFIG, OCI_LAYER
from tests.conftest import run_python
from tests.support.index_file import change_index
from tests.support.make import (
    digest_of,
    docker_files,
    full_config,
    image,
    image_of,
    index,
    layer,
    save,
    save_index,
    write,
)
from tests.support.promises import check

BUILT = datetime(2026, 2, 3, 4, 5, 6, 789012, tzinfo=UTC)


def read_description(cache: Cache, name: str) -> tuple[Any, ...]:
    found = cache.get_image(name)
    return found.os, found.architecture, found.variant, found.created, found.author, cache.get_labels(name)


DESCRIPTION = ("linux", "arm", "v7", BUILT, "A. Author <a@example.org>", {"empty": "", "version": "1"})
NO_DESCRIPTION: tuple[Any, ...] = (None, None, None, None, None, {})


@pytest.mark.parametrize("kind", [OCI_CONFIG, DOCKER_CONFIG])
def test_an_image_is_described_by_its_config(cache: Cache, kind: str) -> None:
    save(cache, "app:1", image_of(full_config(1, 2), 1, 2, kind=kind))
    assert read_description(cache, "app:1") == DESCRIPTION
    assert [(blob.diff_id, blob.created_by) for blob in cache.get_image_blobs("app:1")] == [
        (None, None),
        (None, None),
        (digest_of(layer(1)), "RUN make 1"),
        (digest_of(layer(2)), "RUN make 2"),
    ]
    assert cache.list_manifests() == [cache.get_image("app:1")]


def test_a_config_stored_after_its_manifest_describes_the_image(cache: Cache) -> None:
    made = image_of(full_config(1), 1)
    cache.save_manifest("app:1", made.manifest)
    cache.tag("app:1", "app:2")
    assert read_description(cache, "app:1") == NO_DESCRIPTION
    cache.save_blob(digest_of(made.config), made.config)
    assert read_description(cache, "app:1") == read_description(cache, "app:2") == DESCRIPTION
    assert cache.get_image_blobs("app:2")[2].created_by == "RUN make 1"


def test_an_imported_image_is_described(cache: Cache, tmp_path: Any) -> None:
    cache.cache_from_tar(write(tmp_path / "a.tar", docker_files({"app:1": image_of(full_config(1), 1)})))
    assert read_description(cache, "app:1") == DESCRIPTION


def test_a_name_that_moves_gets_the_new_images_description(cache: Cache) -> None:
    save(cache, "app:1", image_of(full_config(1), 1))
    other = image(2)
    save(cache, "app:1", other)
    assert read_description(cache, "app:1") == ("linux", "amd64", None, None, None, {})
    cache.save_manifest("app:1", image(3).manifest)
    assert read_description(cache, "app:1") == NO_DESCRIPTION


def test_a_tag_gets_the_description_and_blobs_of_its_source(cache: Cache) -> None:
    save(cache, "app:1", image_of(full_config(1, 2), 1, 2))
    save(cache, "app:2", image(3))
    cache.tag("app:1", "app:2")
    assert read_description(cache, "app:2") == DESCRIPTION
    assert cache.get_image_blobs("app:1") == cache.get_image_blobs("app:2")


def test_labels_are_deleted_with_their_image(cache: Cache) -> None:
    save(cache, "app:1", image_of(full_config(1), 1))
    cache.remove_manifest("app:1")
    cache.close()
    check(cache.directory)


def test_an_index_is_described_by_the_values_that_its_platforms_share(cache: Cache) -> None:
    first = image_of(full_config(1, config={"Labels": {"version": "1", "tuned": "yes"}}), 1)
    second = image_of(full_config(2, architecture="amd64", config={"Labels": {"version": "1", "tuned": "no"}}), 2)
    save_index(cache, "app:1", first, second)
    author = "A. Author <a@example.org>"
    assert read_description(cache, "app:1") == ("linux", None, "v7", BUILT, author, {"version": "1"})
    layers = [blob for blob in cache.get_image_blobs("app:1") if blob.role == "layer"]
    assert [blob.created_by for blob in layers] == ["RUN make 1", "RUN make 2"]


def read_platforms(cache: Cache, name: str) -> list[tuple[Any, ...]]:
    """Return the platforms of an image, each with the number of its layers."""
    query = """
        SELECT p.os, p.architecture, p.variant, last_position - position - 1
        FROM image_platforms AS p JOIN images AS i ON i.id = p.image_id
        WHERE i.repository || ':' || i.reference = ? ORDER BY position
    """
    with closing(sqlite3.connect(cache.directory / "index.db")) as shell:
        return shell.execute(query, (name,)).fetchall()


def test_an_image_has_the_platform_of_its_config(cache: Cache) -> None:
    save(cache, "app:1", image_of(full_config(1, 2), 1, 2))
    save(cache, "other:1", image_of({"config": {}}, 1))
    cache.tag("app:1", "app:2")
    assert read_platforms(cache, "app:1") == read_platforms(cache, "app:2") == [("linux", "arm", "v7", 2)]
    assert read_platforms(cache, "other:1") == []
    cache.tag("other:1", "app:2")
    assert read_platforms(cache, "app:2") == []


def test_the_platform_that_an_index_states_wins_over_that_of_the_config(cache: Cache) -> None:
    first, second, third = (image_of(full_config(seed), seed) for seed in (1, 2, 3))
    stated = [{"os": "linux", "architecture": "arm"}, {}, {"os": "windows", "architecture": "amd64", "variant": "v2"}]
    save_index(cache, "app:1", first, second, third, platforms=stated)
    assert read_platforms(cache, "app:1") == [
        ("linux", "arm", None, 1),
        ("linux", "arm", "v7", 1),
        ("windows", "amd64", "v2", 1),
    ]


def test_an_index_states_a_platform_before_its_config_is_stored(cache: Cache) -> None:
    made = image_of(full_config(1), 1)
    save_index(cache, "app:1", made)
    lost = cache.get_image_blobs("app:1")[2].path
    assert lost is not None
    lost.unlink()
    cache.verify(repair=True)
    cache.save_manifest("app:1", index(made))
    assert read_platforms(cache, "app:1") == [("linux", "amd64", None, 1)]


def test_an_index_that_cannot_be_read_leaves_the_platforms_of_the_configs(cache: Cache) -> None:
    made = image_of(full_config(1), 1)
    save_index(cache, "app:1", made)
    path = cache.get_image_blobs("app:1")[0].path
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(b"x" * path.stat().st_size)
    with cache._database.write() as connection:
        (unreadable,) = describe.describe(connection, cache.directory, 1)
        assert describe.matches_configs(connection, cache.directory, 1)
    assert unreadable.digest == cache.get_image("app:1").digest
    assert read_platforms(cache, "app:1") == [("linux", "arm", "v7", 1)]


def test_attached_layers_belong_to_no_platform(cache: Cache) -> None:
    save(cache, "app:1", image_of(full_config(1), 1))
    cache.associate_blob_with_image("app:1", cache.add_blob(b"more"), role="layer", media_type=OCI_LAYER)
    assert read_platforms(cache, "app:1") == [("linux", "arm", "v7", 1)]


def test_a_platform_stored_later_changes_the_shared_values(cache: Cache) -> None:
    first, second = image_of(full_config(1), 1), image_of(full_config(2, architecture="amd64"), 2)
    cache.save_manifest("app:1", index(first, second))
    for child, architecture in ((first, "arm"), (second, None)):
        cache.save_blob(digest_of(child.manifest), child.manifest)
        cache.save_blob(digest_of(child.config), child.config)
        assert cache.get_image("app:1").architecture == architecture


def test_an_attestation_does_not_describe_its_image(cache: Cache) -> None:
    made = image_of(full_config(1), 1)
    attestation = image_of({"os": "unknown", "architecture": "unknown", "config": {}}, 9)
    save_index(cache, "app:1", made, attestation, platforms=[{}, {"os": "unknown", "architecture": "unknown"}])
    assert read_description(cache, "app:1") == DESCRIPTION
    assert read_platforms(cache, "app:1") == [("linux", "arm", "v7", 1)]
    save_index(cache, "app:2", made, attestation, platforms=[{}, {}])
    assert read_platforms(cache, "app:2") == [("linux", "arm", "v7", 1)]


def test_an_attached_layer_gets_no_command_from_the_config(cache: Cache) -> None:
    save(cache, "app:1", image_of(full_config(1), 1))
    cache.associate_blob_with_image("app:1", cache.add_blob(b"attached"), role="layer")
    cache.save_manifest("app:1", image_of(full_config(1), 1).manifest)
    assert [blob.created_by for blob in cache.get_image_blobs("app:1")] == [None, None, "RUN make 1", None]


@pytest.mark.parametrize("data", [b"{not json", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_an_image_with_an_unreadable_config_is_complete_but_not_described(cache: Cache, data: bytes) -> None:
    save(cache, "app:1", image_of(data, 1))
    assert read_description(cache, "app:1") == NO_DESCRIPTION
    assert cache.is_image_complete("app:1")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", value)
        for value in ("", "a" * 65, 7, None, "a b", "x\n", "\x1b[31m", {"a": 1}, "../x")
    ]
    + [
        ("created", value)
        for value in (
            "",
            "yesterday",
            "0001-01-01T00:00:00Z",
            "0001-01-01T00:00:00+01:00",
            "9999-12-31T23:59:59-23:59",
            "2026-02-30T00:00:00Z",
            "2026-02-03",
            "2026-02-03T04:05:06",
            "٢026-02-03T04:05:06Z",
            1770000000,
        )
    ]
    + [("author", value) for value in ("", "a\0b", "\ud800", "a" * (TEXT_LIMIT + 1), ["a"])],
)  # fmt: skip
def test_an_invalid_value_is_left_out(cache: Cache, key: str, value: object) -> None:
    save(cache, "app:1", image_of(full_config(1, **{key: value}), 1))
    assert getattr(cache.get_image("app:1"), key) is None
    assert cache.get_image("app:1").os == "linux"


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-02-03T04:05:06Z", datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)),
        ("2026-02-03t04:05:06.5z", datetime(2026, 2, 3, 4, 5, 6, 500000, tzinfo=UTC)),
        ("2026-02-03T04:05:06+02:00", datetime(2026, 2, 3, 2, 5, 6, tzinfo=UTC)),
        ("1970-01-01T00:00:00Z", datetime(1970, 1, 1, tzinfo=UTC)),
    ],
)
def test_a_time_is_kept_in_utc(cache: Cache, text: str, time: datetime) -> None:
    save(cache, "app:1", image_of(full_config(1, created=text), 1))
    assert cache.get_image("app:1").created == time


def test_invalid_labels_are_left_out(cache: Cache) -> None:
    labels = {"a": "1", "": "2", "b": 3, "c": "x" * (TEXT_LIMIT + 1), "d\0": "4", "e": "\udc00", "f": None}
    save(cache, "app:1", image_of(full_config(1, config={"Labels": labels}), 1))
    assert cache.get_labels("app:1") == {"a": "1"}


def test_labels_beyond_the_limit_are_left_out(cache: Cache) -> None:
    sizes = {"b": 60_000, "c": 60_000, "a": 60_000, "d": 60_000, "large": 30_000, "e": 20_000, "more": 3_000, "last": 2}
    labels = {key: "x" * size for key, size in sizes.items()}
    save(cache, "app:1", image_of(full_config(1, config={"Labels": labels}), 1))
    kept = cache.get_labels("app:1")
    assert list(kept) == ["a", "b", "c", "d", "e", "last"]
    assert sum(len(key) + len(value) for key, value in kept.items()) <= CONFIG_LIMIT


def test_commands_beyond_the_limit_are_left_out(cache: Cache) -> None:
    seeds = range(1, 8)
    sizes = [60_000] * 4 + [30_000, 20_000, 3_000]
    history = [{"created_by": "x" * size} for size in sizes]
    save(cache, "app:1", image_of(full_config(*seeds, history=history), *seeds))
    found = [(len(blob.created_by or ""), blob.diff_id) for blob in cache.get_image_blobs("app:1")[2:]]
    kept = [60_000] * 4 + [0, 20_000, 0]
    assert found == [(size, digest_of(layer(seed))) for size, seed in zip(kept, seeds, strict=True)]


@pytest.mark.parametrize(
    "more",
    [
        {"history": [{"created_by": "a"}, {"created_by": "b"}]},
        {"history": None},
        {"history": [{"created_by": 7}]},
        {"history": ["RUN a"]},
    ],
)
def test_a_history_that_does_not_match_the_layers_is_ignored(cache: Cache, more: dict[str, Any]) -> None:
    save(cache, "app:1", image_of(full_config(1, **more), 1))
    found = cache.get_image_blobs("app:1")[2]
    assert (found.diff_id, found.created_by) == (digest_of(layer(1)), None)


def test_diff_ids_are_ignored_if_the_config_names_more_layers_than_the_manifest(cache: Cache) -> None:
    save(cache, "app:1", image_of(full_config(1, 2), 1))
    assert cache.get_image_blobs("app:1")[2].diff_id is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(sorted(full_config())) | st.text(), JSON), st.binary())
def test_parsing_a_strange_config_raises_no_other_error(document: dict[str, Any], data: bytes) -> None:
    parse_config(json.dumps({**full_config(1), **document}).encode(), 100)
    for entry in ("Labels", "diff_ids"):
        nested = {"config": {entry: document}, "rootfs": {entry: [document]}, "history": [document]}
        parse_config(json.dumps(nested).encode(), 100)
    with suppress(CacheError):
        parse_config(data, 100)


def test_verify_describes_an_image_whose_config_could_not_be_read_before(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = image_of(full_config(1), 1)
    for digest, data in made.blobs.items():
        cache.save_blob(digest, data)
    opened = reader.open_blob

    def fail(directory: Path, digest: Digest) -> BinaryIO:
        if digest == digest_of(made.config):
            raise StorageError("cannot read a blob: Input/output error")
        return opened(directory, digest)

    monkeypatch.setattr(reader, "open_blob", fail)
    cache.save_manifest("app:1", made.manifest)
    assert cache.verify().problems == []  # verify skips a config that it cannot read
    monkeypatch.undo()
    assert read_description(cache, "app:1") == NO_DESCRIPTION
    (problem,) = cache.verify().problems
    assert (problem.kind, problem.digest) == ("index", made.digest)
    assert problem.detail == "app:1: its description in the index differs from its config"
    assert cache.verify(repair=True).problems[0].repair
    assert read_description(cache, "app:1") == DESCRIPTION
    assert cache.verify().problems == []


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE images SET author = 'B'",
        "UPDATE image_labels SET value = '2' WHERE key = 'version'",
        "DELETE FROM image_labels",
        "UPDATE image_blobs SET created_by = NULL",
        "UPDATE image_blobs SET diff_id = NULL",
        "UPDATE image_platforms SET architecture = 'arm64'",
        "UPDATE image_platforms SET last_position = 1",
        "DELETE FROM image_platforms",
    ],
)
def test_verify_repairs_values_that_differ_from_the_config(cache: Cache, sql: str) -> None:
    save(cache, "app:1", image_of(full_config(1), 1))
    contents = cache.get_image_blobs("app:1")
    change_index(cache.directory, sql)
    assert [problem.kind for problem in cache.verify().problems] == ["index"]
    cache.verify(repair=True)
    assert (read_description(cache, "app:1"), cache.get_image_blobs("app:1")) == (DESCRIPTION, contents)
    assert read_platforms(cache, "app:1") == [("linux", "arm", "v7", 1)]
    assert cache.verify().problems == []


def test_verify_skips_descriptions_that_a_backfill_has_not_reached(cache: Cache) -> None:
    save(cache, "app:1", image_of(full_config(1), 1))
    change_index(cache.directory, "UPDATE images SET author = NULL")
    change_index(cache.directory, f"INSERT INTO backfills VALUES ('{BACKFILL}', 0)")
    assert cache.verify().problems == []
    change_index(cache.directory, "UPDATE backfills SET image_id = 1")
    assert [problem.kind for problem in cache.verify().problems] == ["index"]


def test_an_attached_config_describes_the_image_now_and_when_it_is_saved_again(cache: Cache) -> None:
    save(cache, "app:1", image_of(full_config(1), 1))
    other = cache.add_blob(json.dumps(full_config(author="B", config={})).encode())
    cache.associate_blob_with_image("app:1", other, role="config", media_type=OCI_CONFIG)
    assert cache.verify().problems == []
    found = read_description(cache, "app:1")
    assert found == (*DESCRIPTION[:4], None, {})
    cache.save_manifest("app:1", image_of(full_config(1), 1).manifest)
    assert read_description(cache, "app:1") == found


@pytest.mark.slow
def test_reading_a_description_does_not_import_alembic(cache: Cache) -> None:
    save(cache, "app:1", image(1))
    output = run_python(
        """
        import sys
        from cachedb import Cache

        with Cache.open(sys.argv[1]) as cache:
            print(cache.get_image("app:1").os, "alembic" in sys.modules)
        """,
        cache.directory,
        new_interpreter=True,
    )
    assert output == "linux False\n"
