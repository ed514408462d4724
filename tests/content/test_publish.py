"""Storing blobs: the stored bytes are the verified bytes, and a blob is stored whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event

from cachedb import Cache, DigestMismatch, InvalidArchive, StorageError
from cachedb.content import collect, publish
from cachedb.content.session import Session
from cachedb.disk import writer
from cachedb.disk.layout import blob_path
from cachedb.disk.writer import Received
from cachedb.index import blobs
from cachedb.index.sqlite.batches import BATCH
from cachedb.index.sqlite.database import Database
from cachedb.oci.digests import Digest
from tests.conftest import Run, files_of, snapshot, stored_rows
from tests.support.make import digest_of, image, random_bytes

MIB = 1024 * 1024
SIZES = [0, 1, MIB - 1, MIB, MIB + 1, 4 * MIB, 4 * MIB + 1, 9 * MIB]


@pytest.fixture
def session(index: Database) -> Iterator[Session]:
    session = Session(index)
    yield session
    session.close()


def receive(session: Session, data: bytes, *, write: bool = True) -> Received:
    return publish.receive(session, io.BytesIO(data), write=write)


class RandomChunks(io.RawIOBase):
    """A source that returns chunks of random sizes."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._random = random.Random(len(data))

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        count = min(len(buffer), len(self._data), self._random.randint(1, MIB))
        buffer[:count] = self._data[:count]
        self._data = self._data[count:]
        return count


# Receiving


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("size", SIZES)
def test_content_of_any_size_is_stored_unchanged(cache: Cache, session: Session, size: int, algorithm: str) -> None:
    data = random_bytes(size, seed=size)
    reported: list[int] = []
    received = publish.receive(session, RandomChunks(data), algorithm=algorithm, progress=reported.append)
    assert received.path is not None
    assert received.path.read_bytes() == data
    assert received[:2] == (digest_of(data, algorithm), size)
    assert sum(reported) == size
    received.path.unlink()
    assert cache.save_blob(digest_of(data, algorithm), data) == digest_of(data, algorithm)
    assert cache.get_blob_path(digest_of(data, algorithm)).read_bytes() == data
    assert cache.get_blob_size(digest_of(data, algorithm)) == size


def test_a_stored_blob_cannot_be_written_to(cache: Cache) -> None:
    assert cache.get_blob_path(cache.add_blob(b"data")).stat().st_mode & 0o7777 == 0o444


@pytest.mark.parametrize("size", [10, 3 * MIB])
@pytest.mark.parametrize("wrong", ["digest", "longer", "shorter"])
def test_content_that_differs_from_its_declared_digest_or_size_is_refused(
    session: Session, size: int, wrong: str
) -> None:
    data = random_bytes(size, seed=1)
    digest = Digest(digest_of(data if wrong != "digest" else b"other"))
    declared_size = {"digest": size, "longer": size - 1, "shorter": size + 1}[wrong]
    with pytest.raises(DigestMismatch):
        publish.receive(session, io.BytesIO(data), digest=digest, size=declared_size)
    assert os.listdir(session.folder) == []


def test_reading_stops_after_the_declared_size(session: Session) -> None:
    class Endless:
        given = 0

        def readinto(self, buffer: memoryview, /) -> int:
            self.given += len(buffer)
            assert self.given < 20 * MIB
            return len(buffer)

    with pytest.raises(DigestMismatch, match="should have 5 bytes, and has more"):
        publish.receive(session, Endless(), size=5)
    assert os.listdir(session.folder) == []


@pytest.mark.parametrize("write", [True, False])
def test_a_source_that_fails_leaves_nothing(session: Session, write: bool) -> None:
    class Failing:
        left = 6

        def readinto(self, buffer: memoryview, /) -> int:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return len(buffer)

    with pytest.raises(KeyboardInterrupt):
        publish.receive(session, Failing(), write=write)
    assert os.listdir(session.folder) == []


