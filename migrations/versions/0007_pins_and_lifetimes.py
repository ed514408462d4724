"""pins and lifetimes of images

`images` gets `pinned_at` and `expires_at`, and the view `image_usage` gets `pinned` and `expires_at`.

Revision: 0007
Revises: 0006
Created: 2026-11-29 21:00:00
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None
# Releases before this one would prune pinned images, and keep the lifetime of a name that they save anew.
oldest = "0007"


def is_time(column: str) -> str:
    return f"{column} LIKE '____-__-__T__:__:__.______Z' AND ltrim({column}, '0123456789-T:.Z') = ''"


# The view
#
# It starts with a comment that describes it, and each of its columns has a line with a comment. The documentation and
# `cachedb sql --schema` print these comments. CAST gives an expression a type for programs that ask for it.


def name_of(image: str) -> str:
    separator = f"CASE WHEN instr({image}.reference, ':') THEN '@' ELSE ':' END"
    return f"CAST({image}.repository || {separator} || {image}.reference AS TEXT)"


def number(expression: str) -> str:
    # SQLite takes BIGINT for INTEGER. In DuckDB, which runs the views itself, INTEGER has only 32 bits.
    return f"CAST({expression} AS BIGINT)"


def days_since(time: str) -> str:
    return f"CAST(julianday('now') - julianday({time}) AS REAL)"


# SQLite runs these subqueries row by row with its indexes, and skips the columns that a query does not use.
STORED = "b.stored_at IS NOT NULL"
BLOBS_OF_IMAGE = "b.id IN (SELECT o.blob_id FROM image_blobs AS o WHERE o.image_id = i.id)"
IN_ANOTHER = "EXISTS (SELECT 1 FROM image_blobs AS o WHERE o.blob_id = b.id AND o.image_id <> i.id)"
HELD = "EXISTS (SELECT 1 FROM leases AS l WHERE l.digest = b.digest)"
MISSING = (
    "EXISTS (SELECT 1 FROM image_blobs AS o JOIN blobs AS b ON b.id = o.blob_id "
    f"WHERE o.image_id = i.id AND NOT {STORED})"
)
LAST_USE = "time of its last use (saved, pulled, exported, pushed, held, asked for), true to five minutes"


def size_of(condition: str) -> str:
    return number(f"(SELECT coalesce(sum(b.size), 0) FROM blobs AS b WHERE {condition})")


def view(description: str, columns: list[tuple[str, str, str]], source: str) -> str:
    """Return the SQL of a view.

    Args:
        description: of the view.
        columns: name, expression and description of each column.
        source: the SQL after the columns.
    """
    lines = []
    for number, (name, expression, comment) in enumerate(columns, 1):
        comma = "," if number < len(columns) else ""
        lines.append(f"    {expression} AS {name}{comma} -- {comment}")
    return "\n".join([f"\n-- {description}", "SELECT", *lines, source])


IMAGE_USAGE = view(
    "images: what they take, share, lack, and what removing one would free",
    [
        ("name", name_of("i"), "name of the image, as `cachedb ls` prints it"),
        ("repository", "i.repository", "part of the name before the tag or digest"),
        ("reference", "i.reference", "tag or digest of the name"),
        ("digest", "m.digest", "digest of the manifest or index; several names of one image have the same digest"),
        ("media_type", "i.media_type", "media type of the manifest or index"),
        (
            "os",
            "i.os",
            "old: the operating system, NULL if the platforms of the image differ; see the view `platforms`",
        ),
        (
            "architecture",
            "i.architecture",
            "old: the architecture, NULL if the platforms of the image differ; see the view `platforms`",
        ),
        (
            "variant",
            "i.variant",
            "old: the variant, NULL if the platforms of the image differ; see the view `platforms`",
        ),
        ("author", "i.author", "author that the config names"),
        ("created", "i.created", "time at which the image was built"),
        ("created_at", "i.added_at", "old: `added_at`"),
        ("last_used_at", "i.last_used_at", LAST_USE),
        ("complete", number(f"NOT {MISSING}"), "whether all its blobs are stored; left-out platforms do not count"),
        (
            "blobs",
            number("(SELECT count(DISTINCT o.blob_id) FROM image_blobs AS o WHERE o.image_id = i.id)"),
            "number of its blobs; here and in the sizes, a blob that occurs twice counts once",
        ),
        (
            "size",
            size_of(BLOBS_OF_IMAGE),
            "bytes of its blobs, missing blobs included; a sum over images counts shared blobs several times",
        ),
        ("missing_size", size_of(f"{BLOBS_OF_IMAGE} AND NOT {STORED}"), "bytes of its blobs that are not stored"),
        (
            "unique_size",
            size_of(f"{BLOBS_OF_IMAGE} AND {STORED} AND NOT {IN_ANOTHER}"),
            "bytes of its stored blobs that no other image has; a second name is another image",
        ),
        (
            "shared_size",
            size_of(f"{BLOBS_OF_IMAGE} AND {STORED} AND {IN_ANOTHER}"),
            "bytes of its stored blobs that other images have too",
        ),
        (
            "freed_size",
            size_of(f"{BLOBS_OF_IMAGE} AND {STORED} AND NOT {IN_ANOTHER} AND NOT {HELD}"),
            "bytes that `cachedb rm` of only this image frees: `unique_size` without held blobs",
        ),
        ("added_at", "i.added_at", "time at which its name came to point to this manifest"),
        ("built_days", days_since("i.created"), "days since `created`"),
        ("added_days", days_since("i.added_at"), "days since `added_at`"),
        ("unused_days", days_since("i.last_used_at"), "days since `last_used_at`"),
        ("pinned", number("i.pinned_at IS NOT NULL"), "whether a pin keeps it from `cachedb prune`"),
        ("expires_at", "i.expires_at", "time after which `cachedb prune` removes it; NULL if never"),
    ],
    """FROM images AS i JOIN blobs AS m ON m.id = i.manifest_id""",
)


# Steps


def old_views() -> dict[str, str]:
    """Return the views of the revision before."""
    found = context.script.get_revision(down_revision)
    assert found is not None
    views: dict[str, str] = found.module.VIEWS
    return views


def drop_views() -> None:
    for name in old_views():
        op.execute(f"DROP VIEW {name}")


def create_views(views: dict[str, str]) -> None:
    for name, query in views.items():
        op.execute(f"CREATE VIEW {name} AS{query}")


def upgrade() -> None:
    drop_views()
    for name in ("pinned_at", "expires_at"):
        check = sa.CheckConstraint(is_time(name), name=op.f(f"ck_images_{name}"))
        op.add_column("images", sa.Column(name, sa.Text(), check, nullable=True))
    create_views({**old_views(), "image_usage": IMAGE_USAGE})  # all of them, so that they keep their order


def downgrade() -> None:
    drop_views()
    for name in ("pinned_at", "expires_at"):
        op.drop_column("images", name)
    create_views(old_views())
