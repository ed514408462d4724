"""Commands about images, while another process moves their tags."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from cachedb import Cache
from cachedb.cli.main import cli
from tests.conftest import Run
from tests.support import make

MOVE = """
import sys
from cachedb import Cache
with Cache.open(sys.argv[1]) as cache:
    print("moving", flush=True)
    while True:
        for source in ("first:1", "second:1"):
            cache.tag(source, "app:1")
            cache.tag(source, "app:2")
"""


@pytest.fixture
def moving(cache: Cache) -> Iterator[Cache]:
    """Yield a cache in which another process moves two tags between two images."""
    make.save(cache, "first:1", make.image(1))
    make.save(cache, "second:1", make.image(2, 3, 4))
    cache.tag("first:1", "app:1")
    cache.tag("first:1", "app:2")
    command = [sys.executable, "-c", MOVE, str(cache.directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "moving\n"
        yield cache
        process.kill()


def run(cache: Cache, *words: str) -> str:
    """Run a command, assert that it succeeds, and return its output."""
    done = CliRunner().invoke(cli, ["--dir", str(cache.directory), *words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_show_prints_one_image_while_its_tag_moves(moving: Cache) -> None:
    digests = set()
    for _ in range(60):
        shown = json.loads(run(moving, "show", "--format", "json", "app:1"))
        assert shown["digest"] == shown["blobs"][0]["digest"]
        assert shown["size"] == sum(blob["size"] for blob in shown["blobs"])
        digests.add(shown["digest"])
    assert len(digests) == 2


@pytest.mark.slow
def test_get_details_returns_one_image_while_its_tag_moves(moving: Cache) -> None:
    for _ in range(300):
        image, blobs, labels, platforms = moving.get_details("app:1")
        assert image.digest == blobs[0].digest
        assert labels == {}
        assert platforms == []


@pytest.mark.slow
def test_the_images_of_df_add_up_to_its_totals_while_tags_move(moving: Cache) -> None:
    for _ in range(60):
        found = json.loads(run(moving, "df", "--verbose", "--format", "json"))
        listed = found["image_usage"]
        assert len(listed) == found["images"]
        assert sum(image["unique_size"] for image in listed) == found["unique"]["size"]


# Pins and lifetimes


def test_names_and_patterns_are_pinned_and_unpinned_without_output(cache: Cache) -> None:
    for name in ("app:1", "app:2", "db:1"):
        make.save(cache, name, make.image(1))
    assert run(cache, "pin", "app:*") == run(cache, "pin", "app:1", "db:1") == ""
    assert run(cache, "ls", "-q", "--filter", "pinned") == "app:1\napp:2\ndb:1\n"
    assert run(cache, "unpin", "--filter", "pinned", "--limit", "2") == run(cache, "unpin", "app:1") == ""
    assert run(cache, "ls", "-q", "--filter", "pinned") == "db:1\n"
    assert "no image matches: nothing is pinned" in run(cache, "pin", "--ignore-missing", "nope:1")
    assert "no image matches: nothing is unpinned" in run(cache, "unpin", "--filter", "incomplete")


@pytest.mark.parametrize("command", ["pin", "unpin"])
def test_a_name_that_is_not_there_pins_nothing(cachedb: Run, cache: Cache, command: str) -> None:
    make.save(cache, "app:1", make.image(1))
    cache.pin("app:1") if command == "unpin" else None
    done = cachedb(command, "app:1", "nope:1")
    assert (done.returncode, done.stdout) == (3, "")
    assert cachedb(command).returncode == 2
    assert cache.get_image("app:1").pinned == (command == "unpin")


def test_a_table_of_images_shows_pins_and_lifetimes_if_there_are_any(cache: Cache) -> None:
    made = make.image(1)
    make.save(cache, "app:1", made)
    make.save(cache, "app:2", made)
    assert "PINNED" not in run(cache, "ls") + run(cache, "show", "app:1")
    cache.pin("app:1")
    assert [line.split()[-1] for line in run(cache, "ls").splitlines()] == ["PINNED", "yes", "no"]
    image = cache.save_manifest("app:2", made.manifest, ttl=3600)
    ends = f"{image.expires_at:%Y-%m-%d %H:%M:%S} UTC"
    assert [line.split()[-1] for line in run(cache, "ls", "app:1").splitlines()] == ["PINNED", "yes"]
    assert run(cache, "ls", "--columns", "name,pinned,expires").splitlines() == [
        "NAME   PINNED  EXPIRES",
        "app:1  yes     -",
        f"app:2  no      {ends}",
    ]
    assert ends in run(cache, "ls").splitlines()[2]
    assert ends in run(cache, "show", "app:2").splitlines()[1]
    assert run(cache, "ls", "--format", "csv").startswith("name,digest,size,created,added_at,complete\n")
    shown = json.loads(run(cache, "show", "--format", "json", "app:2"))
    assert (shown["pinned"], shown["expires_at"]) == (False, f"{image.expires_at:%Y-%m-%dT%H:%M:%S.%fZ}")


def test_an_import_with_a_lifetime_says_when_it_ends(cache: Cache, tmp_path: Path) -> None:
    archive = make.write_bytes(tmp_path / "app.tar", make.tar_of(make.docker_files({"app:1": make.image(1)})))
    printed = run(cache, "import", "--ttl", "6h", str(archive))
    ends = cache.get_image("app:1").expires_at
    assert ends is not None
    assert timedelta(hours=5) < ends - datetime.now(UTC) <= timedelta(hours=6)
    assert f"{ends:%Y-%m-%d %H:%M:%S} UTC" in printed
    assert "EXPIRES" not in run(cache, "import", str(archive))
    assert cache.get_image("app:1").expires_at is None
