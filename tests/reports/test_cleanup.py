"""What the page proposes to remove frees exactly what it says, and its commands run in a shell."""

from __future__ import annotations

import json
import os
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cachedb import Cache
from cachedb.index.sqlite.database import Database
from cachedb.reports import cleanup
from cachedb.reports.cleanup import Removal, format_command_line
from tests.support.make import digest_of, image, save, save_index
from tests.support.pages import add_hostile_names, card_of, exact, fill, only, parse, render, text_of


def propose(directory: Path) -> Removal:
    with closing(Database(directory)) as index, index.read() as connection:
        return cleanup.propose_removal(connection, datetime.now(UTC))


def set_last_used(directory: Path, days: dict[str, float]) -> None:
    """Set how many days ago images were last used."""
    with closing(sqlite3.connect(directory / "index.db")) as shell, shell:
        for name, ago in days.items():
            time = datetime.now(UTC) - timedelta(days=ago)
            shell.execute(
                "UPDATE images SET last_used_at = ? WHERE repository || ':' || reference = ?",
                (f"{time.replace(tzinfo=None).isoformat(timespec='microseconds')}Z", name),
            )


@pytest.fixture
def filled(cache: Cache) -> Cache:
    """Return a cache whose images share layers, in part with images that are held or were used today."""
    save(cache, "registry.example.com:5000/team/app:1", image(1, 2, 3))
    save(cache, "registry.example.com:5000/team/app:2", image(1, 2, 4))
    save(cache, "old/only:1", image(5))
    save_index(cache, "old/index:1", image(6), image(7, architecture="arm64"))
    save(cache, "new/app:1", image(1, 8))
    save(cache, "held/app:1", image(2, 9))
    save(cache, "held/app:2", image(10))
    cache.tag("new/app:1", "old/name-of-new:1")
    cache.add_hold("held/app:1", "held/app:2")
    only_old = image(5)
    cache.add_hold(digest_of(only_old.layers[0]))
    cache.save_blob(digest_of(b"garbage"), b"garbage")
    days = {name: 40 + number for number, name in enumerate(str(info.name) for info in cache.list_manifests())}
    set_last_used(cache.directory, {**days, "new/app:1": 0})
    return cache


@pytest.mark.slow
def test_removing_the_proposed_images_frees_what_the_page_says(filled: Cache) -> None:
    html = render(filled.directory)
    card = card_of(parse(html), "removal")
    stated = exact(only(card, "p[1]/span").attrib["title"])
    command = text_of(card.findall("pre")[0])
    program = f"{shlex.quote(sys.executable)} -m cachedb"
    done = subprocess.run(
        ["sh", "-c", f"cachedb() {{ {program} \"$@\" --format json; }}; {command}"],
        capture_output=True, text=True, check=True, cwd=filled.directory.parent, env={**os.environ},
    )  # fmt: skip
    assert json.loads(done.stdout)["bytes"] == stated > 3000
    left = {str(info.name) for info in filled.list_manifests()}
    # The other name of a used image frees nothing, so it stays.
    assert left == {"new/app:1", "held/app:1", "held/app:2", "old/name-of-new:1"}
    assert propose(filled.directory) == Removal([], 0, 1)


def test_the_least_recently_used_images_are_proposed_first(filled: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    names = propose(filled.directory).names
    assert names == sorted(names, key=lambda name: filled.get_image(name).last_used_at)
    monkeypatch.setattr(cleanup, "_PROPOSED_IMAGES", 2)
    few = propose(filled.directory)
    assert few.names == names[:2]
    assert few.candidates == 5
    assert few.freed_size == filled.remove_manifest(*few.names, dry_run=True).bytes
    monkeypatch.setattr(cleanup, "UNUSED_DAYS", 1000)
    assert propose(filled.directory) == Removal([], 0, 0)


def test_a_pinned_image_is_not_proposed(filled: Cache) -> None:
    before = propose(filled.directory)
    filled.pin(before.names[0])
    after = propose(filled.directory)
    assert before.names[0] not in after.names
    assert after.candidates == before.candidates - 1


def test_a_name_that_rm_refuses_is_not_proposed(directory: Path) -> None:
    fill(directory, 10)
    add_hostile_names(directory)
    with closing(sqlite3.connect(directory / "index.db")) as shell, shell:
        shell.execute("UPDATE images SET last_used_at = '2020-01-01T00:00:00.000000Z'")
    proposed = propose(directory)
    assert len(proposed.names) == 10
    assert not any("hostile" in name for name in proposed.names)
    with Cache.open(directory) as cache:
        assert cache.remove_manifest(*proposed.names, dry_run=True).bytes == proposed.freed_size


def test_a_command_is_quoted_for_the_shell_or_not_shown() -> None:
    hostile = '/tmp/it\'s $(touch x); "a" `b`'
    words = format_command_line(Path(hostile), "rm", ["app:1", "a b", "$x"])
    echo = f"cachedb() {{ printf '%s\\n' \"$@\"; }}; {words}"
    done = subprocess.run(["sh", "-c", echo], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["--dir", hostile, "rm", "app:1", "a b", "$x"]
    assert format_command_line(Path("/a b"), "gc", []) == "cachedb --dir '/a b' gc"
    for unprintable in ("/tmp/\x1b[2J", "/tmp/\u202e", "/tmp/\udcff", "/tmp/a\nb"):
        assert format_command_line(Path(unprintable), "rm", ["app:1"]) == ""
    assert format_command_line(Path("/tmp"), "rm", ["app:1\n"]) == ""


def test_outdated_bases_are_counted_by_the_images_on_them(directory: Path) -> None:
    fill(directory, 5)
    add_hostile_names(directory)
    with closing(Database(directory)) as index, index.read() as connection:
        found, names = cleanup.count_outdated_bases(connection)
    assert [(base.newer[-4:], base.images) for base in found] == [(":new", 2)]
    assert len(names) == 2


def test_duplicates_are_manifests_of_several_names() -> None:
    found = cleanup.find_duplicates(
        {"sha256:a": ["a:1"], "sha256:b": ["b:2", "b:1"], "sha256:c": ["c:1", "c:3", "c:2"]}
    )
    assert found == [
        {"digest": "sha256:c", "names": ["c:1", "c:2", "c:3"]},
        {"digest": "sha256:b", "names": ["b:1", "b:2"]},
    ]


@pytest.mark.slow
def test_the_holds_of_the_page_are_those_that_last(filled: Cache) -> None:
    lasting = filled.list_holds()
    card = card_of(parse(render(filled.directory)), "holds")
    assert {text_of(code) for code in card.findall("ul/li/code")} == {hold.id for hold in lasting}
