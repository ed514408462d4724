"""Make the tiles of the treemap of the HTML page: namespaces, repositories, images and layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from sqlalchemy import Connection

from cachedb.reports.image_rows import AgeGroup, ImageRow
from cachedb.reports.treemap import Tile, lay_out
from cachedb.reports.words import Row, clean_text, fetch_rows, format_command, format_count
from cachedb.text import shorten_digest

__all__ = ["Drawn", "find_drawn", "make_tiles"]


_TILES: Final = 2000  # content smaller than the stored bytes divided by this is merged into one tile
_GROUPED_REPOSITORIES: Final = 20  # more repositories than these are grouped by namespace
_NAMESPACES: Final = 60  # the most groups


class Shared(NamedTuple):
    """A blob that several repositories use, all of them in one namespace."""

    namespace: str
    size: int


def make_tiles(
    connection: Connection,
    totals: dict[str, int],
    repositories: Sequence[Row],
    rows: Sequence[ImageRow],
    ages: Sequence[AgeGroup],
) -> list[Tile]:
    """Return tiles that show each stored byte once: namespaces, repositories, images and layers.

    As in the views, the tile of a repository or image has the bytes that only this repository or image uses. Bytes that
    several repositories use have a separate tile. It is in a namespace if only repositories of that namespace use them.
    """
    # Smaller blobs are not read but merged into one tile, so this is fast even with millions of blobs.
    min_bytes = max(1, totals["stored"] // _TILES)
    namespaces = choose_namespaces([row.repository for row in repositories])
    shared = _find_shared_in_namespaces(connection, namespaces) if namespaces else {}
    blobs = _make_blob_tiles(connection, shared, min_bytes)
    images = _make_image_tiles(rows, blobs, ages, min_bytes)
    made = _make_repository_tiles(repositories, blobs, images, ages, min_bytes)
    sizes = {row.repository: row.unique_size for row in repositories}
    tiles: list[Tile] = []
    small: list[str] = []
    for name, size in sizes.items():
        if name in namespaces:
            continue
        if size >= min_bytes:
            tiles.append(made[name])
        else:
            small.append(name)
    small_size = sum(sizes[name] for name in small)
    for namespace in dict.fromkeys(namespaces.values()):
        members = [name for name, space in namespaces.items() if space == namespace]
        tile = _make_namespace_tile(namespace, members, sizes, made, shared, blobs)
        if tile.size >= min_bytes:
            tiles.append(tile)
        else:
            small += members
            small_size += tile.size
    in_several = totals["unique"] + totals["shared"] - small_size - sum(tile.size for tile in tiles)
    several = "shared by several namespaces" if namespaces else "shared by several repositories"
    others = [
        Tile(format_count(len(small), "smaller repository", "smaller repositories"), small_size, "rest"),
        Tile(several, in_several, "shared", "each byte is drawn once", blobs[("shared",)]),
        Tile("garbage", totals["garbage"], "garbage", "`cachedb gc` frees it", blobs[("garbage",)]),
        Tile("held, in no image", totals["held"], "held", "by a hold or a process", blobs[("held",)]),
    ]
    for tile in others:
        _add_rest(tile, "smaller layers, configs and manifests", tile.kind)
    tiles += [tile for tile in others if tile.size]
    lay_out(tiles)
    return tiles


class Drawn(NamedTuple):
    """The names that have a tile of their own."""

    images: set[str]
    repositories: set[str]


def find_drawn(tiles: Sequence[Tile]) -> Drawn:
    """Return the images and repositories that have a drawn tile, among these tiles and those inside."""
    drawn = Drawn(set(), set())
    waiting = list(tiles)
    while waiting:
        tile = waiting.pop()
        if tile.drawn:
            drawn.images.add(tile.image)
            drawn.repositories.add(tile.repository)
            waiting += tile.inside
    return drawn


def choose_namespaces(repositories: Sequence[str]) -> dict[str, str]:
    """Return the namespaces of repositories; empty if there are too few repositories to group them.

    A namespace is a repository's path without its last part, or less if that gives too many namespaces. A repository
    without a namespace, or alone in it, is not in the result.
    """
    if len(repositories) <= _GROUPED_REPOSITORIES:
        return {}
    paths = {name: name.split("/")[:-1] for name in repositories}
    for depth in range(max(map(len, paths.values())), 0, -1):
        members: dict[str, list[str]] = defaultdict(list)
        for name, path in paths.items():
            members["/".join(path[:depth])].append(name)
        members.pop("", None)
        if 1 < len(members) <= _NAMESPACES:
            return {name: space for space, names in members.items() if len(names) > 1 for name in names}
    return {}


def _find_shared_in_namespaces(connection: Connection, namespaces: Mapping[str, str]) -> dict[str, Shared]:
    """Return the stored blobs that several repositories use, all of them in one namespace, by digest."""
    rows = fetch_rows(
        connection,
        """
        SELECT DISTINCT b.digest, b.size, i.repository
        FROM blobs AS b JOIN image_blobs AS o ON o.blob_id = b.id JOIN images AS i ON i.id = o.image_id
        WHERE b.stored_at IS NOT NULL
            AND b.id IN (SELECT blob_id FROM image_blobs GROUP BY blob_id HAVING min(image_id) <> max(image_id))
        """,
    )
    users: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        users[row.digest].append(namespaces.get(row.repository, ""))
    return {
        row.digest: Shared(spaces[0], row.size)
        for row in rows
        if len(spaces := users[row.digest]) > 1 and spaces[0] and len(set(spaces)) == 1
    }


def _make_blob_tiles(
    connection: Connection, shared: Mapping[str, Shared], min_bytes: int
) -> dict[tuple[str, ...], list[Tile]]:
    """Return the blobs of at least ``min_bytes`` bytes, by the kind and name of the tile they belong to."""
    rows = fetch_rows(
        connection,
        """
        SELECT b.digest, b.size, count(DISTINCT i.id) AS images, count(DISTINCT i.repository) AS repositories,
            min(i.repository) AS repository, min(i.reference) AS reference, min(o.role) AS role,
            substr(min(o.created_by), 1, 200) AS created_by, max(CASE WHEN l.digest IS NULL THEN 0 ELSE 1 END) AS held
        FROM blobs AS b LEFT JOIN image_blobs AS o ON o.blob_id = b.id LEFT JOIN images AS i ON i.id = o.image_id
            LEFT JOIN (SELECT DISTINCT digest FROM leases) AS l ON l.digest = b.digest
        WHERE b.stored_at IS NOT NULL AND b.size >= :min_bytes
        GROUP BY b.id, b.digest, b.size
        """,
        min_bytes=min_bytes,
    )
    found: dict[tuple[str, ...], list[Tile]] = defaultdict(list)
    for blob in rows:
        place: tuple[str, ...]
        if blob.images == 1:
            place = "image", blob.repository, blob.reference
        elif blob.repositories == 1:
            place = "inner", blob.repository
        elif blob.digest in shared:
            place = "namespace", shared[blob.digest].namespace
        elif blob.images:
            place = ("shared",)
        else:
            place = ("held" if blob.held else "garbage",)
        where = f"in {blob.images:,} images" if blob.images > 1 else ""
        if blob.repositories > 1:
            where += f" of {blob.repositories:,} repositories"
        detail = "\n".join(filter(None, (clean_text(blob.created_by or ""), blob.digest, where)))
        name = format_command(blob.created_by) or blob.role or shorten_digest(blob.digest)
        kind = "inner" if place[0] == "namespace" else place[0]
        found[place].append(Tile(name, blob.size, kind, detail))
    return found


def _make_image_tiles(
    rows: Sequence[ImageRow],
    blobs: dict[tuple[str, ...], list[Tile]],
    ages: Sequence[AgeGroup],
    min_bytes: int,
) -> dict[str, list[Tile]]:
    """Return the images by repository, each with its unique bytes and the colour of its age."""
    found: dict[str, list[Tile]] = defaultdict(list)
    for image in rows:
        if image.unique_size < min_bytes:
            continue
        kind = f"age{image.age}"
        name = clean_text(image.name, 400)
        layers = blobs["image", image.repository, image.reference]
        tile = Tile(
            clean_text(image.reference),
            image.unique_size,
            kind,
            f"only in this image\nlast used {image.last_used_at[:10]}",
            layers,
            title=name,
            image=image.name,
            is_path=True,
        )
        _add_rest(tile, "smaller layers, configs and manifests", kind)
        for layer in tile.inside:
            layer.kind = kind
            layer.detail += f"\nin {name}"
        found[image.repository].append(tile)
    for age in ages:
        kind = f"age{age.age}"
        drawn = [tile for tile in found[age.repository] if tile.kind == kind]
        # Many small images share one tile per age.
        if (rest := age.unique_size - sum(tile.size for tile in drawn)) >= max(1, min_bytes // 4):
            name = format_count(age.images - len(drawn), "smaller image")
            found[age.repository].append(Tile(name, rest, kind, f"in {clean_text(age.repository, 400)}"))
    return found


def _make_repository_tiles(
    repositories: Sequence[Row],
    blobs: dict[tuple[str, ...], list[Tile]],
    images: dict[str, list[Tile]],
    ages: Sequence[AgeGroup],
    min_bytes: int,
) -> dict[str, Tile]:
    """Return the tiles of repositories of at least ``min_bytes`` bytes, with their images inside."""
    inner = {row.repository: row.unique_size for row in repositories}
    for age in ages:
        inner[age.repository] -= age.unique_size
    tiles: dict[str, Tile] = {}
    for repository in repositories:
        name = repository.repository
        if repository.unique_size < min_bytes:
            continue  # the caller merges it into one tile
        inside = images[name]
        if inner[name] >= max(1, min_bytes // 4):
            detail = f"by images of {clean_text(name, 400)}"
            shared = Tile("shared within the repository", inner[name], "inner", detail, blobs["inner", name])
            _add_rest(shared, "smaller layers", "inner")
            inside.append(shared)
        detail = f"{format_count(repository.images, 'image')}; not in other repositories"
        tiles[name] = Tile(
            clean_text(name, 400), repository.unique_size, "repository", detail, inside, repository=name, is_path=True
        )
        _add_rest(tiles[name], "smaller images", "rest")
    return tiles


def _make_namespace_tile(
    namespace: str,
    members: list[str],
    sizes: Mapping[str, int],
    repositories: Mapping[str, Tile],
    shared: Mapping[str, Shared],
    blobs: dict[tuple[str, ...], list[Tile]],
) -> Tile:
    """Return the tile of a namespace, with the tiles of its repositories and of what they share."""
    inside = [repositories[name] for name in members if name in repositories]
    for tile in inside:
        tile.title, tile.name = tile.name, tile.name[len(namespace) + 1 :]
    title = clean_text(namespace, 400)
    if common := sum(blob.size for blob in shared.values() if blob.namespace == namespace):
        tile = Tile("shared within the namespace", common, "inner", f"by repositories of {title}")
        tile.inside = blobs["namespace", namespace]
        _add_rest(tile, "smaller layers", "inner")
        inside.append(tile)
    size = sum(sizes[name] for name in members) + common
    detail = f"{format_count(len(members), 'repository', 'repositories')}; not in other namespaces"
    tile = Tile(title, size, "namespace", detail, inside, is_path=True)
    _add_rest(tile, "smaller repositories", "rest")
    return tile


def _add_rest(tile: Tile, name: str, kind: str) -> None:
    """If a tile has inner tiles, add one for the bytes that they do not cover."""
    rest = tile.size - sum(inside.size for inside in tile.inside)
    if tile.inside and rest > 0:
        tile.inside.append(Tile(name, rest, kind))
