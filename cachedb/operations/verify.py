"""Verify the index, the digests of files, and that the index matches the files; repair problems.

Without the write lock, a change by another process can look like a problem. So a suspected blob is checked again under
the lock before it is reported, and everything else before it is repaired.

Repair destroys nothing. A file that does not match its digest moves to ``quarantine/``. An intact file without a row
gets one: a manifest becomes an image, and `gc` may collect the others.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, select

from cachedb.content import collect, describe, save
from cachedb.content.session import Session, find_unfinished_digests
from cachedb.disk.folders import Leftover
from cachedb.disk.hashes import Reading, hash_files
from cachedb.disk.layout import (
    blob_path,
    is_received,
    is_session,
    list_blob_files,
    lock_kind,
    partial_digest,
    quarantine_path,
    trash_digest,
)
from cachedb.disk.writer import file_identity
from cachedb.errors import (
    CacheError,
    DamagedIndex,
    InvalidManifest,
    NotInCache,
    SchemaMismatch,
    StorageError,
    explain,
    os_errors,
)
from cachedb.index import drift, images
from cachedb.index.blobs import read_all_stored_sizes, read_image_names, read_stored_sizes
from cachedb.index.sqlite.batches import split_batches
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.inspect import find_faults, read_journal_mode
from cachedb.index.sqlite.prepare import accept_copy
from cachedb.index.tables import IMAGES, REVISION, TRASH
from cachedb.oci.digests import Digest
from cachedb.oci.names import Name
from cachedb.operations import rebuild
from cachedb.operations.repair import REPAIRS, move_to_quarantine
from cachedb.progress import Progress

__all__ = ["KINDS", "Problem", "Verification", "verify"]


KINDS = ("missing", "corrupt", "wrong_size", "orphan", "index")
"""What is wrong:

