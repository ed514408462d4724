"""Writing image archives: one tar for Docker and OCI tools, docker-archive, OCI archive, OCI layout folder.

The same image gives the same bytes: entries are in a fixed order, and times, owners and modes are fixed.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import secrets
import tarfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from cachedb import oci
from cachedb.archive import CONTAINERD_NAME, REF_NAME, layout_path
from cachedb.database import sync_folder
from cachedb.directory import blob_path
from cachedb.errors import CacheError, NotInCache, os_errors
from cachedb.oci import Descriptor
from cachedb.parallel import Advance
from cachedb.reading import open_blob
from cachedb.receiving import CHUNK, WRITTEN_BACK, discard, write_back
from cachedb.reference import Digest, Name, digest_of, shorten, split_digest

__all__ = ["FORMATS", "Entry", "choose_platform", "entries", "without_absent", "write_folder", "write_tar"]

FORMATS: Final = ("docker", "docker-archive", "oci-archive", "oci-dir")
"""What an image can be exported as; the first, the default, is an OCI archive that `docker load` takes too."""


class Entry(NamedTuple):
    """A file of an archive: its path in it, and its content, or the blob whose content it has."""

    path: str
    size: int  # bytes
    content: bytes | Digest


def entries(
    name: Name,
    root: Descriptor,
    format: str,
    manifests: dict[Digest, bytes],
    closure: Iterable[Descriptor],
    made: Mapping[Digest, bytes],
) -> list[Entry]:
    """Return the files that an export consists of, in their order.

    Args:
        name: the image's.
        root: its manifest or index; for a docker-archive, a manifest.
        format: one of `FORMATS`.
        manifests: the bytes of the manifests and indexes of the closure, by digest.
        closure: all that is exported.
        made: what of it is not in the cache, for `without_absent` made it.
    """
    if name.digest:
        name = Name(name.repository, root.digest)  # one platform has another digest than the index it is from
    blobs = {
        blob.digest: Entry(layout_path(blob.digest), blob.size, made.get(blob.digest, blob.digest)) for blob in closure
    }
    if format == "docker-archive":
        config, *layers = oci.descriptors(manifests[root.digest], root.media_type)
        config_path = f"{split_digest(config.digest)[1]}.json"
        paths = {layer.digest: f"{split_digest(layer.digest)[1]}{_suffix(layer.media_type)}" for layer in layers}
        return [
            _manifest_json(name, config_path, [paths[layer.digest] for layer in layers]),
            Entry(config_path, config.size, config.digest),
            *(blobs[digest]._replace(path=path) for digest, path in paths.items()),
        ]
    found = [_json("oci-layout", {"imageLayoutVersion": "1.0.0"}), _json("index.json", _index(name, root))]
    if format == "docker" and (image := _only_image(root, manifests)):
        config, *layers = oci.descriptors(manifests[image.digest], image.media_type)
        found.append(_manifest_json(name, layout_path(config.digest), [layout_path(layer.digest) for layer in layers]))
    # Small documents first: a reader of a stream knows early what it has.
    documents = {layout_path(digest) for digest in manifests}
    return found + sorted(blobs.values(), key=lambda entry: (entry.path not in documents, entry.path))


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


def without_absent(
    root: Descriptor, manifests: dict[Digest, bytes], here: Container[Digest]
) -> tuple[Descriptor, dict[Digest, bytes]]:
    """Return an index that names what is here and no more, and what was made for it; as it is, if all of it is here.

    Args:
        root: the index, or a manifest.
        manifests: the bytes of the manifests and indexes of the closure; what is made is put among them.
        here: what the image has in the cache.
    """
    if root.role != "index":
        return root, {}
    made: dict[Digest, bytes] = {}
    entries, document = [], oci.load_json(manifests[root.digest], "the index")
    for entry in document["manifests"]:
        child = oci.child(entry, "the index")
        if child.digest in here:
            new, more = without_absent(child, manifests, here)
            made |= more
            entries.append({**entry, "digest": new.digest, "size": new.size})
    if entries == document["manifests"]:
        return root, {}
    data = json.dumps({**document, "manifests": entries}, separators=(",", ":")).encode()
    digest = digest_of(data)
    made[digest] = manifests[digest] = data
    return root._replace(digest=digest, size=len(data)), made


def _platforms(root: Descriptor, manifests: dict[Digest, bytes]) -> list[Descriptor]:
    """Return the image manifests below a manifest or index; attestations, of unknown/unknown, are none."""
    if root.role == "manifest":
        return [root]
    children = oci.descriptors(manifests[root.digest], root.media_type)
    found = [
        image
        for blob in children
        if blob.role in ("manifest", "index") and blob.digest in manifests and blob.platform != "unknown/unknown"
        for image in ([blob] if blob.role == "manifest" else _platforms(blob, manifests))
    ]
    return list(dict.fromkeys(found))


def _only_image(root: Descriptor, manifests: dict[Digest, bytes]) -> Descriptor | None:
    images = _platforms(root, manifests)
    return images[0] if len(images) == 1 else None


def choose_platform(
    name: Name,
    root: Descriptor,
    manifests: dict[Digest, bytes],
    read: Callable[[Digest], bytes],
    wanted: str | None,
) -> Descriptor:
    """Return the manifest of one platform of an image.

    Args:
        name: the image's.
        root: its manifest or index.
        manifests: the bytes of the manifests and indexes of the closure, by digest.
        read: returns a blob's bytes: of a config, which tells the platform where no index does.
        wanted: ``os/architecture[/variant]``; None for the host's.

    Raises:
        NotInCache: if the image is not for that platform, or what it has for it is not here.
    """
    images = _platforms(root, manifests)
    if wanted is None and len(images) == 1:
        return images[0]
    asked = wanted or oci.host_platform()
    there = {image: image.platform or _platform_of_config(image, manifests, read) for image in images}
    for image, label in there.items():
        if oci.is_for(label, asked):
            return image
    for blob in oci.walk(root, lambda blob: manifests.get(blob.digest)):
        if blob.role == "manifest" and blob.digest not in manifests and oci.is_for(blob.platform, asked):
            raise NotInCache(f"{name} is not here for platform {shorten(asked)}: pull it with --platform")
    known = ", ".join(sorted(there.values()))
    raise NotInCache(f"{name} is not for platform {shorten(asked)}, but for {known}: choose one with --platform")


def _platform_of_config(image: Descriptor, manifests: dict[Digest, bytes], read: Callable[[Digest], bytes]) -> str:
    config = oci.descriptors(manifests[image.digest], image.media_type)[0]
    if config.size > oci.DOCUMENT_LIMIT:
        return "unknown"
    return oci.platform_label(oci.load_json(read(config.digest), f"config {config.digest}")) or "unknown"


def write_tar(
    directory: Path, files: list[Entry], destination: Path | BinaryIO, progress: Advance | None = None
) -> None:
    """Write a tar to a stream, or to a file that appears when all of it is there and on disk.

    Raises:
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
            with _appearing(path) as file:
                _write_members(directory, files, file, progress)
            sync_folder(path.parent)


