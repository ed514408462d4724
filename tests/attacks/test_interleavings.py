"""Interleavings: two processes at one cache, stepped through the orders of the steps that each of them takes.

Whatever the order, the two have done what they would have done one after the other: both outcomes, and the cache
that they leave, are those of one of the two serial orders. At every stop the directory is what a kill would leave
there, so every stored row must have its file (P1), and at the end all promises are checked.

By default a sample of the orders of each pair is run, the same each time; where ``CACHEDB_EVERY_ORDER`` is set, all
of them; ``CACHEDB_ORDER`` is the word of one, from a failure, to run that alone. Each pair has step points of the
kinds that matter to it, so that there are few enough:

======== ==========================================================================
(lock)   before a process waits for the write lock; there for every pair
commit   before a write transaction's commit, in the critical section
read     before a read transaction sees its snapshot
blobs    before a file gets its name in ``blobs/`` or loses it, in the critical section
trash    before ``trash/`` is listed, and before a file in it is unlinked
ingest   before what is received is renamed, listed or unlinked
open     before a blob's file is opened
receive  before a blob is received, and after it
session  before a session's lock file is tried or unlinked
inside   where an actor of this module says so
``…*``   of several of the kind in a row, the first
======== ==========================================================================
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.default import DefaultDialect

import cachedb.transports.archive.read
import cachedb.transports.archive.write_layout  # noqa: F401 - for the zygote, so that no actor imports it
from cachedb import Cache, CacheError
from cachedb.content import collect as collecting
from cachedb.content import publish
from cachedb.content.held import held
from cachedb.disk import locks, single_flight, writer
from cachedb.index.sqlite.database import Database
from cachedb.operations import export_archive
from tests.conftest import files_of, run_python
from tests.support import make
from tests.support.interleaving import Choose, Failed, Order, Outcome, Steps, Zygote, every_order, run
from tests.support.make import save
from tests.support.promises import check

pytestmark = pytest.mark.attack

EVERY = bool(os.environ.get("CACHEDB_EVERY_ORDER"))
ORDER = os.environ.get("CACHEDB_ORDER", "")
"""A word from a failure, to run that order alone."""
SAMPLE = 20
"""Orders of each pair that are run by default."""

OLD = make.image(1)
"""Saved before, as old:1."""
SHARING = make.image(1, 2)
"""Saved before, as sharing:1; shares a layer with the old one."""
GARBAGE = make.image(3)
"""Its blobs are there, and nothing refers to them; in garbage.tar it is an image, and in the folder garbage."""
HALF = make.layer(4)
"""A dead session has linked it, and not committed."""
TRASHED = make.layer(5)
"""A dead session has forgotten it, and not moved its file."""
LEFT = make.image(4, 5)
"""Of both, in left.tar."""
NEW = make.layer(6)


WRITE_LOCK = "write.lock"


# Actors. Each runs in a process of its own, and says how it ended in what JSON can hold.


@contextmanager
def opened(directory: Path, steps: Steps) -> Iterator[Cache]:
    """A cache that was open before the stepping, and is closed after it."""
    with Cache.open(directory / "cache") as cache, steps.stepped():
        yield cache


def import_old(directory: Path, steps: Steps) -> list[str]:
    with opened(directory, steps) as cache:
        return [str(image.digest) for image in cache.cache_from_tar(directory / "old.tar", "again:1")]


def import_garbage(directory: Path, steps: Steps) -> list[str]:
    with opened(directory, steps) as cache:
        return [str(image.digest) for image in cache.cache_from_tar(directory / "garbage.tar")]


def link_garbage(directory: Path, steps: Steps) -> list[str]:
    with opened(directory, steps) as cache:
        found = cache.cache_from_tar(directory / "garbage", link=True)
    for data in GARBAGE.blobs.values():
        assert (directory / "garbage" / "blobs" / "sha256" / make.hex_of(data)).read_bytes() == data
    return [str(image.digest) for image in found]


def import_left(directory: Path, steps: Steps) -> list[str]:
    """Import what others left half done; this cache was open before they died, and has swept nothing away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "recover", lambda database, **_: [])
        cache = Cache.open(directory / "cache")
    with cache, steps.stepped():
        return [str(image.digest) for image in cache.cache_from_tar(directory / "left.tar")]


