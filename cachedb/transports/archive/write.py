"""Writing image archives: one tar for Docker and OCI tools, docker-archive, OCI archive, OCI layout folder.

The same image gives the same bytes: entries are in a fixed order, and times, owners and modes are fixed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from cachedb import oci
from cachedb.disk.durable import PART, atomic_file, lock_part, part_path, remove_leftovers, sync_folder
from cachedb.disk.layout import blob_path
from cachedb.disk.reader import damaged, open_blob, open_regular
from cachedb.disk.writer import CHUNK, WRITTEN_BACK, discard, hashing, write_back
from cachedb.errors import CacheError, is_callers, os_errors
from cachedb.oci.closure import Closure
from cachedb.oci.digests import Digest, split_digest
from cachedb.oci.manifests import Descriptor
from cachedb.oci.names import Name
from cachedb.progress import Advance
from cachedb.reentry import not_reentered
from cachedb.threads import in_threads
from cachedb.transports.archive.model import CONTAINERD_NAME, REF_NAME, layout_path

__all__ = ["Entry", "entries", "write_folder", "write_tar"]


_END: Final = bytes(2 * tarfile.BLOCKSIZE)  # of a tar
_FICLONE: Final = 0x40049409  # ioctl_ficlone(2)


class Entry(NamedTuple):
    """A file of an archive: its path in it, and its content, or the blob whose content it has."""

    path: str
    size: int  # bytes
    content: bytes | Digest


def entries(name: Name, closure: Closure, format: str) -> list[Entry]:
    """Return the files that an export consists of, in their order.

    Args:
        name: of the image.
        closure: of its manifest or index; for a docker-archive, of a manifest.
        format: one of `FORMATS`.
    """
    root = closure.root
    if name.digest:
        name = Name(name.repository, root.digest)  # one platform has another digest than the index it is from
    blobs = {blob.digest: _entry(blob, closure) for blob in closure.blobs}
    if format == "docker-archive":
        config, *layers = closure.children[root.digest]
        config_path = f"{split_digest(config.digest)[1]}.json"
        paths = {layer.digest: f"{split_digest(layer.digest)[1]}{_suffix(layer.media_type)}" for layer in layers}
        return [
            _manifest_json(name, config_path, [paths[layer.digest] for layer in layers]),
            Entry(config_path, config.size, config.digest),
            *(blobs[digest]._replace(path=path) for digest, path in paths.items()),
        ]
    found = [_json("oci-layout", {"imageLayoutVersion": "1.0.0"}), _json("index.json", _index(name, root))]
    images = closure.images
    if format == "docker" and len(images) == 1:
        config, *layers = closure.children[images[0].digest]
        found.append(_manifest_json(name, layout_path(config.digest), [layout_path(layer.digest) for layer in layers]))
    # Small documents first: a reader of a stream knows early what it has.
    documents = {layout_path(digest) for digest in closure.documents}
    return found + sorted(blobs.values(), key=lambda entry: (entry.path not in documents, entry.path))


def _entry(blob: Descriptor, closure: Closure) -> Entry:
    content = closure.documents[blob.digest] if blob.digest in closure.made else blob.digest
    return Entry(layout_path(blob.digest), blob.size, content)


def _json(path: str, document: object) -> Entry:
    content = json.dumps(document, separators=(",", ":")).encode()
    return Entry(path, len(content), content)


def _manifest_json(name: Name, config: str, layers: list[str]) -> Entry:
    tags = None if name.digest else [str(name)]
    return _json("manifest.json", [{"Config": config, "RepoTags": tags, "Layers": layers}])


def _suffix(media_type: str) -> str:
    if media_type.endswith("gzip"):
        return ".tar.gz"
    return ".tar.zst" if media_type.endswith("zstd") else ".tar"


def _index(name: Name, root: Descriptor) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": oci.OCI_INDEX,
        "manifests": [
            {
                "mediaType": root.media_type,
                "digest": root.digest,
                "size": root.size,
                "annotations": {CONTAINERD_NAME: name.qualified(), REF_NAME: str(name)},
            }
        ],
    }


def write_tar(
    directory: Path, files: list[Entry], destination: Path | BinaryIO, progress: Advance | None = None
) -> None:
    """Write a tar to a stream, or to a file that appears when all of it is verified and on disk.

    A stream that gets a damaged blob never gets the end of the tar.

    Raises:
        DigestMismatch: if a blob's file is damaged.
        StorageError: if it cannot be written.
    """
    with os_errors("write the export"):
        if not isinstance(destination, Path):
            destination.flush()
            unbuffered = destination.raw if type(destination) is io.BufferedWriter else destination
            _write_members(directory, files, unbuffered, progress)
            destination.flush()
        elif destination.exists() and not destination.is_file():  # a device or a fifo
            with destination.open("wb", buffering=0) as stream:
                _write_members(directory, files, stream, progress)
        else:
            path = destination.resolve()
            if not path.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
            remove_leftovers(path.parent)
            with atomic_file(path) as file:
                _write_members_at_once(directory, files, file.fileno(), progress)
            sync_folder(path.parent)


def _write_members(directory: Path, files: list[Entry], stream: BinaryIO, progress: Advance | None) -> None:
    """Write a tar from its beginning to its end."""
    for entry, header in _headers(files):
        _write(stream, header)
        if isinstance(entry.content, bytes):
            _write(stream, entry.content)
        else:
            _copy_blob(directory, entry, partial(_write, stream), progress, hash_beside=True)
        _write(stream, bytes(-entry.size % tarfile.BLOCKSIZE))
    _write(stream, _END)


def _write_members_at_once(directory: Path, files: list[Entry], file: int, progress: Advance | None) -> None:
    """Write a tar to a new file, several blobs at once: to hash them takes longer than to copy them."""
    offsets: dict[Entry, int] = {}
    offset = 0
    for entry, header in _headers(files):
        _write_at(file, offset, memoryview(header))
        offset += len(header)
        if isinstance(entry.content, bytes):
            _write_at(file, offset, memoryview(entry.content))
        else:
            offsets[entry] = offset
        offset += entry.size + -entry.size % tarfile.BLOCKSIZE  # what is not written of a file reads as zeros
    _write_at(file, offset, memoryview(_END))

    hash_beside = _larger_than_a_share(offsets)

    def write(entry: Entry, advance: Advance) -> None:
        writer = _Writer(file, offsets[entry])
        _copy_blob(directory, entry, writer.write, advance, hash_beside=entry in hash_beside)

    in_threads(write, _largest_first(offsets), progress or _tell_nobody)


def _headers(files: Iterable[Entry]) -> Iterator[tuple[Entry, bytes]]:
    """Yield each entry with what stands before it in a tar: the folders that it is the first in, and its header."""
    known = {""}
    for entry in files:
        headers = []
        # skopeo gives a folder that is no member to root, and fails where it may not.
        for folder in _folders(entry.path, known):
            member = tarfile.TarInfo(folder)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            headers.append(member.tobuf(tarfile.PAX_FORMAT))
        member = tarfile.TarInfo(entry.path)
        member.size, member.mode = entry.size, 0o644
        yield entry, b"".join([*headers, member.tobuf(tarfile.PAX_FORMAT)])


def _folders(path: str, known: set[str]) -> list[str]:
    """Return the folders of a path that are not known yet, the outermost first; they are known from now on."""
    new: list[str] = []
    while (path := os.path.dirname(path)) not in known:
        known.add(path)
        new.insert(0, path)
    return new


def _largest_first(files: Iterable[Entry]) -> list[Entry]:
    """Order entries so that all threads come to their end together."""
    return sorted(files, key=lambda entry: -entry.size)


def _larger_than_a_share(files: Collection[Entry]) -> set[Entry]:
    """Return the entries that one core would still be busy with when the others have ended.

    These are hashed in a second thread. For the others that costs more than it gains: every core has its own blob.
    """
    share = sum(entry.size for entry in files) / (os.cpu_count() or 1)
    return {entry for entry in files if entry.size > share}


def _tell_nobody(_count: int) -> None:
    """Take the place of an `Advance` where nobody asked for the progress."""


class _Writer:
    """Writes to a part of a file, and keeps its own place in it."""

    def __init__(self, file: int, offset: int) -> None:
        self._file, self._offset, self._unsaid = file, offset, 0

    def write(self, data: memoryview) -> None:
        _write_at(self._file, self._offset, data)
        self._offset += len(data)
        self._unsaid += len(data)
        if self._unsaid >= WRITTEN_BACK:
            write_back(self._file, self._unsaid, self._offset)
            self._unsaid = 0


def _write_at(file: int, offset: int, data: memoryview) -> None:
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def _copy_blob(
    directory: Path,
    entry: Entry,
    write: Callable[[memoryview], None],
    progress: Advance | None,
    *,
    hash_beside: bool,
) -> None:
    """Write a blob, and verify the bytes that are written: the same buffers are hashed."""
    digest = entry.content
    assert isinstance(digest, str)
    with open_blob(directory, digest) as blob:
        _check_size(entry, os.fstat(blob.fileno()).st_size)
        _hash_blob(entry, blob.fileno(), write, progress, beside=hash_beside)


def _check_size(entry: Entry, size: int) -> None:
    if size != entry.size:
        raise CacheError(
            f"the file of {entry.content!s} is {size} bytes, and should be {entry.size} by its manifest: "
            "import the image again"
        )


def _hash_blob(
    entry: Entry,
    file: int,
    write: Callable[[memoryview], None] | None,
    progress: Advance | None,
    *,
    beside: bool = False,
) -> None:
    """Read a blob's file to its end, have it written, and raise `DigestMismatch` unless it is the blob."""
    digest = Digest(str(entry.content))
    hasher, done, length = hashlib.new(split_digest(digest)[0]), 0, min(CHUNK, entry.size)
    with hashing([hasher], length, beside=beside) as (buffers, hash_chunk):
        while done < entry.size:
            chunk = next(buffers)[: entry.size - done]
            filled = 0
            while filled < len(chunk):
                with os_errors("read a blob"):
                    count = os.preadv(file, [chunk[filled:]], done + filled)
                if not count:
                    raise CacheError(f"the file of {digest} was cut short while it was read: run `cachedb verify`")
                filled += count
            hash_chunk(chunk)
            if write is not None:
                write(chunk)
            done += filled
            if progress is not None:
                progress(filled)
    if f"{hasher.name}:{hasher.hexdigest()}" != digest:
        raise damaged(digest)


