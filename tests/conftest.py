"""What the tests share: a cache, what is on its disk, and the peers that may be installed."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache
from cachedb.index.sqlite.database import Database
from tests.support import leftovers
from tests.support.command_server import CommandServer

# Whoever runs the tests in a shell's background has SIGINT ignored, and what they start would have it ignored too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    """Have nothing left when the run ends, however it does. The speed of this machine makes no example fail."""
    leftovers.isolate_mounts()
    leftovers.watch()
    from hypothesis import HealthCheck, settings  # which no script of a test needs

    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(directory: Path) -> Iterator[Cache]:
    with Cache.open(directory) as opened:
        yield opened


@pytest.fixture
def index(cache: Cache) -> Iterator[Database]:
    """The database of a new cache."""
    database = Database(cache.directory)
    yield database
    database.close()


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test may touch the cache of whoever runs it."""
    monkeypatch.setenv("CACHEDB_DIR", str(tmp_path / "default-cache"))


Run = Callable[..., subprocess.CompletedProcess[Any]]


@pytest.fixture(scope="session")
def command_server() -> Iterator[CommandServer]:
    """A server of this worker, that is forked for each command."""
    server = CommandServer(Path(__file__).parents[1])
    yield server
    server.close()


@pytest.fixture
def cachedb(directory: Path, command_server: CommandServer) -> Run:
    """Run the command line in a process of its own."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[Any]:
        words = ["--dir", str(directory), *map(str, arguments)]
        options = {"text": True, "capture_output": True, "timeout": 120, **options}
        if command_server.accepts(options):
            return command_server.run(words, **options)
        return subprocess.run([sys.executable, "-m", "cachedb", *words], check=False, **options)

    return run


@pytest.fixture
def interrupted_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt comes when a thread is to be started, before it runs."""

    def interrupted(_thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)


def find_peer(program: str, install: str = "") -> str:
    """Return a peer's program; without it, skip, or fail where CACHEDB_REQUIRE_PEERS says that it must be there."""
    path = shutil.which(program)
    if path is None:
        message = f"{program} is not installed: {install or f'apt-get install {program}'}"
        if os.environ.get("CACHEDB_REQUIRE_PEERS"):
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture
def peer() -> Callable[[str], str]:
    return find_peer


def files_of(directory: Path) -> dict[str, int]:
    """The blobs on disk: size by digest."""
    found = {}
    for folder in (directory / "blobs").iterdir():
        for path in folder.iterdir():
            found[f"{folder.name}:{path.name}"] = path.stat().st_size
    return found


def stored_rows(directory: Path) -> dict[str, int]:
    """The blobs that the index says are stored: size by digest."""
    connection = sqlite3.connect(directory / "index.db")
    try:
        return dict(connection.execute("SELECT digest, size FROM blobs WHERE stored_at IS NOT NULL"))
    finally:
        connection.close()


def snapshot(directory: Path) -> dict[str, object]:
    """All that a failed operation must leave as it was."""
    connection = sqlite3.connect(directory / "index.db")
    try:
        tables = {
            table: sorted(connection.execute(f"SELECT * FROM {table}"), key=repr)
            for table in ("images", "blobs", "image_blobs", "image_labels", "leases", "holds", "trash")
        }
    finally:
        connection.close()
    folders = {name: sorted(os.listdir(directory / name)) for name in ("trash", "locks", "ingest")}
    return {"files": files_of(directory), **tables, **folders}


def revision_of(directory: Path) -> str | None:
    """The schema of a cache's index."""
    with closing(Database(directory)) as database:
        return database.revision()


def is_open(connection: sqlite3.Connection) -> bool:
    """Whether a connection is open."""
    try:
        connection.total_changes  # noqa: B018 - a closed one raises
    except sqlite3.ProgrammingError:
        return False
    return True


def start_python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python on a script, with pipes to its input and from its output."""
    # A script forks on purpose, also with threads about, of which newer Pythons warn.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script)]
    return subprocess.Popen(
        [*command, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def run_python(script: str, *arguments: object) -> str:
    """Run a script to its end, which must be a good one, and return what it printed."""
    with start_python(script, *arguments) as process:
        try:
            output, _ = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, output
    return output


@contextmanager
def running(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a script beside the block, which begins when the script has printed a line; killed at the end."""
    with start_python(script, *arguments) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()