def remove_old(directory: Path, steps: Steps) -> None:
    with opened(directory, steps) as cache:
        cache.remove_manifest("old:1")


def remove_sharing(directory: Path, steps: Steps) -> None:
    with opened(directory, steps) as cache:
        cache.remove_manifest("sharing:1")


def collect(directory: Path, steps: Steps) -> None:
    """Collect garbage; the recovery at the beginning of that has pairs of its own."""
    recover = collecting.recover

    def passed_over(database: Database) -> None:
        with steps.passed_over():
            recover(database)

    with opened(directory, steps) as cache, pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "recover", passed_over)
        cache.collect_garbage()


def save_new(directory: Path, steps: Steps) -> str:
    with opened(directory, steps) as cache:
        return cache.save_blob(make.digest_of(NEW), NEW)


def save_garbage(directory: Path, steps: Steps) -> str:
    """Store an image, part by part, of which the blobs are there unreferenced."""
    with opened(directory, steps) as cache:
        for data in GARBAGE.layers:
            cache.save_blob(make.digest_of(data), data)
        cache.add_blob(GARBAGE.config)
        return cache.save_manifest("garbage:1", GARBAGE.manifest).digest


def tag_old(directory: Path, steps: Steps) -> str:
    with opened(directory, steps) as cache:
        return cache.tag("old:1", "second:1").digest


def export_old(directory: Path, steps: Steps) -> str:
    hold, began = held, []

    @contextmanager
    def noted(*arguments: Any) -> Iterator[Any]:
        with hold(*arguments) as found:
            began.append(found)
            yield found

    with opened(directory, steps) as cache, pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_archive, "held", noted)
        try:
            cache.export("old:1", directory / "exported.tar")
        except CacheError as error:
            if began:
                raise AssertionError("P3: what an export has found, it exports") from error
            raise
    return hashlib.sha256((directory / "exported.tar").read_bytes()).hexdigest()


def hold_old(directory: Path, steps: Steps) -> None:
    with opened(directory, steps) as cache, cache.hold("old:1"):
        for digest, data in OLD.blobs.items():
            steps.step("inside", "the hold")
            assert cache.has_blob(digest), "P4: what is held is not forgotten"
            assert cache.get_blob_path(digest).read_bytes() == data, "P4: what is held is there"


def move_old(directory: Path, steps: Steps) -> str:
    """Have a name point to another image."""
    with opened(directory, steps) as cache:
        return cache.tag("sharing:1", "old:1").digest


def read_old(directory: Path, steps: Steps) -> bytes | str:
    with opened(directory, steps) as cache:
        return hashlib.sha256(cache.get_manifest("old:1")).hexdigest()


def open_and_close(directory: Path, steps: Steps) -> None:
    with steps.stepped():
        Cache.open(directory / "cache").close()


def visit(directory: Path, steps: Steps) -> None:
    """Begin a session, and end it with a blob that nothing refers to."""
    with steps.stepped(), Cache.open(directory / "cache") as cache:
        cache.add_blob(NEW)


def create(directory: Path, steps: Steps) -> None:
    with steps.stepped():
        Cache.open(directory / "created").close()


ACTORS: dict[str, Callable[[Path, Steps], object]] = {
    actor.__name__: actor
    for actor in (
        import_old, import_garbage, link_garbage, import_left, remove_old, remove_sharing, collect, save_new,
        save_garbage, tag_old, export_old, hold_old, move_old, read_old, open_and_close, visit, create,
    )
}  # fmt: skip


