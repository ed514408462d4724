"""Save images in the index: point a name to a manifest and associate the image with its closure."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import (
    Connection,
    func,
    insert,
    select,
    update,
)

from cachedb import oci
from cachedb.content import describe
from cachedb.disk import reader
from cachedb.errors import (
    InvalidManifest,
    InvalidName,
    NotInCache,
    StorageError,
    os_errors,
)
from cachedb.index import blobs as blob_rows
from cachedb.index import descriptions
from cachedb.index.images import (
    build_associations_copy,
    build_associations_delete,
    build_image_insert,
    build_images_insert,
    find,
    insert_associations,
    look_up,
    look_up_all,
    look_up_blobs,
    point_name,
    read_image_blobs,
    read_root,
    select_images_waiting_for,
)
from cachedb.index.lifetimes import add_seconds
from cachedb.index.records import BlobRow
from cachedb.index.sqlite.batches import split_batches
from cachedb.index.tables import BLOBS, IMAGE_BLOBS, IMAGES
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import (
    DOCUMENT_LIMIT,
    Descriptor,
    check_document_size,
    descriptors,
    manifest_media_type,
)
from cachedb.oci.names import Name

__all__ = [
    "NewImage",
    "SavedImage",
    "associate_waiting",
    "attach",
    "attach_referrers",
    "closure",
    "find_present_part",
    "find_stored_part",
    "platform_choice",
    "reassociate",
    "restore_image",
    "save_image",
    "save_new",
    "tag",
]


Choice = Callable[[list[Descriptor]], list[Descriptor]]
"""A function that returns the children of an index that belong to an image's closure."""


class SavedImage(NamedTuple):
    """An image as another index records it."""

    digest: Digest
    media_type: str
    added_at: datetime  # UTC
    last_used_at: datetime  # UTC
    some_platforms: int | None  # 1 if its closure lacks platforms of its index, or foreign layers
    contents: list[Descriptor]  # by position
    pinned_at: datetime | None = None  # UTC; None if it is not pinned
    expires_at: datetime | None = None  # UTC; None for never


class NewImage(NamedTuple):
    """An image to save."""

    name: Name
    digest: Digest  # of the manifest or index, which is stored
    media_type: str
    contents: list[Descriptor] | None = None  # its closure; None if the caller does not know it


def associate_waiting(connection: Connection, directory: Path, digests: list[Digest]) -> None:
    """Update the images that reference one of these new blobs as a child manifest or a config."""
    for image_id in _find_waiting(connection, digests):
        reassociate(connection, directory, image_id)


def reassociate(connection: Connection, directory: Path, image_id: int) -> None:
    """Associate an image again with the stored part of its manifest's closure.

    If the image has only some platforms of its index, the closure keeps those platforms.
    """
    recorded = read_root(connection, image_id)
    root = _correct_media_type(connection, directory, recorded)
    if root != recorded:
        connection.execute(update(IMAGES).where(IMAGES.c.id == image_id).values(media_type=root.media_type))
    known: dict[Digest, BlobRow] = {}
    choose = platform_choice(connection, image_id)
    found = closure(connection, directory, root, choose, strict=False, known=known)
    _ensure_rows(connection, found, known, strict=False)
    _associate(connection, directory, image_id, found, known)


def platform_choice(connection: Connection, image_id: int) -> Choice | None:
    """Return a function that chooses the index's children in an image's closure; None if all are in it."""
    query = select(IMAGES.c.some_platforms).where(IMAGES.c.id == image_id)
    if connection.execute(query).scalar_one() is None:
        return None
    return oci.choose_among({blob.digest for blob in descriptions.read_associations(connection, image_id)})


def _correct_media_type(connection: Connection, directory: Path, root: Descriptor) -> Descriptor:
    """Return a manifest with the media type of its content if the recorded media type does not fit."""
    if blob_rows.read_stored_sizes(connection, [root.digest]).get(root.digest, DOCUMENT_LIMIT + 1) > DOCUMENT_LIMIT:
        return root
    with suppress(InvalidManifest, NotInCache, StorageError):
        with reader.open_blob(directory, root.digest) as file, os_errors("read a manifest"):
            data = file.read()
        with suppress(InvalidManifest):
            descriptors(data, manifest_media_type(data, root.media_type))
            return root
        media_type = manifest_media_type(data)
        descriptors(data, media_type)
        return oci.root_descriptor(root.digest, root.size, media_type)
    return root