@pytest.mark.parametrize("failing", range(1, 8))
def test_an_observer_may_refuse_content_at_any_chunk(session: Session, failing: int) -> None:
    class Refusing:
        seen = 0

        def update(self, _data: memoryview, /) -> None:
            self.seen += 1
            if self.seen == failing:
                raise InvalidArchive("refused")

    with pytest.raises(InvalidArchive, match="refused"):
        publish.receive(session, io.BytesIO(bytes(6 * MIB)), also=Refusing())
    assert os.listdir(session.folder) == []


def test_stored_content_can_be_verified_without_being_written(session: Session) -> None:
    data = random_bytes(2 * MIB + 1, seed=2)
    assert receive(session, data, write=False) == (digest_of(data), len(data), None)
    assert os.listdir(session.folder) == []


def test_the_hashed_bytes_are_written_though_the_source_changes(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(bytes(9 * MIB))

    class Changing:
        def __init__(self) -> None:
            self.file = path.open("r+b", buffering=0)

        def readinto(self, buffer: memoryview, /) -> int:
            count = self.file.readinto(buffer)
            os.pwrite(self.file.fileno(), os.urandom(MIB), max(0, self.file.tell() - MIB))
            return count

    source = Changing()
    received = publish.receive(session, source)
    source.file.close()
    assert received.path is not None
    assert digest_of(received.path.read_bytes()) == received.digest
    received.path.unlink()


def test_a_full_disk_while_receiving_leaves_nothing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = session.folder
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="No space left on device: free some space"):
        receive(session, bytes(3 * MIB))
    assert os.listdir(folder) == []


def test_a_partial_write_is_continued(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100_000]))
    data = random_bytes(2 * MIB + 5, seed=3)
    received = receive(session, data)
    assert received.path is not None
    assert received.path.read_bytes() == data
    received.path.unlink()


def test_fadvise_covers_only_the_newly_written_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, offset, length, _advice: advised.append((offset, length)))
    path = tmp_path / "partial"
    path.write_bytes(bytes(3 * MIB))
    writer.receive(io.BytesIO(bytes(20 * MIB)), path, size=23 * MIB, resume=True)
    assert advised == [(3 * MIB, 8 * MIB), (11 * MIB, 8 * MIB)]
    assert path.stat().st_size == 23 * MIB


def test_memory_does_not_depend_on_the_size(session: Session) -> None:
    class Zeros:
        left = 64

        def readinto(self, buffer: memoryview, /) -> int:
            self.left -= 1
            return len(buffer) if self.left >= 0 else 0

    tracemalloc.start()
    received = publish.receive(session, Zeros())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert received.size == 64 * MIB
    assert peak < 8 * MIB
    assert received.path is not None
    received.path.unlink()


# Publishing