def _write(stream: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) or 0 :]  # None of a full pipe that does not block


_OLD_PART = re.compile(r"\.cachedb-[0-9a-f]{16}\.part")  # of earlier releases


def write_folder(
    directory: Path,
    files: list[Entry],
    destination: Path,
    *,
    link: bool = False,
    progress: Advance | None = None,
) -> None:
    """Write an image layout folder, or add to the one that is there; ``index.json`` is written last.

    Args:
        directory: of the cache.
        files: as `entries` gives them.
        destination: the folder; its parent must exist.
        link: make hard links to the cache's files where the file system can.
        progress: is told of the bytes written or verified.

    Raises:
        DigestMismatch: if a blob's file is damaged; what was written of the image is removed then.
        StorageError: if it cannot be written.
        CacheError: if the folder holds something else.
    """
    with os_errors("write the export"), ExitStack() as stack:
        # Two exports into one layout take turns, for each rewrites its index.
        stack.enter_context(not_reentered(f"export {destination.resolve()}", f"exporting to {str(destination)!r}"))
        lock, is_new = _locked_folder(destination)
        made = [destination] if is_new else []
        folders = {destination, destination.parent} if is_new else {destination}
        try:
            parts = re.compile(f"{PART.pattern}|{_OLD_PART.pattern}")
            strange = [name for name in os.listdir(destination) if not parts.fullmatch(name)]
            if strange and not (destination / "oci-layout").is_file():
                raise CacheError(f"{str(destination)!r} is neither empty nor an OCI image layout")
            for folder in (destination / "blobs", *destination.glob("blobs/*")):
                if folder.is_symlink():
                    raise CacheError(f"{str(folder)!r} is a symbolic link: name a layout whose folders are its own")
            for folder in (destination, *destination.glob("blobs/*")):
                remove_leftovers(folder, parts)  # who writes a layout has its lock, in earlier releases too
            # The first says what the folder is, should this be cut off; the last names what is there by then.
            order = {"oci-layout": 0, "index.json": 2}
            *others, index = sorted(files, key=lambda entry: order.get(entry.path, 1))
            blobs = []
            for entry in others:
                path = destination / entry.path
                for parent in reversed(Path(entry.path).parents):
                    if not (destination / parent).is_dir():
                        (destination / parent).mkdir()
                        made.append(destination / parent)
                    folders.add(destination / parent)
                if not os.path.lexists(path):
                    made.append(path)
                if isinstance(entry.content, bytes):
                    _write_file(directory, entry, path, None)
                else:
                    blobs.append(entry)

            hash_beside = _larger_than_a_share(blobs)

            def write(entry: Entry, advance: Advance) -> None:
                path = destination / entry.path
                if not (link and _link(directory, entry, path, advance)):
                    _write_file(directory, entry, path, advance, hash_beside=entry in hash_beside)

            in_threads(write, _largest_first(blobs), progress or _tell_nobody)
            for folder in folders:
                sync_folder(folder)
            # All that it names is on disk now.
            path = destination / index.path
            _write_file(directory, _merged(path, index), path, None)
            sync_folder(destination)
        except BaseException:
            _remove(made)
            raise
        finally:
            os.close(lock)