def _find_waiting(connection: Connection, digests: list[Digest]) -> list[int]:
    """Return the ids of the images that reference one of these blobs as a child manifest or a config."""
    found: set[int] = set()
    for part in split_batches(digests):
        found.update(connection.execute(select_images_waiting_for(), {"digests": part}).scalars())
    return sorted(found)


def save_image(
    connection: Connection,
    directory: Path,
    name: Name,
    digest: Digest,
    media_type: str,
    choose: Choice | None = None,
    *,
    ttl: float | None = None,
) -> int:
    """Point a name to a stored manifest or index and associate its closure; return the image's id.

    The name no longer points to its previous manifest. Blobs attached to an image of the same manifest stay attached.

    Args:
        connection: in a write transaction.
        directory: of the cache.
        name: of the image.
        digest: of the manifest or index.
        media_type: of the manifest or index.
        choose: returns the children of an index that belong to the closure; None for all of them.
        ttl: seconds until the name expires; None for never.

    Raises:
        InvalidName: if the name has another digest; then nothing is written.
        InvalidManifest: if a manifest of the closure is invalid; then nothing is written.
    """
    if name.digest not in (None, digest):
        raise InvalidName(f"{name} names another digest than {digest}: use a tag or this digest")
    known = look_up_blobs(connection, [digest])
    root = oci.root_descriptor(digest, known[digest].size, media_type)
    found = closure(connection, directory, root, choose, known=known)
    _ensure_rows(connection, found, known)
    image_id, new = point_name(connection, name, known[digest].id, media_type, 1 if choose else None, ttl=ttl)
    # Blobs that the new closure leaves out are not attached, though the image may have had them before.
    left_out = {blob.digest for blob in closure(connection, directory, root, strict=False)} if choose else set()
    _associate(connection, directory, image_id, found, known, left_out, new=new)
    return image_id


def attach_referrers(connection: Connection, directory: Path, name: Name, blobs: Iterable[Descriptor]) -> None:
    """Attach the closures of an image's referrers, whose blobs are stored, to the image."""
    for blob in blobs:
        role = blob.role if blob.is_document else "other"
        attach(connection, directory, name, blob.digest, role, blob.media_type)


def find_stored_part(connection: Connection, directory: Path, name: Name, digest: Digest) -> set[Digest]:
    """Return the stored blobs of an image with this name and digest; none if the name points elsewhere.

    A pull or import of one platform keeps the platforms that are stored already.
    """
    found = look_up(connection, name)
    if found is None or found.digest != digest:
        return set()
    return {blob.digest for blob in read_image_blobs(connection, directory, found.id) if blob.stored}


def save_new(
    connection: Connection, directory: Path, new: Iterable[NewImage], *, ttl: float | None = None
) -> dict[Name, InvalidManifest]:
    """Save images under names that the index lacks, in a few statements for all of them.

    Args:
        connection: in a write transaction.
        directory: of the cache.
        new: the images; a name with a digest must have the digest of its image.
        ttl: seconds until the names expire; None for never.

    Returns:
        The images that were not saved because a manifest of their closure is invalid, with the error.
    """
    wanted, refused = {image.name: image for image in new}, dict[Name, InvalidManifest]()
    known = look_up_blobs(connection, {image.digest for image in wanted.values()})
    contents: dict[Name, list[Descriptor]] = {}
    for name, image in wanted.items():
        root = oci.root_descriptor(image.digest, known[image.digest].size, image.media_type)
        try:
            contents[name] = image.contents or closure(connection, directory, root, known=known)
        except InvalidManifest as error:
            refused[name] = error
    known.update(
        look_up_blobs(connection, {blob.digest for found in contents.values() for blob in found} - known.keys())
    )
    for name, found in list(contents.items()):
        try:
            _check_sizes(found, known)
        except InvalidManifest as error:
            refused[name] = error
            del contents[name]
    if contents:
        _add_rows(connection, (blob for found in contents.values() for blob in found), known)
        _insert_new(connection, directory, [wanted[name] for name in contents], contents, known, ttl)
    return refused


