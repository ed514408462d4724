"""`cachedb sql`: how rows are printed, where the query comes from, how it ends, and the priority of its process."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from cachedb import Cache
from tests.cli.test_main import run_on_terminal
from tests.conftest import Run
from tests.support import make
from tests.support.processes import cpu_seconds
from tests.support.queries import ENDLESS
from tests.support.waiting import wait_until

IMAGE = make.image(1, 2)

pytestmark = pytest.mark.usefixtures("check_promises")


@pytest.fixture
def cache(cache: Cache) -> Cache:
    make.save(cache, "app:1", IMAGE)
    return cache


PRINTED = {
    "table": 'name    n  t\napp:1  12  a|"b,\\n\n',
    "json": '[\n  {"name": "app:1", "n": 12, "t": "a|\\"b,\\n"}\n]\n',
    "ndjson": '{"name": "app:1", "n": 12, "t": "a|\\"b,\\n"}\n',
    "csv": 'name,n,t\napp:1,12,"a|""b,\n"\n',
    "tsv": 'name\tn\tt\napp:1\t12\t"a|""b,\n"\n',
    "markdown": '| name | n | t |\n| --- | --- | --- |\n| app:1 | 12 | a\\|"b,\\\\n |\n',
}


@pytest.mark.parametrize("form", PRINTED)
def test_rows_are_printed_in_the_chosen_format(cachedb: Run, cache: Cache, form: str) -> None:
    query = "SELECT name, :n + 2 AS n, 'a|\"b,' || char(10) AS t FROM image_usage"
    assert cachedb("sql", "--format", form, "-p", "n=10", query).stdout == PRINTED[form]


STRANGE = {
    "table": "a\\nb  b     c  e       i  a\\nb\n   1  00ff     x\\ry  inf     2\n",
    "json": '[\n  {"a\\nb": 1, "b": "00ff", "c": null, "e": "x\\ry", "i": null, "a\\nb_2": 2}\n]\n',
    "ndjson": '{"a\\nb": 1, "b": "00ff", "c": null, "e": "x\\ry", "i": null, "a\\nb_2": 2}\n',
    "csv": '"a\nb",b,c,e,i,"a\nb"\n1,00ff,,"x\ry",inf,2\n',
    "tsv": '"a\nb"\tb\tc\te\ti\t"a\nb"\n1\t00ff\t\t"x\ry"\tinf\t2\n',
    "markdown": "| a\\\\nb | b | c | e | i | a\\\\nb |\n| --- | --- | --- | --- | --- | --- |\n"
    "| 1 | 00ff |  | x\\\\ry | inf | 2 |\n",
}


@pytest.mark.parametrize("form", STRANGE)
def test_special_values_and_names_are_printed_in_every_format(cachedb: Run, cache: Cache, form: str) -> None:
    """The row has a blob, a carriage return and infinity; a column name is repeated and has two lines."""
    query = "SELECT 1 AS 'a\nb', x'00ff' AS b, NULL AS c, 'x' || char(13) || 'y' AS e, 1e999 AS i, 2 AS 'a\nb'"
    assert cachedb("sql", "--format", form, query, text=False).stdout.decode() == STRANGE[form]


FORMULAS = [
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "\uff1d1",
    "\uff0b1",
    "\uff0d1",
    "\uff201",
    "-",
    "+1e",
]


@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_no_cell_is_a_formula_of_a_spreadsheet(cachedb: Run, cache: Cache, form: str) -> None:
    query = f"SELECT value FROM json_each({sqlite_text(json.dumps(FORMULAS))})"
    printed = cachedb("sql", "--format", form, query, text=False).stdout.decode()
    cells = [row[0] for row in csv.reader(io.StringIO(printed, newline=""), delimiter="," if form == "csv" else "\t")]
    assert cells == ["value", *(f"'{text}" for text in FORMULAS)]


def sqlite_text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_a_number_stays_a_number_in_a_cell(cachedb: Run, cache: Cache, form: str) -> None:
    query = "SELECT -1 UNION ALL SELECT -1.5 UNION ALL SELECT '-2' UNION ALL SELECT '+3.25e-7' UNION ALL SELECT 'a=1'"
    assert cachedb("sql", "--format", form, query).stdout.splitlines()[1:] == ["-1", "-1.5", "-2", "+3.25e-7", "a=1"]


def test_a_cell_of_markdown_contains_no_html_and_no_link(cachedb: Run, cache: Cache) -> None:
    text = "<img src=x onerror=alert(1)> & ![x](http://example.org/x) `code`"
    printed = cachedb("sql", "--format", "markdown", f"SELECT '{text}' AS '<b>'").stdout.splitlines()
    assert printed[0] == "| &lt;b&gt; |"
    assert printed[2] == ("| &lt;img src=x onerror=alert(1)&gt; &amp; !\\[x\\](http://example.org/x) \\`code\\` |")


@pytest.mark.slow
def test_a_terminal_gets_no_escape_sequence_in_a_cell(cache: Cache) -> None:
    command = [sys.executable, "-m", "cachedb", "--dir", str(cache.directory), "sql", "--format", "csv"]
    shown = run_on_terminal([*command, "SELECT 'a' || char(27) || '[2J' AS x"])
    assert "\x1b[2J" not in shown
    assert "a\\x1b[2J" in shown


@pytest.mark.slow
def test_a_row_wider_than_the_terminal_is_printed_with_one_line_a_value(cache: Cache) -> None:
    command = [sys.executable, "-m", "cachedb", "--dir", str(cache.directory), "sql"]
    cache.tag("app:1", "app:2")
    shown = run_on_terminal([*command, "SELECT * FROM image_usage"]).replace("\r\n", "\n").split("\n\n")
    assert [image.splitlines()[0].split() for image in shown] == [["name", "app:1"], ["name", "app:2"]]
    assert [line.split()[0] for line in shown[0].splitlines()[:4]] == ["name", "repository", "reference", "digest"]
    assert (
        "app:1"
        not in run_on_terminal([*command, "SELECT name, created_at, blobs, size FROM image_usage"]).splitlines()[0]
    )
    assert run_on_terminal([*command, "SELECT * FROM image_usage WHERE 0"]) == "", "there is no row to print"
    assert run_on_terminal([*command, "SELECT name FROM image_usage WHERE 0"]).startswith("\x1b[1m")


@pytest.mark.parametrize("form", PRINTED)
def test_an_empty_result_is_printed_in_every_format(cachedb: Run, cache: Cache, form: str) -> None:
    done = cachedb("sql", "--format", form, "SELECT 1 AS one WHERE 0")
    assert done.returncode == 0
    if form == "json":
        assert json.loads(done.stdout) == []
    else:
        assert done.stdout == {"table": "one\n", "ndjson": "", "markdown": "| one |\n| --- |\n"}.get(form, "one\n")


@pytest.mark.slow
def test_a_parameter_written_as_a_number_is_a_number(cachedb: Run, cache: Cache) -> None:
    for text, kind in {
        "10": "integer",
        "-1.5": "real",
        "1.10": "text",
        "007": "text",
        "1e3": "text",
        "nan": "text",
        "inf": "text",
        "9223372036854775807": "integer",
        "20261128171001123456": "text",
        "": "text",
    }.items():
        done = cachedb("sql", "--format", "csv", "-p", f"x={text}", "SELECT typeof(:x) AS t, :x || '' AS x")
        assert done.stdout == f"t,x\n{kind},{text or ''}\n"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["csv", "markdown", "table"])
def test_a_character_that_the_users_encoding_lacks_is_escaped(cachedb: Run, cache: Cache, form: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1:strict"}
    done = cachedb("sql", "--format", form, "SELECT char(0xe9, 0x65e5) AS x", text=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\xe9\\u65e5" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["sql", "SELECT 1"], ["sql", "--format", "csv", "SELECT 1"], ["df"], ["ls"]])
def test_a_closed_stderr_is_no_error(cachedb: Run, cache: Cache, arguments: list[str]) -> None:
    done = cachedb(*arguments, preexec_fn=lambda: os.close(2))
    assert (done.returncode, done.stderr, bool(done.stdout)) == (0, "", True)


@pytest.mark.slow
def test_a_query_that_runs_out_of_memory_fails_in_one_line(cachedb: Run, cache: Cache) -> None:
    limit = (400 * 1024 * 1024,) * 2
    query = ENDLESS.format("randomblob(4000000)")
    failed = cachedb("sql", query, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit))
    assert (failed.returncode, failed.stderr.count("\n"), "out of memory" in failed.stderr) == (1, 1, True)


@pytest.mark.slow
def test_a_query_is_read_from_a_file_or_stdin(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "query.sql").write_text("SELECT count(*) AS n FROM images")
    assert cachedb("sql", "--file", str(tmp_path / "query.sql")).stdout == "n\n1\n"
    assert cachedb("sql", "-", input="SELECT 2 AS n").stdout == "n\n2\n"
    assert cachedb("sql", "--file", "-", input="SELECT 3 AS n").stdout == "n\n3\n"
    (tmp_path / "query.sql").write_bytes(b"\xef\xbb\xbfSELECT\r\nnme FROM image_usage")
    with (tmp_path / "query.sql").open("rb") as opened:
        for arguments in (["--file", tmp_path / "query.sql"], ["-"]):
            assert cachedb("sql", *arguments, stdin=opened).stderr.endswith(
                "in line 2:\n  nme FROM image_usage\n  ^^^\n"
            )
    for encoding in ("utf-8:strict", "utf-8:surrogateescape"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        failed = cachedb("sql", "-", input=b"SELECT '\xff'", text=False, env=environment)
        assert (failed.returncode, failed.stderr.count(b"\n"), b"it is not UTF-8 text" in failed.stderr) == (2, 1, True)
    failed = cachedb("sql", "--file", str(tmp_path / "nothing.sql"))
    assert (failed.returncode, "cannot read" in failed.stderr) == (2, True)
    assert cachedb("sql", "--schema", "SELECT 1").returncode == 2


WITHOUT_HEADER = {"table": "app:1  4\n", "csv": "app:1,4\n", "tsv": "app:1\t4\n", "markdown": "| app:1 | 4 |\n"}


@pytest.mark.parametrize("form", WITHOUT_HEADER)
def test_no_header_leaves_out_the_names_of_the_columns(cachedb: Run, cache: Cache, form: str) -> None:
    query = "SELECT name, blobs FROM image_usage"
    assert cachedb("sql", "--no-header", "--format", form, query).stdout == WITHOUT_HEADER[form]
    assert cachedb("sql", "--no-header", "--format", form, f"{query} WHERE 0").stdout == ""
    assert cachedb("report", "--no-header", "--format", form, "garbage").stdout == ""


def test_json_has_booleans_in_the_boolean_columns_of_the_views(cachedb: Run, cache: Cache) -> None:
    query = "SELECT complete, blobs = 4 AS four, 7 AS held, NULL AS stored FROM image_usage"
    (row,) = json.loads(cachedb("sql", "--format", "json", query).stdout)
    assert row == {"complete": True, "four": 1, "held": 7, "stored": None}
    assert row["complete"] is True
    assert cachedb("sql", "--format", "csv", "SELECT complete FROM image_usage").stdout == "complete\n1\n"


def test_sql_without_a_query_lists_the_views_and_the_schema_is_valid_sql(cachedb: Run, cache: Cache) -> None:
    assert "image_usage  " in cachedb("sql").stdout
    views = json.loads(cachedb("sql", "--format", "json").stdout)
    assert "image_usage" in [view["name"] for view in views]
    assert all(view["view"] == view["name"] for view in views), "the old key"
    shell = sqlite3.connect(":memory:")
    shell.executescript(cachedb("sql", "--schema").stdout)
    assert shell.execute("SELECT count(*) FROM image_usage").fetchone() == (0,)
    shell.close()


@pytest.mark.slow
def test_schema_prints_the_columns_of_a_view(cachedb: Run, cache: Cache) -> None:
    printed = cachedb("sql", "--schema", "garbage").stdout.splitlines()
    assert [line.split()[:2] for line in printed] == [
        ["COLUMN", "TYPE"], ["digest", "TEXT"], ["size", "INTEGER"], ["stored_at", "TEXT"],
    ]  # fmt: skip
    views = {view.name: view for view in cache.list_views()}
    listed = json.loads(cachedb("sql", "--schema", "image_usage", "--format", "json").stdout)
    assert listed == [column._asdict() for column in views["image_usage"].columns]
    for name, hint in (("image_usge", "did you mean image_usage?"), ("xyzzy", "`cachedb sql` lists the views")):
        failed = cachedb("sql", "--schema", name)
        assert (failed.returncode, failed.stderr) == (2, f"cachedb: there is no view {name!r}: {hint}\n")


def test_datasette_metadata_describes_every_view_and_column(cachedb: Run, cache: Cache) -> None:
    described = json.loads(cachedb("sql", "--datasette-metadata").stdout)["databases"]["index"]["tables"]
    assert described == {
        view.name: {
            "description": view.description,
            "columns": {column.name: column.description for column in view.columns},
        }
        for view in cache.list_views()
    }
    assert cachedb("sql", "--datasette-metadata", "SELECT 1").returncode == 2


@pytest.mark.slow
def test_the_place_of_an_error_is_marked(cachedb: Run, cache: Cache) -> None:
    failed = cachedb("sql", "SELECT name\nFROM image_usge WHERE 1")
    assert failed.returncode == 2
    assert failed.stderr == (
        "cachedb: no such table: image_usge: did you mean image_usage?, in line 2:\n"
        "  FROM image_usge WHERE 1\n       ^^^^^^^^^^\n"
    )
    failed = cachedb("sql", "DELETE FROM images")
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert cachedb("sql", "--timeout", "1s", ENDLESS.format("count(*)")).returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["count(*)", "sum(length(human(x)))", "count(ago('2020-01-01'))"])
@pytest.mark.parametrize("form", ["table", "ndjson"])
def test_an_interrupt_ends_a_query(cache: Cache, form: str, what: str) -> None:
    command = [sys.executable, "-m", "cachedb", "sql", "--format", form, ENDLESS.format(what)]
    environment = {**os.environ, "CACHEDB_DIR": str(cache.directory)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        # The query runs at idle priority, so a busy machine gives it little time.
        assert wait_until(lambda: os.sched_getscheduler(process.pid) == os.SCHED_IDLE)
        begun = cpu_seconds(process.pid)
        assert wait_until(lambda: cpu_seconds(process.pid) >= begun + 0.1, 120)
        process.send_signal(signal.SIGINT)
        try:
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, error) == (130, "\ncachedb: interrupted\n")


FIRST = {"json": b"[\n", "ndjson": b'{"x": 1}\n', "csv": b"x\n1\n", "markdown": b"| x |\n| --- |\n| 1 |\n"}


@pytest.mark.slow
@pytest.mark.parametrize("form", FIRST)
def test_rows_are_printed_before_the_query_ends(cache: Cache, form: str) -> None:
    command = [sys.executable, "-m", "cachedb", "sql", "--format", form, ENDLESS.format("x")]
    environment = {**os.environ, "CACHEDB_DIR": str(cache.directory)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        for line in FIRST[form].splitlines(keepends=True):
            assert process.stdout.readline() == line
        process.stdout.close()  # as `head` does
        assert process.wait(timeout=60) == 1
        assert process.stderr
        assert process.stderr.read() == b""


PRINT_PRIORITIES = """
import os, sys
from cachedb import cache
from cachedb.cli import main
def print_priority_of(name):
    method = getattr(cache.Cache, name)
    def print_and_call(*arguments, **options):
        print(name, os.sched_getscheduler(0) == os.SCHED_IDLE, os.getpriority(os.PRIO_PROCESS, 0), file=sys.stderr)
        return method(*arguments, **options)
    setattr(cache.Cache, name, print_and_call)
