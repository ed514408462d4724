"""Interleavings: run two processes that share a cache in many orders of their steps.

In any order, the two actors must do what they would do one after the other: their outcomes, and the cache that they
leave, must equal those of one of the two serial orders. A kill at a stop would leave the directory in exactly this
state, so at every stop every stored row must have its file (P1). At the end of each order,
`tests/support/promises.py` checks P1, P2, P3, P5 and P6.

By default the test runs a sample of the orders of each pair, the same each time. With ``CACHEDB_EVERY_ORDER`` set it
runs all orders. An order is written as As and Bs, such as ``AABBA``: each letter says which actor makes the next step.
``CACHEDB_ORDER`` is one order, from a failure; then only this order and the two serial orders run. Each pair has the
kinds of step points that matter to it, to keep the number of orders small:

======== ==========================================================================
(lock)   before a process waits for the write lock; every pair has these points
commit   before the commit of a write transaction, in the critical section
read     before a read transaction takes its snapshot
blobs    before a link, rename or unlink in ``blobs/``, in the critical section
trash    before ``trash/`` is listed, and before a file in it is unlinked
ingest   before ``ingest/`` or a folder in it is listed, and before an entry in it is renamed or removed
open     before a blob's file is opened
receive  before a blob is received, and afterwards
session  before ``locks/`` is listed, before a non-blocking attempt to take a lock, and before a lock file is unlinked;
         without ``*`` also before a wait for a session's lock
inside   where an actor in this module calls ``steps.step("inside")``
``…*``   only the first of several points of this kind in a row
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
from cachedb.content.held import hold_images
from cachedb.disk import locks, single_flight, turns, writer
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
"""An order from a failure, such as ``AABBA``; only this order and the two serial orders run."""
SAMPLE = 20
"""The number of orders of each pair that run by default."""

OLD = make.image(1)
"""The image that is saved as old:1 before each order."""
SHARING = make.image(1, 2)
"""The image that is saved as sharing:1 before each order; it shares a layer with `OLD`."""
GARBAGE = make.image(3)
"""An image in garbage.tar and in the folder garbage; the cache "garbage" has its blobs, unreferenced."""
HALF = make.layer(4)
"""A blob that a dead session has linked into blobs/ without a commit."""
TRASHED = make.layer(5)
"""A blob whose row a dead session has moved to the trash table without moving the file."""
LEFT = make.image(4, 5)
"""An image of `HALF` and `TRASHED`, in left.tar."""
NEW = make.layer(6)


WRITE_LOCK = "write.lock"


# Actors. Each runs in its own process and returns a value that JSON can hold.


@contextmanager
def opened(directory: Path, steps: Steps) -> Iterator[Cache]:
    """Open a cache before the stepping, and close it afterwards."""
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
    """Import blobs that dead sessions left half done, without a recovery when the cache is opened."""
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
    """Collect garbage.

    The recovery at its start stops only before locks, because other pairs test the recovery.
    """
    recover = collecting.recover

    def recover_without_stops(database: Database) -> None:
        with steps.without_stops():
            recover(database)

    with opened(directory, steps) as cache, pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "recover", recover_without_stops)
        cache.collect_garbage()


def save_new(directory: Path, steps: Steps) -> str:
    with opened(directory, steps) as cache:
        return cache.save_blob(make.digest_of(NEW), NEW)


def save_garbage(directory: Path, steps: Steps) -> str:
    """Store an image blob by blob; the cache already has its blobs, unreferenced."""
    with opened(directory, steps) as cache:
        for data in GARBAGE.layers:
            cache.save_blob(make.digest_of(data), data)
        cache.add_blob(GARBAGE.config)
        return cache.save_manifest("garbage:1", GARBAGE.manifest).digest


def tag_old(directory: Path, steps: Steps) -> str:
    with opened(directory, steps) as cache:
        return cache.tag("old:1", "second:1").digest


def export_old(directory: Path, steps: Steps) -> str:
    hold, held_images = hold_images, []

    @contextmanager
    def noting_held(*arguments: Any, **options: Any) -> Iterator[Any]:
        with hold(*arguments, **options) as found:
            held_images.append(found)
            yield found

    with opened(directory, steps) as cache, pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_archive, "hold_images", noting_held)
        try:
            cache.export("old:1", directory / "exported.tar")
        except CacheError as error:
            if held_images:
                raise AssertionError("P3: an export succeeds once it holds its image") from error
            raise
    return hashlib.sha256((directory / "exported.tar").read_bytes()).hexdigest()


def hold_old(directory: Path, steps: Steps) -> None:
    with opened(directory, steps) as cache, cache.hold("old:1"):
        for digest, data in OLD.blobs.items():
            steps.step("inside", "the hold")
            assert cache.has_blob(digest), "P4: a held blob keeps its row"
            assert cache.get_blob_path(digest).read_bytes() == data, "P4: a held blob keeps its file"


def move_old(directory: Path, steps: Steps) -> str:
    """Point a name to another image."""
    with opened(directory, steps) as cache:
        return cache.tag("sharing:1", "old:1").digest


def read_old(directory: Path, steps: Steps) -> bytes | str:
    with opened(directory, steps) as cache:
        return hashlib.sha256(cache.get_manifest("old:1")).hexdigest()


def open_and_close(directory: Path, steps: Steps) -> None:
    with steps.stepped():
        Cache.open(directory / "cache").close()


def visit(directory: Path, steps: Steps) -> None:
    """Begin a session, and end it after adding an unreferenced blob."""
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
    """Run an actor in its own process."""
    with pytest.MonkeyPatch.context() as patch, stops_at_transactions(patch, steps):
        announce_locks(patch, steps)
        stop_at_files(patch, steps, directory)
        patch.setattr(os, "fsync", lambda descriptor: None)  # there are no power cuts here
        # The chosen order decides which process runs next, so skip the queue of the write lock.
        patch.setattr(turns, "_await_turn", lambda queue, path, number, wait: None)
        # Let an import use one thread, because the steps cannot control the order of threads.
        patch.setattr(os, "cpu_count", lambda: 1)
        return ACTORS[actor](directory, steps)


def warm() -> None:
    """Do the operations that are slow the first time, before any actor is forked."""
    with tempfile.TemporaryDirectory() as directory, Cache.open(directory) as cache:
        save(cache, "warm:1", OLD)
        cache.export("warm:1", io.BytesIO())
        cache.remove_manifest("warm:1")
        cache.collect_garbage()


# Step points.


def announce_locks(patch: pytest.MonkeyPatch, steps: Steps) -> None:
    """Announce `write.lock` and the locks of claims, and stop before a process tries a session's lock."""
    flock = fcntl.flock

    def announcing_flock(file: Any, operation: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        # Other locks are known by inode, because a session's lock file may be unlinked and made again.
        lock = path.name if path.name == WRITE_LOCK else str(os.fstat(descriptor).st_ino)
        if path.name == "write.queue" or operation == fcntl.LOCK_SH:  # nobody waits for these locks here
            flock(file, operation)
        elif operation == fcntl.LOCK_UN:
            flock(file, operation)
            steps.report_released(lock)
        elif operation & fcntl.LOCK_NB:
            steps.step("session", "try the lock of a session")
            flock(file, operation)
            steps.report_taken(lock)
        elif lock == WRITE_LOCK:
            steps.announce_lock(lock, "wait for the write lock")
            flock(file, operation)
        elif path.suffix == ".producing":
            steps.announce_lock(lock, "wait for the producer")
            flock(file, operation)
        elif "session" in steps.kinds:
            steps.announce_lock(lock, "wait for the lock of a session")
            flock(file, operation)
        else:
            flock(file, operation)

    def lock_in_kernel(_path: Path, file: Any, operation: int, wait: object) -> None:
        """Wait with a blocking flock, where cachedb polls; the lock was announced, so the wait ends."""
        fcntl.flock(file, operation if wait else operation | fcntl.LOCK_NB)

    def wait_for_producer(path: Path) -> None:
        """Wait for a producer with a blocking flock, where cachedb polls."""
        with suppress(FileNotFoundError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            fcntl.flock(file, fcntl.LOCK_UN)

    patch.setattr(fcntl, "flock", announcing_flock)
    patch.setattr(locks, "_lock", lock_in_kernel)
    patch.setattr(single_flight, "_read_progress", wait_for_producer)


def full_path(path: Any, options: dict[str, Any], place: int) -> Path | None:
    """Return the path of a descriptor, or a path joined to the folder that `dir_fd` or the like names."""
    if isinstance(path, int):
        return Path(os.readlink(f"/proc/self/fd/{path}"))
    if not isinstance(path, (str, os.PathLike)):
        return None
    folder = options.get("dir_fd", options.get("dst_dir_fd" if place else "src_dir_fd"))
    return Path(path) if folder is None else Path(os.readlink(f"/proc/self/fd/{folder}"), path)


def stop_at_files(patch: pytest.MonkeyPatch, steps: Steps, directory: Path) -> None:
    """Stop before calls that change, list or open files of the cache, and around the receipt of a blob."""
    kinds = {"blobs": "blobs", "trash": "trash", "ingest": "ingest", "locks": "session"}

    def stop_before(module: Any, name: str, place: int = 0, only: str = "") -> None:
        call = getattr(module, name)

        def stop_and_call(*arguments: Any, **options: Any) -> Any:
            path = full_path(arguments[place], options, place) if len(arguments) > place else None
            if path is not None and path.is_relative_to(directory):
                inside = path.relative_to(directory).parts[1:]
                kind = kinds.get(inside[0], "") if inside else ""
                if only and len(inside) < 3:
                    kind = ""  # a folder that is opened to sync it
                if kind and kind == (only or kind):
                    steps.step("open" if only else kind, f"{name} {'/'.join(part[:12] for part in inside)}")
            return call(*arguments, **options)

        patch.setattr(module, name, stop_and_call)

    stop_before(os, "link", 1)
    for name in ("rename", "unlink", "rmdir", "listdir"):
        stop_before(os, name)
    stop_before(os, "open", only="blobs")

    receive = publish.receive

    def stop_around_receive(*arguments: Any, **options: Any) -> writer.Received:
        steps.step("receive", "begin to receive")
        blob = receive(*arguments, **options)
        steps.step("receive", "received")
        return blob

    patch.setattr(publish, "receive", stop_around_receive)


@contextmanager
def stops_at_transactions(patch: pytest.MonkeyPatch, steps: Steps) -> Iterator[None]:
    """Stop before reads and commits, and announce SQLite's own lock, which is taken inside the write lock."""
    lock = "SQLite's"

    def begin(connection: Connection) -> None:
        if "cachedb_begin" in connection.get_execution_options():
            steps.announce_lock(lock, "begin to write", inner=WRITE_LOCK in steps.held)
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

    def announce_end(name: str) -> None:
        call = getattr(DefaultDialect, name)

        def end_and_report(dialect: DefaultDialect, connection: Any) -> None:
            call(dialect, connection)
            steps.report_released(lock)

        patch.setattr(DefaultDialect, name, end_and_report)

    announce_end("do_commit")
    announce_end("do_rollback")
    listeners = (Engine, "begin", begin), (Engine, "commit", commit)  # these come before the engine's own
    for listener in listeners:
        event.listen(*listener)
    try:
        yield
    finally:
        for listener in listeners:
            event.remove(*listener)


# The caches with which orders begin.

DIE = """
import os, sys
from cachedb import Cache, cache
from cachedb.content import collect
from tests.attacks.test_interleavings import HALF, TRASHED
with Cache.open(sys.argv[1]) as opened:
    opened.add_blob(TRASHED)
opened = Cache.open(sys.argv[1])
opened.add_blob(b"leased by a dead session")
if os.fork() == 0:
    collect._move_out = lambda database: os._exit(0)
    collect.recover = lambda database, **_: []
    opened.collect_garbage()
os.wait()
link = os.link
def link_and_die(*paths, **options):
    link(*paths, **options)
    os._exit(0)
os.link = link_and_die
opened.add_blob(HALF)
"""
"""Let two sessions die: one between deleting a blob's row and moving its file, one between a link and its commit."""


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
    """The folder where the orders run: in memory, if possible."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def prepared(place: Path) -> dict[str, Path]:
    """The directories with which orders begin, by name."""
    found = {name: place / name for name in ("plain", "garbage", "left")}
    for directory in found.values():
        directory.mkdir()
        prepare(directory)
    with Cache.open(found["garbage"] / "cache") as cache:
        for data in GARBAGE.blobs.values():
            cache.add_blob(data)
    run_python(DIE, found["left"] / "cache")
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
    """The directory with which each order begins: plain, garbage or left."""
    kinds: str
    """The kinds of the step points."""


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


def make_p1_check(directory: Path) -> Callable[[], None]:
    """Return a function that checks P1 at a stop.

    A kill at that stop would leave the directory in this state.
    """

    def at_stop() -> None:
        with closing(sqlite3.connect(directory / "index.db")) as connection:
            tables = dict(connection.execute("SELECT name, type FROM sqlite_master"))
            query = "SELECT digest, size FROM blobs WHERE stored_at IS NOT NULL"
            rows = dict(connection.execute(query)) if "blobs" in tables else {}
        assert rows.items() <= (files_of(directory) if rows else {}).items(), "P1: every stored row has its file"

    return at_stop


def read_images(directory: Path) -> object:
    """Return the images and their blobs for a comparison, without garbage, which may differ."""
    with closing(sqlite3.connect(directory / "index.db")) as connection:
        return connection.execute(
            "SELECT repository, reference, role, digest, stored_at IS NOT NULL FROM images "
            "JOIN image_blobs ON image_id = images.id JOIN blobs ON blobs.id = blob_id "
            "ORDER BY repository, reference, position"
        ).fetchall()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.first}-{pair.second}")
def test_two_actors_do_in_every_order_what_they_do_one_after_the_other(
    pair: Pair, zygote: Zygote, prepared: dict[str, Path], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    actors, work = (pair.first, pair.second), place / "work"
    directory = work / ("created" if pair.first == "create" else "cache")
    serial: list[tuple[object, object]] = []

    def run_one(choose: Choose) -> Order:
        shutil.copytree(prepared[pair.before], work)
        try:
            order = run(zygote, actors, work, pair.kinds.split(), choose=choose, at_stop=make_p1_check(directory))
            try:
                result = (comparable(order.outcomes), read_images(directory))
                check(directory)
                if len(serial) < 2:
                    serial.append(result)
                assert result in serial, f"the result differs from both serial orders: {order.outcomes}"
            except Exception as error:
                raise Failed(f"{actors} in the {order}\n{error}") from error
            return order
        finally:
            shutil.rmtree(work)

    run_one(lambda word: "A")
    run_one(lambda word: "B")
    if ORDER:
        run_one(lambda word: ORDER[len(word)])
        return
    orders = every_order(run_one, seed=None if EVERY else 1)
    count = sum(1 for _ in (orders if EVERY else itertools.islice(orders, SAMPLE)))
    print(f"{count} orders of {pair.first} and {pair.second}")
    assert count > 3


def comparable(outcomes: tuple[Outcome, Outcome]) -> object:
    """Return the values and errors of the actors, without the tracebacks, which differ between orders."""
    return [(outcome.value, outcome.error) for outcome in outcomes]
