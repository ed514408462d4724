"""Commands about images, while another process moves their tags."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from cachedb import Cache
from cachedb.cli.main import cli
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