def _insert_new(
    connection: Connection,
    directory: Path,
    new: list[NewImage],
    contents: dict[Name, list[Descriptor]],
    known: dict[Digest, BlobRow],
    ttl: float | None,
) -> None:
    now = datetime.now(UTC)
    times = {"added_at": now, "last_used_at": now, "expires_at": add_seconds(now, ttl)}
    rows, wanted, labels, platforms = [], {}, {}, {}
    for image in new:
        wanted[image.name] = _associations(contents[image.name], known)
        description = _describe(directory, wanted[image.name])
        values = {"manifest_id": known[image.digest].id, "media_type": image.media_type, **description.values}
        rows.append({**image.name._asdict(), **values, **times})
        labels[image.name], platforms[image.name] = description.labels, description.platforms
    connection.execute(build_images_insert(), rows)
    ids = {name: row.id for name, row in look_up_all(connection, wanted).items()}
    insert_associations(connection, {ids[name]: blobs for name, blobs in wanted.items()})
    descriptions.add_labels(connection, {ids[name]: pairs for name, pairs in labels.items()})
    descriptions.add_platforms(connection, {ids[name]: found for name, found in platforms.items()})


def closure(
    connection: Connection,
    directory: Path,
    root: Descriptor,
    choose: Choice | None = None,
    *,
    strict: bool = True,
    known: dict[Digest, BlobRow] | None = None,
) -> list[Descriptor]:
    """Return a manifest and the blobs that it references, directly or through stored children.

    Args:
        connection: in a transaction.
        directory: of the cache.
        root: the manifest or index.
        choose: returns the children of an index that belong to the closure; None for all of them.
        strict: raise if a manifest is invalid or cannot be read; else treat it as a blob without children.
        known: rows of blobs that need no look-up; this function adds the rows it looks up.

    Raises:
        InvalidManifest: if a manifest of the closure is invalid, and ``strict``.
        NotInCache: if the file of a stored manifest is gone, and ``strict``.
        StorageError: if a manifest cannot be read, and ``strict``.
    """
    rows = {} if known is None else known

    def read(blob: Descriptor) -> bytes | None:
        if blob.digest not in rows:
            rows.update(look_up_blobs(connection, [blob.digest]))
        row = rows.get(blob.digest)
        if row is None or not row.stored:
            return None
        try:
            check_document_size(row.size, f"manifest {blob.digest}")
            with reader.open_blob(directory, blob.digest) as file, os_errors("read a manifest"):
                return file.read()
        except (InvalidManifest, NotInCache, StorageError):
            if strict:
                raise
            return None

    return list(oci.walk(root, read, choose, skip_invalid=not strict))


def _ensure_rows(
    connection: Connection, found: list[Descriptor], known: dict[Digest, BlobRow], *, strict: bool = True
) -> None:
    """Insert the missing rows of blobs and add all rows to ``known``; check declared sizes if ``strict``."""
    known.update(look_up_blobs(connection, {blob.digest for blob in found} - known.keys()))
    if strict:
        _check_sizes(found, known)
    _add_rows(connection, found, known)


def _check_sizes(found: Iterable[Descriptor], known: dict[Digest, BlobRow]) -> None:
    """Raise if the declared size of a stored blob differs from its size in the index."""
    for digest, size in {blob.digest: blob.size for blob in found}.items():
        row = known.get(digest)
        if row is not None and row.stored and row.size != size:
            raise InvalidManifest(f"the manifest declares {size} bytes for {digest}, but the blob has {row.size}")


def _add_rows(connection: Connection, found: Iterable[Descriptor], known: dict[Digest, BlobRow]) -> None:
    """Insert the rows of the blobs that are not in ``known``, and add them to it."""
    new = {blob.digest: blob.size for blob in found if blob.digest not in known}
    if new:
        connection.execute(insert(BLOBS), [{"digest": digest, "size": size} for digest, size in new.items()])
        known.update(look_up_blobs(connection, new))


def _associate(
    connection: Connection,
    directory: Path,
    image_id: int,
    found: list[Descriptor],
    known: dict[Digest, BlobRow],
    left_out: Container[Digest] = (),
    *,
    new: bool = False,
) -> None:
    """Associate an image with its closure, followed by its attached blobs, and write its description.

    Args:
        connection: in a write transaction.
        directory: of the cache.
        image_id: of the image.
        found: its closure.
        known: the rows of the closure's blobs.
        left_out: blobs that are not attached if they are not stored.
        new: whether the image has no associations yet.
    """
    old = [] if new else descriptions.read_associations(connection, image_id)
    reached = _associations(found, known)
    attached = [
        blob._replace(diff_id=None, created_by=None)
        for blob in old
        if blob.digest not in known and (blob.stored or blob.digest not in left_out)
    ]
    wanted = [blob._replace(position=position) for position, blob in enumerate([*reached, *attached])]
    description = _describe(directory, wanted)
    if wanted != old:
        if old:
            connection.execute(build_associations_delete(), {"of": image_id})
        insert_associations(connection, {image_id: wanted})
    descriptions.write(connection, image_id, description, new=new)


