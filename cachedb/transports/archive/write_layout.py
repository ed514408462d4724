"""Write images into an OCI image layout folder, or one image into a folder for skopeo's ``dir:``."""

from __future__ import annotations

import os
import re
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from cachedb.disk.durable import (
    PART_NAME,
    atomic_file,
    clone_content,
    lock_part,
    part_path,
    remove_leftovers,
    sync_folder,
)
from cachedb.disk.layout import blob_path, check_destination
from cachedb.disk.locks import hold_folder_lock
from cachedb.disk.reader import open_blob
from cachedb.disk.regular import open_regular
from cachedb.disk.waiting import Wait
from cachedb.disk.writer import discard, write_all
from cachedb.errors import CacheError, is_callers, os_errors
from cachedb.progress import Advance
from cachedb.reentry import not_reentered
from cachedb.transports.archive.copy_blob import (
    FileWriter,
    check_size,
    copy_blob,
    copy_in_threads,
    read_blob,
)
from cachedb.transports.archive.entries import Entry
from cachedb.transports.archive.merge_index import merge_index

__all__ = ["write_layout"]


_PROGRESS_SECONDS = 1.0  # between two notes of progress
_OLD_PART = re.compile(r"\.cachedb-[0-9a-f]{16}\.part")  # written by earlier releases
_IN_DIR = re.compile(r"([0-9a-f]{64}|[0-9a-f]{128})(\.manifest\.json)?|signature-[0-9]+")  # written by skopeo


def write_layout(
    directory: Path,
    files: list[Entry],
    destination: Path,
    *,
    link: bool,
    wait_seconds: float,
    progress: Advance,
) -> None:
    """Write a folder; the file that refers to all others is written last.

    Images are added to an existing image layout. In an existing folder of the format ``dir``, the image is replaced.

    Args:
        directory: of the cache.
        files: from `list_entries`, for a folder format.
        destination: the folder; its parent must exist.
        link: make hard links to the cache's files where the file system can.
        wait_seconds: to wait for another export into the layout that makes no progress.
        progress: takes the bytes written or verified.

    Raises:
        Busy: if another export has the layout and makes no progress for that time.
        DigestMismatch: if a blob's file is damaged; the files written so far are removed.
        StorageError: if it cannot be written.
        CacheError: if the folder holds something else.
    """
    with os_errors("write the export"), ExitStack() as stack:
        # Exports into one layout take turns, because each rewrites its index.
        stack.enter_context(not_reentered(f"export {destination.resolve()}", f"exporting to {str(destination)!r}"))
        is_new = _lock_folder(stack, destination, wait_seconds)
        made = [destination] if is_new else []
        folders = {destination, destination.parent} if is_new else {destination}
        try:
            parts = re.compile(f"{PART_NAME.pattern}|{_OLD_PART.pattern}")
            strange = [name for name in os.listdir(destination) if not parts.fullmatch(name)]
            marker, index, *others = files
            if strange and not _has_marker(destination, marker):
                raise _refuse_folder(destination, index)
            for folder in (destination / "blobs", *destination.glob("blobs/*")):
                if folder.is_symlink():
                    raise CacheError(f"{str(folder)!r} is a symbolic link: name a layout whose folders are its own")
                check_destination(directory, folder)  # it may be a bind mount
            for folder in (destination, *destination.glob("blobs/*")):
                remove_leftovers(folder, parts)  # no other export is writing: earlier releases take the lock, too
            # Write the marker first, so that a killed export leaves a folder of its format, and the index last.
            blobs = []
            for entry in (marker, *others):
                path = destination / entry.path
                for parent in reversed(Path(entry.path).parents):
                    if not (destination / parent).is_dir():
                        (destination / parent).mkdir()
                        made.append(destination / parent)
                    folders.add(destination / parent)
                if not os.path.lexists(path):
                    made.append(path)
                if isinstance(entry.content, bytes):
                    _write_document(entry, path)
                else:
                    blobs.append(entry)

            def write(entry: Entry, advance: Advance, hash_in_thread: bool) -> None:
                path = destination / entry.path
                if not (link and _link(directory, entry, path, advance)):
                    _write_blob(directory, entry, path, advance, hash_in_thread=hash_in_thread)

            copy_in_threads(blobs, write, _with_progress_notes(destination, progress))
            for folder in folders:
                sync_folder(folder)
            # Everything that the index references is on disk now.
            path = destination / index.path
            _write_document(merge_index(destination, index) if index.path == "index.json" else index, path)
            sync_folder(destination)
        except BaseException:
            _remove(made)
            raise
        if index.path == "manifest.json":
            _remove_replaced(destination, {entry.path for entry in files})