for name in ("open", "sql", "run_report", "get_html_report", "close"):
    print_priority_of(name)
REFUSE
main.cli(sys.argv[1:])
"""


def read_priorities(directory: Path, *arguments: str, refuse: str = "") -> dict[str, tuple[str, int]]:
    """Return, for each method that a command calls, whether it runs at idle priority, and its nice value."""
    command = [sys.executable, "-c", PRINT_PRIORITIES.replace("REFUSE", refuse), "--dir", str(directory), *arguments]
    stderr = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {name: (idle, int(nice)) for name, idle, nice in map(str.split, stderr.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        (("sql", "SELECT 1"), "sql"),
        (("report", "garbage"), "run_report"),
        (("report", "--html", "-"), "get_html_report"),
    ],
)
def test_a_query_runs_at_idle_priority_once_the_cache_is_open(
    cache: Cache, arguments: tuple[str, ...], method: str
) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    found = read_priorities(cache.directory, *arguments)
    assert found["open"] == ("False", own)  # opening may take the write lock
    assert found[method] == ("True", own)
    if os.geteuid() == 0:  # other users cannot raise their priority again
        assert found["close"] == ("False", own)


@pytest.mark.slow
def test_a_query_is_nice_if_idle_priority_is_not_allowed(cache: Cache) -> None:
    refuse = "def refuse(*_): raise PermissionError\nos.sched_setscheduler = refuse"
    found = read_priorities(cache.directory, "sql", "SELECT 1", refuse=refuse)
    assert found["sql"] == ("False", 19)
