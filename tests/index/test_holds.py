"""Holds that outlive their process: which blobs they keep, for how long, and how they end."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cachedb import Cache, CacheError, Name, NotInCache
from cachedb.index.sqlite.database import Database
from tests.conftest import Run, files_of, run_python, snapshot
from tests.support import make
from tests.support.index_file import change_index
from tests.support.make import save
from tests.support.promises import check

MADE = make.image(1, 2)
OTHER = make.image(3)
HOUR = 3600

SetClock = Callable[[datetime], None]


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """Return a function that sets the clock in every module that reads it."""

    def set_to(time: datetime) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: object = None) -> Clock:
                return cls.fromtimestamp(time.timestamp(), UTC)

        for module in ("index.holds", "index.images", "content.save", "index.blobs", "text"):
            monkeypatch.setattr(f"cachedb.{module}.datetime", Clock)

    return set_to


def list_hold_ids(directory: Path) -> set[str]:
    """Return the ids of all holds in the index, expired ones included."""
    rows = snapshot(directory)["lasting_holds"]
    assert isinstance(rows, list)
    return {row[0] for row in rows}


@pytest.mark.slow
def test_held_blobs_outlive_their_image_and_process_until_released(directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", MADE)
        (hold,) = cache.add_hold("app:1")
    assert re.fullmatch("hold-[0-9a-f]{12}", hold.id)
    assert (hold.name, hold.blobs, hold.size) == ("app:1", 4, sum(map(len, MADE.blobs.values())))
    assert hold.expires_at is None
    remove = """
        import sys
        from cachedb import Cache
        with Cache.open(sys.argv[1]) as cache:
            print(cache.remove_manifest("app:1").blobs, cache.collect_garbage().blobs)
    """
    assert run_python(remove, directory) == "0 0\n"
    check(directory)
    with Cache.open(directory) as cache:
        assert files_of(directory).keys() == MADE.blobs.keys()
        assert cache.list_holds() == [hold]
        assert cache.release_hold(hold.id) == 1
        assert cache.list_holds() == []
        assert cache.collect_garbage().blobs == 4
    assert files_of(directory) == {}


def test_an_expired_hold_has_no_effect_and_the_next_open_deletes_it(
    cache: Cache, directory: Path, set_clock: SetClock
) -> None:
    save(cache, "app:1", MADE)
    (hold,) = cache.add_hold("app:1", seconds=HOUR)
    (lasting,) = cache.add_hold("app:1", seconds=2 * HOUR)
    assert hold.expires_at == hold.created_at + timedelta(hours=1)
    cache.remove_manifest("app:1")
    set_clock(hold.expires_at - timedelta(seconds=1))
    Cache.open(directory).close()
    assert cache.list_holds() == [hold, lasting]
    set_clock(hold.expires_at + timedelta(microseconds=1))
    assert cache.list_holds() == [lasting]
    with pytest.raises(NotInCache):
        cache.release_hold(hold.id)
    assert list_hold_ids(directory) == {hold.id, lasting.id}, "a hold was deleted before the next open"
    Cache.open(directory).close()
    assert list_hold_ids(directory) == {lasting.id}
    assert cache.collect_garbage().blobs == 0
    set_clock(hold.created_at + timedelta(days=1))
    assert cache.collect_garbage().blobs == 4, "a collection did not delete expired holds"
    assert list_hold_ids(directory) == set()


def test_a_hold_ends_exactly_at_its_time(cache: Cache, set_clock: SetClock) -> None:
    save(cache, "app:1", MADE)
    (hold,) = cache.add_hold("app:1", seconds=HOUR)
    assert hold.expires_at is not None
    set_clock(hold.expires_at)
    assert cache.list_holds() == []


def test_a_hold_of_a_name_keeps_the_image_that_the_name_had(cache: Cache, directory: Path) -> None:
    save(cache, "app:1", MADE)
    cache.add_hold("app:1")
    save(cache, "app:1", OTHER)
    cache.tag("app:1", "other")
    cache.remove_manifest("app:1", "other")
    cache.collect_garbage()
    assert files_of(directory).keys() == MADE.blobs.keys(), "the new image is held too"


def test_a_single_blob_is_held_and_released_by_its_digest_in_any_spelling(cache: Cache, directory: Path) -> None:
    save(cache, "app:1", MADE)
    digest = make.digest_of(MADE.layers[0])
    (hold,) = cache.add_hold(digest.removeprefix("sha256:"))
    assert (hold.name, hold.blobs, hold.size) == (digest, 1, len(MADE.layers[0]))
    cache.remove_manifest("app:1")
    assert files_of(directory).keys() == {digest}
    assert cache.release_hold(digest.upper().replace("SHA256:", "").lower()) == 1
    assert cache.collect_garbage().blobs == 1


def test_holds_of_one_name_are_released_together_and_single_ones_by_id(cache: Cache, directory: Path) -> None:
    save(cache, "app", MADE)
    save(cache, "other", OTHER)
    first, second, third = (cache.add_hold("app", seconds=seconds)[0] for seconds in (None, HOUR, HOUR))
    (other,) = cache.add_hold("other")
    assert cache.list_holds() == [first, second, third, other], "the oldest is not first"
    cache.remove_manifest("app")
    assert cache.release_hold(second.id) == 1
    assert cache.collect_garbage().blobs == 0
    assert cache.release_hold("app:latest") == 2, "another spelling of the name was not understood"
    assert cache.list_holds() == [other]
    cache.collect_garbage()
    assert files_of(directory).keys() == OTHER.blobs.keys()


def test_several_names_are_held_or_released_together_or_not_at_all(cache: Cache, directory: Path) -> None:
    save(cache, "app:1", MADE)
    save(cache, "app:2", OTHER)
    before = snapshot(directory)
    for names in (["app:1", "nope"], ["nope", "app:1"], ["app:1", "sha256:" + "0" * 64]):
        with pytest.raises(NotInCache):
            cache.add_hold(*names)
        assert snapshot(directory) == before
    made = cache.add_hold("app:2", "app:1", seconds=60)
    assert [hold.name for hold in made] == ["app:2", "app:1"], "the holds are not in the order of the names"
    before = snapshot(directory)
    with pytest.raises(NotInCache):
        cache.release_hold("app:1", "app:2", "nope")
    with pytest.raises(NotInCache, match="neither a hold nor held"):
        cache.release_hold(made[0].id, "hold-000000000000")
    assert snapshot(directory) == before
    assert cache.release_hold("app:1", made[0].id) == 2


@pytest.mark.parametrize("seconds", [-1, -1e-9, 0, 1e11, 1e300, float("inf"), float("nan")])
def test_an_invalid_time_to_hold_is_refused(cache: Cache, directory: Path, seconds: float) -> None:
    save(cache, "app:1", MADE)
    before = snapshot(directory)
    with pytest.raises(CacheError, match="cannot hold for"):
        cache.add_hold("app:1", seconds=seconds)
    assert snapshot(directory) == before


def test_a_hold_of_an_incomplete_image_keeps_blobs_that_are_stored_later(cache: Cache, directory: Path) -> None:
    """All digests that the manifest references are held, stored or not."""
    cache.save_manifest("part", MADE.manifest)
    (hold,) = cache.add_hold("part")
    assert (hold.blobs, hold.size) == (4, sum(map(len, MADE.blobs.values())))
    late = cache.save_blob(make.digest_of(MADE.layers[0]), MADE.layers[0])
    cache.remove_manifest("part")
    cache.collect_garbage()
    assert files_of(directory).keys() == {MADE.digest, late}
    cache.release_hold("part")
    assert cache.collect_garbage().blobs == 2


def test_more_holds_than_a_statement_has_variables_can_be_deleted(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this failed, no later open would succeed."""
    connect = Database._open

    def open_limited(database: Database, **options: bool) -> sqlite3.Connection:
        connection = connect(database, **options)
        connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)  # the limit of older releases of SQLite
        return connection

    monkeypatch.setattr(Database, "_open", open_limited)
    with Cache.open(directory) as cache:
        save(cache, "app:1", MADE)
        with cache._database.write() as connection:
            for ends, first in (("'1971-01-01T00:00:00.000000Z'", 0), ("NULL", 10_000)):
                numbers = f"WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n LIMIT 1200)"
                row = f"printf('hold-%012x', i), 'app:2', '1970-01-01T00:00:00.000000Z', {ends}"
                connection.exec_driver_sql(f"{numbers} INSERT INTO lasting_holds SELECT {row} FROM n")
                row = f"'{MADE.digest}', printf('hold-%012x', i), 0"
                connection.exec_driver_sql(f"{numbers} INSERT INTO leases SELECT {row} FROM n")
        Cache.open(directory).close()
        assert len(list_hold_ids(directory)) == 1200
        assert cache.release_hold("app:2") == 1200


