"""Images in the index: names, what they point to, and the closure each is associated with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, Delete, Select, and_, bindparam, delete, func, insert, literal, or_, select, update
from sqlalchemy.sql.dml import ReturningInsert

from cachedb import blobs, configs
from cachedb.database import Database
from cachedb.errors import (
    CacheError,
    DamagedIndex,
    IncompleteImage,
    InvalidManifest,
    InvalidName,
    NotInCache,
    StorageError,
    os_errors,
)
from cachedb.models import Blob, Image, ImageBlob
from cachedb.oci import (
    CONFIG_TYPES,
    DOCUMENT_LIMIT,
    Descriptor,
    descriptors,
    is_compressed,
    manifest_media_type,
    role_of,
    walk,
)
from cachedb.reference import Digest, Name
from cachedb.sessions import Hold, Session

__all__ = [
    "BlobInfo",
    "ImageInfo",
    "SavedImage",
    "associate_waiting",
    "attach",
    "bring",
    "closure",
    "count_incomplete",
    "find",
    "image",
    "image_blobs",
    "images",
    "incomplete",
    "is_associated",
    "let_go",
    "look_up",
    "publish",
    "reassociate",
    "remove",
    "restore",
    "root_of",
    "save",
    "tag",
]


T = TypeVar("T")

_ASSOCIATION = ("image_id", "position", "blob_id", "role", "media_type")


class ImageInfo(NamedTuple):
    """An image in the cache."""

    repository: str
    reference: str  # a tag or a digest
    digest: Digest  # of the manifest or index
    media_type: str  # of the manifest or index
    size: int  # bytes of the closure, a blob that occurs twice counted once
    complete: bool  # whether every blob of the closure is stored
    created_at: datetime  # UTC; when the name came to point to this manifest
    last_used_at: datetime  # UTC
    # As its config says; of an image for several platforms, what all of them have in common.
    architecture: str | None
    os: str | None
    variant: str | None
    created: datetime | None  # UTC; when it was built
    author: str | None

    @property
    def name(self) -> Name:
        """The image's name."""
        return Name(self.repository, self.reference)


_TOLD = (
    Image.created_at,
    Image.last_used_at,
    Image.architecture,
    Image.os,
    Image.variant,
    Image.created,
    Image.author,
)
"""The columns at the end of an `ImageInfo`."""


class BlobInfo(NamedTuple):
    """A blob of an image."""

    digest: Digest
    size: int  # bytes
    role: str  # manifest, index, config, layer or other
    media_type: str
    position: int  # in the image; the manifest or index is at 0
    stored: bool
    compressed: bool
    path: Path | None  # of the file, if it is stored; hold the image to keep it valid
    diff_id: Digest | None  # of a layer: the digest before compression, as the config says
    created_by: str | None  # of a layer: the command that made it, as the config says

    @property
    def is_config(self) -> bool:
        """Whether the blob is an image's config."""
        return self.role == "config"


class SavedImage(NamedTuple):
    """What a name pointed to, as another index has it."""

    digest: Digest
    media_type: str
    created_at: datetime  # UTC
    last_used_at: datetime  # UTC
    contents: list[Descriptor]  # in the order of their positions


class Found(NamedTuple):
    """An image's row."""

    id: int
    manifest_id: int
    digest: Digest
    media_type: str


def find(connection: Connection, name: Name, *, exact: bool = False) -> Found:
    """Return an image's row. A digest also finds what a tag of the same repository points to, unless ``exact``.

    Raises:
        NotInCache: if there is none.
    """
    found = look_up(connection, name)
    if found is None and name.digest and not exact:
        values = {"repository": name.repository, "digest": name.digest}
        row = connection.execute(_with_manifest(), values).first()
        found = None if row is None else Found(*row)
    if found is None:
        raise NotInCache(f"{name} is not in the cache; {_near(connection, name) or '`cachedb ls` lists what is'}")
    return found


def look_up(connection: Connection, name: Name) -> Found | None:
    """Return the row of the image that has exactly this name, if there is one."""
    row = connection.execute(_named(), name._asdict()).first()
    return None if row is None else Found(*row)


def _near(connection: Connection, name: Name) -> str | None:
    """Say which image other tools would have meant, for they put a registry in front of a short name."""
    fronts = ("docker.io/library/", "docker.io/", "localhost/")
    query = select(Image.repository).where(
        Image.repository.in_([front + name.repository for front in fronts]), Image.reference == name.reference
    )
    repository = connection.execute(query.limit(1)).scalar()
    return repository and f"{Name(repository, name.reference)} is"