def test_data_is_synced_before_its_name_and_its_name_before_its_row(
    index: Database, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut between two steps must never leave a row without its data."""
    happened: list[str] = []
    folders = {session.folder: "session", index.directory / "blobs" / "sha256": "blobs"}

    def note_calls(what: str, name: str, path_of: Callable[..., Path]) -> None:
        call = getattr(os, name)

        def replacement(*arguments: object, **options: Any) -> object:
            result = call(*arguments, **options)
            folder = os.readlink(f"/proc/self/fd/{options['dst_dir_fd']}") if "dst_dir_fd" in options else "/"
            path = folder / path_of(*arguments)
            happened.append(
                f"{what} {folders[path]}" if path in folders else f"{what} a file in {folders[path.parent]}"
            )
            return result

        monkeypatch.setattr(os, name, replacement)

    def note_commit(_: object) -> None:
        happened.append("commit")

    note_calls("sync", "fsync", lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}")))
    note_calls("name", "rename", lambda _source, target: Path(target))
    note_calls("link", "link", lambda _source, target: Path(target))
    event.listen(Engine, "commit", note_commit)
    try:
        with publish.publish_blobs(index, session, [receive(session, b"data")]):
            pass
    finally:
        event.remove(Engine, "commit", note_commit)
    assert happened == [
        "sync a file in session",
        "name a file in session",
        "sync session",  # so that the next open finds it after a power cut
        "link a file in blobs",
        "sync blobs",
        "commit",
    ]
    assert os.listdir(session.folder) == []


def test_a_publication_stores_each_new_blob_once(index: Database, session: Session) -> None:
    with publish.publish_blobs(index, session, [receive(session, b"old")]):
        pass
    inode = blob_path(index.directory, Digest(digest_of(b"old"))).stat().st_ino
    received = [receive(session, data) for data in (b"old", b"new", b"new", b"")]
    received.append(receive(session, b"held elsewhere", write=False))
    with publish.publish_blobs(index, session, received) as connection:
        assert blobs.read_stored_sizes(connection, [blob.digest for blob in received]).keys() == {
            digest_of(data) for data in (b"old", b"new", b"")
        }
    assert files_of(index.directory) == stored_rows(index.directory)
    assert files_of(index.directory) == {digest_of(data): len(data) for data in (b"old", b"new", b"")}
    assert blob_path(index.directory, Digest(digest_of(b"old"))).stat().st_ino == inode
    assert os.listdir(session.folder) == []


def test_storing_a_known_blob_corrects_its_size_in_the_index(cache: Cache, index: Database) -> None:
    made = image(1)
    cache.save_manifest("app", made.manifest)
    layer = digest_of(made.layers[0])
    assert not cache.has_blob(layer)
    with index.write() as connection:
        connection.exec_driver_sql("UPDATE blobs SET size = 1 WHERE digest = ?", (layer,))
    cache.save_blob(layer, made.layers[0])
    assert cache.get_blob_size(layer) == len(made.layers[0])


def test_a_publication_whose_block_fails_leaves_no_file_and_no_row(index: Database, session: Session) -> None:
    with publish.publish_blobs(index, session, [receive(session, b"before")]):
        pass
    with (
        pytest.raises(KeyError),
        publish.publish_blobs(index, session, [receive(session, b"before"), receive(session, b"data")]),
    ):
        raise KeyError
    assert files_of(index.directory) == stored_rows(index.directory) == {digest_of(b"before"): 6}
    assert os.listdir(session.folder) == []


@pytest.mark.parametrize("step", ["link", "sync", "commit"])
def test_a_full_disk_while_publishing_leaves_no_file_and_no_row(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    cache.add_blob(b"before")
    before = snapshot(cache.directory)
    full: list[OSError] = []

    def fail_once(subject: object, *_: object, **__: object) -> None:
        # Fail only during the publication, not before it, in a read, or in the retraction after it.
        before = isinstance(subject, Connection) and not subject.get_execution_options().get("cachedb_begin")
        if not full and not before and subject != cache._session.folder:
            full.append(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            raise full[0]

    with monkeypatch.context() as patch:
        if step == "link":
            patch.setattr(os, "link", fail_once)
        elif step == "sync":
            fsync = os.fsync

            def sync(descriptor: int) -> None:
                if os.readlink(f"/proc/self/fd/{descriptor}").endswith("blobs/sha256"):
                    fail_once(descriptor)
                fsync(descriptor)

            patch.setattr(os, "fsync", sync)
        else:
            event.listen(Engine, "commit", fail_once)
        try:
            with pytest.raises(StorageError, match="No space left on device: free some space"):
                cache.add_blob(b"data")
        finally:
            if step == "commit":
                event.remove(Engine, "commit", fail_once)
    assert full
    assert snapshot(cache.directory) == before
    cache.add_blob(b"data")


def test_the_next_open_retracts_a_publication_that_could_not_be_retracted(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Cache.open(directory) as cache, monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise StorageError("the disk is gone")

        patch.setattr(publish, "set_stored", fail)
        patch.setattr(publish, "retract", fail)
        with pytest.raises(StorageError, match="the disk is gone"):
            cache.add_blob(b"data")
        cache.close()
    assert files_of(directory) == {digest_of(b"data"): 4}
    Cache.open(directory).close()
    assert files_of(directory) == stored_rows(directory) == {}
    assert os.listdir(directory / "ingest") == []


def test_a_blob_can_be_stored_again_at_every_step_of_its_collection(
    cache: Cache, index: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"data"

    def forget() -> None:
        with index.write() as connection:
            connection.exec_driver_sql("DELETE FROM leases")
            ids = connection.exec_driver_sql("SELECT id FROM blobs").scalars().all()
            assert collect.delete_unreferenced(connection, ids) == (1, 4)

    digest = cache.add_blob(data)
    forget()
    assert files_of(index.directory) == {digest: 4}
    assert not cache.has_blob(digest)
    # A file without a row has the blob's name. It may be incomplete.
    path = blob_path(index.directory, digest)
    path.unlink()
    path.write_bytes(b"da")
    cache.add_blob(data)
    collect.empty_trash(index)
    assert cache.get_blob(digest) == data

    forget()  # the blob is stored again after the trash was read and before the lock
    rows = Database.rows
    stored: list[Digest] = []

    def store_then_read(self: Database, *arguments: Any) -> object:
        if self is index and not stored:
            stored.append(Digest("being stored"))
            stored.append(cache.add_blob(data))
        return rows(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Database, "rows", store_then_read)
        collect.empty_trash(index)
    assert stored == ["being stored", digest]
    assert cache.get_blob(digest) == data

    forget()  # the blob is forgotten twice, and the row of the first time is still in the trash
    cache.add_blob(data)
    forget()
    collect.empty_trash(index)
    assert files_of(index.directory) == stored_rows(index.directory) == {}
    assert os.listdir(index.directory / "trash") == []
    cache.add_blob(data)
    assert cache.get_blob(digest) == data


def test_threads_that_store_the_same_blob_store_it_once(cache: Cache) -> None:
    data = random_bytes(MIB + 1, seed=4)
    together = threading.Barrier(8)
    digests = []

    def store() -> None:
        together.wait()
        digests.append(cache.save_blob(digest_of(data), io.BytesIO(data)))

    threads = [threading.Thread(target=store) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests == [digest_of(data)] * together.parties
    assert files_of(cache.directory) == stored_rows(cache.directory) == {digest_of(data): len(data)}
    assert os.listdir(cache._session.folder) == []


def test_many_digests_are_looked_up_in_batches(index: Database) -> None:
    wanted = [Digest(digest_of(b"%d" % number)) for number in range(2 * BATCH + 1)]
    with index.write() as connection:
        insert = "INSERT INTO blobs (digest, size, stored_at) VALUES (?, 1, '2026-01-31T23:59:59.123456Z')"
        connection.exec_driver_sql(insert, [(digest,) for digest in wanted])
        connection.exec_driver_sql("INSERT INTO blobs (digest, size) VALUES (?, 1)", (digest_of(b"unstored"),))
        assert blobs.read_stored_sizes(connection, [*wanted, Digest(digest_of(b"unstored"))]).keys() == set(wanted)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_folder_in_the_place_of_a_blob_is_refused_at_once(
    cache: Cache, cachedb: Run, make: Callable[[Path], None]
) -> None:
    digest = cache.add_blob(b"a file")
    path = blob_path(cache.directory, digest)
    path.unlink()
    make(path)
    done = cachedb("blob", "cat", digest, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"cachedb: cannot read a blob: it is not a regular file: {str(path)!r}\n"


def test_a_folder_in_the_place_of_a_new_blob_is_set_aside(cache: Cache) -> None:
    digest = digest_of(b"new")
    place = blob_path(cache.directory, Digest(digest))
    (place / "deep").mkdir(parents=True)
    assert cache.add_blob(b"new") == digest
    assert place.read_bytes() == b"new"
    (problem,) = cache.verify().problems
    assert (problem.kind, str(problem.path).partition(".")[0]) == ("orphan", str(place))
    assert Path(f"{problem.path}/deep").is_dir()


def test_the_names_of_received_files_cannot_be_guessed(session: Session) -> None:
    numbers = [int(session.new_path().name) for _ in range(50)]
    assert len(set(numbers)) == 50
    assert max(numbers) > 2**32


def test_content_that_differs_from_a_stored_blob_leaves_no_lease(cache: Cache) -> None:
    cache.save_blob(digest_of(b"data"), b"data")
    before = snapshot(cache.directory)["leases"]
    with Cache.open(cache.directory) as other:
        with pytest.raises(DigestMismatch):
            other.save_blob(digest_of(b"data"), b"else")
        assert snapshot(cache.directory)["leases"] == before
    assert len(before) == 1  # type: ignore[arg-type]