def _refuse_folder(destination: Path, index: Entry) -> CacheError:
    """Return the error for a folder that is neither empty nor of the wanted format."""
    if index.path == "index.json":
        return CacheError(f"{str(destination)!r} is neither empty nor an OCI image layout: name another folder")
    return CacheError(
        f"{str(destination)!r} is neither empty nor a folder of skopeo's dir: transport: name another one"
    )


def _has_marker(destination: Path, marker: Entry) -> bool:
    """Return whether a folder has the file that marks its format.

    The content of ``version`` is compared, because many folders have a file of that name.
    """
    path = destination / marker.path
    return path.is_file() and (marker.path == "oci-layout" or path.read_bytes() == marker.content)


def _remove_replaced(destination: Path, written: set[str]) -> None:
    """Remove the files of the image that was in a folder for ``dir:`` before, with its signatures."""
    for name in os.listdir(destination):
        if name not in written and _IN_DIR.fullmatch(name):
            with suppress(OSError):  # the export is complete
                (destination / name).unlink()


def _lock_folder(stack: ExitStack, destination: Path, wait_seconds: float) -> bool:
    """Lock a layout's folder until the stack ends, and return whether it was made here."""
    what = f"the lock of the layout {str(destination)!r}"
    wait = stack.enter_context(Wait(what, wait_seconds, lambda: _read_progress(destination)))
    while True:
        is_new = False
        with suppress(FileExistsError):
            destination.mkdir()
            is_new = True
        try:
            stack.enter_context(hold_folder_lock(destination, wait, shared=False))
        except FileNotFoundError:  # an export that fails while we wait removes the folder that it made
            if destination.is_symlink():
                raise
        else:
            wait.end()
            return is_new


def _with_progress_notes(destination: Path, progress: Advance) -> Advance:
    """Return a function that calls ``progress``, and touches the folder for processes that wait."""
    noted = time.monotonic()

    def note(size: int) -> None:
        nonlocal noted
        if time.monotonic() - noted >= _PROGRESS_SECONDS:
            noted = time.monotonic()
            with suppress(OSError):  # waiting processes then see no progress, and the export goes on
                os.utime(destination)
        progress(size)

    return note


def _read_progress(destination: Path) -> int | None:
    """Return a value that changes while an export into the folder makes progress."""
    with suppress(OSError):
        return destination.stat().st_mtime_ns
    return None


def _remove(made: list[Path]) -> None:
    """Remove the files that a failed export made, and its folders if they are empty."""
    for path in reversed(made):
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()


def _write_document(entry: Entry, path: Path) -> None:
    assert isinstance(entry.content, bytes)
    with atomic_file(path) as file:
        write_all(file, entry.content)


def _write_blob(directory: Path, entry: Entry, path: Path, progress: Advance, *, hash_in_thread: bool) -> None:
    with atomic_file(path) as file:
        if not _clone(directory, entry, file.fileno(), progress):
            copy_blob(directory, entry, FileWriter(file.fileno(), 0).write, progress, hash_in_thread=hash_in_thread)


def _clone(directory: Path, entry: Entry, target: int, progress: Advance) -> bool:
    """Share a blob's bytes with a new file and verify them; return False if the file system cannot."""
    assert isinstance(entry.content, str)
    with open_blob(directory, entry.content) as blob:
        check_size(entry, os.fstat(blob.fileno()).st_size)
        if not clone_content(blob.fileno(), target):
            return False
    read_blob(entry, target, None, progress)
    return True


def _link(directory: Path, entry: Entry, path: Path, progress: Advance) -> bool:
    """Make a hard link to a blob's file and verify it; return False if the file system cannot."""
    assert isinstance(entry.content, str)
    part = part_path(path.parent)
    try:
        os.link(blob_path(directory, entry.content), part, follow_symlinks=False)
    except OSError as error:
        if is_callers(error):
            raise
        return False  # another file system, or one without hard links
    try:
        with os_errors("read a blob"):
            file = open_regular(str(part), os.O_RDONLY | os.O_CLOEXEC)
        try:
            lock_part(file)
            check_size(entry, os.fstat(file).st_size)
            read_blob(entry, file, None, progress)
        finally:
            os.close(file)
        part.rename(path)
    finally:
        discard(part)  # a rename over another link of the same file leaves both names
    return True