@pytest.mark.slow
@pytest.mark.parametrize("year", [1970, datetime.now(UTC).year - 1])
def test_a_clock_that_jumps_back_makes_holds_longer_and_breaks_nothing(
    cache: Cache, directory: Path, tmp_path: Path, set_clock: SetClock, cachedb: Run, year: int
) -> None:
    save(cache, "app:1", MADE)
    cache.add_hold("app:1", seconds=HOUR)
    cache.remove_manifest("app:1")
    set_clock(datetime(year, 1, 1, 0, 0, 1, tzinfo=UTC))
    save(cache, "old:1", OTHER)
    cache.cache_from_tar(make.write(tmp_path / "new.tar", make.oci_files({"new:1": make.image(5)})))
    (late,) = cache.add_hold("old:1", seconds=HOUR)
    assert late.created_at.year == year
    assert [hold.name for hold in cache.list_holds()] == ["old:1", "app:1"]
    assert [image.added_at.year for image in cache.list_manifests()] == [year, year]
    assert cache.verify().problems == []
    cache.collect_garbage()
    assert MADE.blobs.keys() <= files_of(directory).keys()
    cache.close()
    # The command line has the true clock: the hold of the old clock has expired and is not listed.
    assert "years ago" in (listed := cachedb("ls").stdout) or "year ago" in listed or "months ago" in listed
    holds = cachedb("holds")
    assert (holds.returncode, "app:1" in holds.stdout, "old:1" in holds.stdout) == (0, True, False)
    check(directory)