def images(connection: Connection) -> list[ImageInfo]:
    """Return all images, in the order of their names."""
    contents = select(ImageBlob.image_id, ImageBlob.blob_id).distinct().subquery()
    totals = (
        select(
            contents.c.image_id,
            func.sum(Blob.size).label("size"),
            (func.count() == func.count(Blob.stored_at)).label("complete"),
        )
        .join(Blob, Blob.id == contents.c.blob_id)
        .group_by(contents.c.image_id)
        .subquery()
    )
    query = (
        select(
            Image.repository,
            Image.reference,
            Blob.digest,
            Image.media_type,
            totals.c.size,
            totals.c.complete,
            *_TOLD,
        )
        .join(Blob, Blob.id == Image.manifest_id)
        .join(totals, totals.c.image_id == Image.id)
        .order_by(Image.repository, Image.reference)
    )
    return [
        ImageInfo(row[0], row[1], Digest(row[2]), row[3], int(row[4]), bool(row[5]), *row[6:])
        for row in connection.execute(query)
    ]


def image(connection: Connection, directory: Path, image_id: int) -> tuple[ImageInfo, list[BlobInfo]]:
    """Return an image, and its blobs in the order of their positions.

    Raises:
        DamagedIndex: if it has none.
    """
    row = connection.execute(_one_image(), {"of": image_id}).one()
    contents = image_blobs(connection, directory, image_id)
    if not contents:
        raise DamagedIndex("an image has no blobs in the index; `cachedb verify --repair` finds them")
    size = sum({blob.digest: blob.size for blob in contents}.values())
    complete = all(blob.stored for blob in contents)
    return ImageInfo(row[0], row[1], Digest(row[2]), row[3], size, complete, *row[4:]), contents


# To put a statement together takes longer than to execute it, and these are executed for every image that is saved.


@cache
def _of_repository() -> Select[*tuple[Any, ...]]:
    columns = (Image.id, Image.manifest_id, Blob.digest, Image.media_type)
    joined = select(*columns).join(Blob, Blob.id == Image.manifest_id)
    return joined.where(Image.repository == bindparam("repository"))


@cache
def _named() -> Select[*tuple[Any, ...]]:
    return _of_repository().where(Image.reference == bindparam("reference"))


@cache
def _with_manifest() -> Select[*tuple[Any, ...]]:
    return _of_repository().where(Blob.digest == bindparam("digest")).limit(1)


@cache
def _new_image() -> ReturningInsert[*tuple[Any, ...]]:
    return insert(Image).returning(Image.id)


@cache
def _associations_of() -> Select[*tuple[Any, ...]]:
    columns = (ImageBlob.blob_id, ImageBlob.role, ImageBlob.media_type)
    return select(*columns).where(ImageBlob.image_id == bindparam("of")).order_by(ImageBlob.position)


@cache
def _without_associations() -> Delete:
    return delete(ImageBlob).where(ImageBlob.image_id == bindparam("of"))


@cache
def _blobs_with() -> Select[*tuple[Any, ...]]:
    columns = (Blob.id, Blob.digest, Blob.size, Blob.stored_at)
    return select(*columns).where(Blob.digest.in_(bindparam("digests", expanding=True)))


@cache
def _one_image() -> Select[*tuple[Any, ...]]:
    columns = (Image.repository, Image.reference, Blob.digest, Image.media_type)
    return select(*columns, *_TOLD).join(Blob, Blob.id == Image.manifest_id).where(Image.id == bindparam("of"))


@cache
def _contents_of_one() -> Select[*tuple[Any, ...]]:
    columns = (Blob.digest, Blob.size, ImageBlob.role, ImageBlob.media_type, ImageBlob.position, Blob.stored_at)
    return (
        select(*columns, ImageBlob.diff_id, ImageBlob.created_by)
        .join(Blob, Blob.id == ImageBlob.blob_id)
        .where(ImageBlob.image_id == bindparam("of"))
        .order_by(ImageBlob.position)
    )


def image_blobs(connection: Connection, directory: Path, image_id: int) -> list[BlobInfo]:
    """Return an image's blobs in the order of their positions."""
    return [
        BlobInfo(
            Digest(digest),
            size,
            role,
            media_type,
            position,
            stored_at is not None,
            is_compressed(media_type),
            blobs.blob_path(directory, Digest(digest)) if stored_at is not None else None,
            diff_id,
            created_by,
        )
        for digest, size, role, media_type, position, stored_at, diff_id, created_by in connection.execute(
            _contents_of_one(), {"of": image_id}
        )
    ]


