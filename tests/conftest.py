"""Fixtures and helpers for all tests: a cache, its files and rows, processes, other tools."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache
from cachedb.index.sqlite.database import Database
from tests.support import leftovers, new_index
from tests.support.command_server import CommandServer

# A shell's background job ignores SIGINT, and the processes that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # `nohup` ignores it; a new program begins without the handler
    signal.signal(signal.SIGHUP, lambda *_: None)

# Otherwise each worker would rewrite all asserts again, and each process that a test starts would compile the package.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# The files of tests live for a moment. In memory, a sync takes no time.
MEMORY, ENOUGH_BYTES = "/dev/shm", 4 << 30
if "TMPDIR" not in os.environ and os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > ENOUGH_BYTES:
    os.environ["TMPDIR"], tempfile.tempdir = MEMORY, None


def pytest_configure() -> None:
    """Clean up after the run however it ends, and let no Hypothesis example fail for slowness."""
    leftovers.isolate_mounts()
    leftovers.start_watcher()
    from hypothesis import HealthCheck, settings  # here, because the scripts that import this module do not need it

    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")


@pytest.hookimpl(optionalhook=True)  # without xdist
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of workers for `-n auto`: one more than CPUs, because tests also wait for other processes."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_runtest_setup(item: pytest.Item) -> None:
    new_index.install(copies=item.get_closest_marker("attack") is None)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(directory: Path) -> Iterator[Cache]:
    with Cache.open(directory) as opened:
        yield opened


@pytest.fixture
def check_promises(directory: Path) -> Iterator[None]:
    """Check at the end that the cache keeps its promises, if the test has made one."""
    from tests.support.promises import check  # here, because that module imports this one

    yield
    if directory.exists():
        check(directory)


@pytest.fixture
def index(cache: Cache) -> Iterator[Database]:
    """Yield the database of a new cache."""
    database = Database(cache.directory)
    yield database
    database.close()


@pytest.fixture(autouse=True)
def _hide_user_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the default cache of the user who runs the tests."""
    monkeypatch.setenv("CACHEDB_DIR", str(tmp_path / "default-cache"))


@pytest.fixture(autouse=True)
def _restore_log() -> Iterator[None]:
    """Undo what a command does to the library's log if it runs in the process of the tests."""
    yield
    logger = logging.getLogger("cachedb")
    if not logger.propagate:
        logger.propagate, logger.handlers = True, []
        logger.setLevel(logging.NOTSET)


Run = Callable[..., subprocess.CompletedProcess[Any]]


@functools.cache
def start_command_server() -> CommandServer:
    """Return the server of this pytest worker; it forks for each command and each script."""
    return CommandServer(Path(__file__).parents[1])


@pytest.fixture(scope="session", autouse=True)
def _close_command_server() -> Iterator[None]:
    yield
    if start_command_server.cache_info().currsize:
        start_command_server().close()


@pytest.fixture(scope="session")
def command_server() -> CommandServer:
    return start_command_server()


@pytest.fixture
def cachedb(directory: Path, command_server: CommandServer) -> Run:
    """Return a function that runs a command in a new process."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[Any]:
        words = ["--dir", str(directory), *map(str, arguments)]
        options = {"text": True, "capture_output": True, "timeout": 120, **options}
        if command_server.accepts(options):
            return command_server.run(words, **options)
        return subprocess.run([sys.executable, "-m", "cachedb", *words], check=False, **options)

    return run


GO_PEERS = {
    line.rpartition("/")[2].partition("@")[0]: line
    for line in (Path(__file__).parent / "peers" / "go.txt").read_text().splitlines()
}
"""The peers that Debian lacks: a Go module and its version by the name of the program."""


def find_peer(program: str, install: str = "") -> str:
    """Return a peer's path; without it, skip the test, or fail if CACHEDB_REQUIRE_PEERS is set."""
    path = shutil.which(program)
    if path is None:
        if program in GO_PEERS:
            install = f"go install {GO_PEERS[program]}, and put $(go env GOPATH)/bin on the PATH"
        message = f"{program} is not installed: {install or f'apt-get install {program}'}"
        if os.environ.get("CACHEDB_REQUIRE_PEERS"):
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture
def peer() -> Callable[[str], str]:
    return find_peer


def files_of(directory: Path) -> dict[str, int]:
    """Return the blobs on disk: size by digest."""
    found = {}
    for folder in (directory / "blobs").iterdir():
        for path in folder.iterdir():
            found[f"{folder.name}:{path.name}"] = path.stat().st_size
    return found


def stored_rows(directory: Path) -> dict[str, int]:
    """Return the blobs that are stored according to the index: size by digest."""
    connection = sqlite3.connect(directory / "index.db")
    try:
        return dict(connection.execute("SELECT digest, size FROM blobs WHERE stored_at IS NOT NULL"))
    finally:
        connection.close()


def snapshot(directory: Path) -> dict[str, object]:
    """Return the rows and files that a failed operation must not change."""
    connection = sqlite3.connect(directory / "index.db")
    try:
        tables = {
            table: sorted(connection.execute(f"SELECT * FROM {table}"), key=repr)
            for table in (
                "images",
                "blobs",
                "image_blobs",
                "image_labels",
                "image_platforms",
                "leases",
                "lasting_holds",
                "trash",
            )
        }
    finally:
        connection.close()
    folders = {name: sorted(os.listdir(directory / name)) for name in ("trash", "locks", "ingest")}
    return {"files": files_of(directory), **tables, **folders}


def read_revision(directory: Path) -> str | None:
    """Return the revision of the schema of a cache's index."""
    with closing(Database(directory)) as database:
        return database.revision()


def is_open(connection: sqlite3.Connection) -> bool:
    """Return whether a connection is open."""
    try:
        connection.total_changes  # noqa: B018 - a closed connection raises an error
    except sqlite3.ProgrammingError:
        return False
    return True


def start_python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python on a script, with pipes to its stdin and from its stdout."""
    # Some scripts fork while threads run, on purpose; newer Pythons warn about it.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script)]
    return subprocess.Popen(
        [*command, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def run_python(script: str, *arguments: object, new_interpreter: bool = False) -> str:
    """Run a script, assert that it succeeds, and return its output; in a fork of the command server, if possible."""
    if not new_interpreter and (server := start_command_server()).accepts({}):
        done = server.run([*map(str, arguments)], script=textwrap.dedent(script), text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)
    with start_python(script, *arguments) as process:
        try:
            output, _ = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, output
    return output


@contextmanager
def running(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a script during the block, which begins after its first line of output; kill it at the end."""
    with start_python(script, *arguments) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()
