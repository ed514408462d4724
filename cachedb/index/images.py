"""Read and write the rows of images and their associations. This module opens no file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

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

from cachedb import oci
from cachedb.disk.layout import blob_path
from cachedb.errors import (
    DamagedIndex,
    IncompleteImage,
    NotInCache,
)
from cachedb.index import descriptions
from cachedb.index.lifetimes import add_seconds, is_pinned
from cachedb.index.records import BlobInfo, BlobRow, ImageInfo, ImageRow
from cachedb.index.sqlite.batches import split_batches
from cachedb.index.sqlite.database import Database
from cachedb.index.tables import BLOBS, IMAGE_BLOBS, IMAGES, UtcTime
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import (
    CONFIG_TYPES,
    Descriptor,
    is_compressed,
)
from cachedb.oci.names import Name

__all__ = [
    "build_associations_copy",
    "build_associations_delete",
    "build_image_insert",
    "build_images_insert",
    "count_incomplete",
    "find",
    "find_repositories",
    "incomplete_error",
    "insert_associations",
    "is_associated",
    "look_up",
    "look_up_all",
    "look_up_blobs",
    "look_up_image_blobs",
    "point_name",
    "read_image",
    "read_image_blobs",
    "read_images",
    "read_names",
    "read_root",
    "read_tags",
    "remove",
    "select_images_waiting_for",
    "touch",
]


_ASSOCIATION_COLUMNS = ("position", "blob_id", "role", "media_type", "diff_id", "created_by")


_IMAGE_COLUMNS = (
    IMAGES.c.added_at,
    IMAGES.c.last_used_at,
    IMAGES.c.architecture,
    IMAGES.c.os,
    IMAGES.c.variant,
    IMAGES.c.created,
    IMAGES.c.author,
    is_pinned(),
    IMAGES.c.expires_at,
)
"""The columns of the last fields of an `ImageInfo`."""


_FOUND_COLUMNS = (IMAGES.c.id, IMAGES.c.manifest_id, BLOBS.c.digest, IMAGES.c.media_type, IMAGES.c.some_platforms)
"""The columns of a `ImageRow`."""


def find(connection: Connection, name: Name, *, exact: bool = False) -> ImageRow:
    """Return an image's row.

    Unless ``exact``, ``repository@digest`` also finds an image of the repository whose tag points to the digest.

    Raises:
        NotInCache: if there is no such image.
    """
    found = look_up(connection, name)
    if found is None and name.digest and not exact:
        values = {"repository": name.repository, "digest": name.digest}
        row = connection.execute(_select_with_manifest(), values).first()
        found = None if row is None else ImageRow(*row)
    if found is None:
        hint = _suggest(connection, name) or "`cachedb ls` lists the images"
        raise NotInCache(f"{name} is not in the cache: {hint}", name=name)
    return found


def look_up(connection: Connection, name: Name) -> ImageRow | None:
    """Return the row of the image with exactly this name, or None."""
    row = connection.execute(_select_named(), name._asdict()).first()
    return None if row is None else ImageRow(*row)


def look_up_all(connection: Connection, names: Iterable[Name]) -> dict[Name, ImageRow]:
    """Return the rows of the images that exist, by name."""
    wanted = set(names)
    found: dict[Name, ImageRow] = {}
    for part in split_batches(wanted):
        values = {
            "repositories": list({name.repository for name in part}),
            "references": list({name.reference for name in part}),
        }
        for repository, reference, *row in connection.execute(_select_all_named(), values):
            if (name := Name(repository, reference)) in wanted:
                found[name] = ImageRow(*row)
    return found


def _suggest(connection: Connection, name: Name) -> str | None:
    """Suggest a name with a registry in front, because other tools add one to a short name."""
    prefixes = ("docker.io/library/", "docker.io/", "localhost/")
    query = select(IMAGES.c.repository).where(
        IMAGES.c.repository.in_([prefix + name.repository for prefix in prefixes]), IMAGES.c.reference == name.reference
    )
    repository = connection.execute(query.limit(1)).scalar()
    return repository and f"did you mean {Name(repository, name.reference)}?"


def read_images(
    connection: Connection, narrow: Callable[[Select[*tuple[Any, ...]]], Select[*tuple[Any, ...]]] | None = None
) -> list[ImageInfo]:
    """Return the images, sorted by name.

    Args:
        connection: to the index.
        narrow: returns the statement limited to some images, and in their order; None for all images.
    """
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
            *_IMAGE_COLUMNS,
        )
        .join(BLOBS, BLOBS.c.id == IMAGES.c.manifest_id)
        .join(totals, totals.c.image_id == IMAGES.c.id)
    )
    query = query.order_by(IMAGES.c.repository, IMAGES.c.reference) if narrow is None else narrow(query)
    return [
        ImageInfo(row[0], row[1], Digest(row[2]), row[3], int(row[4]), bool(row[5]), *row[6:])
        for row in connection.execute(query)
    ]


def read_names(database: Database) -> list[Name]:
    """Return the names of all images, sorted."""
    return [Name(*row) for row in database.rows(_select_names(), {})]


@cache
def _select_names() -> Select[*tuple[Any, ...]]:
    return select(IMAGES.c.repository, IMAGES.c.reference).order_by(IMAGES.c.repository, IMAGES.c.reference)


def read_image(connection: Connection, directory: Path, image_id: int) -> tuple[ImageInfo, list[BlobInfo]]:
    """Return an image, and its blobs by position.

    Raises:
        DamagedIndex: if the image has no blobs.
    """
    row = connection.execute(_select_image(), {"of": image_id}).one()
    contents = read_image_blobs(connection, directory, image_id)
    if not contents:
        raise DamagedIndex("an image has no blobs in the index: restore them with `cachedb verify --repair`")
    size = sum({blob.digest: blob.size for blob in contents}.values())
    complete = all(blob.stored for blob in contents)
    return ImageInfo(row[0], row[1], Digest(row[2]), row[3], size, complete, *row[4:]), contents


# Building a statement takes longer than executing it, and saving an image executes all of these. So they are cached.


@cache
def _select_in_repository() -> Select[*tuple[Any, ...]]:
    joined = select(*_FOUND_COLUMNS).join(BLOBS, BLOBS.c.id == IMAGES.c.manifest_id)
    return joined.where(IMAGES.c.repository == bindparam("repository"))


@cache
def _select_named() -> Select[*tuple[Any, ...]]:
    return _select_in_repository().where(IMAGES.c.reference == bindparam("reference"))


@cache
def _select_all_named() -> Select[*tuple[Any, ...]]:
    columns = (IMAGES.c.repository, IMAGES.c.reference, *_FOUND_COLUMNS)
    # This selects too many rows, and the caller filters them: to match pairs, SQLite would scan the whole table.
    repositories = IMAGES.c.repository.in_(bindparam("repositories", expanding=True))
    references = IMAGES.c.reference.in_(bindparam("references", expanding=True))
    return select(*columns).join(BLOBS, BLOBS.c.id == IMAGES.c.manifest_id).where(repositories, references)


@cache
def _select_with_manifest() -> Select[*tuple[Any, ...]]:
    return _select_in_repository().where(BLOBS.c.digest == bindparam("digest")).limit(1)


@cache
def build_image_insert() -> ReturningInsert[*tuple[Any, ...]]:
    """Return the statement that inserts an image and returns its id."""
    return insert(IMAGES).returning(IMAGES.c.id)


@cache
def build_images_insert() -> Insert:
    """Return the statement that inserts images."""
    return insert(IMAGES)


@cache
def _build_associations_insert() -> Insert:
    return insert(IMAGE_BLOBS)


@cache
def build_associations_delete() -> Delete:
    """Return the statement that deletes the associations of an image."""
    return delete(IMAGE_BLOBS).where(IMAGE_BLOBS.c.image_id == bindparam("of"))


@cache
def _build_image_delete() -> Delete:
    return delete(IMAGES).where(IMAGES.c.id == bindparam("of"))


@cache
def _build_manifest_update() -> Update:
    manifest_id, now = bindparam("manifest_id", type_=Integer), bindparam("added_at", type_=UtcTime)
    return (
        update(IMAGES)
        .where(IMAGES.c.id == bindparam("of"))
        .values(
            manifest_id=manifest_id,
            media_type=bindparam("media_type"),
            some_platforms=bindparam("some_platforms"),
            added_at=case((IMAGES.c.manifest_id == manifest_id, IMAGES.c.added_at), else_=now),
            last_used_at=bindparam("last_used_at"),
            expires_at=bindparam("expires_at"),
        )
    )


@cache
def build_associations_copy() -> Insert:
    """Return the statement that copies the associations of one image to another."""
    columns = [IMAGE_BLOBS.c[name] for name in _ASSOCIATION_COLUMNS]
    target = bindparam("target", type_=Integer)
    return insert(IMAGE_BLOBS).from_select(
        ["image_id", *_ASSOCIATION_COLUMNS], select(target, *columns).where(IMAGE_BLOBS.c.image_id == bindparam("of"))
    )


@cache
def _select_blob_ids() -> Select[*tuple[Any, ...]]:
    return select(IMAGE_BLOBS.c.blob_id).where(IMAGE_BLOBS.c.image_id == bindparam("of"))


@cache
def select_images_waiting_for() -> Select[*tuple[Any, ...]]:
    """Return the query for the images that reference one of some manifests or configs."""
    is_manifest = IMAGE_BLOBS.c.role.in_(("manifest", "index"))
    is_config = and_(IMAGE_BLOBS.c.role == "config", IMAGE_BLOBS.c.media_type.in_(CONFIG_TYPES))
    joined = select(IMAGE_BLOBS.c.image_id).join(BLOBS, BLOBS.c.id == IMAGE_BLOBS.c.blob_id)
    is_wanted = BLOBS.c.digest.in_(bindparam("digests", expanding=True))
    return joined.where(is_wanted, IMAGE_BLOBS.c.position > 0, or_(is_manifest, is_config))


@cache
def _select_blobs() -> Select[*tuple[Any, ...]]:
    columns = (BLOBS.c.digest, BLOBS.c.id, BLOBS.c.size, BLOBS.c.stored_at.is_not(None))
    return select(*columns).where(BLOBS.c.digest.in_(bindparam("digests", expanding=True)))


@cache
def _select_image() -> Select[*tuple[Any, ...]]:
    columns = (IMAGES.c.repository, IMAGES.c.reference, BLOBS.c.digest, IMAGES.c.media_type)
    return (
        select(*columns, *_IMAGE_COLUMNS)
        .join(BLOBS, BLOBS.c.id == IMAGES.c.manifest_id)
        .where(IMAGES.c.id == bindparam("of"))
    )


@cache
def _select_contents() -> Select[*tuple[Any, ...]]:
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
def _select_contents_by_id() -> Select[*tuple[Any, ...]]:
    return _select_contents().where(IMAGE_BLOBS.c.image_id == bindparam("of"))


@cache
def _select_contents_by_name() -> Select[*tuple[Any, ...]]:
    joined = _select_contents().join(IMAGES, IMAGES.c.id == IMAGE_BLOBS.c.image_id)
    return joined.where(IMAGES.c.repository == bindparam("repository"), IMAGES.c.reference == bindparam("reference"))


def read_image_blobs(connection: Connection, directory: Path, image_id: int) -> list[BlobInfo]:
    """Return an image's blobs by position."""
    return _to_blob_infos(directory, connection.execute(_select_contents_by_id(), {"of": image_id}))