def _associations(contents: list[Descriptor], known: dict[Digest, BlobRow]) -> list[descriptions.Association]:
    """Return the associations with a closure, without diff ids and commands of layers."""
    return [
        descriptions.Association(position, blob.role, blob.media_type, row.id, blob.digest, row.size, row.stored)
        for position, blob in enumerate(contents)
        for row in [known[blob.digest]]
    ]


def _describe(directory: Path, wanted: list[descriptions.Association]) -> descriptions.Description:
    """Return the description of an image; put the diff ids and commands of its layers into ``wanted``."""
    description = describe.read_description(directory, wanted)
    for position, (diff_id, created_by) in description.layers.items():
        wanted[position] = wanted[position]._replace(diff_id=diff_id, created_by=created_by)
    return description


def find_present_part(connection: Connection, directory: Path, root: Descriptor) -> list[Descriptor] | None:
    """Return the stored part of an index's closure; None if all or nothing of it is stored.

    Nothing records which part was chosen when the index was saved. So platforms and foreign layers that are absent
    count as left out.
    """
    whole = closure(connection, directory, root, strict=False)
    stored = blob_rows.read_stored_sizes(connection, {blob.digest for blob in whole})
    part = closure(connection, directory, root, oci.choose_among(stored), strict=False)
    return part if len(part) < len(whole) else None


def restore_image(connection: Connection, directory: Path, name: Name, saved: SavedImage) -> None:
    """Insert an image as another index records it, and associate it with the stored part of its closure."""
    size = next((blob.size for blob in saved.contents if blob.digest == saved.digest), 0)
    root = oci.root_descriptor(saved.digest, size, saved.media_type)
    contents = saved.contents or [root]
    known: dict[Digest, BlobRow] = {}
    _ensure_rows(connection, [root, *contents], known, strict=False)
    values = {
        **name._asdict(),
        "manifest_id": known[saved.digest].id,
        "media_type": saved.media_type,
        "some_platforms": saved.some_platforms,
        "added_at": saved.added_at,
        "last_used_at": saved.last_used_at,
        "pinned_at": saved.pinned_at,
        "expires_at": saved.expires_at,
    }
    image_id = connection.execute(build_image_insert(), values).scalar_one()
    insert_associations(connection, {image_id: _associations(contents, known)})
    reassociate(connection, directory, image_id)


def tag(connection: Connection, source: Name, target: Name) -> int:
    """Give an image a second name, and return the id of the image row with that name.

    The target no longer points to its previous manifest, and never expires.

    Raises:
        NotInCache: if the source is not in the index.
        InvalidName: if the target has another digest.
    """
    image = find(connection, source)
    if target.digest not in (None, image.digest):
        raise InvalidName(f"{target} names another digest than that of {source}, {image.digest}: use a tag")
    target_id, _ = point_name(connection, target, image.manifest_id, image.media_type, image.some_platforms)
    if target_id == image.id:
        return target_id
    connection.execute(build_associations_delete(), {"of": target_id})
    connection.execute(build_associations_copy(), {"of": image.id, "target": target_id})
    descriptions.copy(connection, image.id, target_id)
    return target_id


def attach(connection: Connection, directory: Path, name: Name, digest: Digest, role: str, media_type: str) -> None:
    """Attach a stored blob to an image at the last position, unless the image has it in this role already.

    Raises:
        NotInCache: if the image is not in the index, or the blob is not stored.
    """
    image = find(connection, name)
    blob_id = connection.execute(
        select(BLOBS.c.id).where(BLOBS.c.digest == digest, BLOBS.c.stored_at.is_not(None))
    ).scalar()
    if blob_id is None:
        raise NotInCache(f"{digest} is not in the cache: store it first", name=digest)
    existing = select(IMAGE_BLOBS.c.position).where(
        IMAGE_BLOBS.c.image_id == image.id, IMAGE_BLOBS.c.blob_id == blob_id, IMAGE_BLOBS.c.role == role
    )
    if connection.execute(existing).first() is not None:
        return
    position = select(func.max(IMAGE_BLOBS.c.position) + 1).where(IMAGE_BLOBS.c.image_id == image.id)
    connection.execute(
        insert(IMAGE_BLOBS).values(
            image_id=image.id,
            position=connection.execute(position).scalar_one(),
            blob_id=blob_id,
            role=role,
            media_type=media_type,
        )
    )
    if role in ("config", "layer"):
        describe.describe(connection, directory, image.id)
