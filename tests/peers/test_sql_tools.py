"""Common SQLite tools read the views of a cache while another process writes to it."""

from __future__ import annotations

import html
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
from tests.conftest import Run, find_peer, running
from tests.support.index_file import change_index
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


SUM_NUMBERS = """
import json, sys
from pathlib import Path
import duckdb, duckdb_extension_sqlite_scanner

index, macros, views = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
(extension,) = Path(duckdb_extension_sqlite_scanner.__file__).parent.glob("extensions/*/*.duckdb_extension")
shell = duckdb.connect()
shell.execute(f"LOAD '{extension}'")
shell.execute(macros)
shell.execute(f"ATTACH '{index}' AS cache (TYPE sqlite, READ_ONLY)")
found = {}
for view, columns in views.items():
    numbers = [name for name, kind in columns.items() if kind != "TEXT"]
    sums = ", ".join(f"sum({name})" for name in numbers) or "count(*)"
    types = {row[0]: row[1] for row in shell.execute(f"DESCRIBE cache.{view}").fetchall()}
    totals = [float(total or 0) for total in shell.execute(f"SELECT {sums} FROM cache.{view}").fetchone()]
    found[view] = [types, dict(zip(numbers, totals))]
assert len(shell.execute("SELECT view_name FROM duckdb_views() WHERE database_name = 'cache'").fetchall()) == len(views)
print(json.dumps(found))
"""
TYPES = {"TEXT": {"VARCHAR"}, "INTEGER": {"BIGINT"}, "REAL": {"FLOAT", "DOUBLE"}}
"""DuckDB's types for each type of a column."""


def find_python(program: str, *packages: str) -> Path:
    """Return the Python of a peer from PyPI, if its environment has some packages too."""
    python = Path(find_peer(program, INSTALL[program])).resolve().with_name("python")
    for package in packages:
        done = subprocess.run([python, "-c", f"import {package}"], check=False, capture_output=True)
        if done.returncode:
            find_peer(package, f"pip install {package}")
    return python


def run_with(python: Path, script: str, *arguments: object) -> Any:
    """Return the JSON that a script prints."""
    line = [str(python), "-c", script, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_duckdb_attaches_the_index_and_sums_every_number(tmp_path: Path) -> None:
    """The extension for SQLite comes from PyPI, with the version of DuckDB that it fits."""
    python = find_python("duckdb", "duckdb_extension_sqlite_scanner")
    (macros,) = re.findall(r"^  (CREATE MACRO .*;\n)  ATTACH ", PAGE, re.DOTALL | re.MULTILINE)
    with Cache.open(tmp_path) as cache:
        save(cache, "app:1", image(1, 2))
        save(cache, "app:2", image(1, 2, 3))
        cache.save_manifest("lacking:1", image(9).manifest)
        cache.add_blob(b"garbage")
        cache.add_hold("app:1")
        change_index(tmp_path, f"UPDATE blobs SET size = {1 << 33} + id")  # more bytes than 32 bits count
        views = {view.name: {column.name: column.type for column in view.columns} for view in cache.list_views()}
        found = run_with(python, SUM_NUMBERS, tmp_path / "index.db", macros, json.dumps(views))
        for view, columns in views.items():
            types, totals = found[view]
            assert {name: kind for name, kind in types.items() if kind not in TYPES[columns[name]]} == {}, view
            for name, total in totals.items():
                with cache.sql(f"SELECT coalesce(sum({name}), 0) FROM {view}") as answer:
                    ((wanted,),) = answer.rows
                assert total == pytest.approx(wanted, abs=0.01), (view, name)


REFLECT = """
import json, sqlite3, sys
import pandas, sqlalchemy

engine = sqlalchemy.create_engine(f"sqlite:///file:{sys.argv[1]}?mode=ro&uri=true")
found = {}
for view in sqlalchemy.inspect(engine).get_view_names():
    table = sqlalchemy.Table(view, sqlalchemy.MetaData(), autoload_with=engine)
    with engine.connect() as connection:
        frame = pandas.read_sql_query(f"SELECT * FROM {view}", connection)
    reflected = {column.name: type(column.type).__name__ for column in table.columns}
    found[view] = {name: [reflected[name], kind.kind] for name, kind in frame.dtypes.items()}
print(json.dumps([sqlite3.sqlite_version_info, found]))
"""


@pytest.mark.slow
def test_sqlalchemy_and_pandas_find_the_type_of_every_column(cache: Cache) -> None:
    python = find_python("sqlite-utils", "pandas", "sqlalchemy")
    save(cache, "app:1", image(1, 2))
    save(cache, "app:2", image(1, 2, 3))
    version, found = run_with(python, REFLECT, cache.directory / "index.db")
    for view in cache.list_views():
        for column in view.columns:
            reflected, kind = found[view.name][column.name]
            if version >= [3, 41]:  # an older SQLite does not report the type of an expression
                assert reflected == column.type, (view.name, column.name)
            if view.name == "image_usage" and column.type != "TEXT" and column.name != "built_days":
                assert kind == ("i" if column.type == "INTEGER" else "f"), column.name


@pytest.mark.slow
def test_datasette_shows_the_descriptions_of_the_views(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(cachedb("sql", "--datasette-metadata").stdout)
    index = cache.directory / "index.db"
    page = run("datasette", index, "--metadata", tmp_path / "metadata.json", "--get", "/index/garbage")
    (view,) = [view for view in cache.list_views() if view.name == "garbage"]
    assert html.escape(view.description) in page
    save(cache, "app:1", image(1, 2))
    page = run("datasette", index, "--metadata", tmp_path / "metadata.json", "--get", "/index/image_usage")
    assert "bytes of its blobs that are not stored" in page


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