def look_up_image_blobs(database: Database, name: Name) -> list[BlobInfo]:
    """Return the blobs of the image with exactly this name, by position; empty if there is no such image."""
    return _to_blob_infos(database.directory, database.rows(_select_contents_by_name(), name._asdict()))


def _to_blob_infos(directory: Path, rows: Iterable[Sequence[Any]]) -> list[BlobInfo]:
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


def read_root(connection: Connection, image_id: int) -> Descriptor:
    """Return the descriptor of an image's manifest or index."""
    query = select(BLOBS.c.digest, BLOBS.c.size, IMAGES.c.media_type).join(BLOBS, BLOBS.c.id == IMAGES.c.manifest_id)
    row = connection.execute(query.where(IMAGES.c.id == image_id)).one()
    return oci.root_descriptor(Digest(row.digest), row.size, row.media_type)


def point_name(
    connection: Connection,
    name: Name,
    manifest_id: int,
    media_type: str,
    some_platforms: int | None,
    *,
    ttl: float | None = None,
) -> tuple[int, bool]:
    """Make a name point to a manifest; return the image's id and whether it is new.

    If the name pointed to another manifest, its associations are deleted. A pin of the name stays. The name expires
    after ``ttl`` seconds; without it, the name never expires, even if it would have expired before.
    """
    now = datetime.now(UTC)
    values = {
        "manifest_id": manifest_id,
        "media_type": media_type,
        "some_platforms": some_platforms,
        "added_at": now,
        "last_used_at": now,
        "expires_at": add_seconds(now, ttl),
    }
    row = look_up(connection, name)
    if row is None:
        return int(connection.execute(build_image_insert(), {**name._asdict(), **values}).scalar_one()), True
    if row.manifest_id != manifest_id:
        connection.execute(build_associations_delete(), {"of": row.id})
    connection.execute(_build_manifest_update(), {"of": row.id, **values})
    return int(row.id), False