def _locked_folder(destination: Path) -> tuple[int, bool]:
    """Open and lock a folder, for exports into one layout take turns; also return whether it was made here."""
    while True:
        is_new = False
        with suppress(FileExistsError):
            destination.mkdir()
            is_new = True
        try:
            lock = os.open(destination, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            if destination.is_symlink():
                raise
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # An export that fails while we wait removes the folder that it made.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), destination.stat()):
                    return lock, is_new
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _remove(made: list[Path]) -> None:
    """Remove what a failed export made: files, and folders that are empty then."""
    for path in reversed(made):
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()


def _write_file(
    directory: Path, entry: Entry, path: Path, progress: Advance | None, *, hash_beside: bool = False
) -> None:
    with atomic_file(path) as file:
        if isinstance(entry.content, bytes):
            _write(file, entry.content)
        elif not _clone(directory, entry, file.fileno(), progress):
            _copy_blob(directory, entry, _Writer(file.fileno(), 0).write, progress, hash_beside=hash_beside)


def _clone(directory: Path, entry: Entry, target: int, progress: Advance | None) -> bool:
    """Share a blob's bytes with a new file, where the file system can; and verify them there."""
    assert isinstance(entry.content, str)
    with open_blob(directory, entry.content) as blob:
        _check_size(entry, os.fstat(blob.fileno()).st_size)
        try:
            fcntl.ioctl(target, _FICLONE, blob.fileno())
        except OSError as error:
            if is_callers(error):
                raise
            return False  # an error may only mean "not between these two files"; if not, a write meets it again
    _hash_blob(entry, target, None, progress)
    return True


def _link(directory: Path, entry: Entry, path: Path, progress: Advance | None) -> bool:
    """Make a hard link to a blob's file, where the file system can; it gets its name when it is verified."""
    assert isinstance(entry.content, str)
    part = part_path(path.parent)
    try:
        os.link(blob_path(directory, entry.content), part)
    except OSError as error:
        if is_callers(error):
            raise
        return False  # another file system, or one without links: copy
    try:
        with os_errors("read a blob"):
            file = open_regular(str(part), os.O_RDONLY | os.O_CLOEXEC)
        try:
            lock_part(file)
            _check_size(entry, os.fstat(file).st_size)
            _hash_blob(entry, file, None, progress)
        finally:
            os.close(file)
        part.rename(path)
    finally:
        discard(part)  # a rename over another link of the same file does nothing
    return True


def _merged(path: Path, entry: Entry) -> Entry:
    """Return the index with the image in it, in place of another of its name."""
    assert isinstance(entry.content, bytes)
    try:
        old = oci.load_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        return entry
    new = json.loads(entry.content)
    if not isinstance(old, dict) or not isinstance(old.get("manifests"), list):
        raise CacheError(f"{str(path)!r} is not an image index")

    def ref_name(descriptor: object) -> object:
        annotations = descriptor.get("annotations") if isinstance(descriptor, dict) else None
        return annotations.get(REF_NAME) if isinstance(annotations, dict) else None

    name = ref_name(new["manifests"][0])
    kept = [descriptor for descriptor in old["manifests"] if ref_name(descriptor) != name]
    return _json("index.json", {**old, "manifests": kept + new["manifests"]})