@contextmanager
def publish(database: Database, session: Session, received: Iterable[blobs.Received]) -> Iterator[Connection]:
    """Store received blobs as `blobs.publish` does; images that waited for one of them learn what it names."""
    received = list(received)
    with blobs.publish(database, session, received) as connection:
        documents = [blob.digest for blob in received if blob.path is not None and blob.size <= DOCUMENT_LIMIT]
        associate_waiting(connection, database.directory, documents)
        yield connection


def bring(
    database: Database,
    session: Session,
    digests: Iterable[Digest],
    receive: Callable[[Hold, dict[object, blobs.Received]], None],
    save: Callable[[Connection], T],
) -> T:
    """Receive blobs and save the images that need them: all of it, or nothing.

    Args:
        database: of the cache.
        session: to work in.
        digests: that are wanted; those that are stored are held, and need only be associated.
        receive: is called with that hold, and puts what it receives into the dictionary, under any key.
        save: is called in the transaction in which what was received is stored, and saves the images.

    Returns:
        What ``save`` returns.
    """
    hold = blobs.hold_stored(database, session, digests)
    received: dict[object, blobs.Received] = {}
    try:
        try:
            receive(hold, received)
        except BaseException:
            for blob in list(received.values()):  # a second signal may end the waiting for the threads that add to it
                blobs.discard(blob.path)
            raise
        # From here on the files are the record of what is being published.
        with publish(database, session, received.values()) as connection:
            result = save(connection)
            session.release(connection, hold)
            return result
    except BaseException:
        with suppress(CacheError):  # where that fails, it goes with the session
            let_go(database, session, hold)
        raise


def let_go(database: Database, session: Session, hold: Hold) -> None:
    """Release a hold, in a transaction of its own."""
    if hold.digests:
        with database.write() as connection:
            session.release(connection, hold)


def associate_waiting(connection: Connection, directory: Path, digests: list[Digest]) -> None:
    """Associate images that have one of the stored blobs as a child manifest, or a config, with what it says."""
    for image_id in _waiting(connection, digests):
        reassociate(connection, directory, image_id)


def reassociate(connection: Connection, directory: Path, image_id: int) -> None:
    """Associate an image anew with the closure of its manifest, as far as that is stored."""
    said = root_of(connection, image_id)
    root = _as_it_is(connection, directory, said)
    if root != said:
        connection.execute(update(Image).where(Image.id == image_id).values(media_type=root.media_type))
    _associate(connection, directory, image_id, root, strict=False)


def _as_it_is(connection: Connection, directory: Path, root: Descriptor) -> Descriptor:
    """Return a manifest with the media type that it has by its own word, where the index's cannot be right."""
    if blobs.stored(connection, [root.digest]).get(root.digest, DOCUMENT_LIMIT + 1) > DOCUMENT_LIMIT:
        return root
    with suppress(InvalidManifest, NotInCache, StorageError):
        with blobs.open_blob(directory, root.digest) as file, os_errors("read a manifest"):
            data = file.read()
        with suppress(InvalidManifest):
            descriptors(data, manifest_media_type(data, root.media_type))
            return root
        media_type = manifest_media_type(data)
        descriptors(data, media_type)
        return root._replace(media_type=media_type, role=role_of(media_type))
    return root


def root_of(connection: Connection, image_id: int) -> Descriptor:
    """Return the manifest or index that an image points to."""
    query = select(Blob.digest, Blob.size, Image.media_type).join(Blob, Blob.id == Image.manifest_id)
    row = connection.execute(query.where(Image.id == image_id)).one()
    return Descriptor(Digest(row.digest), row.size, row.media_type, role_of(row.media_type))


def _waiting(connection: Connection, digests: list[Digest]) -> list[int]:
    """Return the images that have one of these as a child manifest, or as a config."""
    found: set[int] = set()
    for part in blobs.batched(digests):
        query = (
            select(ImageBlob.image_id)
            .join(Blob, Blob.id == ImageBlob.blob_id)
            .where(
                Blob.digest.in_(part),
                ImageBlob.position > 0,
                or_(
                    ImageBlob.role.in_(("manifest", "index")),
                    and_(ImageBlob.role == "config", ImageBlob.media_type.in_(CONFIG_TYPES)),
                ),
            )
        )
        found.update(connection.execute(query).scalars())
    return sorted(found)