def look_up_blobs(connection: Connection, digests: Iterable[Digest]) -> dict[Digest, BlobRow]:
    """Return the rows of the known blobs among some digests, by digest."""
    found: dict[Digest, BlobRow] = {}
    for part in split_batches(digests):
        for digest, *row in connection.execute(_select_blobs(), {"digests": part}):
            found[Digest(digest)] = BlobRow(*row)
    return found


def insert_associations(connection: Connection, wanted: dict[int, list[descriptions.Association]]) -> None:
    """Insert the associations of images, given by image id."""
    rows = [
        {"image_id": image_id, **{name: getattr(blob, name) for name in _ASSOCIATION_COLUMNS}}
        for image_id, contents in wanted.items()
        for blob in contents
    ]
    connection.execute(_build_associations_insert(), rows)


def touch(connection: Connection, image_id: int) -> None:
    """Set an image's last use to now."""
    connection.execute(update(IMAGES).where(IMAGES.c.id == image_id).values(last_used_at=datetime.now(UTC)))


def is_associated(connection: Connection, digest: Digest) -> bool:
    """Return whether any image is associated with a blob."""
    query = (
        select(IMAGE_BLOBS.c.image_id).join(BLOBS, BLOBS.c.id == IMAGE_BLOBS.c.blob_id).where(BLOBS.c.digest == digest)
    )
    return connection.execute(query.limit(1)).first() is not None