- missing: a stored blob has no file.
- corrupt: a file does not match its digest, or cannot be read.
- wrong_size: the size of a file differs from its row.
- orphan: a file has no row, or does not belong to the cache.
- index: the index is damaged or was changed, or differs from a manifest or config.
"""


class Problem(NamedTuple):
    """A problem in a cache, and its repair."""

    kind: str  # one of KINDS
    digest: Digest | None  # of the blob, if any
    path: Path | None  # of the file, if any
    detail: str
    repair: str | None  # what was done; None if nothing was done
    images: tuple[Name, ...] = ()  # that have the blob, sorted; empty if the index is damaged


class Verification(NamedTuple):
    """The result of a verification."""

    checked: int  # files
    problems: list[Problem]


def verify(
    database: Database,
    session: Session,
    *,
    quick: bool,
    repair: bool,
    leftovers: Iterable[Leftover] = (),
    progress: Progress | None = None,
) -> Verification:
    """Check a cache, and repair it if requested.

    Args:
        database: the index of the cache.
        session: the session whose folder receives a rebuilt index.
        quick: check only the presence and size of files, not their content.
        repair: repair the problems that can be repaired.
        leftovers: files that could not be removed when the cache was opened, with the reasons.
        progress: called with the bytes read and the total; from any thread, one call at a time.

    Raises:
        StorageError: if the cache cannot be read, or cannot be written for a repair.
    """
    if repair and database.read_only:
        raise StorageError("the cache is read-only: verify it without a repair, or make it writable")
    with os_errors("verify the cache"):  # a folder may be missing
        return _verify(database, session, quick=quick, repair=repair, leftovers=leftovers, progress=progress)


def _verify(
    database: Database,
    session: Session,
    *,
    quick: bool,
    repair: bool,
    leftovers: Iterable[Leftover],
    progress: Progress | None,
) -> Verification:
    problems = [Problem("index", None, database.path, fault, None) for fault in find_faults(database, quick=quick)]
    mismatch = _find_schema_mismatch(database)
    if mismatch is not None and repair and (not problems or (database.revision() or "") > REVISION):
        raise mismatch  # a repair changes the schema only if the index is damaged, and never to an older one
    if mismatch is not None:
        problems.append(Problem("index", None, database.path, str(mismatch), None))
    if problems and repair:
        lost = rebuild.rebuild(database, session.new_folder())
        problems = [problem._replace(repair="the index was rebuilt") for problem in problems]
        problems += [Problem("index", None, database.path, line, None) for line in lost]
    files, strays = list_blob_files(database.directory)
    if problems and not repair:
        # An index that is damaged, or has another schema, is not read. Files are still checked against their names.
        readings = {} if quick else hash_files(database.directory, files, progress)
        return Verification(len(files), problems + list(_find_corrupt(database.directory, readings)))
    problems += _check_settings(database, repair=repair)
    with database.read() as connection:
        rows = read_all_stored_sizes(connection)
    suspects = {digest for digest in files.keys() | rows.keys() if files.get(digest) != rows.get(digest)}
    # A quick repair reads the suspects too: a file may be intact although its size differs from its row.
    wanted = files.keys() if not quick else files.keys() & suspects if repair else set()
    readings = hash_files(database.directory, {digest: files[digest] for digest in wanted}, progress)
    suspects.update(digest for digest, reading in readings.items() if reading.digest != digest)
    problems += _check_strays(database, strays, repair=repair)
    known = dict(leftovers)
    problems += [problem for problem in _find_foreign_files(database.directory) if problem.path not in known]
    problems += [Problem("orphan", None, path, f"it cannot be removed: {why}", None) for path, why in known.items()]
    for part in split_batches(sorted(suspects)):
        problems += _check_again(database, {digest: readings.get(digest) for digest in part}, repair=repair)
    if repair and suspects:
        collect.empty_trash(database)
        problems = _name_orphans(database, files, problems)
    if not quick:
        bad = {problem.digest for problem in problems if problem.kind != "orphan" and problem.digest}
        problems += _check_images(database, bad, repair=repair)
    if repair:
        accept_copy(database, check=False)  # the verification above replaces its check
    with database.read() as connection:
        names = read_image_names(connection, {problem.digest for problem in problems if problem.digest})
    problems = [problem._replace(images=tuple(names.get(problem.digest or "", ()))) for problem in problems]
    return Verification(len(files), problems)


def _find_schema_mismatch(database: Database) -> SchemaMismatch | None:
    """Return why this release cannot use the schema of the index; None if it can, or cannot read it."""
    try:
        with suppress(DamagedIndex), database.read():
            pass
    except SchemaMismatch as error:
        return error
    return None


def _check_settings(database: Database, *, repair: bool) -> Iterator[Problem]:
    """Report a lost WAL mode and the triggers of other programs; a repair restores WAL mode."""
    mode = read_journal_mode(database)
    if mode != "wal":
        done = None
        if repair:
            with database.write():  # this restores WAL mode
                done = "it is in WAL mode again"
        detail = f"its journal mode is {mode!r}, not WAL: readers and writers block each other"
        yield Problem("index", None, database.path, detail, done)
    for trigger in drift.find_foreign_triggers(database):
        # Never drop it: somebody may have created it on purpose.
        detail = f"no migration creates the trigger {trigger!r}, which may change what cachedb writes: drop it"
        yield Problem("index", None, database.path, detail, None)


def _find_corrupt(directory: Path, readings: dict[Digest, Reading]) -> Iterator[Problem]:
    for digest, reading in readings.items():
        if reading.digest != digest:
            yield Problem("corrupt", digest, blob_path(directory, digest), reading.detail, None)


def _check_again(database: Database, suspects: dict[Digest, Reading | None], *, repair: bool) -> list[Problem]:
    """Check suspected blobs again; report the problems that remain, and repair them.

    This holds the write lock, unless the cache is read-only.
    """
    problems = []
    with database.read() if database.read_only else database.write() as connection:
        rows = read_stored_sizes(connection, suspects)
        # Unfinished publications and collections have files without a row, which their process or the next open fixes.
        in_transit = find_unfinished_digests(database.directory)
        collected = select(TRASH.c.digest).where(TRASH.c.digest.in_(suspects))
        in_transit.update(map(Digest, connection.execute(collected).scalars()))
        for digest, reading in suspects.items():
            path = blob_path(database.directory, digest)
            status = _read_status(path)
            if reading and (status is None or reading.file != file_identity(status)):
                reading = None  # the file was replaced since it was read
            if digest in in_transit and digest not in rows:
                continue
            kind, detail = _judge_blob(digest, rows.get(digest), status, reading)
            if kind:
                done = REPAIRS[kind](connection, database.directory, digest, reading) if repair else None
                problems.append(Problem(kind, digest, path, detail, done))
    return problems


def _judge_blob(
    digest: Digest, size: int | None, status: os.stat_result | None, reading: Reading | None
) -> tuple[str, str]:
    """Return the kind and detail of a blob's problem; both are empty if there is none.

    Args:
        digest: the blob's digest.
        size: the blob's size in the index; None if it has no stored row.
        status: the status of its file; None if it has none.
        reading: the result of hashing the file; None if it was not hashed.
    """
    if size is not None and status is None:
        return "missing", "the blob is stored according to the index, but has no file"
    if size is not None and status and status.st_size != size:
        return "wrong_size", f"the file has {status.st_size} bytes and should have {size}"
    if reading and reading.digest != digest:
        return "corrupt", reading.detail
    if size is None and status:
        return "orphan", "the index does not know this file"
    return "", ""


def _read_status(path: Path) -> os.stat_result | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _name_orphans(database: Database, files: dict[Digest, int], problems: list[Problem]) -> list[Problem]:
    """Give names to the manifests among the orphans that got a row, and say so in their problems."""
    adopted = {problem.digest for problem in problems if problem.kind == "orphan" and problem.repair}
    orphans = {digest: files[digest] for digest in adopted if digest in files}
    with database.write() as connection:
        named = {name.digest: name for name in rebuild.name_unnamed(connection, database.directory, orphans)}
    return [
        problem._replace(repair=f"added to the index as {named[problem.digest]}")
        if problem.digest in named
        else problem
        for problem in problems
    ]


def _check_strays(database: Database, strays: Iterable[Path], *, repair: bool) -> Iterator[Problem]:
    """Report entries of ``blobs/`` that are not blobs; a repair moves them to ``quarantine/``."""
    for path in strays:
        done, detail = None, "its name is not a digest, or it is not a regular file"
        if repair:
            with database.write():
                if not os.path.lexists(path):
                    continue
                kept = quarantine_path(database.directory, path.name)
                try:
                    move_to_quarantine(database.directory, path, kept)
                    done = f"moved to quarantine/{kept.name}"
                except PermissionError as error:  # only the owner of a folder can move it elsewhere
                    detail = f"{detail}; it cannot be moved: {explain(error)}"
        yield Problem("orphan", None, path, detail, done)


def _find_foreign_files(directory: Path) -> Iterator[Problem]:
    """Report entries of the other folders that the cache did not create; nothing removes them."""
    detail = "the cache did not create it and never removes it: move it elsewhere"
    known: dict[str, Callable[[str], object]] = {
        "ingest": lambda name: name == "partial" or is_session(name),
        "ingest/partial": partial_digest,
        "trash": trash_digest,
        "locks": lock_kind,
    }
    for folder, is_known in known.items():
        with suppress(FileNotFoundError):
            for name in sorted(os.listdir(directory / folder)):
                if not is_known(name) or (folder != "ingest" and not _is_regular(directory / folder / name)):
                    yield Problem("orphan", None, directory / folder / name, detail, None)
    for session in sorted(filter(is_session, os.listdir(directory / "ingest"))):
        with suppress(OSError):
            for name in sorted(os.listdir(directory / "ingest" / session)):
                if not is_received(name):
                    yield Problem("orphan", None, directory / "ingest" / session / name, detail, None)


def _is_regular(path: Path) -> bool:
    """Return whether a path leads to a regular file, or to nothing."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return True
    return stat.S_ISREG(status.st_mode)


