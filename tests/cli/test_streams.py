"""Commands whose stdin, stdout or stderr is closed, full, or a terminal: one line and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cachedb import Cache
from tests.support import make


@pytest.fixture
def filled(cache: Cache) -> Cache:
    make.save(cache, "app:1", make.image(1))
    return cache


def run(cache: Cache, line: str, redirections: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell, with redirections that close or replace streams."""
    python = f"{os.fspath(sys.executable)!r} -m cachedb --dir {os.fspath(cache.directory)!r}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = ["sh", "-c", f"{python} {line} {redirections}"]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("line", ["import -", "import - name:1", "blob add -", "sql -", "sql --file -"])
def test_a_closed_stdin_is_a_usage_error(filled: Cache, line: str) -> None:
    done = run(filled, line, "<&-")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cachedb: stdin is closed: send the ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        *(
            "export app:1 -",
            "manifest app:1",
            "report --html -",
            "report garbage",
            "ls",
            "show app:1",
            "sql 'SELECT 1'",
        ),
        *("df", "stats", "ps", "holds", "policy show", "db history", "help ls", "blob path sha256:0", "tags app"),
    ],
)
def test_a_result_is_not_written_to_a_closed_stdout(filled: Cache, line: str) -> None:
    done = run(filled, line, ">&-")
    assert done.returncode == 2
    assert done.stderr.startswith("cachedb: stdout is closed: redirect it")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["tag app:1 app:2", "rm app:1", "gc", "verify", "report --html /dev/null", "exists app:1"]
)
def test_a_command_that_does_more_than_print_works_without_stdout(filled: Cache, line: str) -> None:
    done = run(filled, line, ">&-")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("line", ["ls", "manifest app:1", "export app:1 -", "sql 'SELECT 1'", "--help", "stats"])
def test_a_full_stdout_is_an_error_of_one_line(filled: Cache, line: str) -> None:
    done = run(filled, line, ">/dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("cachedb: cannot ")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code"), [("exists none:1", 3), ("ls --none", 2), ("import /none", 1), ("gc", 0), ("show A", 2)]
)
@pytest.mark.parametrize("redirections", ["2>/dev/full", "2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_the_exit_code_is_right_if_stderr_cannot_be_written(
    filled: Cache, line: str, code: int, redirections: str
) -> None:
    assert run(filled, line, redirections).returncode == code


@pytest.mark.slow
def test_no_file_of_the_cache_takes_the_place_of_a_standard_stream(filled: Cache, tmp_path: Path) -> None:
    archive = make.write(tmp_path / "other.tar", make.oci_files({"other:1": make.image(2)}))
    code = f"""
import os, sys
from cachedb import Cache
from cachedb.cli import main as cli
real = Cache.cache_from_tar
def note_streams(self, *arguments, **options):
    found = [os.readlink(f"/proc/self/fd/{{number}}") for number in range(3)]
    open({str(tmp_path / "found")!r}, "w").write(repr(found))
    return real(self, *arguments, **options)
Cache.cache_from_tar = note_streams
sys.argv = ["cachedb", "--dir", {str(filled.directory)!r}, "import", {str(archive)!r}]
cli.main()
"""
    (tmp_path / "code.py").write_text(code)
    command = f"{os.fspath(sys.executable)!r} {os.fspath(tmp_path / 'code.py')!r} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False, timeout=120).returncode == 0
    # A Python that was built with an old C library opens /dev/urandom first, and keeps it open.
    assert (tmp_path / "found").read_text().replace("urandom", "null") == repr(["/dev/null"] * 3)
    assert filled.is_image_complete("other:1")


@pytest.mark.slow
def test_content_is_not_read_from_a_terminal(filled: Cache) -> None:
    ours, theirs = os.openpty()
    try:
        for line in ("import -", "blob add -"):
            command = [sys.executable, "-m", "cachedb", "--dir", str(filled.directory), *line.split()]
            done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, check=False, timeout=120)
            assert done.returncode == 2
            assert done.stderr.startswith("cachedb: stdin is a terminal: ")
    finally:
        os.close(ours)
        os.close(theirs)