def read_tags(connection: Connection, repository: str) -> list[Name]:
    """Return the names of a repository's tags, sorted."""
    query = select(IMAGES.c.reference).where(IMAGES.c.repository == repository).order_by(IMAGES.c.reference)
    names = [Name(repository, reference) for reference in connection.execute(query).scalars()]
    return [name for name in names if not name.digest]


def find_repositories(connection: Connection, digest: Digest) -> list[str]:
    """Return the repositories of the images that use a blob, sorted."""
    query = (
        select(IMAGES.c.repository)
        .join(IMAGE_BLOBS, IMAGE_BLOBS.c.image_id == IMAGES.c.id)
        .join(BLOBS, BLOBS.c.id == IMAGE_BLOBS.c.blob_id)
        .where(BLOBS.c.digest == digest)
        .distinct()
        .order_by(IMAGES.c.repository)
    )
    return list(connection.execute(query).scalars())


def remove(connection: Connection, image_ids: Iterable[int]) -> set[int]:
    """Remove images and return the ids of the blobs they used."""
    touched: set[int] = set()
    for image_id in image_ids:
        touched.update(connection.execute(_select_blob_ids(), {"of": image_id}).scalars())
        connection.execute(_build_image_delete(), {"of": image_id})
    return touched


def incomplete_error(name: Name, contents: Iterable[BlobInfo]) -> IncompleteImage:
    """Return the error for an image with missing blobs."""
    missing = [blob for blob in contents if not blob.stored]
    more = f", nor are {len(missing) - 1} more blobs" if len(missing) > 1 else ""
    return IncompleteImage(
        f"{name} is incomplete: {missing[0].role} {missing[0].digest} is not in the cache{more}: import it again"
    )


def count_incomplete(connection: Connection) -> int:
    """Return the number of images with a missing blob."""
    query = (
        select(func.count(IMAGE_BLOBS.c.image_id.distinct()))
        .join(BLOBS, BLOBS.c.id == IMAGE_BLOBS.c.blob_id)
        .where(BLOBS.c.stored_at.is_(None))
    )
    return connection.execute(query).scalar_one()
