"""Common SQLite tools read the views of a cache while another process writes to it."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache
from tests.conftest import find_peer, running
from tests.support.make import image, save

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "sql.md").read_text()
INSTALL = {name: f"pip install {name}" for name in ("datasette", "sqlite-utils")} | {"duckdb": "pip install duckdb-cli"}
QUERY = "SELECT name, freed_size FROM image_usage WHERE repository = 'app' ORDER BY name"
WRITER = """
import sys
from cachedb import Cache

with Cache.open(sys.argv[1]) as cache:
    print("writing", flush=True)
    number = 0
    while True:
        cache.tag("app:1", "busy:1")
        cache.add_blob(b"%d" % number)
        cache.remove_manifest("busy:1")
        number += 1
"""

Tool = Callable[..., Any]


@pytest.fixture
def index(directory: Path) -> Iterator[Path]:
    """Yield the index of a cache that another process writes to without a pause."""
    with Cache.open(directory) as cache:
        save(cache, "app:1", image(1, 2))
        save(cache, "app:2", image(1, 3))
    with running(WRITER, directory) as writer:
        yield directory / "index.db"
        assert writer.poll() is None
        assert_is_written_to(directory / "index.db")
    with Cache.open(directory) as cache:
        assert cache.verify().problems == []


def assert_is_written_to(index: Path) -> None:
    """Check that the writer still commits."""
    with closing(sqlite3.connect(f"file:{index}?mode=ro", uri=True)) as shell:
        before = shell.execute("PRAGMA data_version").fetchone()
        end = time.monotonic() + 30
        while shell.execute("PRAGMA data_version").fetchone() == before:
            assert time.monotonic() < end
            time.sleep(0.01)


def run(program: str, *arguments: object, stdin: str = "") -> str:
    line = [find_peer(program, INSTALL.get(program, "")), *map(str, arguments)]
    done = subprocess.run(line, input=stdin, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def query_with_sqlite3(index: Path, query: str) -> list[dict[str, Any]]:
    return list(json.loads(run("sqlite3", "-readonly", "-json", index, query) or "[]"))


def query_with_sqlite_utils(index: Path, query: str) -> list[dict[str, Any]]:
    return list(json.loads(run("sqlite-utils", "query", index, query)))


def query_with_datasette(index: Path, query: str) -> list[dict[str, Any]]:
    from urllib.parse import urlencode

    return list(
        json.loads(run("datasette", index, "--get", f"/index.json?{urlencode({'sql': query, '_shape': 'array'})}"))
    )


def query_with_duckdb(index: Path, query: str) -> list[dict[str, Any]]:
    """Query the JSON output of sqlite3: DuckDB needs a downloaded extension to open a SQLite database."""
    found = run("sqlite3", "-readonly", "-json", index, query)
    return list(json.loads(run("duckdb", "-json", "-c", "SELECT * FROM read_json('/dev/stdin')", stdin=found)))


@pytest.mark.slow
@pytest.mark.parametrize("tool", [query_with_sqlite3, query_with_sqlite_utils, query_with_datasette, query_with_duckdb])
def test_a_tool_can_query_the_views(index: Path, tool: Tool) -> None:
    with Cache.open(index.parent) as cache:
        freed = [cache.remove_manifest(name, dry_run=True).bytes for name in ("app:1", "app:2")]
        held = {name: cache.get_image(name).size for name in ("app:1", "app:2")}
    assert freed[1] > 0
    rows = tool(index, QUERY)
    assert [row["name"] for row in rows] == ["app:1", "app:2"]
    # While the writer has given app:1 a second name, the removal of app:1 frees nothing.
    assert rows[1]["freed_size"] == freed[1]
    assert rows[0]["freed_size"] in (0, held["app:1"] - (held["app:2"] - freed[1]))


def test_sqlite_utils_and_datasette_list_the_views(index: Path) -> None:
    with closing(sqlite3.connect(f"file:{index}?mode=ro", uri=True)) as shell:
        views = {name for (name,) in shell.execute("SELECT name FROM sqlite_master WHERE type = 'view'")}
    assert {row["view"] for row in json.loads(run("sqlite-utils", "views", index))} == views
    shown = json.loads(run("datasette", index, "--get", "/index.json"))
    assert {view["name"] for view in shown["views"]} == views


def test_duckdb_can_parse_the_views(cache: Cache) -> None:
    """DuckDB's extension for SQLite parses a view before it reads it."""
    with closing(sqlite3.connect(cache.directory / "index.db")) as shell:
        views = dict(shell.execute("SELECT name, sql FROM sqlite_master WHERE type = 'view'"))
    queries = {name: sql.partition(" AS")[2].replace("'", "''") for name, sql in views.items()}
    asked = ", ".join(f"json_serialize_sql('{query}') AS {name}" for name, query in queries.items())
    (answers,) = json.loads(run("duckdb", "-json", "-c", f"SELECT {asked}"))
    parsed = {name: json.loads(answer) if isinstance(answer, str) else answer for name, answer in answers.items()}
    assert {name: answer.get("error_message") for name, answer in parsed.items()} == dict.fromkeys(views)


def test_the_commands_of_the_sql_reference_work(index: Path) -> None:
    (block,) = re.findall(r"```sh\n(sqlite3 -readonly.*?)```", PAGE, re.DOTALL)
    commands = block.splitlines()
    assert [command.split()[0] for command in commands] == ["sqlite3", "sqlite-utils", "datasette", "sqlite3"]
    for tool in ("sqlite3", "sqlite-utils", "datasette", "duckdb"):
        find_peer(tool, INSTALL.get(tool, ""))
    for command in commands:
        done = subprocess.run(
            command, shell=True, cwd=index.parent, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "app:1" in done.stdout, command
        assert "app:2" in done.stdout, command