def test_future_times_are_printed_as_just_now(cache: Cache, cachedb: Run, set_clock: SetClock) -> None:
    set_clock(datetime.now(UTC) + timedelta(days=400))
    save(cache, "app:1", MADE)
    cache.add_hold("app:1")
    assert "just now" in cachedb("ls").stdout
    assert "just now" in cachedb("holds").stdout


def test_an_expired_hold_is_not_in_the_view(cache: Cache, directory: Path) -> None:
    save(cache, "app:1", MADE)
    cache.add_hold("app:1")
    cache.add_hold("app:1", seconds=HOUR)
    query = "SELECT name, blobs, size FROM holds"
    assert read_all(directory, query) == [("app:1", 4, sum(map(len, MADE.blobs.values())))] * 2
    change_index(directory, "UPDATE lasting_holds SET expires_at = '2026-01-31T23:59:59.123456Z' WHERE expires_at > ''")
    assert len(read_all(directory, query)) == 1


def read_all(directory: Path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(directory / "index.db")) as shell:
        return shell.execute(query).fetchall()


# The command line


@pytest.mark.slow
def test_the_commands_hold_holds_and_release(cachedb: Run, directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", MADE)
    held = cachedb("hold", "app:1", MADE.digest, "--for", "2h", "--format", "json")
    assert (held.returncode, held.stderr) == (0, "")
    first, second = json.loads(held.stdout)
    assert list(first) == ["id", "name", "blobs", "size", "created_at", "expires_at"]
    assert (first["name"], first["blobs"], second["name"], second["blobs"]) == ("app:1", 4, MADE.digest, 1)
    assert first["created_at"].endswith("Z")
    lasts = datetime.fromisoformat(first["expires_at"]) - datetime.fromisoformat(first["created_at"])
    assert lasts == timedelta(hours=2)
    assert cachedb("rm", "app:1").stdout == "freed 0 blobs, 0 B\n"
    assert cachedb("gc").stdout == "freed 0 blobs, 0 B\n"
    assert cachedb("holds", "-q").stdout.split() == [first["id"], second["id"]]
    assert json.loads(cachedb("holds", "--format", "json").stdout) == [first, second]
    heading, row, _ = cachedb("holds").stdout.splitlines()
    assert heading.split() == ["HOLD", "NAME", "BLOBS", "SIZE", "CREATED", "ENDS"]
    assert re.fullmatch(rf"{first['id']}  app:1 +4 +[0-9.]+ kB  just now  \S+ \S+ UTC", row)
    released = cachedb("release", "app:1", second["id"])
    assert (released.returncode, released.stdout, released.stderr) == (0, "", "")
    assert cachedb("gc").stdout.startswith("freed 4 blobs")


@pytest.mark.slow
def test_a_hold_without_an_end_is_printed_as_ending_when_released(cachedb: Run, cache: Cache) -> None:
    save(cache, "app:1", MADE)
    assert cachedb("hold", "app:1").stdout.splitlines()[1].endswith("just now  when released")
    identifier = cachedb("hold", "-q", "app:1").stdout
    assert re.fullmatch("hold-[0-9a-f]{12}\n", identifier)
    assert json.loads(cachedb("holds", "--format", "json").stdout)[1]["expires_at"] is None


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["hold", "nope"], 3),
        (["hold", "sha256:" + "0" * 64], 3),
        (["release", "nope"], 3),
        (["release", "hold-000000000000"], 3),
        (["release", "No Name"], 2),
        (["hold"], 2),
        (["release"], 2),
        (["hold", "app:1", "--for", "2 hours"], 2),
        (["hold", "app:1", "--for", "-5m"], 2),
        (["hold", "app:1", "--for", ""], 2),
    ],
)
def test_an_error_is_one_line_and_has_its_exit_code(
    cachedb: Run, cache: Cache, directory: Path, arguments: list[str], code: int
) -> None:
    save(cache, "app:1", MADE)
    before = snapshot(directory)
    result = cachedb(*arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert re.fullmatch(r"cachedb: .+\n", result.stderr), result.stderr
    assert snapshot(directory) == before


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("7d", 604_800), ("1w", 604_800), ("1h30m", 5400), ("1h1h", 7200)],
)
def test_a_duration_is_parsed(text: str, seconds: int) -> None:
    from cachedb.cli.options import DurationParameter

    assert DurationParameter().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "1", "h", "1.5h", "1 h", "-1h", "1h\n", "1H", "1y", "9" * 10 + "s", "1hm"])
def test_an_invalid_duration_is_refused(text: str) -> None:
    import click

    from cachedb.cli.options import DurationParameter

    with pytest.raises(click.UsageError, match="is not a duration"):
        DurationParameter().convert(text, None, None)


def test_an_error_in_a_hold_is_not_hidden_by_an_error_of_its_release(cache: Cache, directory: Path) -> None:
    digest = cache.add_blob(b"data")
    with pytest.raises(KeyError), cache.hold(digest):  # noqa: PT012
        (directory / "index.db").rename(directory / "away.db")
        raise KeyError
    (directory / "away.db").rename(directory / "index.db")


def test_holds_are_released_once_though_a_name_is_repeated(cache: Cache) -> None:
    digest = cache.add_blob(b"data")
    save(cache, "app:1", make.image(1))
    (by_name,) = cache.add_hold("app:1")
    cache.add_hold(digest)
    assert cache.release_hold("app:1", by_name.id, Name("app", "1"), digest, digest) == 2
    assert cache.list_holds() == []
