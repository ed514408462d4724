"""Verification: is the index sound, are the files what their names say, do the two agree; and repair of all three.

What looks wrong without the write lock may only be on its way from one right state to another, so each blob that is
suspected is looked at again under the lock before it is reported, and all else before it is repaired. Repair destroys
nothing: what is not what its name says is moved to ``quarantine/``, and a good file that no row knows becomes a blob of
the cache; a manifest among them becomes an image, and the rest is for `gc` to take.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, delete, insert, select, update

from cachedb.content import collect, describe, save
from cachedb.content.session import Session, half_published
from cachedb.disk.durable import copy_to_new, sync_folder
from cachedb.disk.folders import Folders, Leftover
from cachedb.disk.layout import (
    blob_path,
    is_received,
    is_session,
    lock_kind,
    on_disk,
    partial_digest,
    quarantine_path,
    trash_digest,
)
from cachedb.disk.reader import open_regular
from cachedb.disk.writer import CHUNK, Received, identity
from cachedb.errors import CacheError, InvalidManifest, NotInCache, StorageError, explain, is_callers, os_errors
from cachedb.index import drift, images
from cachedb.index.blobs import set_stored, stored
from cachedb.index.sqlite.batches import batched
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.inspect import find_faults, read_journal_mode
from cachedb.index.sqlite.prepare import accept_copy
from cachedb.index.tables import BLOBS, IMAGES, TRASH
from cachedb.oci.digests import Digest, split_digest
from cachedb.oci.manifests import DOCUMENT_LIMIT
from cachedb.oci.names import Name
from cachedb.operations import rebuild
from cachedb.progress import Advance, Progress, summed
from cachedb.threads import in_threads

__all__ = ["KINDS", "Problem", "Verification", "verify"]


KINDS = ("missing", "corrupt", "wrong_size", "orphan", "index")
"""A stored blob has no file; a file has another content than its name says; a file has another size than its row;
a file has no row; the index is damaged, or says something else than a manifest or a config."""

_TOGETHER = 64  # files, of which none is large, that one thread hashes in one go


class Problem(NamedTuple):
    """Something wrong, and what was done about it."""

    kind: str  # one of KINDS
    digest: Digest | None  # of the blob, where it is about one
    path: Path | None  # of the file, where it is about one
    detail: str
    repair: str | None  # what was done; None if nothing was, or can be


class Verification(NamedTuple):
    """What a verification found."""

    checked: int  # files
    problems: list[Problem]


class Reading(NamedTuple):
    """What reading a file gave, and which file that was."""

    file: tuple[int, int, int]  # its identity
    size: int  # bytes
    digest: Digest | None  # None where it could not be read
    detail: str


def verify(
    database: Database,
    session: Session,
    *,
    quick: bool,
    repair: bool,
    left: Iterable[Leftover] = (),
    progress: Progress | None = None,
) -> Verification:
    """Check a cache, and repair it if asked to.

    Args:
        database: of the cache.
        session: to work in.
        quick: look at the presence and size of the files only, and not into them.
        repair: put right what can be.
        left: what could not be cleaned up when the cache was opened.
        progress: is told how far the reading is, in bytes; from any thread, one call at a time.

    Raises:
        StorageError: if the cache cannot be read or, to repair it, written to.
    """
    if repair and database.read_only:
        raise StorageError("cannot repair the cache: it can only be read")
    with os_errors("verify the cache"):  # its folders may be gone
        return _verify(database, session, quick=quick, repair=repair, left=left, progress=progress)


def _verify(
    database: Database,
    session: Session,
    *,
    quick: bool,
    repair: bool,
    left: Iterable[Leftover],
    progress: Progress | None,
) -> Verification:
    problems = [Problem("index", None, database.path, fault, None) for fault in find_faults(database, quick=quick)]
    if problems and repair:
        lost = rebuild.rebuild(database, session.new_folder())
        problems = [problem._replace(repair="the index was rebuilt") for problem in problems]
        problems += [Problem("index", None, database.path, line, None) for line in lost]
    files, strays = on_disk(database.directory)
    if problems and not repair:
        # Nothing the index says can be relied on; the names of the files still say what is in them.
        readings = {} if quick else _read(database.directory, files, progress)
        return Verification(len(files), problems + list(_altered(database.directory, readings)))
    problems += _settle_settings(database, repair=repair)
    rows = _rows(database)
    odd = {digest for digest in files.keys() | rows.keys() if files.get(digest) != rows.get(digest)}
    # What repair moves or adopts it has read: a row may have the wrong size, and the file be good.
    wanted = files.keys() if not quick else files.keys() & odd if repair else set()
    readings = _read(database.directory, {digest: files[digest] for digest in wanted}, progress)
    odd.update(digest for digest, reading in readings.items() if reading.digest != digest)
    problems += _settle_strays(database, strays, repair=repair)
    problems += _find_strange(database.directory)
    problems += [Problem("orphan", None, path, f"it cannot be removed: {reason}", None) for path, reason in left]
    for part in batched(sorted(odd)):
        problems += _settle(database, {digest: readings.get(digest) for digest in part}, repair=repair)
    if repair and odd:
        collect.empty_trash(database)
        problems = _name_adopted(database, files, problems)
    if not quick:
        bad = {problem.digest for problem in problems if problem.kind != "orphan" and problem.digest}
        problems += _settle_images(database, bad, repair=repair)
    if repair:
        accept_copy(database, check=False)  # what was torn by copying is put right now
    return Verification(len(files), problems)


def _settle_settings(database: Database, *, repair: bool) -> Iterator[Problem]:
    """Report what an outside program changed in the index file beside its rows; put WAL mode back."""
    mode = read_journal_mode(database)
    if mode != "wal":
        done = None
        if repair:
            with database.write():
                done = "it is in WAL mode again"
        detail = f"its journal mode is {mode!r}, not WAL: readers and writers block each other"
        yield Problem("index", None, database.path, detail, done)
    for trigger in drift.foreign_triggers(database):
        # A person may want it, and to drop it may lose work.
        detail = f"no migration makes the trigger {trigger!r}, which can change what is written: drop it"
        yield Problem("index", None, database.path, detail, None)


def _altered(directory: Path, readings: dict[Digest, Reading]) -> Iterator[Problem]:
    for digest, reading in readings.items():
        if reading.digest != digest:
            yield Problem("corrupt", digest, blob_path(directory, digest), reading.detail, None)


def _rows(database: Database) -> dict[Digest, int]:
    with database.read() as connection:
        query = select(BLOBS.c.digest, BLOBS.c.size).where(BLOBS.c.stored_at.is_not(None))
        return {Digest(digest): size for digest, size in connection.execute(query)}


def _read(directory: Path, files: dict[Digest, int], progress: Progress | None) -> dict[Digest, Reading]:
    """Read files, several at once; those that are gone meanwhile are left out."""

    def read(digests: list[Digest], add: Advance) -> list[tuple[Digest, Reading]]:
        buffer = memoryview(bytearray(CHUNK))
        found = ((digest, _read_file(blob_path(directory, digest), digest, buffer, add)) for digest in digests)
        return [(digest, reading) for digest, reading in found if reading]

    parts = in_threads(read, _parts(files), summed(sum(files.values()), progress))
    return {digest: reading for part in parts for digest, reading in part}


def _parts(files: dict[Digest, int]) -> Iterator[list[Digest]]:
    """Divide files into what is read in one go: the large ones first and alone, so that all threads end together."""
    part: list[Digest] = []
    for digest in sorted(files, key=lambda digest: -files[digest]):
        part.append(digest)
        if len(part) == _TOGETHER or files[digest] > CHUNK:
            yield part
            part = []
    if part:
        yield part


def _read_file(path: Path, digest: Digest, buffer: memoryview, add: Advance) -> Reading | None:
    """Read a file to its end; None if there is none."""
    algorithm, _ = split_digest(digest)
    hasher, size = hashlib.new(algorithm), 0
    read = (0, 0, 0)
    try:
        read = identity(path.lstat())  # also of a file that cannot be opened
        with open(path, "rb", buffering=0, opener=open_regular) as file:
            read = identity(os.fstat(file.fileno()))
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
                size += count
                add(count)
    except FileNotFoundError:
        return None
    except OSError as error:
        if is_callers(error):
            raise  # or a good file would be taken for a damaged one
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise StorageError(f"cannot read a blob: {explain(error)}") from error  # that says nothing of the file
        return Reading(read, size, None, f"it cannot be read: {explain(error)}")
    found = Digest(f"{algorithm}:{hasher.hexdigest()}")
    return Reading(read, size, found, f"its content has digest {found}")


def _settle(database: Database, suspects: dict[Digest, Reading | None], *, repair: bool) -> list[Problem]:
    """Look at blobs again, under the lock if there can be writers; report what is wrong indeed, and repair it."""
    problems = []
    with database.read() if database.read_only else database.write() as connection:
        rows = stored(connection, suspects)
        # Files without a row, and no orphans: they are being collected, or the next open takes them back.
        passing = half_published(database.directory)
        leaving = select(TRASH.c.digest).where(TRASH.c.digest.in_(suspects))
        passing.update(map(Digest, connection.execute(leaving).scalars()))
        for digest, reading in suspects.items():
            path = blob_path(database.directory, digest)
            status = _status(path)
            if reading and (status is None or reading.file != identity(status)):
                reading = None  # another file is there now
            if digest in passing and digest not in rows:
                continue
            kind, detail = _judge(digest, rows.get(digest), status, reading)
            if kind:
                done = _REPAIRS[kind](connection, database.directory, digest, reading) if repair else None
                problems.append(Problem(kind, digest, path, detail, done))
    return problems


def _judge(digest: Digest, size: int | None, status: os.stat_result | None, reading: Reading | None) -> tuple[str, str]:
    """Return the kind and detail of what is wrong with a blob: its size in the index, its file, what was read of it."""
    if size is not None and status is None:
        return "missing", "the index says that it is stored, and there is no file"
    if size is not None and status and status.st_size != size:
        return "wrong_size", f"the file has {status.st_size} bytes, and should have {size}"
    if reading and reading.digest != digest:
        return "corrupt", reading.detail
    if size is None and status:
        return "orphan", "the index does not know this file"
    return "", ""


def _status(path: Path) -> os.stat_result | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _adopt(connection: Connection, directory: Path, digest: Digest, reading: Reading | None) -> str | None:
    if reading is None:
        return None  # it came since: another look will tell
    path = blob_path(directory, digest)
    with open(path, "rb", opener=open_regular) as file:
        if os.fstat(file.fileno()).st_mode & 0o222:
            os.fchmod(file.fileno(), 0o444)
        os.fsync(file.fileno())
    sync_folder(path.parent)
    set_stored(connection, [Received(digest, reading.size, None)])
    if reading.size <= DOCUMENT_LIMIT:
        save.associate_waiting(connection, directory, [digest])
    return "it is a blob of the cache now"


def _unstore(connection: Connection, _directory: Path, digest: Digest, _reading: Reading | None = None) -> str:
    connection.execute(update(BLOBS).where(BLOBS.c.digest == digest).values(stored_at=None))
    return "it is not called stored any more: import or pull it again"


def _put_aside(connection: Connection, directory: Path, digest: Digest, _reading: Reading | None) -> str:
    path = blob_path(directory, digest)
    kept = quarantine_path(directory, digest.replace(":", "-"))
    if digest not in stored(connection, [digest]):
        _move(directory, path, kept)
    else:
        # A second name; the first goes by way of the trash, once the row is gone for good.
        with Folders(directory).open("quarantine") as quarantine:
            try:
                os.link(path, kept.name, dst_dir_fd=quarantine, follow_symlinks=False)
            except PermissionError:  # it is another user's, which Linux does not let us link
                with open(path, "rb", opener=open_regular) as file:
                    copy_to_new(file, kept.name, quarantine)
            os.fsync(quarantine)
        connection.execute(delete(TRASH).where(TRASH.c.digest == digest))
        connection.execute(insert(TRASH).values(digest=digest, size=path.stat().st_size))
        _unstore(connection, directory, digest)
    return f"moved to quarantine/{kept.name}: import or pull it again"


def _move(directory: Path, path: Path, kept: Path) -> None:
    """Move what lies in a folder of the cache to ``quarantine/``, for good; neither folder may lead elsewhere."""
    folders = Folders(directory)
    with (
        folders.open(str(path.parent.relative_to(directory))) as source,
        folders.open("quarantine") as quarantine,
    ):
        os.rename(path.name, kept.name, src_dir_fd=source, dst_dir_fd=quarantine)
        os.fsync(source)
        os.fsync(quarantine)


def _resize(connection: Connection, directory: Path, digest: Digest, reading: Reading | None) -> str | None:
    if reading is None:
        return None  # it came since: another look will tell
    if reading.digest != digest:
        return _put_aside(connection, directory, digest, reading)
    set_stored(connection, [Received(digest, reading.size, None)])
    return "the file is good, and the index says its size now"


_REPAIRS: dict[str, Callable[[Connection, Path, Digest, Reading | None], str | None]] = {
    "missing": _unstore,
    "corrupt": _put_aside,
    "wrong_size": _resize,
    "orphan": _adopt,
}


def _name_adopted(database: Database, files: dict[Digest, int], problems: list[Problem]) -> list[Problem]:
    """Give names to the manifests among the blobs that were adopted, and say so."""
    adopted = {problem.digest for problem in problems if problem.kind == "orphan" and problem.repair}
    orphans = {digest: files[digest] for digest in adopted if digest in files}
    with database.write() as connection:
        named = {name.digest: name for name in rebuild.name_unnamed(connection, database.directory, orphans)}
    return [
        problem._replace(repair=f"it is {named[problem.digest]} now") if problem.digest in named else problem
        for problem in problems
    ]


def _settle_strays(database: Database, strays: Iterable[Path], *, repair: bool) -> Iterator[Problem]:
    """Report what is no blob and lies in ``blobs/``, and move it away."""
    for path in strays:
        done = None
        if repair:
            with database.write():
                if not os.path.lexists(path):
                    continue
                kept = quarantine_path(database.directory, path.name)
                _move(database.directory, path, kept)
            done = f"moved to quarantine/{kept.name}"
        yield Problem("orphan", None, path, "it is no blob: its name is not a digest's, or it is no file", done)


def _find_strange(directory: Path) -> Iterator[Problem]:
    """Report what lies in the other folders and is not ours; it stays."""
    detail = "it is not the cache's: nothing of that name is ever removed"
    known: dict[str, Callable[[str], object]] = {
        "ingest": lambda name: name == "partial" or is_session(name),
        "ingest/partial": partial_digest,
        "trash": trash_digest,
        "locks": lock_kind,
    }
    for folder, is_known in known.items():
        with suppress(FileNotFoundError):
            for name in sorted(os.listdir(directory / folder)):
                if not is_known(name):
                    yield Problem("orphan", None, directory / folder / name, detail, None)
    for session in sorted(filter(is_session, os.listdir(directory / "ingest"))):
        with suppress(OSError):
            for name in sorted(os.listdir(directory / "ingest" / session)):
                if not is_received(name):
                    yield Problem("orphan", None, directory / "ingest" / session / name, detail, None)


def _settle_images(database: Database, bad: set[Digest], *, repair: bool) -> Iterator[Problem]:
    """Report where the index says something else of an image than its manifests, but for those known to be bad."""
    with database.read() as connection:
        ids = list(connection.execute(select(IMAGES.c.id).order_by(IMAGES.c.id)).scalars())
    for image_id in ids:
        with database.read() as connection:
            spoiled = bool(bad) and _is_spoiled(connection, database.directory, image_id, bad)
            found = [] if spoiled else _contradictions(connection, database.directory, image_id, bad)
        if not repair or not (found or spoiled):
            yield from found
            continue
        with database.write() as connection:
            found = _contradictions(connection, database.directory, image_id, bad)
            if found:
                save.reassociate(connection, database.directory, image_id)
                left = _contradictions(connection, database.directory, image_id, bad)
                done = "the index says what the manifest says now"
                found = [problem if problem in left else problem._replace(repair=done) for problem in found]
                if spoiled:
                    found = left  # that the index says more than the manifests that are left is no fault of its own
        yield from found


def _is_spoiled(connection: Connection, directory: Path, image_id: int, bad: set[Digest]) -> bool:
    contents = images.image_blobs(connection, directory, image_id)
    return any(blob.digest in bad and blob.role in ("manifest", "index") for blob in contents)


def _contradictions(connection: Connection, directory: Path, image_id: int, bad: set[Digest]) -> list[Problem]:
    """Compare what the index says of an image with its manifests and configs."""
    name = connection.execute(select(IMAGES.c.repository, IMAGES.c.reference).where(IMAGES.c.id == image_id)).first()
    if name is None:
        return []  # removed since
    image = Name(*name)
    root = images.root_of(connection, image_id)
    if root.digest not in stored(connection, [root.digest]):
        return []  # there is nothing to compare with

    def problem(digest: Digest, detail: str) -> Problem:
        return Problem("index", digest, blob_path(directory, digest), f"{image}: {detail}", None)

    problems = []
    contents = images.image_blobs(connection, directory, image_id)
    choose = save.choice(connection, image_id)
    try:
        closure = save.closure(connection, directory, root, choose)
    except NotInCache:
        return []  # its file is missing, or was collected since
    except InvalidManifest as error:
        problems.append(problem(root.digest, str(error)))
        try:
            closure = save.closure(connection, directory, root, choose, strict=False)
        except CacheError:
            return problems
    said = [(blob.digest, blob.role, blob.media_type) for blob in contents[: len(closure)]]
    if said != [(blob.digest, blob.role, blob.media_type) for blob in closure]:
        problems.append(problem(root.digest, "it is not associated with the blobs that its manifest names"))
    sizes = {blob.digest: blob.size for blob in contents if blob.stored and blob.digest not in bad}
    for blob in closure:
        if sizes.get(blob.digest, blob.size) != blob.size:
            lie = f"its manifest says that {blob.digest} is {blob.size} bytes; it is {sizes[blob.digest]}"
            problems.append(problem(blob.digest, lie))
    if not describe.agrees(connection, directory, image_id):
        problems.append(problem(root.digest, "it is not described as its config describes it"))
    return problems