def _write_members(directory: Path, files: list[Entry], stream: BinaryIO, progress: Advance | None) -> None:
    for entry in files:
        member = tarfile.TarInfo(entry.path)
        member.size, member.mode = entry.size, 0o644
        _write(stream, member.tobuf(tarfile.PAX_FORMAT))
        _write_content(directory, entry, stream, progress)
        _write(stream, bytes(-entry.size % tarfile.BLOCKSIZE))
    _write(stream, bytes(2 * tarfile.BLOCKSIZE))


def _write_content(directory: Path, entry: Entry, stream: BinaryIO, progress: Advance | None) -> None:
    if isinstance(entry.content, bytes):
        _write(stream, entry.content)
        return
    with open_blob(directory, entry.content) as blob:
        source, left = blob.fileno(), os.fstat(blob.fileno()).st_size
        if left != entry.size:
            raise CacheError(
                f"the file of {entry.content} is {left} bytes, and should be {entry.size} by its manifest: "
                "import the image again"
            )
        while left:
            count = _copy_some(source, stream, min(left, WRITTEN_BACK))
            if not count:
                raise CacheError(f"the file of {entry.content} was cut short while it was read")
            left -= count
            if progress is not None:
                progress(count)


def _copy_some(source: int, stream: BinaryIO, count: int) -> int:
    """Have the kernel copy, by reference where the file system can; else go through our memory."""
    if type(stream) is io.FileIO:  # any other may compress, say, though it has a descriptor too
        # An error may only mean "not between these two files"; if not, the write below meets it again.
        with suppress(OSError):
            if copied := os.copy_file_range(source, stream.fileno(), count):
                write_back(stream.fileno(), copied)
                return copied
        with suppress(OSError):
            return os.sendfile(stream.fileno(), source, None, count)
    chunk = os.read(source, min(count, CHUNK))
    _write(stream, chunk)
    return len(chunk)


def _write(stream: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) or 0 :]  # None of a full pipe that does not block


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside its final name, which it gets when its content is whole and on disk."""
    part = _part(path)
    try:
        with part.open("xb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        part.rename(path)
    finally:
        discard(part)


_PARTS = ".cachedb-*.part"


def _part(path: Path) -> Path:
    return path.with_name(_PARTS.replace("*", secrets.token_hex(8)))


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
        progress: is told of the bytes written or linked.

    Raises:
        StorageError: if it cannot be written.
        CacheError: if the folder holds something else.
    """
    with os_errors("write the export"):
        folders = {destination}
        with suppress(FileExistsError):
            destination.mkdir()
            folders.add(destination.parent)
        # Two exports into one layout take turns, for each rewrites its index.
        lock = os.open(destination, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            left = [*destination.glob(_PARTS), *destination.glob(f"blobs/*/{_PARTS}")]
            if set(destination.iterdir()) - set(left) and not (destination / "oci-layout").is_file():
                raise CacheError(f"{str(destination)!r} is neither empty nor an OCI image layout")
            for part in left:
                part.unlink()  # of an export that was killed: whoever writes a layout has the lock
            # The first says what the folder is, should this be cut off; the last names what is there by then.
            order = {"oci-layout": 0, "index.json": 2}
            *others, index = sorted(files, key=lambda entry: order.get(entry.path, 1))
            for entry in others:
                path = destination / entry.path
                path.parent.mkdir(parents=True, exist_ok=True)
                folders.update(destination / parent for parent in Path(entry.path).parents)
                if not (link and _link(directory, entry, path, progress)):
                    _write_file(directory, entry, path, progress)
            for folder in folders:
                sync_folder(folder)
            # All that it names is on disk now.
            path = destination / index.path
            _write_file(directory, _merged(path, index), path, None)
            sync_folder(destination)
        finally:
            os.close(lock)


def _write_file(directory: Path, entry: Entry, path: Path, progress: Advance | None) -> None:
    with _appearing(path) as file:
        _write_content(directory, entry, file, progress)


def _link(directory: Path, entry: Entry, path: Path, progress: Advance | None) -> bool:
    if isinstance(entry.content, bytes):
        return False
    part = _part(path)
    try:
        os.link(blob_path(directory, entry.content), part)
    except OSError:
        return False  # another file system, or one without links: copy
    try:
        part.rename(path)
    finally:
        discard(part)  # a rename over another link of the same file does nothing
    if progress is not None:
        progress(entry.size)
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
