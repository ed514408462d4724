"""Images in the index: names, what they point to, and the closure each is associated with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import (
    Connection,
    Delete,
    Insert,
    Integer,
    Select,
    Update,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.sql.dml import ReturningInsert

from cachedb.content import describe
from cachedb.content import publish as blobs
from cachedb.content.session import Hold, Session
from cachedb.disk import reader
from cachedb.disk.layout import blob_path
from cachedb.disk.writer import discard
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
from cachedb.index.sqlite.database import Database, batched
from cachedb.index.tables import BLOBS, IMAGE_BLOBS, IMAGES, UtcTime
from cachedb.oci import manifests
from cachedb.oci.manifests import (
    CONFIG_TYPES,
    DOCUMENT_LIMIT,
    Descriptor,
    descriptors,
    is_compressed,
    manifest_media_type,
)
from cachedb.oci.names import Digest, Name

__all__ = [
    "BlobInfo",
    "ImageInfo",
    "NewImage",
    "PlatformInfo",
    "SavedImage",
    "associate_waiting",
    "attach",
    "blobs_of",
    "bring",
    "choice",
    "closure",
    "count_incomplete",
    "find",
    "give_up",
    "image",
    "image_blobs",
    "images",
    "incomplete",
    "is_associated",
    "let_go",
    "look_up",
    "look_up_all",
    "names",
    "publish",
    "reassociate",
    "remove",
    "repositories_with",
    "restore",
    "root_of",
    "save",
    "save_new",
    "tag",
    "tags",
]


T = TypeVar("T")

Choice = Callable[[list[Descriptor]], list[Descriptor]]
"""Returns those of an index's children that are in an image's closure."""

_ASSOCIATION = ("position", "blob_id", "role", "media_type", "diff_id", "created_by")


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

    @property
    def platform(self) -> str:
        """``os/architecture[/variant]``, as far as it is known."""
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


_TOLD = (
    IMAGES.c.created_at,
    IMAGES.c.last_used_at,
    IMAGES.c.architecture,
    IMAGES.c.os,
    IMAGES.c.variant,
    IMAGES.c.created,
    IMAGES.c.author,
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


class PlatformInfo(NamedTuple):
    """What an image's index names."""

    platform: str | None  # os/architecture[/variant], if the index says
    digest: Digest  # of the manifest, or of an index in the index
    complete: bool  # whether it is here with all its blobs


class SavedImage(NamedTuple):
    """What a name pointed to, as another index has it."""

    digest: Digest
    media_type: str
    created_at: datetime  # UTC
    last_used_at: datetime  # UTC
    some_platforms: int | None  # 1 if not all of its index's are in its closure
    contents: list[Descriptor]  # in the order of their positions


class NewImage(NamedTuple):
    """An image to save."""

    name: Name
    digest: Digest  # of the manifest or index, which is stored
    media_type: str
    contents: list[Descriptor] | None = None  # its closure, if that is known


class _BlobRow(NamedTuple):
    """A blob's row."""

    id: int
    size: int  # bytes
    stored: bool


class Found(NamedTuple):
    """An image's row."""

    id: int
    manifest_id: int
    digest: Digest
    media_type: str
    some_platforms: int | None  # 1 if not all of its index's platforms are in its closure


_FOUND = (IMAGES.c.id, IMAGES.c.manifest_id, BLOBS.c.digest, IMAGES.c.media_type, IMAGES.c.some_platforms)
"""The columns of a `Found`."""


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


def look_up_all(connection: Connection, names: Iterable[Name]) -> dict[Name, Found]:
    """Return the rows of those of the images that are there."""
    wanted = set(names)
    found: dict[Name, Found] = {}
    for part in batched(wanted):
        values = {
            "repositories": list({name.repository for name in part}),
            "references": list({name.reference for name in part}),
        }
        for repository, reference, *row in connection.execute(_all_named(), values):
            if (name := Name(repository, reference)) in wanted:
                found[name] = Found(*row)
    return found


def _near(connection: Connection, name: Name) -> str | None:
    """Say which image other tools would have meant, for they put a registry in front of a short name."""
    fronts = ("docker.io/library/", "docker.io/", "localhost/")
    query = select(IMAGES.c.repository).where(
        IMAGES.c.repository.in_([front + name.repository for front in fronts]), IMAGES.c.reference == name.reference
    )
    repository = connection.execute(query.limit(1)).scalar()
    return repository and f"{Name(repository, name.reference)} is"