def _check_images(database: Database, bad: set[Digest], *, repair: bool) -> Iterator[Problem]:
    """Report images whose rows differ from their manifests and configs, and repair the rows.

    Args:
        database: the index of the cache.
        bad: the digests of blobs that have a problem already.
        repair: associate such images again.
    """
    with database.read() as connection:
        ids = list(connection.execute(select(IMAGES.c.id).order_by(IMAGES.c.id)).scalars())
    for image_id in ids:
        with database.read() as connection:
            has_bad_manifest = bool(bad) and _has_bad_manifest(connection, database.directory, image_id, bad)
            found = [] if has_bad_manifest else _compare_image(connection, database.directory, image_id, bad)
        if not repair or not (found or has_bad_manifest):
            yield from found
            continue
        with database.write() as connection:
            found = _compare_image(connection, database.directory, image_id, bad)
            if found:
                save.reassociate(connection, database.directory, image_id)
                rest = _compare_image(connection, database.directory, image_id, bad)
                done = "the index was corrected"
                found = [problem if problem in rest else problem._replace(repair=done) for problem in found]
                if has_bad_manifest:
                    found = rest  # a bad manifest, reported already, explains the other differences
        yield from found


def _has_bad_manifest(connection: Connection, directory: Path, image_id: int, bad: set[Digest]) -> bool:
    contents = images.read_image_blobs(connection, directory, image_id)
    return any(blob.digest in bad and blob.role in ("manifest", "index") for blob in contents)


def _compare_image(connection: Connection, directory: Path, image_id: int, bad: set[Digest]) -> list[Problem]:
    """Return how the rows of an image differ from its manifests and configs."""
    name = connection.execute(select(IMAGES.c.repository, IMAGES.c.reference).where(IMAGES.c.id == image_id)).first()
    if name is None:
        return []  # removed meanwhile
    image = Name(*name)
    root = images.read_root(connection, image_id)
    if root.digest not in read_stored_sizes(connection, [root.digest]):
        return []  # without the manifest there is nothing to compare

    def problem(digest: Digest, detail: str) -> Problem:
        return Problem("index", digest, blob_path(directory, digest), f"{image}: {detail}", None)

    problems = []
    contents = images.read_image_blobs(connection, directory, image_id)
    choose = save.platform_choice(connection, image_id)
    try:
        closure = save.closure(connection, directory, root, choose)
    except NotInCache:
        return []  # the manifest's file is missing, or was collected meanwhile
    except InvalidManifest as error:
        problems.append(problem(root.digest, str(error)))
        try:
            closure = save.closure(connection, directory, root, choose, strict=False)
        except CacheError:
            return problems
    recorded = [(blob.digest, blob.role, blob.media_type) for blob in contents[: len(closure)]]
    if recorded != [(blob.digest, blob.role, blob.media_type) for blob in closure]:
        problems.append(problem(root.digest, "its blobs in the index differ from those in its manifest"))
    elif not describe.matches_configs(connection, directory, image_id):
        problems.append(problem(root.digest, "its description in the index differs from its config"))
    sizes = {blob.digest: blob.size for blob in contents if blob.stored and blob.digest not in bad}
    for blob in closure:
        if sizes.get(blob.digest, blob.size) != blob.size:
            detail = f"{blob.digest} has {sizes[blob.digest]} bytes, but {blob.size} in the manifest"
            problems.append(problem(blob.digest, detail))
    return problems