def save(connection: Connection, directory: Path, name: Name, digest: Digest, media_type: str) -> int:
    """Point a name to a stored manifest or index and associate its closure; return the image's id.

    What the name pointed to before is let go. Blobs that were attached to the same manifest stay attached.

    Raises:
        InvalidName: if the name is by another digest.
        InvalidManifest: if a manifest of the closure is invalid.
    """
    if name.digest not in (None, digest):
        raise InvalidName(f"{name} cannot be the name of {digest}: its digest is another")
    manifest = connection.execute(_blobs_with(), {"digests": [digest]}).one()
    image_id = _point(connection, name, manifest.id, media_type)
    root = Descriptor(digest, manifest.size, media_type, role_of(media_type))
    _associate(connection, directory, image_id, root)
    return image_id


def _point(connection: Connection, name: Name, manifest_id: int, media_type: str) -> int:
    """Make a name point to a manifest, with no associations left of another one; return the image's id."""
    now = datetime.now(UTC)
    values = {"manifest_id": manifest_id, "media_type": media_type, "last_used_at": now}
    row = look_up(connection, name)
    if row is None:
        return int(connection.execute(_new_image(), {**name._asdict(), **values, "created_at": now}).scalar_one())
    if row.manifest_id != manifest_id:
        values["created_at"] = now
        connection.execute(delete(ImageBlob).where(ImageBlob.image_id == row.id))
    connection.execute(update(Image).where(Image.id == row.id).values(values))
    return int(row.id)


def closure(connection: Connection, directory: Path, root: Descriptor, *, strict: bool = True) -> list[Descriptor]:
    """Return what a manifest reaches, as far as its children are stored.

    A child that is what its digest says, and no manifest as the index said, is refused or, if not ``strict``, a
    blob like any other; so is one whose file is gone or cannot be read.

    Raises:
        InvalidManifest: if a manifest of the closure is invalid, and ``strict``.
    """

    def read(blob: Descriptor) -> bytes | None:
        size = blobs.stored(connection, [blob.digest]).get(blob.digest)
        if size is None:
            return None
        if size > DOCUMENT_LIMIT and not strict:
            return None
        if size > DOCUMENT_LIMIT:
            raise InvalidManifest(f"manifest {blob.digest} is {size} bytes; {DOCUMENT_LIMIT} at most are read")
        try:
            with blobs.open_blob(directory, blob.digest) as file, os_errors("read a manifest"):
                data = file.read()
            if not strict:
                descriptors(data, manifest_media_type(data, blob.media_type))
        except (InvalidManifest, NotInCache, StorageError):
            if strict:
                raise
            return None
        return data

    return list(walk(root, read))


def _associate(
    connection: Connection, directory: Path, image_id: int, root: Descriptor, *, strict: bool = True
) -> None:
    """Associate an image with the closure of its manifest, in front of what was attached to it."""
    found = closure(connection, directory, root, strict=strict)
    ids = _blob_ids(connection, found, strict=strict)
    wanted = [(ids[blob.digest], blob.role, blob.media_type) for blob in found]
    old = connection.execute(_associations_of(), {"of": image_id}).all()
    reached = set(ids.values())
    wanted += [(row.blob_id, row.role, row.media_type) for row in old if row.blob_id not in reached]
    if wanted != [tuple(row) for row in old]:
        if old:
            connection.execute(_without_associations(), {"of": image_id})
        rows = [dict(zip(_ASSOCIATION, (image_id, position, *row), strict=True)) for position, row in enumerate(wanted)]
        connection.execute(insert(ImageBlob), rows)
    configs.describe(connection, directory, image_id)


def _blob_ids(connection: Connection, found: list[Descriptor], *, strict: bool) -> dict[Digest, int]:
    """Return the ids of the blobs, of which some may be new to the index; a size that is a lie is refused if strict."""
    wanted = {blob.digest: blob for blob in found}
    ids: dict[Digest, int] = {}
    for part in blobs.batched(wanted):
        for row in connection.execute(_blobs_with(), {"digests": part}):
            if strict and row.stored_at is not None and row.size != wanted[row.digest].size:
                raise InvalidManifest(
                    f"the manifest says that {row.digest} is {wanted[row.digest].size} bytes; it is {row.size}"
                )
            ids[row.digest] = row.id
        new = [{"digest": digest, "size": wanted[digest].size} for digest in part if digest not in ids]
        if new:
            connection.execute(insert(Blob), new)
            rows = connection.execute(_blobs_with(), {"digests": [row["digest"] for row in new]})
            ids.update((Digest(row.digest), row.id) for row in rows)
    return ids