def images(connection: Connection) -> list[ImageInfo]:
    """Return all images, in the order of their names."""
    contents = select(IMAGE_BLOBS.c.image_id, IMAGE_BLOBS.c.blob_id).distinct().subquery()
    totals = (
        select(
            contents.c.image_id,
            func.sum(BLOBS.c.size).label("size"),
            (func.count() == func.count(BLOBS.c.stored_at)).label("complete"),
        )
        .join(BLOBS, BLOBS.c.id == contents.c.blob_id)
        .group_by(contents.c.image_id)
        .subquery()
    )
    query = (
        select(
            IMAGES.c.repository,
            IMAGES.c.reference,
            BLOBS.c.digest,
            IMAGES.c.media_type,
            totals.c.size,
            totals.c.complete,
            *_TOLD,
        )
        .join(BLOBS, BLOBS.c.id == IMAGES.c.manifest_id)
        .join(totals, totals.c.image_id == IMAGES.c.id)
        .order_by(IMAGES.c.repository, IMAGES.c.reference)
    )
    return [
        ImageInfo(row[0], row[1], Digest(row[2]), row[3], int(row[4]), bool(row[5]), *row[6:])
        for row in connection.execute(query)
    ]


def names(database: Database) -> list[Name]:
    """Return the names of all images, in order."""
    return [Name(*row) for row in database.rows(_names(), {})]


@cache
def _names() -> Select[*tuple[Any, ...]]:
    return select(IMAGES.c.repository, IMAGES.c.reference).order_by(IMAGES.c.repository, IMAGES.c.reference)


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
    joined = select(*_FOUND).join(BLOBS, BLOBS.c.id == IMAGES.c.manifest_id)
    return joined.where(IMAGES.c.repository == bindparam("repository"))


@cache
def _named() -> Select[*tuple[Any, ...]]:
    return _of_repository().where(IMAGES.c.reference == bindparam("reference"))


@cache
def _all_named() -> Select[*tuple[Any, ...]]:
    columns = (IMAGES.c.repository, IMAGES.c.reference, *_FOUND)
    # More than is wanted: SQLite finds pairs among others only by a look at each row.
    repositories = IMAGES.c.repository.in_(bindparam("repositories", expanding=True))
    references = IMAGES.c.reference.in_(bindparam("references", expanding=True))
    return select(*columns).join(BLOBS, BLOBS.c.id == IMAGES.c.manifest_id).where(repositories, references)


@cache
def _with_manifest() -> Select[*tuple[Any, ...]]:
    return _of_repository().where(BLOBS.c.digest == bindparam("digest")).limit(1)


@cache
def _new_image() -> ReturningInsert[*tuple[Any, ...]]:
    return insert(IMAGES).returning(IMAGES.c.id)


@cache
def _new_images() -> Insert:
    return insert(IMAGES)


@cache
def _new_associations() -> Insert:
    return insert(IMAGE_BLOBS)


@cache
def _without_associations() -> Delete:
    return delete(IMAGE_BLOBS).where(IMAGE_BLOBS.c.image_id == bindparam("of"))


@cache
def _without_image() -> Delete:
    return delete(IMAGES).where(IMAGES.c.id == bindparam("of"))


@cache
def _pointed_anew() -> Update:
    manifest_id, now = bindparam("manifest_id", type_=Integer), bindparam("created_at", type_=UtcTime)
    return (
        update(IMAGES)
        .where(IMAGES.c.id == bindparam("of"))
        .values(
            manifest_id=manifest_id,
            media_type=bindparam("media_type"),
            some_platforms=bindparam("some_platforms"),
            created_at=case((IMAGES.c.manifest_id == manifest_id, IMAGES.c.created_at), else_=now),
            last_used_at=bindparam("last_used_at"),
        )
    )


@cache
def _copied_associations() -> Insert:
    columns = [IMAGE_BLOBS.c[name] for name in _ASSOCIATION]
    target = bindparam("target", type_=Integer)
    return insert(IMAGE_BLOBS).from_select(
        ["image_id", *_ASSOCIATION], select(target, *columns).where(IMAGE_BLOBS.c.image_id == bindparam("of"))
    )