def act(actor: str, directory: Path, steps: Steps) -> object:
    """Be an actor; in a process that was forked for it."""
    with pytest.MonkeyPatch.context() as patch:
        announce_locks(patch, steps)
        stop_at_files(patch, steps, directory)
        stop_at_transactions(patch, steps)
        patch.setattr(os, "fsync", lambda descriptor: None)  # no power is cut here
        # Whose turn it is says the word, and not who asked first.
        patch.setattr(locks, "_await_turn", lambda queue, path, number, wait: None)
        patch.setattr(os, "cpu_count", lambda: 1)  # an import's threads take no turns of their own
        return ACTORS[actor](directory, steps)


def warm() -> None:
    """Have what is slow the first time done before any actor is forked."""
    with tempfile.TemporaryDirectory() as directory, Cache.open(directory) as cache:
        save(cache, "warm:1", OLD)
        cache.export("warm:1", io.BytesIO())
        cache.remove_manifest("warm:1")
        cache.collect_garbage()


# Step points.


def announce_locks(patch: pytest.MonkeyPatch, steps: Steps) -> None:
    """Announce `write.lock`; a session's lock is a step point, for it is waited for only while it is swept away."""
    flock = fcntl.flock

    def announced(file: Any, operation: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        # A session's by its inode: its lock file may be unlinked, and made anew.
        lock = path.name if path.name == WRITE_LOCK else str(os.fstat(descriptor).st_ino)
        if path.name == "write.queue" or operation == fcntl.LOCK_SH:  # who opens the index waits for nobody here
            flock(file, operation)
        elif operation == fcntl.LOCK_UN:
            flock(file, operation)
            steps.released(lock)
        elif operation & fcntl.LOCK_NB:
            steps.step("session", "try the lock of a session")
            flock(file, operation)
            steps.took(lock)
        elif lock == WRITE_LOCK:
            steps.wants(lock, "wait for the write lock")
            flock(file, operation)
        elif path.suffix == ".producing":
            steps.wants(lock, "wait for whoever makes it")
            flock(file, operation)
        elif "session" in steps.kinds:
            steps.wants(lock, "wait for the lock of a session")
            flock(file, operation)
        else:
            flock(file, operation)

    def waited_for(_path: Path, file: Any, operation: int, wait: object) -> None:
        """Wait in the kernel, which who is announced there does to the end."""
        fcntl.flock(file, operation if wait else operation | fcntl.LOCK_NB)

    def waited_for_maker(path: Path) -> None:
        """Wait in the kernel for whoever makes something, where the product looks again and again."""
        with suppress(FileNotFoundError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            fcntl.flock(file, fcntl.LOCK_UN)

    patch.setattr(fcntl, "flock", announced)
    patch.setattr(locks, "_lock", waited_for)
    patch.setattr(single_flight, "_progress", waited_for_maker)


def full_path(path: Any, options: dict[str, Any], place: int) -> Path | None:
    """Return the path that an argument means: of a descriptor, or within the folder that another option names."""
    if isinstance(path, int):
        return Path(os.readlink(f"/proc/self/fd/{path}"))
    if not isinstance(path, (str, os.PathLike)):
        return None
    folder = options.get("dir_fd", options.get("dst_dir_fd" if place else "src_dir_fd"))
    return Path(path) if folder is None else Path(os.readlink(f"/proc/self/fd/{folder}"), path)


def stop_at_files(patch: pytest.MonkeyPatch, steps: Steps, directory: Path) -> None:
    kinds = {"blobs": "blobs", "trash": "trash", "ingest": "ingest", "locks": "session"}

    def stop_before(module: Any, name: str, place: int = 0, only: str = "") -> None:
        call = getattr(module, name)

        def stopped(*arguments: Any, **options: Any) -> Any:
            path = full_path(arguments[place], options, place) if len(arguments) > place else None
            if path is not None and path.is_relative_to(directory):
                inside = path.relative_to(directory).parts[1:]
                kind = kinds.get(inside[0], "") if inside else ""
                if only and len(inside) < 3:
                    kind = ""  # a folder, to be synced
                if kind and kind == (only or kind):
                    steps.step("open" if only else kind, f"{name} {'/'.join(part[:12] for part in inside)}")
            return call(*arguments, **options)

        patch.setattr(module, name, stopped)

    stop_before(os, "link", 1)
    for name in ("rename", "unlink", "rmdir", "listdir"):
        stop_before(os, name)
    stop_before(os, "open", only="blobs")

    receive = publish.receive

    def received(*arguments: Any, **options: Any) -> writer.Received:
        steps.step("receive", "begin to receive")
        blob = receive(*arguments, **options)
        steps.step("receive", "received")
        return blob

    patch.setattr(publish, "receive", received)


def stop_at_transactions(patch: pytest.MonkeyPatch, steps: Steps) -> None:
    """Stop before reads and commits, and announce SQLite's own lock, which is within the write lock."""
    lock = "SQLite's"

    def begin(connection: Connection) -> None:
        if "cachedb_begin" in connection.get_execution_options():
            steps.wants(lock, "begin to write", inner=WRITE_LOCK in steps.held)
        else:
            steps.step("read")

    def commit(connection: Connection) -> None:
        if "cachedb_begin" in connection.get_execution_options():
            steps.step("commit")

    rows = Database.rows

    def look_up(self: Database, *arguments: Any) -> object:
        steps.step("read")
        return rows(self, *arguments)

    patch.setattr(Database, "rows", look_up)
    event.listen(Engine, "begin", begin)  # listeners of the class come before the engine's own
    event.listen(Engine, "commit", commit)

    def announce_end(name: str) -> None:
        call = getattr(DefaultDialect, name)

        def ended(dialect: DefaultDialect, connection: Any) -> None:
            call(dialect, connection)
            steps.released(lock)

        patch.setattr(DefaultDialect, name, ended)

    announce_end("do_commit")
    announce_end("do_rollback")


# The cache that each order begins with.

LEAVE = """
import os, sys
from cachedb import Cache, cache
from cachedb.content import collect
from tests.attacks.test_interleavings import HALF, TRASHED
with Cache.open(sys.argv[1]) as opened:
    opened.add_blob(TRASHED)
opened = Cache.open(sys.argv[1])
opened.add_blob(b"leased by the dead")
if os.fork() == 0:
    collect._move_out = lambda database: os._exit(0)
    collect.recover = lambda database, **_: []
    opened.collect_garbage()
os.wait()
link = os.link
def dying(*paths, **options):
    link(*paths, **options)
    os._exit(0)
os.link = dying
opened.add_blob(HALF)
"""
"""Sessions that die: one between forgetting a blob and moving its file, one between a link and its commit."""


def prepare(directory: Path) -> None:
    with Cache.open(directory / "cache") as cache:
        save(cache, "old:1", OLD)
        save(cache, "sharing:1", SHARING)
    make.write(directory / "old.tar", make.oci_files({"old:1": OLD}))
    make.write(directory / "garbage.tar", make.oci_files({"garbage:1": GARBAGE}))
    make.write(directory / "garbage", make.oci_files({"garbage:1": GARBAGE}))
    make.write(directory / "left.tar", make.oci_files({"left:1": LEFT}))


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Where the orders run: in memory, if the machine has such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def prepared(place: Path) -> dict[str, Path]:
    """What an order may begin with, by its name."""
    found = {name: place / name for name in ("plain", "garbage", "left")}
    for directory in found.values():
        directory.mkdir()
        prepare(directory)
    with Cache.open(found["garbage"] / "cache") as cache:
        for data in GARBAGE.blobs.values():
            cache.add_blob(data)
    run_python(LEAVE, found["left"] / "cache")
    return found


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote(__name__, Path(__file__).parents[2]) as started:
        yield started


# The pairs.


class Pair(NamedTuple):
    first: str
    second: str
    before: str
    """What they find: plain, garbage or left."""
    kinds: str
    """Of the step points."""


PAIRS = [
    Pair("import_old", "remove_old", "plain", "read blobs* receive*"),
    Pair("import_garbage", "collect", "garbage", "commit read blobs*"),
    Pair("link_garbage", "collect", "garbage", "commit read blobs*"),
    Pair("save_garbage", "collect", "garbage", "read blobs*"),
    Pair("save_new", "save_new", "plain", "commit read blobs receive*"),
    Pair("remove_old", "remove_sharing", "plain", "commit read blobs* trash*"),
    Pair("remove_old", "tag_old", "plain", "commit read blobs trash"),
    Pair("remove_old", "export_old", "plain", "commit read blobs* open"),
    Pair("remove_old", "hold_old", "plain", "commit read blobs* inside"),
    Pair("remove_old", "read_old", "plain", "commit read blobs trash open"),
    Pair("move_old", "read_old", "plain", "commit read blobs trash open"),
    Pair("collect", "collect", "garbage", "read blobs* trash*"),
    Pair("open_and_close", "open_and_close", "left", "blobs* session*"),
    Pair("open_and_close", "import_left", "left", "commit blobs* session*"),
    Pair("open_and_close", "visit", "plain", "commit session ingest*"),
    Pair("create", "create", "plain", "commit read"),
]


def look(directory: Path) -> Callable[[], None]:
    """Return what looks at the directory between two steps: a kill would leave it as it is now."""

    def at_stop() -> None:
        with closing(sqlite3.connect(directory / "index.db")) as connection:
            tables = dict(connection.execute("SELECT name, type FROM sqlite_master"))
            query = "SELECT digest, size FROM blobs WHERE stored_at IS NOT NULL"
            rows = dict(connection.execute(query)) if "blobs" in tables else {}
        assert rows.items() <= (files_of(directory) if rows else {}).items(), "P1: a stored row has its file"

    return at_stop


def left_by(directory: Path) -> object:
    """The images that two actors have left, to compare; of garbage there may be less or more until it is collected."""
    with closing(sqlite3.connect(directory / "index.db")) as connection:
        return connection.execute(
            "SELECT repository, reference, role, digest, stored_at IS NOT NULL FROM images "
            "JOIN image_blobs ON image_id = images.id JOIN blobs ON blobs.id = blob_id "
            "ORDER BY repository, reference, position"
        ).fetchall()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.first}-{pair.second}")
def test_in_every_order_two_do_what_they_would_do_one_after_the_other(
    pair: Pair, zygote: Zygote, prepared: dict[str, Path], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    actors, work = (pair.first, pair.second), place / "work"
    directory = work / ("created" if pair.first == "create" else "cache")
    serial: list[tuple[object, object]] = []

    def run_one(choose: Choose) -> Order:
        shutil.copytree(prepared[pair.before], work)
        try:
            order = run(zygote, actors, work, pair.kinds.split(), choose=choose, at_stop=look(directory))
            try:
                done = (results(order.outcomes), left_by(directory))
                check(directory)
                if len(serial) < 2:
                    serial.append(done)
                assert done in serial, f"neither one after the other nor the other way round: {order.outcomes}"
            except Exception as error:
                raise Failed(f"{actors} in the {order}\n{error}") from error
            return order
        finally:
            shutil.rmtree(work)

    run_one(lambda begun: "A")
    run_one(lambda begun: "B")
    if ORDER:
        run_one(lambda begun: ORDER[len(begun)])
        return
    orders = every_order(run_one, seed=None if EVERY else 1)
    count = sum(1 for _ in (orders if EVERY else itertools.islice(orders, SAMPLE)))
    print(f"{count} orders of {pair.first} and {pair.second}")
    assert count > 3


def results(outcomes: tuple[Outcome, Outcome]) -> object:
    """What is to be compared: not where in the code an error arose."""
    return [(outcome.value, outcome.error) for outcome in outcomes]