def restore(connection: Connection, directory: Path, name: Name, saved: SavedImage) -> None:
    """Write an image as another index has it, and associate it with what its manifest reaches, if that is stored."""
    size = next((blob.size for blob in saved.contents if blob.digest == saved.digest), 0)
    root = Descriptor(saved.digest, size, saved.media_type, role_of(saved.media_type))
    contents = saved.contents or [root]
    ids = _blob_ids(connection, [root, *contents], strict=False)
    new = insert(Image).values(
        repository=name.repository,
        reference=name.reference,
        manifest_id=ids[saved.digest],
        media_type=saved.media_type,
        created_at=saved.created_at,
        last_used_at=saved.last_used_at,
    )
    image_id = connection.execute(new.returning(Image.id)).scalar_one()
    rows = [
        (image_id, position, ids[blob.digest], blob.role, blob.media_type) for position, blob in enumerate(contents)
    ]
    connection.execute(insert(ImageBlob), [dict(zip(_ASSOCIATION, row, strict=True)) for row in rows])
    reassociate(connection, directory, image_id)


def touch(connection: Connection, image_id: int) -> None:
    """Note that an image is used now."""
    connection.execute(update(Image).where(Image.id == image_id).values(last_used_at=datetime.now(UTC)))


def tag(connection: Connection, source: Name, target: Name) -> int:
    """Give an image a second name; what the target pointed to before is let go. Return the target's id.

    Raises:
        NotInCache: if there is no source.
        InvalidName: if the target is by another digest.
    """
    image = find(connection, source)
    if target.digest not in (None, image.digest):
        raise InvalidName(f"{target} cannot be a name of {source}: its digest is {image.digest}")
    target_id = _point(connection, target, image.manifest_id, image.media_type)
    if target_id == image.id:
        return target_id
    connection.execute(delete(ImageBlob).where(ImageBlob.image_id == target_id))
    copied = (*_ASSOCIATION[1:], "diff_id", "created_by")
    columns = [getattr(ImageBlob, name) for name in copied]
    query = select(literal(target_id), *columns).where(ImageBlob.image_id == image.id)
    connection.execute(insert(ImageBlob).from_select(["image_id", *copied], query))
    configs.copy(connection, image.id, target_id)
    return target_id


def is_associated(connection: Connection, digest: Digest) -> bool:
    """Say whether an image is associated with a blob."""
    query = select(ImageBlob.image_id).join(Blob, Blob.id == ImageBlob.blob_id).where(Blob.digest == digest)
    return connection.execute(query.limit(1)).first() is not None


def attach(connection: Connection, directory: Path, name: Name, digest: Digest, role: str, media_type: str) -> None:
    """Attach a stored blob to an image, at the last position; one that is there already is not repeated.

    Raises:
        NotInCache: if there is no such image, or the blob is not stored.
    """
    image = find(connection, name)
    blob_id = connection.execute(select(Blob.id).where(Blob.digest == digest, Blob.stored_at.is_not(None))).scalar()
    if blob_id is None:
        raise NotInCache(f"{digest} is not in the cache; store it first")
    there = select(ImageBlob.position).where(
        ImageBlob.image_id == image.id, ImageBlob.blob_id == blob_id, ImageBlob.role == role
    )
    if connection.execute(there).first() is not None:
        return
    position = select(func.max(ImageBlob.position) + 1).where(ImageBlob.image_id == image.id)
    connection.execute(
        insert(ImageBlob).values(
            image_id=image.id,
            position=connection.execute(position).scalar_one(),
            blob_id=blob_id,
            role=role,
            media_type=media_type,
        )
    )
    if role == "config":
        configs.describe(connection, directory, image.id)


def remove(connection: Connection, names: Iterable[Name]) -> set[int]:
    """Remove images, all or none; return the ids of the blobs that they were associated with.

    Raises:
        NotInCache: if one of them is not there.
    """
    found = {find(connection, name, exact=True).id for name in names}
    touched: set[int] = set()
    for image_id in found:
        query = select(ImageBlob.blob_id).where(ImageBlob.image_id == image_id)
        touched.update(connection.execute(query).scalars())
        connection.execute(delete(Image).where(Image.id == image_id))
    return touched


def incomplete(name: Name, contents: Iterable[BlobInfo]) -> IncompleteImage:
    """Return the error that says what an image lacks."""
    missing = [blob for blob in contents if not blob.stored]
    more = f", nor are {len(missing) - 1} more blobs" if len(missing) > 1 else ""
    return IncompleteImage(
        f"{name} is incomplete: {missing[0].role} {missing[0].digest} is not in the cache{more}; import it again"
    )


def count_incomplete(connection: Connection) -> int:
    """Return the number of images of which a blob is not stored."""
    query = (
        select(func.count(ImageBlob.image_id.distinct()))
        .join(Blob, Blob.id == ImageBlob.blob_id)
        .where(Blob.stored_at.is_(None))
    )
    return connection.execute(query).scalar_one()