@cache
def _blobs_of() -> Select[*tuple[Any, ...]]:
    return select(IMAGE_BLOBS.c.blob_id).where(IMAGE_BLOBS.c.image_id == bindparam("of"))


@cache
def _waiting_for() -> Select[*tuple[Any, ...]]:
    is_manifest = IMAGE_BLOBS.c.role.in_(("manifest", "index"))
    is_config = and_(IMAGE_BLOBS.c.role == "config", IMAGE_BLOBS.c.media_type.in_(CONFIG_TYPES))
    joined = select(IMAGE_BLOBS.c.image_id).join(BLOBS, BLOBS.c.id == IMAGE_BLOBS.c.blob_id)
    these = BLOBS.c.digest.in_(bindparam("digests", expanding=True))
    return joined.where(these, IMAGE_BLOBS.c.position > 0, or_(is_manifest, is_config))


@cache
def _blobs_with() -> Select[*tuple[Any, ...]]:
    columns = (BLOBS.c.digest, BLOBS.c.id, BLOBS.c.size, BLOBS.c.stored_at.is_not(None))
    return select(*columns).where(BLOBS.c.digest.in_(bindparam("digests", expanding=True)))


@cache
def _one_image() -> Select[*tuple[Any, ...]]:
    columns = (IMAGES.c.repository, IMAGES.c.reference, BLOBS.c.digest, IMAGES.c.media_type)
    return (
        select(*columns, *_TOLD).join(BLOBS, BLOBS.c.id == IMAGES.c.manifest_id).where(IMAGES.c.id == bindparam("of"))
    )


@cache
def _contents() -> Select[*tuple[Any, ...]]:
    columns = (
        BLOBS.c.digest,
        BLOBS.c.size,
        IMAGE_BLOBS.c.role,
        IMAGE_BLOBS.c.media_type,
        IMAGE_BLOBS.c.position,
        BLOBS.c.stored_at.is_not(None),
        IMAGE_BLOBS.c.diff_id,
        IMAGE_BLOBS.c.created_by,
    )
    joined = select(*columns).join(BLOBS, BLOBS.c.id == IMAGE_BLOBS.c.blob_id)
    return joined.order_by(IMAGE_BLOBS.c.position)


@cache
def _contents_of_one() -> Select[*tuple[Any, ...]]:
    return _contents().where(IMAGE_BLOBS.c.image_id == bindparam("of"))


@cache
def _contents_named() -> Select[*tuple[Any, ...]]:
    joined = _contents().join(IMAGES, IMAGES.c.id == IMAGE_BLOBS.c.image_id)
    return joined.where(IMAGES.c.repository == bindparam("repository"), IMAGES.c.reference == bindparam("reference"))


def image_blobs(connection: Connection, directory: Path, image_id: int) -> list[BlobInfo]:
    """Return an image's blobs in the order of their positions."""
    return _blob_infos(directory, connection.execute(_contents_of_one(), {"of": image_id}))


def blobs_of(database: Database, name: Name) -> list[BlobInfo]:
    """Return the blobs of the image that has exactly this name, in the order of their positions; none if none has."""
    return _blob_infos(database.directory, database.rows(_contents_named(), name._asdict()))


def _blob_infos(directory: Path, rows: Iterable[Sequence[Any]]) -> list[BlobInfo]:
    return [
        BlobInfo(
            Digest(digest),
            size,
            role,
            media_type,
            position,
            bool(stored),
            is_compressed(media_type),
            blob_path(directory, Digest(digest)) if stored else None,
            diff_id,
            created_by,
        )
        for digest, size, role, media_type, position, stored, diff_id, created_by in rows
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
                discard(blob.path)
            raise
        # From here on the files are the record of what is being published.
        with publish(database, session, received.values()) as connection:
            result = save(connection)
            session.release(connection, hold)
            return result
    except BaseException:
        give_up(database, session, hold)
        raise


def let_go(database: Database, session: Session, hold: Hold) -> None:
    """Release a hold, in a transaction of its own."""
    if hold.digests:
        with database.write() as connection:
            session.release(connection, hold)


def give_up(database: Database, session: Session, hold: Hold) -> None:
    """Release a hold after an error, of which is to be told; where that fails, it goes with the session."""
    with suppress(CacheError):
        let_go(database, session, hold)


def associate_waiting(connection: Connection, directory: Path, digests: list[Digest]) -> None:
    """Associate images that have one of the stored blobs as a child manifest, or a config, with what it says."""
    for image_id in _waiting(connection, digests):
        reassociate(connection, directory, image_id)


def reassociate(connection: Connection, directory: Path, image_id: int) -> None:
    """Associate an image anew with the closure of its manifest, as far as that is stored.

    Of an index, those platforms are in it that were before, where not all of them are.
    """
    said = root_of(connection, image_id)
    root = _as_it_is(connection, directory, said)
    if root != said:
        connection.execute(update(IMAGES).where(IMAGES.c.id == image_id).values(media_type=root.media_type))
    known: dict[Digest, _BlobRow] = {}
    choose = choice(connection, image_id)
    found = closure(connection, directory, root, choose, strict=False, known=known)
    _complete(connection, found, known, strict=False)
    _associate(connection, directory, image_id, found, known)


def choice(connection: Connection, image_id: int) -> Choice | None:
    """Return what chooses those children of an index that are in an image's closure; None if all are."""
    query = select(IMAGES.c.some_platforms).where(IMAGES.c.id == image_id)
    if connection.execute(query).scalar_one() is None:
        return None
    return manifests.among({blob.digest for blob in describe.associations(connection, image_id)})


def _as_it_is(connection: Connection, directory: Path, root: Descriptor) -> Descriptor:
    """Return a manifest with the media type that it has by its own word, where the index's cannot be right."""
    if blobs.stored(connection, [root.digest]).get(root.digest, DOCUMENT_LIMIT + 1) > DOCUMENT_LIMIT:
        return root
    with suppress(InvalidManifest, NotInCache, StorageError):
        with reader.open_blob(directory, root.digest) as file, os_errors("read a manifest"):
            data = file.read()
        with suppress(InvalidManifest):
            descriptors(data, manifest_media_type(data, root.media_type))
            return root
        media_type = manifest_media_type(data)
        descriptors(data, media_type)
        return manifests.root(root.digest, root.size, media_type)
    return root


def root_of(connection: Connection, image_id: int) -> Descriptor:
    """Return the manifest or index that an image points to."""
    query = select(BLOBS.c.digest, BLOBS.c.size, IMAGES.c.media_type).join(BLOBS, BLOBS.c.id == IMAGES.c.manifest_id)
    row = connection.execute(query.where(IMAGES.c.id == image_id)).one()
    return manifests.root(Digest(row.digest), row.size, row.media_type)


def _waiting(connection: Connection, digests: list[Digest]) -> list[int]:
    """Return the images that have one of these as a child manifest, or as a config."""
    found: set[int] = set()
    for part in batched(digests):
        found.update(connection.execute(_waiting_for(), {"digests": part}).scalars())
    return sorted(found)


def save(
    connection: Connection, directory: Path, name: Name, digest: Digest, media_type: str, choose: Choice | None = None
) -> int:
    """Point a name to a stored manifest or index and associate its closure; return the image's id.

    What the name pointed to before is let go. Blobs that were attached to the same manifest stay attached.

    Args:
        connection: in a write transaction.
        directory: of the cache.
        name: of the image.
        digest: of the manifest.
        media_type: of the manifest.
        choose: returns those of an index's children that are in the closure; all of them unless given.

    Raises:
        InvalidName: if the name is by another digest; nothing is written then.
        InvalidManifest: if a manifest of the closure is invalid; nor is anything then.
    """
    if name.digest not in (None, digest):
        raise InvalidName(f"{name} cannot be the name of {digest}: its digest is another")
    known = _rows(connection, [digest])
    root = manifests.root(digest, known[digest].size, media_type)
    found = closure(connection, directory, root, choose, known=known)
    _complete(connection, found, known)
    image_id, new = _point(connection, name, known[digest].id, media_type, 1 if choose else None)
    _associate(connection, directory, image_id, found, known, new=new)
    return image_id


def save_new(connection: Connection, directory: Path, new: Iterable[NewImage]) -> dict[Name, InvalidManifest]:
    """Save images of names that point to nothing yet, as `save` does, but in a few statements for all of them.

    Args:
        connection: in a write transaction.
        directory: of the cache.
        new: the images; where a name is by a digest, it is the image's.

    Returns:
        Why some were left out: a manifest of the closure is invalid.
    """
    wanted, refused = {image.name: image for image in new}, dict[Name, InvalidManifest]()
    known = _rows(connection, {image.digest for image in wanted.values()})
    contents: dict[Name, list[Descriptor]] = {}
    for name, image in wanted.items():
        root = manifests.root(image.digest, known[image.digest].size, image.media_type)
        try:
            contents[name] = image.contents or closure(connection, directory, root, known=known)
        except InvalidManifest as error:
            refused[name] = error
    known.update(_rows(connection, {blob.digest for found in contents.values() for blob in found} - known.keys()))
    for name, found in list(contents.items()):
        try:
            _check_sizes(found, known)
        except InvalidManifest as error:
            refused[name] = error
            del contents[name]
    if contents:
        _add_rows(connection, (blob for found in contents.values() for blob in found), known)
        _insert_new(connection, directory, [wanted[name] for name in contents], contents, known)
    return refused


def _insert_new(
    connection: Connection,
    directory: Path,
    new: list[NewImage],
    contents: dict[Name, list[Descriptor]],
    known: dict[Digest, _BlobRow],
) -> None:
    now = datetime.now(UTC)
    rows, wanted, labels = [], {}, {}
    for image in new:
        wanted[image.name] = _associations(contents[image.name], known)
        said = _describe(directory, wanted[image.name])
        values = {"manifest_id": known[image.digest].id, "media_type": image.media_type, **said.values}
        rows.append({**image.name._asdict(), **values, "created_at": now, "last_used_at": now})
        labels[image.name] = said.labels
    connection.execute(_new_images(), rows)
    ids = {name: row.id for name, row in look_up_all(connection, wanted).items()}
    _insert(connection, {ids[name]: blobs for name, blobs in wanted.items()})
    describe.add_labels(connection, {ids[name]: said for name, said in labels.items()})


def _point(
    connection: Connection, name: Name, manifest_id: int, media_type: str, some_platforms: int | None
) -> tuple[int, bool]:
    """Make a name point to a manifest, with no associations left of another one; return the image's id, and if new."""
    now = datetime.now(UTC)
    values = {
        "manifest_id": manifest_id,
        "media_type": media_type,
        "some_platforms": some_platforms,
        "created_at": now,
        "last_used_at": now,
    }
    row = look_up(connection, name)
    if row is None:
        return int(connection.execute(_new_image(), {**name._asdict(), **values}).scalar_one()), True
    if row.manifest_id != manifest_id:
        connection.execute(_without_associations(), {"of": row.id})
    connection.execute(_pointed_anew(), {"of": row.id, **values})
    return int(row.id), False


def closure(
    connection: Connection,
    directory: Path,
    root: Descriptor,
    choose: Choice | None = None,
    *,
    strict: bool = True,
    known: dict[Digest, _BlobRow] | None = None,
) -> list[Descriptor]:
    """Return what a manifest reaches, as far as its children are stored.

    A child that is what its digest says, and no manifest as the index said, is refused or, if not ``strict``, a
    blob like any other; so is one whose file is gone or cannot be read. The rows that are looked at go to ``known``,
    and those that are there already are not looked up.

    Raises:
        InvalidManifest: if a manifest of the closure is invalid, and ``strict``.
        NotInCache: if the file of one is gone, and ``strict``.
        StorageError: if it cannot be read, and ``strict``.
    """
    rows = {} if known is None else known

    def read(blob: Descriptor) -> bytes | None:
        if blob.digest not in rows:
            rows.update(_rows(connection, [blob.digest]))
        row = rows.get(blob.digest)
        if row is None or not row.stored:
            return None
        try:
            if row.size > DOCUMENT_LIMIT:
                raise InvalidManifest(f"manifest {blob.digest} is {row.size} bytes; {DOCUMENT_LIMIT} at most are read")
            with reader.open_blob(directory, blob.digest) as file, os_errors("read a manifest"):
                data = file.read()
            if not strict:
                descriptors(data, manifest_media_type(data, blob.media_type))
        except (InvalidManifest, NotInCache, StorageError):
            if strict:
                raise
            return None
        return data

    return list(manifests.walk(root, read, choose))


def _rows(connection: Connection, digests: Iterable[Digest]) -> dict[Digest, _BlobRow]:
    """Return the rows of those of the blobs that have one."""
    found: dict[Digest, _BlobRow] = {}
    for part in batched(digests):
        for digest, *row in connection.execute(_blobs_with(), {"digests": part}):
            found[Digest(digest)] = _BlobRow(*row)
    return found


def _complete(
    connection: Connection, found: list[Descriptor], known: dict[Digest, _BlobRow], *, strict: bool = True
) -> None:
    """Have a row of every blob, and all of them in ``known``; a size that is a lie is refused if strict."""
    known.update(_rows(connection, {blob.digest for blob in found} - known.keys()))
    if strict:
        _check_sizes(found, known)
    _add_rows(connection, found, known)


def _check_sizes(found: Iterable[Descriptor], known: dict[Digest, _BlobRow]) -> None:
    """Refuse a size that is a lie."""
    for digest, size in {blob.digest: blob.size for blob in found}.items():
        row = known.get(digest)
        if row is not None and row.stored and row.size != size:
            raise InvalidManifest(f"the manifest says that {digest} is {size} bytes; it is {row.size}")


def _add_rows(connection: Connection, found: Iterable[Descriptor], known: dict[Digest, _BlobRow]) -> None:
    """Have a row of every blob."""
    new = {blob.digest: blob.size for blob in found if blob.digest not in known}
    if new:
        connection.execute(insert(BLOBS), [{"digest": digest, "size": size} for digest, size in new.items()])
        known.update(_rows(connection, new))


def _associate(
    connection: Connection,
    directory: Path,
    image_id: int,
    found: list[Descriptor],
    known: dict[Digest, _BlobRow],
    *,
    new: bool = False,
) -> None:
    """Associate an image with a closure, in front of what was attached to it; and with what its configs say."""
    old = [] if new else describe.associations(connection, image_id)
    reached = _associations(found, known)
    attached = [blob._replace(diff_id=None, created_by=None) for blob in old if blob.digest not in known]
    wanted = [blob._replace(position=position) for position, blob in enumerate([*reached, *attached])]
    said = _describe(directory, wanted)
    if wanted != old:
        if old:
            connection.execute(_without_associations(), {"of": image_id})
        _insert(connection, {image_id: wanted})
    describe.write(connection, image_id, said, new=new)


def _associations(contents: list[Descriptor], known: dict[Digest, _BlobRow]) -> list[describe.Association]:
    """Return the associations with a closure, without what configs say."""
    return [
        describe.Association(position, blob.role, blob.media_type, row.id, blob.digest, row.size, row.stored)
        for position, blob in enumerate(contents)
        for row in [known[blob.digest]]
    ]


def _describe(directory: Path, wanted: list[describe.Association]) -> describe.Description:
    """Return what an image's configs say; what they say of layers is put into its associations."""
    said = describe.description(directory, wanted)
    for position, (diff_id, created_by) in said.layers.items():
        wanted[position] = wanted[position]._replace(diff_id=diff_id, created_by=created_by)
    return said


def _insert(connection: Connection, wanted: dict[int, list[describe.Association]]) -> None:
    """Associate images, by their ids."""
    rows = [
        {"image_id": image_id, **{name: getattr(blob, name) for name in _ASSOCIATION}}
        for image_id, contents in wanted.items()
        for blob in contents
    ]
    connection.execute(_new_associations(), rows)


def restore(connection: Connection, directory: Path, name: Name, saved: SavedImage) -> None:
    """Write an image as another index has it, and associate it with what its manifest reaches, if that is stored."""
    size = next((blob.size for blob in saved.contents if blob.digest == saved.digest), 0)
    root = manifests.root(saved.digest, size, saved.media_type)
    contents = saved.contents or [root]
    known: dict[Digest, _BlobRow] = {}
    _complete(connection, [root, *contents], known, strict=False)
    values = {
        **name._asdict(),
        "manifest_id": known[saved.digest].id,
        "media_type": saved.media_type,
        "some_platforms": saved.some_platforms,
        "created_at": saved.created_at,
        "last_used_at": saved.last_used_at,
    }
    image_id = connection.execute(_new_image(), values).scalar_one()
    _insert(connection, {image_id: _associations(contents, known)})
    reassociate(connection, directory, image_id)


def touch(connection: Connection, image_id: int) -> None:
    """Note that an image is used now."""
    connection.execute(update(IMAGES).where(IMAGES.c.id == image_id).values(last_used_at=datetime.now(UTC)))


def tag(connection: Connection, source: Name, target: Name) -> int:
    """Give an image a second name; what the target pointed to before is let go. Return the target's id.

    Raises:
        NotInCache: if there is no source.
        InvalidName: if the target is by another digest.
    """
    image = find(connection, source)
    if target.digest not in (None, image.digest):
        raise InvalidName(f"{target} cannot be a name of {source}: its digest is {image.digest}")
    target_id, _ = _point(connection, target, image.manifest_id, image.media_type, image.some_platforms)
    if target_id == image.id:
        return target_id
    connection.execute(_without_associations(), {"of": target_id})
    connection.execute(_copied_associations(), {"of": image.id, "target": target_id})
    describe.copy(connection, image.id, target_id)
    return target_id


def is_associated(connection: Connection, digest: Digest) -> bool:
    """Say whether an image is associated with a blob."""
    query = (
        select(IMAGE_BLOBS.c.image_id).join(BLOBS, BLOBS.c.id == IMAGE_BLOBS.c.blob_id).where(BLOBS.c.digest == digest)
    )
    return connection.execute(query.limit(1)).first() is not None


def platforms(connection: Connection, directory: Path, image_id: int) -> list[PlatformInfo]:
    """Return what an image's index names, in its order, and which of that is here; nothing, if it has none."""
    root = root_of(connection, image_id)
    if root.role != "index":
        return []
    stored = {blob.digest for blob in image_blobs(connection, directory, image_id) if blob.stored}

    def here(child: Descriptor) -> bool:
        return stored.issuperset(blob.digest for blob in closure(connection, directory, child, strict=False))

    data = reader.document(directory, root.digest, root.size)
    children = [] if data is None else descriptors(data, root.media_type)
    return [PlatformInfo(child.platform, child.digest, here(child)) for child in children]


def tags(connection: Connection, repository: str) -> list[Name]:
    """Return the names that a repository's images have by tag, in order."""
    query = select(IMAGES.c.reference).where(IMAGES.c.repository == repository).order_by(IMAGES.c.reference)
    names = [Name(repository, reference) for reference in connection.execute(query).scalars()]
    return [name for name in names if not name.digest]


def repositories_with(connection: Connection, digest: Digest) -> list[str]:
    """Return the repositories of the images that are associated with a blob, in order."""
    query = (
        select(IMAGES.c.repository)
        .join(IMAGE_BLOBS, IMAGE_BLOBS.c.image_id == IMAGES.c.id)
        .join(BLOBS, BLOBS.c.id == IMAGE_BLOBS.c.blob_id)
        .where(BLOBS.c.digest == digest)
        .distinct()
        .order_by(IMAGES.c.repository)
    )
    return list(connection.execute(query).scalars())


def attach(connection: Connection, directory: Path, name: Name, digest: Digest, role: str, media_type: str) -> None:
    """Attach a stored blob to an image, at the last position; one that is there already is not repeated.

    Raises:
        NotInCache: if there is no such image, or the blob is not stored.
    """
    image = find(connection, name)
    blob_id = connection.execute(
        select(BLOBS.c.id).where(BLOBS.c.digest == digest, BLOBS.c.stored_at.is_not(None))
    ).scalar()
    if blob_id is None:
        raise NotInCache(f"{digest} is not in the cache; store it first")
    there = select(IMAGE_BLOBS.c.position).where(
        IMAGE_BLOBS.c.image_id == image.id, IMAGE_BLOBS.c.blob_id == blob_id, IMAGE_BLOBS.c.role == role
    )
    if connection.execute(there).first() is not None:
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
    if role == "config":
        describe.describe(connection, directory, image.id)


def remove(connection: Connection, names: Iterable[Name]) -> set[int]:
    """Remove images, all or none; return the ids of the blobs that they were associated with.

    Raises:
        NotInCache: if one of them is not there.
    """
    found = {find(connection, name, exact=True).id for name in names}
    touched: set[int] = set()
    for image_id in found:
        touched.update(connection.execute(_blobs_of(), {"of": image_id}).scalars())
        connection.execute(_without_image(), {"of": image_id})
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
        select(func.count(IMAGE_BLOBS.c.image_id.distinct()))
        .join(BLOBS, BLOBS.c.id == IMAGE_BLOBS.c.blob_id)
        .where(BLOBS.c.stored_at.is_(None))
    )
    return connection.execute(query).scalar_one()
